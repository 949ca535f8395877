"""Text to token ids and back, from a model directory's own files. Knows no chat, no stream, and never torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

# GPT-2's printable stand-ins: these bytes are written as themselves, the other 68 as U+0100 and up, in order
_PRINTED_AS_THEMSELVES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))

NUM_CONTEXT_TOKENS = 4


class TokenizerError(Exception):
    """A model directory's tokenizer files are missing or unreadable; the message is one sentence for the terminal."""


class Tokenizer:
    """The tokenizer of one model.

    special_tokens: their names ("bos_token") and texts, as chat templates use them. chat_template: its source, or None.
    longest_token: characters of the vocabulary's longest token, as the file writes it, which is never too few.
    """

    def __init__(
        self, model: tokenizers.Tokenizer, *, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> None:
        self.model = model
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.vocab_size: int = model.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, model.get_vocab(with_added_tokens=True)), default=1)
        self._added = {token_id: added.content for token_id, added in model.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}
        self._is_byte_level = '"ByteLevel"' in _decoder_description(model)
        # truncation or padding in the file is for training; a request's prompt must arrive whole
        model.no_truncation()
        model.no_padding()

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json and what belongs to it. Raises TokenizerError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{directory} has no tokenizer.json; save the model's fast tokenizer there with save_pretrained"
            )
        try:
            model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
        config = {
            **_read_json(directory / "special_tokens_map.json"),
            **_read_json(directory / "tokenizer_config.json"),
        }
        return cls(
            model,
            special_tokens=_special_tokens(config),
            chat_template=_chat_template(directory, config),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. add_special_tokens: with those the model wants around a bare text, such as BOS."""
        # the batch call lets other threads run meanwhile, which `encode` does not, and the fast one leaves offsets out
        [encoding] = self.model.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self.model.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def context_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The end of a prompt that the text of the next token depends on; nothing where tokens read the same anywhere.

        SentencePiece decoders drop the space of a text's first word, so what follows a prompt needs the prompt's end.
        """
        return [] if self._is_byte_level else list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for in running text; several tokens may share one character's bytes."""
        known = self._bytes.get(token_id)
        if known is None:
            # as many as the vocabulary has; a reply of log-probabilities asks for the same ones thousands of times
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.model.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTE_OF_CHARACTER.get(character, character.encode()) for character in token)
        if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token as text; `bytes:\\xe2\\x82` for one that is only a part of a character, as OpenAI writes it."""
        token = self.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _byte_of_character() -> dict[str, bytes]:
    table = {chr(byte): bytes([byte]) for byte in _PRINTED_AS_THEMSELVES}
    others = (byte for byte in range(256) if byte not in _PRINTED_AS_THEMSELVES)
    table.update({chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER: Mapping[str, bytes] = _byte_of_character()


def _decoder_description(model: tokenizers.Tokenizer) -> str:
    return json.dumps(json.loads(model.to_str()).get("decoder"))


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and its like, written as a text or as an object with the text under `content`."""
    texts = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            texts[name] = content
    return texts


def _chat_template(directory: Path, config: Mapping[str, object]) -> str | None:
    """The template's own file first, then tokenizer_config.json: one text, or a list of which "default" counts."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
