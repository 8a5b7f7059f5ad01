"""What a request may ask its output to match: size limits, and the text that llguidance compiles.

Importable without llguidance: the HTTP server checks sizes, its compile worker and the engine
compile.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from nsa_serve.errors import RequestError
from nsa_serve.request import StructuredKind, StructuredOutput

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_BYTES = 8 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 64 * 1024

_NOUNS: dict[StructuredKind, str] = {
    "json_object": "the grammar of JSON objects",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}


def json_schema(schema: object, *, param: str) -> StructuredOutput:
    """Return the constraint of a JSON schema. Raises RequestError when it is none or too large."""
    if not isinstance(schema, dict):
        raise RequestError(
            f"{param} must be a JSON schema (an object), got {type(schema).__name__}", param=param
        )
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise RequestError(
            f"{param} is nested {depth} levels deep; at most {MAX_SCHEMA_DEPTH} are allowed "
            "(move inner schemas to $defs)",
            param=param,
        )
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    _check_bytes(text, MAX_SCHEMA_BYTES, param)
    return StructuredOutput("json_schema", text)


def regex(pattern: object, *, param: str) -> StructuredOutput:
    """Return the constraint of a regular expression (Rust's syntax, without look-around)."""
    text = _check_text(pattern, param)
    _check_bytes(text, MAX_REGEX_BYTES, param)
    return StructuredOutput("regex", text)


def grammar(text: object, *, param: str) -> StructuredOutput:
    """Return the constraint of a context-free grammar: Lark, or GBNF."""
    checked = _check_text(text, param)
    _check_bytes(checked, MAX_GRAMMAR_BYTES, param)
    return StructuredOutput("grammar", checked)


def choice(options: object, *, param: str) -> StructuredOutput:
    """Return the constraint of a list of strings, one of which is the whole output."""
    if not isinstance(options, list | tuple) or not options:
        raise RequestError(f"{param} must be a list of at least one string", param=param)
    if len(options) > MAX_CHOICES:
        raise RequestError(
            f"{param} has {len(options)} strings; at most {MAX_CHOICES} are allowed", param=param
        )
    for option in options:
        _check_text(option, f"{param}: each choice", field=param)
    text = json.dumps(list(options), ensure_ascii=False)
    _check_bytes(text, MAX_CHOICE_BYTES, param)
    return StructuredOutput("choice", text)


def json_object() -> StructuredOutput:
    """Return the constraint "any JSON object"."""
    return StructuredOutput("json_object")


def check_size(structured: StructuredOutput) -> None:
    """Raise RequestError when a constraint is malformed or too large to be compiled at all."""
    match structured.kind:
        case "json_schema":
            json_schema(_load(structured), param="structured")
        case "regex":
            regex(structured.value, param="structured")
        case "grammar":
            grammar(structured.value, param="structured")
        case "choice":
            choice(_load(structured), param="structured")


def choice_pattern(options: Iterable[str]) -> str:
    """Return a regular expression that matches exactly these strings."""
    return "|".join(f"(?:{re.escape(option)})" for option in options)


def compile_error(kind: StructuredKind, reason: str, *, param: str) -> RequestError:
    """Return the error of a constraint that llguidance refuses."""
    return RequestError(f"{param}: {_NOUNS[kind]} cannot be used: {reason}", param=param)


def _load(structured: StructuredOutput) -> Any:
    try:
        return json.loads(structured.value)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"structured: the value of kind {structured.kind} must be JSON text: {error}",
            param="structured",
        ) from None


def _check_text(value: object, what: str, *, field: str | None = None) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{what} must be text that is not empty", param=field or what)
    return value


def _check_bytes(text: str, limit: int, param: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{param} must be valid Unicode", param=param) from None
    if num_bytes > limit:
        raise RequestError(
            f"{param} has {num_bytes} bytes; at most {limit} are allowed", param=param
        )


def _depth(value: object) -> int:
    """Count the nested objects and arrays of a JSON value, without recursion."""
    depth, level = 0, [value]
    while True:
        inner: list[object] = []
        is_open = False
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
                is_open = True
            elif isinstance(item, list):
                inner += item
                is_open = True
        if not is_open:
            return depth
        depth, level = depth + 1, inner
