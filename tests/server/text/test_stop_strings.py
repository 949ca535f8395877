"""A text is cut at the same place however it arrives, and what may be a stop string is held back."""

from hypothesis import given
from hypothesis import strategies as st

from server.text.stop_strings import StopStrings

# two letters, so that stop strings overlap with themselves and each other all the time
LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)


def cut(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    """What is shown of a text in pieces, and the stop string that ended it."""
    search = StopStrings(stops)
    shown = ""
    for piece in pieces:
        match = search.push(piece)
        shown += match.text
        if match.stop is not None:
            return shown, match.stop
    return shown + search.finish(), None


def cut_slowly(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the text up to the first end of any stop string, less the longest that ends there."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=LETTERS, stops=STOPS)
def test_the_cut_is_the_defined_one(text: str, stops: list[str]) -> None:
    assert cut([text], stops) == cut_slowly(text, stops)


@given(pieces=st.lists(LETTERS), stops=STOPS)
def test_any_split_of_the_text_gives_the_same_cut(pieces: list[str], stops: list[str]) -> None:
    assert cut(pieces, stops) == cut(["".join(pieces)], stops)


@given(text=LETTERS, stops=STOPS)
def test_what_is_shown_early_is_never_taken_back(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    final, _ = cut([text], stops)
    shown = ""
    for character in text:
        match = search.push(character)
        shown += match.text
        assert final.startswith(shown)
        if match.stop is not None:
            break


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    search = StopStrings(["###"])
    assert search.push("Hello #").text == "Hello "
    assert search.push("1").text == "#1"


def test_without_stop_strings_everything_is_shown_at_once() -> None:
    assert StopStrings([]).push("anything").text == "anything"


def test_what_is_held_at_the_end_is_shown() -> None:
    search = StopStrings(["\n\n"])
    assert search.push("end\n").text == "end"
    assert search.finish() == "\n"
