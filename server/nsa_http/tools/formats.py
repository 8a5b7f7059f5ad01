"""The forms in which models write tool calls, by the name that `--tool-call-parser` takes.

A model whose template knows tools shows them in its own words. For any other, a form has the words
too: what a system message says about the tools, and how earlier calls and results are written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from nsa_http.tools import hermes, llama3_json
from nsa_http.tools.definitions import Tool
from nsa_http.tools.events import ToolParser


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form. markers: text that must reach the parser even where it is a special token."""

    make_parser: Callable[[], ToolParser]
    markers: tuple[str, ...]
    describe: Callable[[Sequence[Tool]], str]
    write_calls: Callable[[Sequence[Mapping[str, Any]]], str]


def choose_format(setting: str, template: str | None) -> ToolFormat:
    """Return the form of the `--tool-call-parser` setting; "auto" looks into the chat template."""
    if setting != "auto":
        return FORMATS[setting]
    text = template or ""
    is_llama = hermes.OPEN not in text and any(mark in text for mark in _LLAMA_MARKS)
    return FORMATS["llama3_json" if is_llama else "hermes"]


# What Llama 3 templates say about the form that the model is to answer in.
_LLAMA_MARKS = (llama3_json.TAG, '{"name": function name, "parameters":')


def _describe_hermes(tools: Sequence[Tool]) -> str:
    lines = [orjson.dumps(tool.as_dict()).decode() for tool in tools]
    return "\n".join(
        [
            "You may call functions to help the user. Their signatures, one JSON object a line:",
            "<tools>",
            *lines,
            "</tools>",
            "To call a function, write its name and arguments as JSON between these tags:",
            hermes.OPEN,
            '{"name": <function name>, "arguments": <object of arguments>}',
            hermes.CLOSE,
        ]
    )


def _describe_llama(tools: Sequence[Tool]) -> str:
    lines = [orjson.dumps(tool.as_dict()).decode() for tool in tools]
    return "\n".join(
        [
            "You may call functions to help the user. Their signatures, one JSON object a line:",
            *lines,
            "To call a function, answer with nothing but JSON of this form:",
            '{"name": <function name>, "parameters": <object of arguments>}',
        ]
    )


def _write_hermes(calls: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{hermes.OPEN}\n{_call_json(call, 'arguments')}\n{hermes.CLOSE}" for call in calls
    )


def _write_llama(calls: Sequence[Mapping[str, Any]]) -> str:
    return f"{llama3_json.SEPARATOR} ".join(_call_json(call, "parameters") for call in calls)


def _call_json(call: Mapping[str, Any], arguments_key: str) -> str:
    function = call["function"]
    content = {"name": function["name"], arguments_key: function["arguments"]}
    return orjson.dumps(content).decode()


FORMATS = {
    "hermes": ToolFormat(
        hermes.HermesParser, (hermes.OPEN, hermes.CLOSE), _describe_hermes, _write_hermes
    ),
    "llama3_json": ToolFormat(llama3_json.Llama3JsonParser, (), _describe_llama, _write_llama),
}
