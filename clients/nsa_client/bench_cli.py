"""The flags of `bench`, and its report."""

import argparse
import asyncio
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from nsa_client.bench import run_bench
from nsa_client.bench_config import BenchConfig
from nsa_client.bench_stats import BenchResult
from nsa_client.plot import check_plot, write_plot
from nsa_client.progress import ProgressBar


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `run_bench_command` reads, beside the flags of the server."""
    default = BenchConfig()
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
    load.add_argument(
        "--burstiness",
        type=float,
        default=default.burstiness,
        metavar="K",
        help="of the request rate: 1 is Poisson, below it bursts, above it evenness",
    )
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="before the clock")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and times")
    load.add_argument("--timeout", type=float, default=default.timeout_s, metavar="S")
    _add_requests(parser, default)
    _add_report(parser)


def _add_requests(parser: argparse.ArgumentParser, default: BenchConfig) -> None:
    what = parser.add_argument_group("Requests")
    what.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    prompts = what.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    prompts.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="random prompts of token ids below N; default: ids of letters, asked of the server",
    )
    what.add_argument(
        "--random-input-len", type=int, metavar="N", help="tokens a random prompt; default: 128"
    )
    what.add_argument(
        "--random-prefix-len",
        type=int,
        metavar="N",
        help="tokens before them that all prompts share; default: 0",
    )
    what.add_argument(
        "--output-len",
        "--random-output-len",
        type=int,
        default=default.output_len,
        metavar="N",
        help="tokens an answer; default: %(default)s",
    )
    what.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="let an answer end early; else it has exactly --output-len tokens",
    )
    what.add_argument("--temperature", type=float, default=0.0, metavar="N")
    what.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="more request fields"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("Report")
    out.add_argument("--json", action="store_true", help="the last line is the result as JSON")
    out.add_argument(
        "--result-file", type=Path, metavar="FILE", help="write that JSON, indented, to a file"
    )
    out.add_argument(
        "--save-detailed", action="store_true", help="with the numbers of every request"
    )
    out.add_argument(
        "--goodput",
        nargs="+",
        type=_limit,
        default=[],
        metavar="METRIC:MS",
        help="count requests within these limits: ttft:200 tpot:50 e2el:2000",
    )
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies to a PNG")
    out.add_argument(
        "--no-progress", "--disable-tqdm", action="store_true", help="show no progress bar"
    )


def json_object(text: str) -> dict[str, Any]:
    """Read a flag's value that must be a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _limit(text: str) -> tuple[str, float]:
    metric, _, value = text.partition(":")
    try:
        return metric, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected METRIC:MS, got {text!r}") from None


def run_bench_command(args: argparse.Namespace, api_key: str | None) -> int:
    """Measure, report, and return the exit status: 1 when a request failed."""
    config = _config(args, api_key)
    if args.save_detailed and not (args.json or args.result_file):
        raise ValueError("--save-detailed needs --result-file or --json")
    if args.plot is not None:
        check_plot(args.plot)
    date = time.strftime("%Y%m%d-%H%M%S")
    result = asyncio.run(_run_with_progress(config, is_shown=not args.no_progress))
    sys.stdout.write(result.table() + "\n")
    values = _settings(config, date) | result.to_dict()
    if args.save_detailed:
        values |= result.details()
    if args.result_file is not None:
        args.result_file.write_text(
            json.dumps(values, allow_nan=False, indent=1) + "\n", encoding="utf-8"
        )
    if args.plot is not None:
        write_plot(result, args.plot, title=_title(config, result))
    if args.json:
        sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")
    return 1 if result.num_failed else 0


async def _run_with_progress(config: BenchConfig, *, is_shown: bool) -> BenchResult:
    if not is_shown:
        return await run_bench(config)
    bar = ProgressBar(config.num_prompts, sys.stderr)
    try:
        return await run_bench(config, on_record=bar.update)
    finally:
        bar.close()


def _settings(config: BenchConfig, date: str) -> dict[str, Any]:
    """Return the head of the JSON; an unlimited rate is the text "inf", as vLLM writes it."""
    return {
        "date": date,
        "endpoint": config.endpoint,
        "num_prompts": config.num_prompts,
        "max_concurrency": config.max_concurrency,
        "request_rate": config.request_rate if math.isfinite(config.request_rate) else "inf",
        "burstiness": config.burstiness,
    }


def _title(config: BenchConfig, result: BenchResult) -> str:
    load = []
    if math.isfinite(config.request_rate):
        load.append(f"{config.request_rate:g} requests/s")
    if config.max_concurrency is not None:
        load.append(f"at most {config.max_concurrency} at once")
    tokens_s = result.num_output_tokens / result.duration_s
    failed = f", {result.num_failed} failed" if result.num_failed else ""
    return (
        f"{result.model}: {len(result.completed)} requests{failed}, "
        f"{' and '.join(load) or 'all at once'}; {tokens_s:.4g} output tokens/s"
    )


def _config(args: argparse.Namespace, api_key: str | None) -> BenchConfig:
    prompts = None
    if args.prompt_file is not None:
        for flag in ("random_input_len", "random_prefix_len"):
            if getattr(args, flag) is not None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} is for random prompts, not for --prompt-file")
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line for line in lines if line.strip())
        if not prompts:
            raise ValueError(f"{args.prompt_file} has no prompts; write one a line")
    return BenchConfig(
        base_url=args.url,
        api_key=api_key,
        model=args.model,
        endpoint=args.endpoint,
        num_prompts=args.num_prompts,
        max_concurrency=args.max_concurrency,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        prompts=prompts,
        random_input_len=128 if args.random_input_len is None else args.random_input_len,
        random_prefix_len=args.random_prefix_len or 0,
        vocab_size=args.vocab_size,
        output_len=args.output_len,
        ignore_eos=not args.stop_at_eos,
        temperature=args.temperature,
        seed=args.seed,
        num_warmups=args.num_warmups,
        goodput=dict(args.goodput),
        timeout_s=args.timeout,
        extra_body=args.extra_body,
    )
