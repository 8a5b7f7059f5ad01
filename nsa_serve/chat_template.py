"""Chat templates: a model's own Jinja program, in a sandbox, with bounded output.

Templates come from the model only, never from a request. What they may use is what transformers
gives them (https://huggingface.co/docs/transformers/chat_templating_writing): `raise_exception`,
`tojson`, `strftime_now`, loop controls, and the `generation` block, which only marks text.
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from nsa_serve.errors import ModelError, RequestError

MAX_OUTPUT_CHARS = 16 * 2**20
# Appended to the last message to find where it ends; private-use characters, so not in real text.
_END_MARKER = "\uf8ff\ue5ad\uf8ff"

_Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template and the special tokens it may print.

    source: the Jinja text. special_tokens: "bos_token", "eos_token", ... -> text. max_chars: bound
    on what a render may produce. Raises ModelError when the text is not a Jinja template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        environment = _Environment(max_chars)
        try:
            self._template = environment.from_string(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template is not valid Jinja: line {error.lineno}: {error}"
            ) from None

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads."""
        return frozenset(self._variables)

    def render(
        self,
        messages: Sequence[_Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the messages as one prompt.

        add_generation_prompt: end with the header of an assistant message. continue_final_message:
        end inside the last message instead, so that the model goes on with it. variables: JSON
        scalars for variables that this template reads. Raises RequestError when they do not go
        together, or the template refuses the messages or knows no tools.
        """
        if not messages:
            raise RequestError("messages must not be empty", param="messages")
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other; "
                    "set add_generation_prompt to false",
                    param="continue_final_message",
                )
            messages = [*messages[:-1], _mark_end(messages[-1])]
        if tools and "tools" not in self._variables:
            raise RequestError(
                "the model's chat template knows no tools; describe them in the system message",
                param="tools",
            )
        context = {
            **self._special_tokens,
            **self._check_variables(variables or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(context)
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, context: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(context):
                num_chars += len(piece)
                if num_chars > self._max_chars:
                    raise _too_long(self._max_chars)
                pieces.append(piece)
        except RequestError:
            raise
        # A template is a program that the messages drive: it can raise anything.
        except Exception as error:
            raise RequestError(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error
        return "".join(pieces)

    def _check_variables(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        reserved = {*self._special_tokens, *_RESERVED}
        allowed = self._variables - reserved
        for name, value in variables.items():
            if name not in allowed:
                known = ", ".join(sorted(allowed)) or "none"
                raise RequestError(
                    f"the model's chat template has no variable {name!r} to set; it has: {known}",
                    param="chat_template_kwargs",
                )
            is_scalar = value is None or isinstance(value, str | int | float)
            if not is_scalar or (isinstance(value, float) and not math.isfinite(value)):
                raise RequestError(
                    f"chat_template_kwargs.{name} must be a string, a finite number, a boolean or "
                    f"null, got {type(value).__name__}",
                    param="chat_template_kwargs",
                )
        return variables


_RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training: print it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with the functions templates expect and without `'a' * 10**9`."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, max_chars: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        self._max_chars = max_chars
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                is_repeat = isinstance(value, str | list | tuple) and isinstance(times, int)
                if is_repeat and len(value) * times > self._max_chars:
                    raise _too_long(self._max_chars)
        elif not (abs(left) < 2**63 and abs(right) <= 64):
            raise _too_long(self._max_chars)
        return super().call_binop(context, operator, left, right)


def _too_long(max_chars: int) -> RequestError:
    return RequestError(
        f"the model's chat template makes more than {max_chars} characters of these messages",
        param="messages",
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes for HTML, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _mark_end(message: _Message) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        raise RequestError(
            "continue_final_message needs a last message whose content is text", param="messages"
        )
    return {**message, "content": content + _END_MARKER}


def _cut_at_mark(text: str) -> str:
    before, marker, _ = text.rpartition(_END_MARKER)
    if not marker:
        raise RequestError(
            "the model's chat template does not print the last message as it is, "
            "so it cannot be continued",
            param="continue_final_message",
        )
    return before
