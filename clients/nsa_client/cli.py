"""The `nsa-client` command: chat, complete, bench."""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_client.bench import BenchConfig, run_bench
from nsa_client.chat import run_chat, run_complete
from nsa_client.client import Client
from nsa_client.core import DEFAULT_BASE_URL
from nsa_client.errors import APIError

_SAMPLING: dict[str, type] = {
    "max-tokens": int,
    "temperature": float,
    "top-p": float,
    "top-k": int,
    "min-p": float,
    "repetition-penalty": float,
    "seed": int,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 success, 1 a request failed, 2 a wrong argument."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except APIError as error:
        sys.stderr.write(f"nsa-client: {error.message}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"nsa-client: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa-client", description="Talk to an OpenAI-compatible server, or measure it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chat = _add_command(commands, "chat", "converse in the terminal, or with lines from a pipe")
    chat.add_argument("--system", help="system prompt")
    _add_sampling(chat)
    chat.set_defaults(run=_chat)
    complete = _add_command(commands, "complete", "continue a text and write it as it comes")
    complete.add_argument("prompt", help="the text; - reads it from standard input")
    _add_sampling(complete)
    complete.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    complete.set_defaults(run=_complete)
    bench = _add_command(commands, "bench", "send many requests and report latency and throughput")
    _add_bench(bench)
    bench.set_defaults(run=_bench)
    return parser


def _add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    group = parser.add_argument_group("Server")
    group.add_argument("--url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    group.add_argument("--model", help="default: the first that the server lists")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file whose first line is the API key"
    )
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling (what is not given, the server decides)")
    for name, kind in _SAMPLING.items():
        group.add_argument(f"--{name}", type=kind, metavar="N")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    default = BenchConfig(vocab_size=1)
    load = parser.add_argument_group("Load")
    load.add_argument("--num-prompts", type=int, default=default.num_prompts, metavar="N")
    load.add_argument("--max-concurrency", type=int, metavar="N", help="default: no limit")
    load.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="requests/s at random (Poisson) times; default: as fast as the concurrency allows",
    )
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="before the clock")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and times")
    load.add_argument("--timeout", type=float, default=default.timeout_s, metavar="S")
    what = parser.add_argument_group("Requests")
    what.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    prompts = what.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    prompts.add_argument(
        "--vocab-size", type=int, metavar="N", help="random prompts of token ids below N"
    )
    what.add_argument(
        "--random-input-len", type=int, metavar="N", help="tokens a random prompt; default: 128"
    )
    what.add_argument("--output-len", type=int, default=default.output_len, metavar="N")
    what.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="let an answer end early; else it has exactly --output-len tokens",
    )
    what.add_argument("--temperature", type=float, default=0.0, metavar="N")
    what.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more request fields"
    )
    out = parser.add_argument_group("Report")
    out.add_argument("--json", action="store_true", help="the last line is the result as JSON")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key_file is None:
        return None
    lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{args.api_key_file}: the first line must be the API key")
    return str(lines[0].strip())


def _client(args: argparse.Namespace) -> Client:
    return Client(args.url, _api_key(args), model=args.model)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    values = {name.replace("-", "_"): None for name in _SAMPLING}
    values = {name: getattr(args, name) for name in values}
    return {name: value for name, value in values.items() if value is not None}


def _chat(args: argparse.Namespace) -> int:
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if is_interactive:
        # Importing it gives input() line editing and history; it is missing on some platforms.
        try:
            import readline  # noqa: F401
        except ImportError:
            sys.stderr.write("no line editing: this Python has no readline module\n")
    with _client(args) as client:
        return run_chat(
            client,
            input,
            sys.stdout,
            sys.stderr,
            system=args.system,
            is_interactive=is_interactive,
            **_sampling(args),
        )


def _complete(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    options = _sampling(args)
    if args.stop:
        options["stop"] = args.stop
    with _client(args) as client:
        run_complete(client, prompt, sys.stdout, **options)
    return 0


def _bench(args: argparse.Namespace) -> int:
    result = asyncio.run(run_bench(_bench_config(args)))
    sys.stdout.write(result.table() + "\n")
    if args.json:
        settings = {
            "endpoint": args.endpoint,
            "num_prompts": args.num_prompts,
            "max_concurrency": args.max_concurrency,
            "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        }
        sys.stdout.write(json.dumps(settings | result.to_dict(), allow_nan=False) + "\n")
    return 1 if result.num_failed else 0


def _bench_config(args: argparse.Namespace) -> BenchConfig:
    prompts = None
    if args.prompt_file is not None:
        if args.random_input_len is not None:
            raise ValueError("--random-input-len is for random prompts, not for --prompt-file")
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line for line in lines if line.strip())
        if not prompts:
            raise ValueError(f"{args.prompt_file} has no prompts; write one a line")
    return BenchConfig(
        base_url=args.url,
        api_key=_api_key(args),
        model=args.model,
        endpoint=args.endpoint,
        num_prompts=args.num_prompts,
        max_concurrency=args.max_concurrency,
        request_rate=args.request_rate,
        prompts=prompts,
        random_input_len=128 if args.random_input_len is None else args.random_input_len,
        vocab_size=args.vocab_size,
        output_len=args.output_len,
        ignore_eos=not args.stop_at_eos,
        temperature=args.temperature,
        seed=args.seed,
        num_warmups=args.num_warmups,
        timeout_s=args.timeout,
        extra_body=args.extra_body,
    )
