"""The peer's process: python -m benchmarks.llama_cpp_worker MODEL THREADS, run by the Python of its own environment.

JSON lines. It says {"system": what llama.cpp was built with} once it is ready, then answers each
{"prompts": [[token id]], "decode_tokens": n} on standard input with {"seconds": s}, or {"error": sentence}.
It goes through llama.cpp's C interface: nothing that the Python package adds is timed.
"""

import json
import os
import sys
import time
from typing import TextIO

import llama_cpp
import numpy as np

# more than any trial takes: attention reads only what is used
SEQUENCE_TOKENS = 1024
ERROR_LEVEL = 4


class WorkerError(Exception):
    """What llama.cpp refused, as a sentence."""


class Context:
    """A KV cache for a number of sequences, and the batch that feeds it."""

    def __init__(self, model: object, num_sequences: int, num_threads: int) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = SEQUENCE_TOKENS * num_sequences
        parameters.n_seq_max = num_sequences
        parameters.n_threads = num_threads
        parameters.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise WorkerError("llama.cpp could not make a context")
        self._batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forget all sequences: nothing of an earlier prompt can be used again."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)  # noqa: FBT003

    def advance(self, chunks: list[list[int]], position: int) -> list[list[int]]:
        """Compute one chunk of tokens a sequence, from the same position on; the likeliest next token of each."""
        self._batch.n_tokens = 0
        last_rows = [self._add(sequence, chunk, position) for sequence, chunk in enumerate(chunks)]
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise WorkerError(f"llama_decode answered {status}")
        return [[self._likeliest(row)] for row in last_rows]

    def _add(self, sequence: int, chunk: list[int], position: int) -> int:
        """Append the chunk to the batch; the row of its last token, the only one whose logits are wanted."""
        batch = self._batch
        for offset, token in enumerate(chunk):
            row = batch.n_tokens
            batch.token[row] = token
            batch.pos[row] = position + offset
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = offset == len(chunk) - 1
            batch.n_tokens += 1
        return int(batch.n_tokens) - 1

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


class Worker:
    """The model, and one context for each number of sequences that was asked for."""

    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise WorkerError(f"llama.cpp could not load {path}")
        self._num_threads = num_threads
        self._contexts: dict[int, Context] = {}

    def run(self, prompts: list[list[int]], decode_tokens: int) -> float:
        """Seconds of the prompts, or of the decode steps after them where there are any."""
        num_sequences = len(prompts)
        if num_sequences not in self._contexts:
            self._contexts[num_sequences] = Context(self._model, num_sequences, self._num_threads)
        context = self._contexts[num_sequences]
        context.clear()
        start = time.perf_counter()
        chunks = context.advance(prompts, 0)
        if decode_tokens:
            start = time.perf_counter()
            for step in range(decode_tokens):
                chunks = context.advance(chunks, len(prompts[0]) + step)
        return time.perf_counter() - start


def main() -> int:
    """Serve trials until standard input ends."""
    answers = _take_stdout()
    log = llama_cpp.llama_log_callback(_log_errors)
    llama_cpp.llama_log_set(log, None)
    try:
        worker = Worker(sys.argv[1], int(sys.argv[2]))
        _say(answers, {"system": llama_cpp.llama_print_system_info().decode().strip()})
        for line in sys.stdin:
            trial = json.loads(line)
            _say(answers, {"seconds": worker.run(trial["prompts"], trial["decode_tokens"])})
    except WorkerError as error:
        _say(answers, {"error": str(error)})
        return 1
    return 0


def _take_stdout() -> TextIO:
    """Standard output for the answers alone: what native code prints goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, message: dict[str, object]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _log_errors(level: int, text: bytes, _user_data: object) -> None:
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
