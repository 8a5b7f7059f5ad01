"""Tool calls and their results in the messages of a request."""

from collections.abc import Sequence
from typing import Any

import orjson

from nsa_http.tools.definitions import MAX_TOOLS, Tool, json_size
from nsa_http.tools.formats import ToolFormat
from nsa_serve.errors import RequestError

Message = dict[str, Any]


def check_tool_fields(message: Message, where: str) -> Message:
    """Return the message with its call arguments parsed, as templates want them.

    Raises RequestError.
    """
    if message.get("function_call"):
        raise RequestError(f"{where}.function_call is not supported; send tool_calls", param=where)
    if not isinstance(message.get("tool_call_id", ""), str):
        raise RequestError(f"{where}.tool_call_id must be a string", param=f"{where}.tool_call_id")
    calls = message.get("tool_calls")
    if not calls:
        # An empty list says "none"; some templates ask only whether the key is there.
        return {name: value for name, value in message.items() if name != "tool_calls"}
    where = f"{where}.tool_calls"
    if message["role"] != "assistant":
        raise RequestError(
            f"{where}: only assistant messages have tool calls, this one is of role "
            f"{message['role'][:64]!r}",
            param=where,
        )
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise RequestError(f"{where} must be an array of at most {MAX_TOOLS} calls", param=where)
    return {
        **message,
        "tool_calls": [_check_call(call, f"{where}.{i}") for i, call in enumerate(calls)],
    }


def write_as_text(
    messages: Sequence[Message], tools: Sequence[Tool], tool_format: ToolFormat
) -> list[Message]:
    """Say everything about tools in plain messages, for a template that knows none.

    The tools go into the system message, calls into the assistant's text, results into a user
    message.
    """
    written: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            written.append({"role": "user", "content": "\n".join(results)})
            results = []
        calls = message.get("tool_calls")
        if calls:
            text = "\n".join(filter(None, [message["content"], tool_format.write_calls(calls)]))
            message = {"role": message["role"], "content": text}
        written.append(message)
    if results:
        written.append({"role": "user", "content": "\n".join(results)})
    return _add_to_system(written, tool_format.describe(tools)) if tools else written


def _add_to_system(messages: list[Message], text: str) -> list[Message]:
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    joined = f"{first['content']}\n\n{text}" if first["content"] else text
    return [{**first, "content": joined}, *messages[1:]]


def _check_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise RequestError(
            f"{where} must be an object with function.name and function.arguments", param=where
        )
    if not isinstance(call.get("id", ""), str) or call.get("type", "function") != "function":
        raise RequestError(f"{where} must have type 'function' and a string `id`", param=where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            raise RequestError(
                f"{where}.function.arguments is not valid JSON: {error.msg}", param=where
            ) from None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"{where}.function.arguments must be a JSON object, as text", param=where
        )
    json_size(arguments, param=where)
    kept = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **kept} if "id" in call else kept
