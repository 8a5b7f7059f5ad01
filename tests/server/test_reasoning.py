"""Reasoning blocks: the parser, and chats with a model that thinks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_http.reasoning import ThinkParser, ends_with_open, is_block_open
from nsa_http.tools.events import ContentDelta, ReasoningDelta
from tests.server.chat_helpers import URL, WEATHER, ask, connect, make_engine, prompt_of
from tests.server.fake_engine import CHAT_TEMPLATE

THINKING_TEMPLATE = CHAT_TEMPLATE + "{# <think> #}"
OPEN_TEMPLATE = CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
EFFORT_TEMPLATE = CHAT_TEMPLATE + "[{{ reasoning_effort }}{{ enable_thinking }}]"
REPLY = "<think>\n1 < 2\n</think>\n\nYes."


def parse(text: str, *pieces: str, is_open: bool = False) -> tuple[str, str]:
    parser = ThinkParser(is_open=is_open)
    events = [event for piece in (text, *pieces) for event in parser.feed(piece)]
    events += parser.finish()
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    return reasoning, "".join(e.text for e in events if isinstance(e, ContentDelta))


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        (REPLY, False, ("\n1 < 2\n", "\n\nYes.")),
        (" \n<think>a</think>b", False, ("a", "b")),
        ("<think></think>b", False, ("", "b")),
        ("<think>a", False, ("a", "")),
        ("<think>a</thin", False, ("a</thin", "")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        ("<think>a<</think></think>b", False, ("a<", "</think>b")),
        ("a<think>b</think>", False, ("", "a<think>b</think>")),
        (" \n<thin", False, ("", " \n<thin")),
        ("  ", False, ("", "  ")),
        ("<<think>a", False, ("", "<<think>a")),
        ("", False, ("", "")),
        ("a</think>b", True, ("a", "b")),
        ("a</think>b</think>", True, ("a", "b</think>")),
        ("a", True, ("a", "")),
        ("</think>b", True, ("", "b")),
    ],
)
def test_the_block_is_told_apart(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert parse(text, is_open=is_open) == expected
    assert parse("", *text, is_open=is_open) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", " ", "\n", "x"])),
    st.booleans(),
    st.data(),
)
def test_the_cuts_change_nothing(parts: list[str], is_open: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(text, is_open=is_open)
    assert parse("", *pieces, is_open=is_open) == whole
    # Nothing is lost but the markers and the white space before the block.
    markers = 0 if is_open else text.find("<think>") + 7
    if not whole[0]:
        assert whole[1] in text
    else:
        assert text[markers:].startswith(whole[0])


@pytest.mark.parametrize("attack", ["<", "</think", "</", " ", "<think>", "x<"])
def test_held_back_text_stays_short(attack: str) -> None:
    text = (attack * 100_000)[:100_000]
    for is_open in (True, False):
        parser = ThinkParser(is_open=is_open)
        for i in range(0, len(text), 7):
            parser.feed(text[i : i + 7])
            assert len(parser._tail) < len("</think>")


def test_where_a_prompt_leaves_the_block() -> None:
    assert ends_with_open("<a><think>\n") and not ends_with_open("<think>a")
    assert is_block_open("<think>a") and not is_block_open("<think>a</think>b")
    assert not is_block_open("a")


async def test_reasoning_is_separate() -> None:
    async with connect(make_engine(REPLY, THINKING_TEMPLATE)) as client:
        choice = await ask(client)
        assert choice["message"] == {
            "role": "assistant",
            "content": "\n\nYes.",
            "refusal": None,
            "reasoning": "\n1 < 2\n",
            "reasoning_content": "\n1 < 2\n",
        }
        hidden = await ask(client, include_reasoning=False)
        assert hidden["message"] == {
            "role": "assistant",
            "content": "\n\nYes.",
            "refusal": None,
        }
        plain = await ask(client, separate_reasoning=False)
        assert plain["message"]["content"] == REPLY
        cut = await ask(client, max_tokens=10)
        assert (cut["message"]["content"], cut["finish_reason"]) == (None, "length")
        body = {"messages": [{"role": "user", "content": "hi"}], "include_reasoning": False}
        usage = (await client.post(URL, json=body)).json()["usage"]
        assert usage["completion_tokens"] == len(REPLY)


@pytest.mark.parametrize(
    ("template", "setting", "is_split"),
    [
        (CHAT_TEMPLATE, "auto", False),
        (CHAT_TEMPLATE, "think", True),
        (THINKING_TEMPLATE, "auto", True),
        (THINKING_TEMPLATE, "none", False),
    ],
)
async def test_the_setting_decides(template: str, setting: str, is_split: bool) -> None:
    async with connect(make_engine(REPLY, template), reasoning_parser=setting) as client:
        assert ("reasoning" in (await ask(client))["message"]) == is_split
        assert "reasoning" in (await ask(client, separate_reasoning=True))["message"]


async def test_a_block_that_the_prompt_opens() -> None:
    async with connect(make_engine("a</think>b", OPEN_TEMPLATE)) as client:
        message = (await ask(client))["message"]
        assert (message["reasoning"], message["content"]) == ("a", "b")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>o"}]
        message = (await ask(client, messages=messages, continue_final_message=True))["message"]
        assert (message["reasoning"], message["content"]) == ("a", "b")
        messages[1]["content"] = "<think>o</think>"
        message = (await ask(client, messages=messages, continue_final_message=True))["message"]
        assert message["content"] == "a</think>b"


async def test_constrained_output_has_no_reasoning() -> None:
    async with connect(make_engine('{"a": 1}', OPEN_TEMPLATE)) as client:
        message = (await ask(client, response_format={"type": "json_object"}))["message"]
        assert message["content"] == '{"a": 1}' and "reasoning" not in message


async def test_calls_after_reasoning() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    reply = f"<think>{call}</think>\n{call}"
    async with connect(make_engine(reply, THINKING_TEMPLATE)) as client:
        choice = await ask(client, tools=[WEATHER])
        assert choice["message"]["reasoning"] == call
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["message"]["tool_calls"]) == 1


async def test_reasoning_effort_reaches_the_template() -> None:
    engine = make_engine("ok", EFFORT_TEMPLATE)
    async with connect(engine) as client:
        for body in (
            {"reasoning_effort": "high"},
            {"reasoning_effort": "none"},
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
        ):
            await ask(client, **body)
        prompts = [prompt_of(engine, i) for i in (0, 2, 4)]
    assert [prompt[prompt.index("[") :] for prompt in prompts] == [
        "[highTrue]",
        "[noneFalse]",
        "[lowFalse]",
    ]


async def test_messages_may_carry_reasoning() -> None:
    engine = make_engine("ok", "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}")
    async with connect(engine) as client:
        await ask(client, messages=[{"role": "assistant", "content": "a", "reasoning": "why"}])
    assert prompt_of(engine) == "why"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"include_reasoning": 1}, "include_reasoning"),
        ({"messages": [{"role": "assistant", "reasoning": 1}]}, "messages.0"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ],
    ids=str,
)
async def test_what_is_refused(body: dict[str, Any], param: str) -> None:
    async with connect(make_engine("ok", CHAT_TEMPLATE)) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
        response = await client.post(URL, json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


async def test_an_effort_of_none_needs_no_support() -> None:
    async with connect(make_engine("ok", CHAT_TEMPLATE)) as client:
        await ask(client, reasoning_effort="none")
