"""The `nsa-client` command, and the client half of `nsa-serve`: chat, complete, bench."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_client.bench_cli import add_bench_flags, json_object, run_bench_command
from nsa_client.chat import SAMPLING, Chat, run_chat, run_complete
from nsa_client.client import Client
from nsa_client.core import DEFAULT_BASE_URL
from nsa_client.errors import APIError

COMMANDS: Mapping[str, str] = {
    "chat": "converse in the terminal, or with lines from a pipe",
    "complete": "continue a text and write it as it comes",
    "bench": "send many requests and report latency and throughput",
}
_HISTORY_LINES = 1000
_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED, _EXIT_PIPE = 1, 2, 130, 141


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "nsa-client",
    url: str = DEFAULT_BASE_URL,
    api_key: str | None = None,
) -> int:
    """Run the command line. Exit status: 0 success, 1 a request failed, 2 a wrong argument.

    url: the server when no flag names one; api_key: its key, sent to no other server.
    """
    args = make_parser(prog, url).parse_args(argv)
    try:
        key = _read_key(args.api_key_file)
        if key is None and args.url == url:
            key = api_key
        status: int = args.run(args, key)
        # Here, where a reader that left early can still be answered.
        sys.stdout.flush()
        return status
    except APIError as error:
        sys.stderr.write(f"{prog}: {error.message}\n")
        return _EXIT_FAILED
    except BrokenPipeError:
        # Else the interpreter complains when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_PIPE
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return _EXIT_USAGE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def make_parser(prog: str, url: str) -> argparse.ArgumentParser:
    """Return the parser; `run` is the function of the command."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Talk to an OpenAI-compatible server, or measure it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = _add_command(commands, "chat", url, _chat)
    chat.add_argument(
        "-q", "--quick", metavar="MESSAGE", help="write one answer and leave; - reads a whole pipe"
    )
    chat.add_argument("--system", "--system-prompt", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--history-file", type=Path, metavar="FILE", help="keep the lines typed, for later chats"
    )
    _add_sampling(chat)

    complete = _add_command(commands, "complete", url, _complete)
    complete.add_argument("prompt", help="the text; - reads it from standard input")
    _add_sampling(complete)
    complete.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")

    add_bench_flags(_add_command(commands, "bench", url, _bench))
    return parser


def _add_command(
    commands: Any, name: str, url: str, run: Callable[[argparse.Namespace, str | None], int]
) -> argparse.ArgumentParser:
    summary = COMMANDS[name]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("Server")
    group.add_argument("--url", "--base-url", default=url, help="default: %(default)s")
    group.add_argument("--model", help="default: the first that the server lists")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file whose first line is the API key"
    )
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling (what is not given, the server decides)")
    for name, kind in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N")
    group.add_argument(
        "--extra-body", type=json_object, metavar="JSON", help="more fields of the request"
    )


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: the first line must be the API key")
    return lines[0].strip()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in (*SAMPLING, "extra_body")}
    return {name: value for name, value in values.items() if value is not None}


def _chat(args: argparse.Namespace, api_key: str | None) -> int:
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty() and args.quick is None
    if args.history_file is not None and not is_interactive:
        raise ValueError("--history-file is for a conversation in a terminal; leave it out")
    with Client(args.url, api_key, model=args.model) as client:
        if args.quick is not None:
            message = sys.stdin.read() if args.quick == "-" else args.quick
            chat = Chat(client, sys.stdout, is_interactive=False, options=_options(args))
            chat.set_system(args.system)
            chat.say(message)
            return 0
        with _line_editing(args.history_file, is_wanted=is_interactive):
            return run_chat(
                client,
                input,
                sys.stdout,
                sys.stderr,
                system=args.system,
                is_interactive=is_interactive,
                **_options(args),
            )


@contextmanager
def _line_editing(history_file: Path | None, *, is_wanted: bool) -> Iterator[None]:
    """Give `input` line editing and a history; the history is kept in a file where one is named."""
    if not is_wanted:
        yield
        return
    try:
        # Importing it is what changes `input`; some platforms do not have it.
        import readline
    except ImportError:
        sys.stderr.write("no line editing: this Python has no readline module\n")
        yield
        return
    if history_file is None:
        yield
        return
    # What people type is theirs alone.
    history_file.touch(mode=0o600)
    readline.read_history_file(history_file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        readline.write_history_file(history_file)


def _complete(args: argparse.Namespace, api_key: str | None) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    options = _options(args)
    if args.stop:
        options["stop"] = args.stop
    with Client(args.url, api_key, model=args.model) as client:
        run_complete(client, prompt, sys.stdout, **options)
    return 0


def _bench(args: argparse.Namespace, api_key: str | None) -> int:
    return run_bench_command(args, api_key)
