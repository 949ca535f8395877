"""Finds the end of a stream's text, and holds back what may become a stop string. Knows no tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """text: what may be shown now. stop: the stop string that ended the text, or None."""

    text: str
    stop: str | None


class StopStrings:
    """One stream's search. The text ends before the stop string that is complete first; of several, the longest.

    Each stop string keeps how many of its characters the text now ends with (Knuth, Morris and Pratt 1977), so the
    result is the same however the text is cut into pieces, and a character costs the same whatever came before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallback_lengths(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """Take more text; after a match, push nothing more."""
        if not self._stops:
            return StopMatch(text, None)
        start = len(self._held)
        self._held += text
        for position in range(start, len(self._held)):
            stop = self._advance(self._held[position])
            if stop is not None:
                return StopMatch(self._held[: position + 1 - len(stop)], stop)
        num_held = max(self._matched)
        shown = self._held[: len(self._held) - num_held]
        self._held = self._held[len(shown) :]
        return StopMatch(shown, None)

    def finish(self) -> str:
        """What was held back, at the end of a stream that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Note one character; the longest stop string that it completes."""
        completed = None
        for index, stop in enumerate(self._stops):
            length, fallbacks = self._matched[index], self._fallbacks[index]
            while length and stop[length] != character:
                length = fallbacks[length]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                completed = completed or stop
                length = fallbacks[length]
            self._matched[index] = length
        return completed


def _fallback_lengths(stop: str) -> list[int]:
    """For each length of a matched beginning, the longest shorter beginning that it ends with."""
    fallbacks = [0, 0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = fallbacks[length]
        if stop[length] == character:
            length += 1
        fallbacks.append(length)
    return fallbacks
