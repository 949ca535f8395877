"""Stand-ins with real behaviour: a runner whose next token is a function of every token it finds in the cache."""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import GenerationRequest, ModelInfo, TokenLogprob
from server.engine.step_plan import SampledToken, SamplingRow, StepPlan, StepResult

FAKE_VOCAB_SIZE = 1000
UNWRITTEN = -1
REPEATED_LENGTH = 5


def next_token(text: bytes, checksum: int = 0) -> int:
    """The token that follows int64 token ids: every one before it counts, and where it stands."""
    return zlib.crc32(text, checksum) % FAKE_VOCAB_SIZE


def next_repeated_token(text: bytes) -> int:
    """As next_token, of a model that mostly says again what it said some tokens before, but can always stop to."""
    checksum = zlib.crc32(text)
    token_ids = np.frombuffer(text, dtype=np.int64)
    is_repeated = checksum % 8 > 0 and len(token_ids) >= REPEATED_LENGTH
    return int(token_ids[-REPEATED_LENGTH]) if is_repeated else checksum // 8 % FAKE_VOCAB_SIZE


def expected_output(request: GenerationRequest) -> tuple[int, ...]:
    """What the fake model answers to a request that runs alone."""
    params = request.sampling
    output: list[int] = []
    checksum = zlib.crc32(np.array(request.prompt_token_ids, dtype=np.int64).tobytes())
    while len(output) < params.max_tokens:
        output.append(next_token(b"", checksum))
        if output[-1] in params.stop_token_ids and len(output) > params.min_tokens:
            break
        checksum = zlib.crc32(output[-1].to_bytes(8, "little"), checksum)
    return tuple(output)


def expected_repeating_output(request: GenerationRequest) -> tuple[int, ...]:
    """What the model of a RepeatingRunner answers to a request that runs alone, token by token."""
    params = request.sampling
    known = list(request.prompt_token_ids)
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(next_repeated_token(np.array(known + output, dtype=np.int64).tobytes()))
        if output[-1] in params.stop_token_ids and len(output) > params.min_tokens:
            break
    return tuple(output)


def fake_model_info(*, max_model_len: int = 256, num_blocks: int = 64, block_size: int = 4) -> ModelInfo:
    return ModelInfo(
        model_path="fake",
        max_model_len=max_model_len,
        vocab_size=FAKE_VOCAB_SIZE,
        eos_token_ids=(0,),
        device="cpu",
        dtype="float32",
        num_blocks=num_blocks,
        block_size=block_size,
    )


class FakeRunner:
    """Writes each token into its slot and predicts from what it reads back through the block table.

    A block that two sequences share, or a token that was never computed, changes what is read, and so the answer.
    """

    # the token that follows int64 token ids, as bytes
    predict = staticmethod(next_token)

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._tokens = np.full(num_blocks * block_size, UNWRITTEN, dtype=np.int64)
        self._offsets = np.arange(block_size)
        self.num_tokens_per_step: list[int] = []
        self.num_copies = 0
        self.failing_request_ids: set[str] = set()
        # the most tokens of a step that the device has memory for; None: of any
        self.memory_tokens: int | None = None
        self.memory_error: Exception = torch.OutOfMemoryError()

    def execute(self, plan: StepPlan) -> StepResult:
        sequences, slots = sequence_of_token(plan), self.slots_by_position(plan)
        written = slots[sequences, plan.positions]
        blocks = self._tokens.reshape(-1, len(self._offsets))
        for source, target in plan.block_copies:
            blocks[target] = blocks[source]
            self.num_copies += 1
        if self.memory_tokens is not None and len(plan.token_ids) > self.memory_tokens:
            # some layers may have written when another finds no room
            self._tokens[written] = UNWRITTEN
            raise self.memory_error
        self._tokens[written] = plan.token_ids
        self.num_tokens_per_step.append(len(plan.token_ids))
        drawing = sequences[np.array([row.token_index for row in plan.sampling_rows], dtype=np.int64)]
        texts = self._tokens[slots[drawing]]
        return StepResult(
            tokens=tuple(self._draw(row, text) for row, text in zip(plan.sampling_rows, texts, strict=True)),
            prompt_logprobs=tuple(
                tuple(TokenLogprob(target, -float(target), ()) for target in rows.targets.tolist())
                for rows in plan.prompt_logprob_rows
            ),
        )

    def slots_by_position(self, plan: StepPlan) -> NDArray[np.int64]:
        """Where the token of each position of each sequence is, int64 [B, positions]; means nothing past its own."""
        slots = plan.block_tables[:, :, None] * len(self._offsets) + self._offsets
        return slots.reshape(len(plan.block_tables), -1)

    def _draw(self, row: SamplingRow, text: NDArray[np.int64]) -> SampledToken:
        read = text[: row.position].tobytes()
        assert read == row.token_ids.tobytes(), f"{row.request_id} does not read what it wrote"
        if row.request_id in self.failing_request_ids:
            return SampledToken(0, error="the model gave no finite logits")
        return SampledToken(self.predict(read))


class RepeatingRunner(FakeRunner):
    """A model whose output can mostly be guessed."""

    predict = staticmethod(next_repeated_token)


class RecordingRunner(FakeRunner):
    """Keeps how prompts were cut, and how what was read had been computed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        # the positions from and up to which each slot's token was computed at once
        self._spans = np.full((num_blocks * block_size, 2), UNWRITTEN, dtype=np.int64)
        # by request, how far each step that held some of its tokens computed it
        self.cuts: dict[str, list[int]] = {}
        # by request, the spans of all it read when it last drew a token
        self.spans_read: dict[str, list[tuple[int, int]]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        sequences, slots = sequence_of_token(plan), self.slots_by_position(plan)
        first = plan.positions[plan.query_starts[:-1]]
        self._spans[slots[sequences, plan.positions]] = np.stack([first, plan.context_lens], axis=1)[sequences]
        for request_id, cut in zip(plan.request_ids, plan.context_lens.tolist(), strict=True):
            self.cuts.setdefault(request_id, []).append(cut)
        for row in plan.sampling_rows:
            spans = self._spans[slots[sequences[row.token_index], : row.position]]
            self.spans_read[row.request_id] = [(start, stop) for start, stop in spans.tolist()]
        return super().execute(plan)


def sequence_of_token(plan: StepPlan) -> NDArray[np.int64]:
    """The index of the sequence that each of a plan's tokens belongs to, int64 [T]."""
    counts = plan.query_starts[1:] - plan.query_starts[:-1]
    return np.arange(len(counts)).repeat(counts)
