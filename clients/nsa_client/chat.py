"""A conversation in the terminal, and one completion: what `chat` and `complete` do."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, Unpack

from nsa_client.client import Client
from nsa_client.errors import APIError
from nsa_client.options import CompletionOptions
from nsa_client.types import ChatMessage
from nsa_client.write import write_stream

HELP = """\
/help               show this
/reset              forget the conversation (the system prompt stays)
/system [TEXT]      set the system prompt, or remove it, and forget the conversation
/undo               forget the last message and its answer
/retry              answer the last message again
/set [NAME VALUE]   show the sampling parameters, or set one; the value "default" unsets it
/save FILE          write the conversation to a new file, as JSON
/exit               leave; so does end of input (Ctrl-D)
A message of several lines stands between two lines of \"\"\", or has \\ at the end of its lines.
Ctrl-C stops the answer that is being written.
"""
SAMPLING: Mapping[str, Callable[[str], float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}
_QUOTES = '"""'


def run_complete(
    client: Client, prompt: str, out: TextIO, **options: Unpack[CompletionOptions]
) -> None:
    """Write the continuation of one prompt."""
    write_stream(client.stream(prompt, **options), out)


def run_chat(
    client: Client,
    read_line: Callable[[str], str],
    out: TextIO,
    err: TextIO,
    *,
    system: str | None = None,
    is_interactive: bool,
    **options: Any,
) -> int:
    """Converse until end of input and return the exit status.

    read_line: takes the prompt to show, returns a line, raises EOFError at the end. In a script
    (not interactive) the first failure ends the conversation with status 1; a person is told and
    may go on, without the message that failed.
    """
    chat = Chat(client, out, is_interactive=is_interactive, options=options)
    chat.set_system(system)
    if is_interactive:
        out.write(HELP)
    while True:
        try:
            text = read_message(read_line, "> " if is_interactive else "")
            if text == "/exit":
                return 0
            if text.startswith("/") and "\n" not in text:
                chat.command(text)
            elif text:
                chat.say(text)
        except (EOFError, KeyboardInterrupt):
            return 0
        except BrokenPipeError:
            raise
        except (APIError, ValueError, OSError) as error:
            err.write(f"error: {error}\n")
            if not is_interactive:
                return 1


def read_message(read_line: Callable[[str], str], prompt: str) -> str:
    """Return one message or command, which may have several lines.

    Raises EOFError at the end of input, ValueError when a message in quotes has no end there.
    """
    more = "." * (len(prompt) - 1) + prompt[-1:]
    line = read_line(prompt)
    if line.strip() == _QUOTES:
        lines: list[str] = []
        while True:
            try:
                line = read_line(more)
            except EOFError:
                raise ValueError(f"the input ended before the closing {_QUOTES}") from None
            if line.strip() == _QUOTES:
                return "\n".join(lines)
            lines.append(line)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read_line(more))
        except EOFError:
            break
    return "\n".join(lines).strip()


@dataclass(slots=True)
class Chat:
    """A conversation: its messages, its sampling parameters, and the commands of a person."""

    client: Client
    out: TextIO
    is_interactive: bool
    options: dict[str, Any]
    messages: list[ChatMessage] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Send a message and write the answer. A failed or empty-handed turn is forgotten."""
        question = ChatMessage(role="user", content=text)
        answer = write_stream(
            self.client.stream_chat([*self.messages, question], **self.options), self.out
        )
        if answer.is_interrupted and not answer.text:
            return
        self.messages += [question, ChatMessage(role="assistant", content=answer.text)]
        if self.is_interactive and (summary := answer.summary()):
            self.out.write(summary + "\n")

    def set_system(self, text: str | None) -> None:
        """Begin anew with a system prompt, or with none."""
        self.messages = [ChatMessage(role="system", content=text)] if text else []

    def command(self, line: str) -> None:
        """Do what a line that starts with / says. Raises ValueError for what it cannot do."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        commands: dict[str, Callable[[str], None]] = {
            "system": self.set_system,
            "set": self._set,
            "save": self._save,
        }
        bare: dict[str, Callable[[], None]] = {
            "help": lambda: _write(self.out, HELP),
            "reset": self._reset,
            "undo": lambda: _write(self.out, f"forgot: {self._undo()}\n"),
            "retry": self._retry,
        }
        if name in commands:
            commands[name](rest)
        elif name not in bare:
            raise ValueError(f"unknown command /{name}; /help lists the commands")
        elif rest:
            raise ValueError(f"/{name} takes nothing after it, got {rest!r}")
        else:
            bare[name]()

    def _reset(self) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _undo(self) -> str:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no message yet")
        question = self.messages[-2]["content"]
        assert isinstance(question, str)
        del self.messages[-2:]
        return question

    def _retry(self) -> None:
        before = list(self.messages)
        try:
            self.say(self._undo())
        except APIError:
            self.messages = before
            raise

    def _set(self, rest: str) -> None:
        if rest:
            name, value = self._setting(rest.split())
            self.options.pop(name, None)
            if value is not None:
                self.options[name] = value
        for name in SAMPLING:
            self.out.write(f"{name} {self.options.get(name, 'default')}\n")

    def _setting(self, words: list[str]) -> tuple[str, float | None]:
        name = words[0].replace("-", "_")
        if name not in SAMPLING or len(words) != 2:
            raise ValueError(f"expected /set NAME VALUE with a name of {', '.join(SAMPLING)}")
        if words[1] == "default":
            return name, None
        try:
            return name, SAMPLING[name](words[1])
        except ValueError:
            raise ValueError(f"{name} must be a number, got {words[1]!r}") from None

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("expected /save FILE")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        # "x": a conversation is not worth an old file that is overwritten by mistake.
        with Path(rest).expanduser().open("x", encoding="utf-8") as file:
            file.write(text + "\n")
        self.out.write(f"saved to {rest}\n")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
