"""Messages of a chat to the one text a model was trained on, by its own template, in a sandbox. Knows no tokens.

The sandbox, the filters and the globals are those of transformers' `apply_chat_template`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidRequest
from server.text.tokenizer import TokenizerError


class ChatTemplateFailure(TemplateError):
    """What a template raises by `raise_exception`, with its own words."""


class GenerationBlock(Extension):
    """Passes through `{% generation %}`, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. special_tokens: texts by name, which templates use as variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TokenizerError(f"the model's chat template has a syntax error: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the assistant speaks next. Raises InvalidRequest when the template refuses them."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            # a template is a program by the model's author, and these are how one fails on messages it does not expect
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the positional order that templates rely on
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it is; jinja's own filter writes HTML escapes, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateFailure(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
