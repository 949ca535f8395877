"""Chats become the text that transformers' own renderer makes of them; templates cannot do harm."""

import pytest
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequest
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import TokenizerError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say <b>\"hi\"</b> & 'é'"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "again"},
]
SPECIAL_TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# each uses one thing that models' templates use, with what transformers gives for it
SOURCES = [
    SMOLLM2,
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}",
    "{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if tools %}tools{% endif %}",
    "  {% if true %}\n  trimmed\n  {% endif %}\nend",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_chat_reads_as_transformers_renders_it(merged_reference: PreTrainedTokenizerFast, source: str) -> None:
    expected = merged_reference.apply_chat_template(
        CHAT, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(source, SPECIAL_TOKENS).render(CHAT) == expected


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as refusal:
        template.render(CHAT)
    assert refusal.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_reaches_out_or_breaks_is_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(CHAT)


def test_a_syntax_error_is_told_before_serving() -> None:
    with pytest.raises(TokenizerError, match="syntax"):
        ChatTemplate("{% for %}", {})


def test_the_date_is_at_hand() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHAT).isdigit()
