"""Structured output of a request: which field asks for it, and whether it can be followed."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from nsa_http.state import ServerState
from nsa_serve.errors import RequestError
from nsa_serve.request import StructuredOutput
from nsa_serve.structured import grammar

_RESPONSE_TYPES = ("text", "json_object", "json_schema")
# There is one backend, so disable_fallback changes nothing.
_OPTIONS = frozenset(
    {
        "disable_additional_properties",
        "disable_any_whitespace",
        "disable_fallback",
        "whitespace_pattern",
    }
)
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


async def structured_output(
    state: ServerState,
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
) -> StructuredOutput | None:
    """Return what the output must match, checked; None for any text. Raises RequestError."""
    wanted = [
        item
        for item in (_read_response_format(response_format), _read_structured(structured_outputs))
        if item is not None
    ]
    if len(wanted) > 1:
        raise RequestError(
            "response_format and structured_outputs cannot both constrain the output; "
            "leave one of them out",
            param="structured_outputs",
        )
    if not wanted:
        return None
    structured, param = wanted[0]
    return await check_structured(state, structured, param=param)


async def structured_from_schema(
    state: ServerState, schema: Mapping[str, Any], *, param: str
) -> StructuredOutput:
    """Return the constraint of a JSON schema, checked; `param` names it in the RequestError."""
    return await check_structured(state, grammar.json_schema(schema, param=param), param=param)


async def check_structured(
    state: ServerState, structured: StructuredOutput, *, param: str
) -> StructuredOutput:
    """Compile a constraint out of process and return it as the engine wants it.

    Raises RequestError naming `param` when it cannot be followed, QueueFullError when too many
    wait to be compiled.
    """
    compiler = state.grammar_compiler
    known = compiler.find(structured, param=param)
    if known is not None:
        return known
    return await asyncio.wrap_future(compiler.submit(structured, param=param))


def _read_response_format(value: Mapping[str, Any] | None) -> tuple[StructuredOutput, str] | None:
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return grammar.json_object(), "response_format"
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type must be one of {', '.join(_RESPONSE_TYPES)}, "
            f"got {str(kind)[:64]!r}",
            param="response_format.type",
        )
    param = "response_format.json_schema"
    wrapper = value.get("json_schema")
    if not isinstance(wrapper, dict):
        raise RequestError(f"{param} must be an object with a `schema`", param=param)
    strict = wrapper.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{param}.strict must be true or false", param=f"{param}.strict")
    schema = wrapper.get("schema")
    if schema is None:
        param = f"{param}.schema"
        raise RequestError(f"{param} is missing; give a JSON schema", param=param)
    return grammar.json_schema(schema, param=f"{param}.schema"), f"{param}.schema"


def _read_structured(value: Mapping[str, Any] | None) -> tuple[StructuredOutput, str] | None:
    if value is None:
        return None
    options = _read_options(value)
    given = {
        name: item for name, item in value.items() if item is not None and name not in _OPTIONS
    }
    unknown = sorted(given.keys() - set(_KINDS))
    if unknown:
        raise RequestError(
            f"structured_outputs.{unknown[0][:64]} is not supported; "
            f"use one of {', '.join(_KINDS)}",
            param="structured_outputs",
        )
    if "json_object" in given and not isinstance(given["json_object"], bool):
        raise RequestError(
            "structured_outputs.json_object must be true or false",
            param="structured_outputs.json_object",
        )
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        raise RequestError(
            f"structured_outputs must have exactly one of {', '.join(_KINDS)}, got {len(given)}",
            param="structured_outputs",
        )
    ((name, item),) = given.items()
    param = f"structured_outputs.{name}"
    if options and name == "json_object":
        name, item = "json", {"type": "object"}
    if options and name != "json":
        raise RequestError(
            f"structured_outputs.{next(iter(options))} is for json and json_object alone",
            param="structured_outputs",
        )
    if name == "json":
        schema = _parsed(item, param)
        if options and isinstance(schema, dict):
            schema = {**schema, "x-guidance": {**schema.get("x-guidance", {}), **options}}
        return grammar.json_schema(schema, param=param), param
    return _constraint(name, item, param), param


def _read_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's options of JSON as llguidance writes them into a schema."""
    options: dict[str, Any] = {}
    for name in ("disable_any_whitespace", "disable_additional_properties", "disable_fallback"):
        flag = value.get(name)
        if flag is not None and not isinstance(flag, bool):
            raise RequestError(
                f"structured_outputs.{name} must be true or false", param="structured_outputs"
            )
    if value.get("disable_additional_properties"):
        raise RequestError(
            "structured_outputs.disable_additional_properties is not supported; write "
            '"additionalProperties": false into the schema',
            param="structured_outputs",
        )
    pattern = value.get("whitespace_pattern")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise RequestError(
                "structured_outputs.whitespace_pattern must be text", param="structured_outputs"
            )
        options["whitespace_pattern"] = pattern
    if value.get("disable_any_whitespace"):
        options["whitespace_flexible"] = False
        options["whitespace_pattern"] = None
    return options


def _constraint(name: str, value: Any, param: str) -> StructuredOutput:
    match name:
        case "regex":
            return grammar.regex(value, param=param)
        case "choice":
            return grammar.choice(value, param=param)
        case "grammar":
            return grammar.grammar(value, param=param)
    return grammar.json_object()


def _parsed(value: Any, param: str) -> Any:
    """Read a schema that came as JSON text, which vLLM takes too."""
    if not isinstance(value, str):
        return value
    if len(value) > grammar.MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{param} has {len(value)} characters; at most {grammar.MAX_SCHEMA_BYTES} bytes are "
            "allowed",
            param=param,
        )
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RequestError(f"{param} must be a JSON schema or its JSON text", param=param) from None
