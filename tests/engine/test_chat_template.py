"""Chat templates: the model's program, and what it must not do."""

from typing import Any

import pytest

from nsa_serve.chat_template import ChatTemplate
from nsa_serve.errors import ModelError, RequestError
from tests.engine.tiny_tokenizers import tokenizer_of

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
USER = {"role": "user", "content": "Hi"}


def _render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or [USER], **options)


def test_messages_and_the_generation_prompt() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert _render(CHATML) == turn + "<|im_start|>assistant\n"
    assert _render(CHATML, add_generation_prompt=False) == turn


def test_whitespace_control_is_that_of_transformers() -> None:
    source = "{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\n"
    assert _render(source) == "x\n"


def test_what_a_template_may_use() -> None:
    assert _render("{{ bos_token }}{{ messages[0].content }}") == "<s>Hi"
    assert _render("{{ {'b': 'é<', 'a': [1]} | tojson }}") == '{"b": "é<", "a": [1]}'
    assert _render("{{ {'a': 1} | tojson(indent=1) }}") == '{\n "a": 1\n}'
    assert _render("{{ strftime_now('%%') }}") == "%"
    assert (
        _render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}x{% endfor %}") == "xx"
    )
    assert _render("a{% generation %}{{ bos_token }}{% endgeneration %}b") == "a<s>b"
    assert _render("{{ tools is none }}") == "True"
    assert _render("{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"


@pytest.mark.parametrize("content", ["The answer", "ends in space ", "", "Hi"])
def test_the_final_message_is_continued(content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    text = _render(CHATML, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{content}"
    assert messages[1]["content"] == content


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        (CHATML, [USER], {"continue_final_message": True}, "exclude each other"),
        (
            CHATML,
            [{"role": "user", "content": None}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "whose content is text",
        ),
        (
            "fixed",
            [USER],
            {"continue_final_message": True, "add_generation_prompt": False},
            "cannot be continued",
        ),
        ("{{ raise_exception('roles must alternate') }}", [USER], {}, "roles must alternate"),
        ("{{ messages[0].content.x.y }}", [USER], {}, "refused the messages"),
        ("{{ messages[0].content + 1 }}", [USER], {}, "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", [USER], {}, "refused the messages"),
        ("{{ messages.append(1) }}", [USER], {}, "refused the messages"),
        ("{{ cycler.__init__.__globals__ }}", [USER], {}, "refused the messages"),
    ],
)
def test_what_a_template_refuses_is_the_requests_fault(
    source: str, messages: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        _render(source, messages, **options)


def test_no_messages_are_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty"):
        ChatTemplate(CHATML, {}).render([])


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 2000000000 }}",
        "{{ 2000000000 * 'a' }}",
        "{{ ([0] * 2000000000) | length }}",
        "{{ 10 ** 1000000000 }}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_template_bombs_stop_at_the_bound(bomb: str) -> None:
    template = ChatTemplate(bomb, {}, max_chars=1000)
    with pytest.raises(RequestError, match="more than 1000 characters"):
        template.render([USER])


def test_repetition_within_the_bound_is_allowed() -> None:
    assert _render("{{ '=' * 3 }}{{ 2 * 3 }}{{ 2 ** 3 }}") == "===68"


def test_tools_are_never_dropped() -> None:
    assert ChatTemplate("{{ tools }}{{ mode }}", {}).variables == {"tools", "mode"}
    with pytest.raises(RequestError, match="knows no tools") as caught:
        _render(CHATML, tools=[{"name": "f"}])
    assert caught.value.param == "tools"


def test_variables_are_those_the_template_reads() -> None:
    source = "{{ enable_thinking }}{{ messages[0].content }}{{ bos_token }}"
    assert _render(source, variables={"enable_thinking": False}) == "FalseHi<s>"
    for name in ("messages", "bos_token", "unknown", "chat_template", "tokenize"):
        with pytest.raises(RequestError, match=f"has no variable '{name}' to set; it has: enable_"):
            _render(source, variables={name: "x"})
    for value in ([1], {"a": 1}, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="must be a string, a finite number"):
            _render(source, variables={"enable_thinking": value})


def test_a_template_that_is_not_jinja_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("a\n{% endif %}", {})


def test_the_tokenizer_renders_its_template() -> None:
    tokenizer = tokenizer_of("byte_level", chat_template="{{ bos_token }}{{ mode }}{{ eos_token }}")
    assert tokenizer.apply_chat_template([USER], mode=3) == "<s>3</s>"
    assert tokenizer.has_chat_template


def test_a_model_without_a_template_says_what_to_use() -> None:
    tokenizer = tokenizer_of("byte_level")
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="send a plain prompt to /v1/completions"):
        tokenizer.apply_chat_template([USER])
