"""What a late reader gets at once is all that it missed."""

from server.engine.open_requests import merge_events
from server.engine.request import FinishReason, TokenEvent, TokenLogprob


def test_a_merged_event_holds_what_all_held() -> None:
    scores = [TokenLogprob(token_id, -1.0, ()) for token_id in (5, 6)]
    first = TokenEvent("r", (5,), (scores[0],), (None,), num_cached_tokens=16)
    last = TokenEvent("r", (6,), (scores[1],), finish_reason=FinishReason.TIMEOUT, error="too late")
    assert merge_events([first, last]) == TokenEvent(
        "r", (5, 6), tuple(scores), (None,), FinishReason.TIMEOUT, "too late", num_cached_tokens=16
    )
