"""A conversation in the terminal, and one completion: what `nsa-client chat` and `complete` do."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO, Unpack

from nsa_client.client import Client, Stream
from nsa_client.errors import APIError
from nsa_client.options import ChatOptions, CompletionOptions
from nsa_client.types import ChatMessage

HELP = """\
/help    show this
/reset   forget the conversation (the system prompt stays)
/exit    leave; so does end of input (Ctrl-D)
Ctrl-C   stop the answer that is being written
"""

# Everything that can move the cursor or send a terminal a command; tab and newline stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_stream(stream: Stream, out: TextIO) -> str:
    """Write the pieces as they come and return the whole text. Ctrl-C ends it early, quietly.

    On a terminal, control characters that a model may produce are shown as U+FFFD.
    """
    is_terminal = out.isatty()
    pieces = []
    with suppress(KeyboardInterrupt), stream:
        for chunk in stream:
            pieces.append(chunk.text)
            out.write(_CONTROL.sub("\ufffd", chunk.text) if is_terminal else chunk.text)
            out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


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
    **options: Unpack[ChatOptions],
) -> int:
    """Converse until end of input and return the exit status.

    read_line: takes the prompt to show, returns a line, raises EOFError at the end. In a script
    (not interactive) the first failed answer ends the conversation with status 1; a person is told
    and may go on, without the message that failed.
    """
    opening = [] if system is None else [ChatMessage(role="system", content=system)]
    messages = list(opening)
    if is_interactive:
        out.write(HELP)
    while True:
        try:
            line = read_line("> " if is_interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.startswith("/"):
            if line == "/exit":
                return 0
            if line == "/reset":
                messages = list(opening)
            elif line == "/help":
                out.write(HELP)
            else:
                err.write(f"unknown command {line.split()[0]}; /help lists the commands\n")
            continue
        if not line:
            continue
        question = ChatMessage(role="user", content=line)
        try:
            answer = write_stream(client.stream_chat([*messages, question], **options), out)
        except APIError as error:
            err.write(f"error: {error.message}\n")
            if not is_interactive:
                return 1
            continue
        messages += [question, ChatMessage(role="assistant", content=answer)]
