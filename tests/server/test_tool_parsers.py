"""What the parsers find in a model's text, however it is cut into pieces, and in linear time."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_http.tools import forced, hermes, llama3_json
from nsa_http.tools.events import ArgumentsDelta, CallStart, ContentDelta, Event, ToolParser
from nsa_http.tools.forced import NamedParser, RequiredParser
from nsa_http.tools.hermes import HermesParser
from nsa_http.tools.llama3_json import Llama3JsonParser

PARSERS: list[Callable[[], ToolParser]] = [HermesParser, Llama3JsonParser, RequiredParser]
Found = tuple[str, list[tuple[str, str]]]


def parse(parser: ToolParser, *pieces: str) -> list[Event]:
    """Feed the pieces; return the events with neighbours of one kind joined."""
    joined: list[Event] = []
    events = [event for piece in pieces for event in parser.feed(piece)]
    for event in [*events, *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif (
            isinstance(event, ArgumentsDelta)
            and isinstance(last, ArgumentsDelta)
            and event.index == last.index
        ):
            joined[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def found(events: list[Event]) -> Found:
    """Return (content, [(name, arguments)])."""
    content, calls = "", list[tuple[str, str]]()
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, ArgumentsDelta):
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        else:
            content += event.text
    return content, calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HERMES_CASES: list[tuple[str, Found]] = [
    ("plain  text\n", ("plain  text\n", [])),
    (CALL, ("", [("f", '{"a": 1}')])),
    (f"Wait.\n\n{CALL}\n", ("Wait.", [("f", '{"a": 1}')])),
    (f"{CALL}\n{CALL}", ("", [("f", '{"a": 1}')] * 2)),
    (f"a{CALL} b {CALL}c", ("a b c".replace(" c", "c"), [("f", '{"a": 1}')] * 2)),
    # Any order of keys, keys to skip, the other name of the arguments, none at all.
    ('<tool_call>{"arguments":{"a":[1]},"name":"f"}</tool_call>', ("", [("f", '{"a":[1]}')])),
    ('<tool_call>{"id":[{}],"name":"f","x":1.5,"parameters":{}}', ("", [("f", "{}")])),
    ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    # Arguments that are a string of JSON, and an empty one.
    (r'<tool_call>{"name":"f","arguments":"{\"a\":\"\\n\"}"}', ("", [("f", '{"a":"\\n"}')])),
    ('<tool_call>{"name":"f","arguments":""}</tool_call>', ("", [("f", "{}")])),
    # Brackets, quotes and markers inside strings.
    (
        r'<tool_call>{"name":"f","arguments":{"a":"}\"</tool_call><tool_call>{"}}</tool_call>!',
        ("!", [("f", r'{"a":"}\"</tool_call><tool_call>{"}')]),
    ),
    # Escapes in names and keys.
    (r'<tool_call>{"n\u0061me":"\u0066","arguments":{}}', ("", [("f", "{}")])),
    # A marker that no call follows is content.
    ("1 <tool_call> 2", ("1 <tool_call> 2", [])),
    ("<tool_call>{}</tool_call>", ("<tool_call>{}</tool_call>", [])),
    ('<tool_call>{"name":7}</tool_call>', ('<tool_call>{"name":7}</tool_call>', [])),
    ('<tool_call>{"name":"","arguments":{}}', ('<tool_call>{"name":"","arguments":{}}', [])),
    ('<tool_call>["f"]', ('<tool_call>["f"]', [])),
    (r'<tool_call>{"\x":1}', (r'<tool_call>{"\x":1}', [])),
    ("</tool_call>", ("</tool_call>", [])),
    ("<<tool_call", ("<<tool_call", [])),
    (f"<tool_call>{CALL}", ("<tool_call>", [("f", '{"a": 1}')])),
    # Cut short.
    ('<tool_call>{"name": "f", "argu', ('<tool_call>{"name": "f", "argu', [])),
    ('<tool_call>{"name": "f", "arguments": {"a": "x', ("", [("f", '{"a": "x')])),
    ('<tool_call>{"name": "f", "arguments": "{', ("", [("f", '"{')])),
    ('<tool_call>{"name": "f", "arguments": 12', ("", [("f", "12")])),
    # The closing marker is missing, or the closing bracket.
    (CALL.removesuffix("</tool_call>") + CALL, ("", [("f", '{"a": 1}')] * 2)),
    (CALL.removesuffix("</tool_call>") + "so", ("\nso", [("f", '{"a": 1}')])),
    ('<tool_call>{"name":"f","arguments":{}</tool_call>', ("", [("f", "{}")])),
    # Said twice: the first stands.
    ('<tool_call>{"name":"f","arguments":{},"arguments":1,"name":"g"}', ("", [("f", "{}")])),
]
LLAMA_CALL = '{"name": "f", "parameters": {"a": 1}}'
LLAMA_CASES: list[tuple[str, Found]] = [
    ("plain {text}", ("plain {text}", [])),
    (LLAMA_CALL, ("", [("f", '{"a": 1}')])),
    (f" <|python_tag|> {LLAMA_CALL}\n", ("", [("f", '{"a": 1}')])),
    (f"{LLAMA_CALL} ; {LLAMA_CALL};", ("", [("f", '{"a": 1}')] * 2)),
    (f"{LLAMA_CALL} and", (" and", [("f", '{"a": 1}')])),
    (f"{LLAMA_CALL};; {LLAMA_CALL}", (f";; {LLAMA_CALL}", [("f", '{"a": 1}')])),
    (f"{LLAMA_CALL}{LLAMA_CALL}", (LLAMA_CALL, [("f", '{"a": 1}')])),
    # JSON that the user asked for.
    ('{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
    ('{"name": "Ada"}', ('{"name": "Ada"}', [])),
    ('{"a": 1} {', ('{"a": 1} {', [])),
    (f'{LLAMA_CALL}; {{"a": 1}}', ('; {"a": 1}', [("f", '{"a": 1}')])),
    (f"Sure: {LLAMA_CALL}", (f"Sure: {LLAMA_CALL}", [])),
    (";" + LLAMA_CALL, (";" + LLAMA_CALL, [])),
    ("<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
    ("<|pyth", ("<|pyth", [])),
    ('\n{"name": "f', ('\n{"name": "f', [])),
    ('{"name": "f", "parameters": {"a', ("", [("f", '{"a')])),
]
REQUIRED_CASES: list[tuple[str, Found]] = [
    (f"[{LLAMA_CALL}]", ("", [("f", '{"a": 1}')])),
    (f" [ {LLAMA_CALL} , {LLAMA_CALL} ] ", (" ", [("f", '{"a": 1}')] * 2)),
    ("hello", ("hello", [])),
    ('[{"a": 1}]', ('{"a": 1}]', [])),
    (f"[{LLAMA_CALL}] so", (" so", [("f", '{"a": 1}')])),
    ('[{"name": "f", "parameters": {"a', ("", [("f", '{"a')])),
]
CASES = [
    *((HermesParser, *case) for case in HERMES_CASES),
    *((Llama3JsonParser, *case) for case in LLAMA_CASES),
    *((RequiredParser, *case) for case in REQUIRED_CASES),
]


@pytest.mark.parametrize(("make", "text", "expected"), CASES, ids=lambda value: str(value)[:50])
def test_what_is_found(make: Callable[[], ToolParser], text: str, expected: Found) -> None:
    whole = parse(make(), text)
    assert found(whole) == expected
    assert parse(make(), *text) == whole
    for i in range(len(text)):
        assert parse(make(), text[:i], text[i:]) == whole


def test_a_named_call_is_its_arguments() -> None:
    assert parse(NamedParser("f"), "", '{"a"', ": 1}") == [
        CallStart(0, "f"),
        ArgumentsDelta(0, '{"a": 1}'),
    ]
    assert parse(NamedParser("f"), "") == []


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "<", ">", ";", ",", ":", "{", "}"),
        *("[", "]", '"', "\\", " ", "\n", "name", '"name"', '"arguments"', '"parameters"', "f"),
        *('{"name": "f", "arguments": {', '"x": [1, "y"]', "}}", "é", "1", "null"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join), st.data())
def test_the_cuts_change_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for make in PARSERS:
        assert parse(make(), *pieces) == parse(make(), text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8),
            st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers(), max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_calls_come_back_as_they_were_written(
    calls: list[tuple[str, dict[str, Any]]], escapes: bool
) -> None:
    def write(key: str) -> list[str]:
        return [json.dumps({"name": n, key: a}, ensure_ascii=escapes) for n, a in calls]

    texts = {
        HermesParser: "\n".join(f"<tool_call>{c}</tool_call>" for c in write("arguments")),
        Llama3JsonParser: "; ".join(write("parameters")),
        RequiredParser: f"[{', '.join(write('parameters'))}]",
    }
    for make, text in texts.items():
        content, got = found(parse(make(), text))
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in got] == calls


ATTACKS = [
    *("<", " ", "\n", "<tool_call>", "<tool_call", "</tool_call>", "{", '"', "\\", "[", ";", "< "),
    *('<tool_call>{"', '<tool_call>{"name":', '<tool_call>{"name":"f","arguments":{"', "<|python_"),
    *('<tool_call>{"name":"f","arguments":{}}\n', '{"name":"f","parameters":{}};'),
    *('{"name":"f","parameters":[', '[{"name":"f","parameters":{}},', '{"a":1,', '{"a":'),
]
MODULES: list[tuple[Any, str]] = [
    (hermes, "HermesParser"),
    (llama3_json, "Llama3JsonParser"),
    (forced, "RequiredParser"),
]


@pytest.mark.parametrize(("module", "name"), MODULES, ids=lambda value: str(value)[-20:])
@pytest.mark.parametrize("attack", ATTACKS)
def test_each_character_is_looked_at_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, attack: str
) -> None:
    num_steps = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, char: str) -> Any:
            nonlocal num_steps
            num_steps += 1
            return method(self, char)

        return call

    parser_type = getattr(module, name)
    steps = [attribute for attribute in vars(parser_type) if attribute.startswith("_step")]
    for attribute in steps:
        monkeypatch.setattr(parser_type, attribute, counted(getattr(parser_type, attribute)))
    num_chars = 100_000
    text = (attack * num_chars)[:num_chars]
    events = parse(parser_type(), *(text[i : i + 7] for i in range(0, num_chars, 7)))
    # Text without `<` is not scanned for Hermes markers at all.
    assert num_steps > 0 or (name == "HermesParser" and "<" not in attack)
    assert num_steps <= 5 * num_chars
    assert sum(len(e.text) for e in events if not isinstance(e, CallStart)) <= num_chars


@pytest.mark.parametrize("text", ["a <b> </b> {x}; ", "Hello, world."])
def test_only_a_possible_marker_is_held_back(text: str) -> None:
    for make in (HermesParser, Llama3JsonParser):
        parser = make()
        shown = ""
        for i, char in enumerate(text):
            shown += found(parser.feed(char))[0]
            held = text[len(shown) : i + 1]
            assert not held.strip() or "<tool_call>".startswith(held.lstrip())
