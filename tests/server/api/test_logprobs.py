"""Log-probabilities are written in parts, and read as the whole that they are."""

import json

import orjson
import pytest

from server.api.logprobs import WRITTEN_TOGETHER, ChatLogprobs, CompletionLogprobs, as_json


@pytest.mark.parametrize("num_tokens", [0, 1, WRITTEN_TOGETHER, 2 * WRITTEN_TOGETHER + 1])
def test_any_number_of_entries_reads_as_it_was(num_tokens: int) -> None:
    numbers = [None, *map(float, range(1, num_tokens))][:num_tokens]
    completion: CompletionLogprobs = {
        "tokens": [f'"{number}", [' for number in range(num_tokens)],
        "token_logprobs": numbers,
        "top_logprobs": [{"a": 0.5} for _ in range(num_tokens)],
        "text_offset": list(range(num_tokens)),
    }
    chat: ChatLogprobs = {
        "content": [{"token": "ä", "logprob": -1.0, "bytes": [195, 164], "top_logprobs": []} for _ in range(num_tokens)]
    }

    for form in (completion, chat):
        assert json.loads(orjson.dumps({"logprobs": as_json(form)})) == {"logprobs": form}
