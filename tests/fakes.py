"""Stand-ins with real behaviour: a runner whose next token is a function of every token it finds in the cache."""

import zlib
from collections.abc import Sequence

import numpy as np

from server.engine.request import GenerationRequest, ModelInfo, TokenLogprob
from server.engine.step_plan import SampledToken, StepPlan, StepResult

FAKE_VOCAB_SIZE = 1000
UNWRITTEN = -1


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows: every token before it counts, and where it stands."""
    return zlib.crc32(np.asarray(token_ids, dtype=np.int64).tobytes()) % FAKE_VOCAB_SIZE


def expected_output(request: GenerationRequest) -> tuple[int, ...]:
    """What the fake model answers to a request that runs alone."""
    params = request.sampling
    token_ids = list(request.prompt_token_ids)
    while len(token_ids) < len(request.prompt_token_ids) + params.max_tokens:
        token_ids.append(next_token(token_ids))
        num_output = len(token_ids) - len(request.prompt_token_ids)
        if token_ids[-1] in params.stop_token_ids and num_output > params.min_tokens:
            break
    return tuple(token_ids[len(request.prompt_token_ids) :])


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

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._slots = np.full((num_blocks, block_size), UNWRITTEN, dtype=np.int64)
        # the positions from and up to which each slot's token was computed at once
        self._spans = np.full((num_blocks, block_size, 2), UNWRITTEN, dtype=np.int64)
        self._block_size = block_size
        self.num_tokens_per_step: list[int] = []
        # by request, how far each step that held some of its tokens computed it
        self.cuts: dict[str, list[int]] = {}
        self.failing_request_ids: set[str] = set()
        # by request, the spans of all it read when it last drew a token
        self.spans_read: dict[str, list[tuple[int, int]]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_tokens_per_step.append(len(plan.token_ids))
        for sequence in range(len(plan.request_ids)):
            tokens = slice(plan.query_starts[sequence], plan.query_starts[sequence + 1])
            positions = plan.positions[tokens]
            self.cuts.setdefault(plan.request_ids[sequence], []).append(int(positions[-1]) + 1)
            blocks = plan.block_tables[sequence, positions // self._block_size]
            self._slots[blocks, positions % self._block_size] = plan.token_ids[tokens]
            self._spans[blocks, positions % self._block_size] = positions[0], positions[-1] + 1
        rows = [self._context(plan, row.token_index) for row in plan.sampling_rows]
        for row, context in zip(plan.sampling_rows, rows, strict=True):
            assert context.tolist() == row.token_ids.tolist(), f"{row.request_id} does not read what it wrote"
        return StepResult(
            tokens=tuple(
                self._sample(row.request_id, context) for row, context in zip(plan.sampling_rows, rows, strict=True)
            ),
            prompt_logprobs=tuple(
                tuple(TokenLogprob(target, -float(target), ()) for target in rows.targets.tolist())
                for rows in plan.prompt_logprob_rows
            ),
        )

    def _context(self, plan: StepPlan, token_index: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        sequence = int(np.searchsorted(plan.query_starts, token_index, side="right")) - 1
        positions = np.arange(plan.context_lens[sequence])
        blocks = plan.block_tables[sequence, positions // self._block_size]
        spans = self._spans[blocks, positions % self._block_size]
        self.spans_read[plan.request_ids[sequence]] = [(int(start), int(stop)) for start, stop in spans]
        return np.asarray(self._slots[blocks, positions % self._block_size])

    def _sample(self, request_id: str, context: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> SampledToken:
        if request_id in self.failing_request_ids:
            return SampledToken(0, error="the model gave no finite logits")
        return SampledToken(next_token(context.tolist()))
