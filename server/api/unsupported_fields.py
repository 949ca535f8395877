"""Data: request fields of other servers that we know, do not implement, and that would change the answer."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.api.errors import describe
from server.errors import InvalidRequest


@dataclass(frozen=True)
class UnsupportedField:
    """harmless: the values, null aside, that mean what this server does anyway. advice: what to send instead."""

    harmless: tuple[object, ...] = ()
    advice: str = "leave it out"


_TEXT_FORMAT = {"type": "text"}

FOR_BOTH: Mapping[str, UnsupportedField] = {
    "response_format": UnsupportedField((_TEXT_FORMAT,), 'use {"type": "text"}'),
    "structured_outputs": UnsupportedField(),
    "guided_json": UnsupportedField(),
    "guided_regex": UnsupportedField(),
    "guided_choice": UnsupportedField(),
    "guided_grammar": UnsupportedField(),
    "grammar": UnsupportedField(),
    "json_schema": UnsupportedField(),
    "prompt_logprobs": UnsupportedField(advice="use echo with logprobs on /v1/completions"),
    "bad_words": UnsupportedField(([],)),
    "allowed_token_ids": UnsupportedField(),
    "truncate_prompt_tokens": UnsupportedField(advice="shorten the prompt"),
    "use_beam_search": UnsupportedField((False,)),
    "length_penalty": UnsupportedField((1, 1.0)),
    "logits_processors": UnsupportedField(([],)),
    "return_token_ids": UnsupportedField((False,)),
    "return_tokens_as_token_ids": UnsupportedField((False,)),
    "typical_p": UnsupportedField((1, 1.0)),
    "mirostat": UnsupportedField((0,)),
    "adapter_id": UnsupportedField(),
    "lora": UnsupportedField(([],)),
}

FOR_COMPLETIONS: Mapping[str, UnsupportedField] = {
    **FOR_BOTH,
    "suffix": UnsupportedField(("",)),
    "max_completion_tokens": UnsupportedField(advice="the limit is max_tokens here"),
    "prompt_embeds": UnsupportedField(),
    "add_special_tokens": UnsupportedField((True,), "send token ids as the prompt to control them"),
}

FOR_CHATS: Mapping[str, UnsupportedField] = {
    **FOR_BOTH,
    "tools": UnsupportedField(([],)),
    "tool_choice": UnsupportedField(("none", "auto"), "use none"),
    "functions": UnsupportedField(([],)),
    "function_call": UnsupportedField(("none", "auto"), "use none"),
    "modalities": UnsupportedField((["text"],), 'use ["text"]'),
    "audio": UnsupportedField(),
    "web_search_options": UnsupportedField(),
    "reasoning_effort": UnsupportedField(("none",)),
    "chat_template": UnsupportedField(advice="put the template into the model's directory"),
    "chat_template_kwargs": UnsupportedField(({},)),
    "add_generation_prompt": UnsupportedField((True,)),
    "continue_final_message": UnsupportedField((False,)),
    "add_special_tokens": UnsupportedField((False,)),
    "documents": UnsupportedField(([],)),
    "echo": UnsupportedField((False,), "use /v1/completions"),
    "thinking_token_budget": UnsupportedField(),
}


def check_unsupported(fields: Mapping[str, object], unsupported: Mapping[str, UnsupportedField]) -> None:
    """Raise InvalidRequest for a field that is known, would change the answer and is not implemented."""
    for name, value in fields.items():
        field = unsupported.get(name)
        if field is None or value is None or any(_is_same(value, harmless) for harmless in field.harmless):
            continue
        raise InvalidRequest(
            f"{name} is not supported by this server, and it is {describe(value)}; {field.advice}", param=name
        )


def _is_same(value: object, harmless: object) -> bool:
    # true is no 1 here
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
