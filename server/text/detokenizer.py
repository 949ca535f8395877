"""Token ids of one stream to text that is safe to show. Knows no stop strings and no HTTP."""

from collections.abc import Sequence

from server.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# a character has at most 4 bytes, so a longer run without a whole one is no text and need not be decoded again
MAX_HELD_TOKENS = 16


class Detokenizer:
    """Turns tokens into text one by one; what `push` and `finish` return joins to the decoded whole.

    Text that ends in the middle of a character is held until the character is whole. Held tokens are decoded after
    the ones shown last, as a decoder may write a token differently at the start of a text.

    context: tokens before the stream's first that are not part of its text.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = list(context)
        self._shown_text = self._decode(self._shown)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty."""
        self._held.append(token_id)
        text = self._held_text()
        is_overlong = len(self._held) > MAX_HELD_TOKENS
        if not text.endswith(REPLACEMENT):
            if text or is_overlong:
                self._show(len(self._held))
            return text
        return self._show_broken_text() if is_overlong else ""

    def finish(self) -> str:
        """What is still held, broken characters included."""
        text = self._held_text()
        self._show(len(self._held))
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _held_text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._shown_text) :]

    def _show(self, num_tokens: int) -> None:
        self._shown, self._held = self._held[:num_tokens], self._held[num_tokens:]
        self._shown_text = self._decode(self._shown)

    def _show_broken_text(self) -> str:
        """Show held tokens up to a place where no character is cut: there, decoding apart equals decoding together."""
        whole = self._decode(self._held)
        for cut in range(len(self._held) - 1, 0, -1):
            before, after = self._decode(self._held[:cut]), self._decode(self._held[cut:])
            if after and before + after == whole:
                self._show(cut)
                return before
        return ""
