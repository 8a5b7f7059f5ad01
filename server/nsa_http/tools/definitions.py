"""`tools` and `tool_choice` of a request: read and checked by hand, so that errors stay short."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from nsa_serve.errors import RequestError

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments."""

    name: str
    description: str | None
    parameters: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what a chat template gets."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """mode: "none", "auto", "required" or "named"; name: the function that "named" names."""

    mode: str = "none"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """The tools of a request and how they may be used."""

    tools: Sequence[Tool] = field(default_factory=tuple)
    choice: ToolChoice = field(default_factory=ToolChoice)
    allows_several: bool = True

    @property
    def is_forced(self) -> bool:
        """True when the answer must be a call."""
        return self.choice.mode in ("required", "named")

    @property
    def chosen(self) -> Tool:
        """The tool that the choice names."""
        return next(tool for tool in self.tools if tool.name == self.choice.name)


def read_tools(tools: Any, tool_choice: Any, parallel_tool_calls: bool | None) -> ToolRequest:
    """Check the three fields. Raises RequestError."""
    known = () if tools is None else tuple(_read_tools(tools))
    choice = _read_choice(tool_choice, [tool.name for tool in known])
    return ToolRequest(known, choice, allows_several=parallel_tool_calls is not False)


def json_size(value: Any, *, param: str) -> int:
    """Return the bytes of a value as JSON. Raises RequestError when it is nested too deeply."""
    try:
        return len(orjson.dumps(value))
    # More is read than can be written again.
    except orjson.JSONEncodeError:
        raise RequestError(
            f"{param} is nested too deeply; at most 254 levels are allowed", param=param
        ) from None


def _read_tools(tools: Any) -> list[Tool]:
    if not isinstance(tools, list) or not tools:
        raise RequestError(
            "tools must be an array of at least one tool; leave it out when there is none",
            param="tools",
        )
    if len(tools) > MAX_TOOLS:
        raise RequestError(
            f"tools has {len(tools)} tools; at most {MAX_TOOLS} are allowed", param="tools"
        )
    num_bytes = json_size(tools, param="tools")
    if num_bytes > MAX_TOOLS_BYTES:
        raise RequestError(
            f"tools has {num_bytes} bytes as JSON; at most {MAX_TOOLS_BYTES} are allowed",
            param="tools",
        )
    known: dict[str, Tool] = {}
    for i, item in enumerate(tools):
        tool = _read_tool(item, f"tools.{i}")
        if tool.name in known:
            raise RequestError(f"tools has two functions named {tool.name!r}", param="tools")
        known[tool.name] = tool
    return list(known.values())


def _read_tool(item: Any, where: str) -> Tool:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind != "function":
        raise RequestError(
            f"{where} must be an object whose type is 'function', got {str(kind)[:64]!r}",
            param="tools",
        )
    function = item.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object with a `name`", param="tools")
    name, description = function.get("name"), function.get("description")
    parameters = function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name must be 1 to 128 letters, digits or any of _.:/-, "
            f"got {str(name)[:64]!r}",
            param="tools",
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.function.description must be a string", param="tools")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"{where}.function.parameters must be an object: a JSON schema", param="tools"
        )
    return Tool(name, description, parameters or _NO_PARAMETERS)


def _read_choice(choice: Any, names: Sequence[str]) -> ToolChoice:
    if choice is None:
        return ToolChoice("auto" if names else "none")
    if choice == "none":
        return ToolChoice()
    if not names:
        raise RequestError(
            "tool_choice needs tools; send them or leave it out", param="tool_choice"
        )
    if choice in ("auto", "required"):
        return ToolChoice(choice)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise RequestError(
            "tool_choice must be 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': ...}}",
            param="tool_choice",
        )
    if name not in names:
        raise RequestError(
            f"tool_choice names the function {name[:64]!r}, which is not among the tools",
            param="tool_choice",
        )
    return ToolChoice("named", name)
