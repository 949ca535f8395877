"""The progress of one request through the scheduler: tokens known, tokens computed, blocks held."""

import hashlib
import math
from enum import Enum

import numpy as np

from server.engine.block_tables import BlockTables
from server.engine.draft_length import DraftCost, DraftLength
from server.engine.request import GenerationRequest, TokenLogprob
from server.engine.step_plan import SampledToken, TokenIds
from server.engine.structured_output import OutputGuide


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Only the scheduler changes it. Known tokens are the prompt and the output; a step computes some of the rest.

    What a step looks at is a plain attribute, not a property: that is read for every sequence in every step.
    """

    def __init__(self, request: GenerationRequest, block_size: int, guide: OutputGuide | None = None) -> None:
        self.request = request
        self.guide = guide
        self.request_id = request.request_id
        self.priority = request.priority
        self.deadline = math.inf if request.deadline is None else request.deadline
        # its place in the order in which requests came
        self.arrival = 0
        self.state = SequenceState.WAITING
        self.num_computed = 0
        # the leading tokens whose keys and values other requests may read
        self.num_shareable = 0
        # whether what it holds may be found by others when it is released
        self.others_may_read = True
        # a block of others that is to be copied when it is admitted, and which of its own that will be
        self.copied_block: tuple[int, int] | None = None
        # of the prompt, when the request first ran
        self.num_cached_prompt = 0
        self.num_preemptions = 0
        self.was_started = False
        # the most tokens at once, where a whole chunk of it ran out of memory alone
        self.max_chunk: int | None = None
        self.blocks: list[int] = []
        # where the blocks stand too, while it runs, and in which row
        self._tables: BlockTables | None = None
        self.table_row = 0
        # tokens that the blocks have room for
        self.num_places = 0
        self.scores_prompt = request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob] = []
        self._block_size = block_size
        self.num_known = self.num_prompt = len(request.prompt_token_ids)
        self.last_token_id = request.prompt_token_ids[-1]
        # guesses that stand after the known tokens while a step verifies them
        self.num_drafted = 0
        # from the first step on that could guess
        self._draft_length: DraftLength | None = None
        self._token_ids = np.empty(self.num_prompt + request.sampling.max_tokens, dtype=np.int64)
        self._token_ids[: self.num_prompt] = request.prompt_token_ids
        # a read-only view of the known tokens and of what will come after them
        self.text = self._token_ids[:]
        self.text.flags.writeable = False
        # the last token is never computed, so it needs no place
        self.max_num_blocks = self.num_blocks_for(len(self._token_ids) - 1)
        self._block_keys: list[bytes] = []

    @property
    def num_output(self) -> int:
        return self.num_known - self.num_prompt

    @property
    def token_ids(self) -> TokenIds:
        """The known tokens: a read-only view, which tokens to come do not change."""
        return self.text[: self.num_known]

    @property
    def num_missing_blocks(self) -> int:
        """Blocks still to allocate before every known token and every guess has its place."""
        return self.num_blocks_for(self.num_known + self.num_drafted) - len(self.blocks)

    @property
    def num_scored_prompt(self) -> int:
        """Prompt tokens that have their log-probability; the first needs none."""
        return len(self.prompt_logprobs) + 1

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def block_keys(self, num_tokens: int) -> list[bytes]:
        """A key for each full block of the first num_tokens known tokens: SHA-256 over all tokens up to its end.

        Each starts with the one before it, and the first with the request's salt and adapter, so equal keys mean equal
        content of one tenant, wherever in the cache it lies.
        """
        num_blocks = num_tokens // self._block_size
        while len(self._block_keys) < num_blocks:
            start = len(self._block_keys) * self._block_size
            before = self._block_keys[-1] if self._block_keys else self.request.cache_root.encode()
            tokens = self._token_ids[start : start + self._block_size].tobytes()
            self._block_keys.append(hashlib.sha256(b"%d:%b%b" % (len(before), before, tokens)).digest())
        return self._block_keys[:num_blocks]

    def key_before(self, index: int) -> bytes:
        """The key of all that stands before its block of that index, which is known whole."""
        keys = self.block_keys(index * self._block_size)
        return keys[-1] if keys else self.request.cache_root.encode()

    def choose_draft_length(self, longest: int, cost: DraftCost) -> int:
        """How many guesses, up to longest, are worth their cost: see `DraftLength.choose`."""
        if self._draft_length is None:
            self._draft_length = DraftLength()
        # the step draws one token more than it verifies
        return self._draft_length.choose(min(longest, len(self._token_ids) - self.num_known - 1), cost)

    def put_draft(self, guesses: TokenIds) -> None:
        """Put guesses after the known tokens, as far as its guide allows them."""
        if self.guide is not None:
            num_wanted = len(guesses)
            guesses = guesses[: self.guide.cut(guesses.tolist())]
            if num_wanted and not len(guesses) and self._draft_length is not None:
                # no step will tell that they did not come true
                self._draft_length.note(num_wanted, 0)
        self._token_ids[self.num_known : self.num_known + len(guesses)] = guesses
        self.num_drafted = len(guesses)

    def settle_draft(self, tokens: list[SampledToken]) -> int:
        """How many of the first guesses came true, by the tokens drawn in their places: what is computed ends there."""
        guesses = self.text[self.num_known : self.num_known + self.num_drafted].tolist()
        num_accepted = 0
        # a row that failed is drawn again by the next step, as its first
        while num_accepted < self.num_drafted and tokens[num_accepted].token_id == guesses[num_accepted]:
            if tokens[num_accepted + 1].error is not None:
                break
            num_accepted += 1
        assert self._draft_length is not None, "guesses that nobody asked for"
        self._draft_length.note(self.num_drafted, num_accepted)
        self.num_drafted = 0
        self.num_computed = self.num_known + num_accepted
        return num_accepted

    def halve_chunk(self, num_tokens: int) -> bool:
        """Be computed in smaller chunks after one of num_tokens ran out of memory alone. False the second time.

        A chunk that is within one block is as small as it gets.
        """
        if self.max_chunk is not None or num_tokens <= self._block_size:
            return False
        self.max_chunk = max(num_tokens // 2 // self._block_size, 1) * self._block_size
        return True

    def append_token(self, token_id: int) -> None:
        self._token_ids[self.num_known] = self.last_token_id = token_id
        self.num_known += 1

    def revise(self, start: int, token_ids: TokenIds) -> None:
        """Let the known tokens end with these, from start on; what is computed ends where they are others than before.

        At least the last of them, of which there must be one, is left to compute.
        """
        stop = start + len(token_ids)
        num_common = min(self.num_known, stop) - start
        differs = self.text[start : start + num_common] != token_ids[:num_common]
        num_same = int(differs.argmax()) if differs.any() else num_common
        self.num_computed = min(self.num_computed, start + num_same, stop - 1)
        self._token_ids[start:stop] = token_ids
        self.num_known = stop
        self.last_token_id = int(token_ids[-1])

    def enter_tables(self, tables: BlockTables) -> None:
        """Keep its blocks in a row of the tables from now on."""
        self._tables, self.table_row = tables, tables.take_row(self.blocks)

    def leave_tables(self) -> None:
        assert self._tables is not None, f"{self.request_id} is in no table"
        self._tables.give_back(self.table_row)
        self._tables = None

    def add_blocks(self, blocks: list[int]) -> None:
        if self._tables is not None:
            self._tables.write(self.table_row, len(self.blocks), blocks)
        self.blocks.extend(blocks)
        self.num_places += len(blocks) * self._block_size

    def take_blocks(self) -> list[int]:
        """Give up all blocks, and with them what was computed."""
        blocks, self.blocks = self.blocks, []
        self.num_places = self.num_computed = self.num_shareable = 0
        return blocks
