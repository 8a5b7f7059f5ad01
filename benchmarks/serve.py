"""Serving under load, over HTTP: random arrivals at several rates, and many streams at once.

    python benchmarks/serve.py [--model a|b] [--rates 4 8 16 24 32] [--seconds 12] [--out FILE]
                               [--plot FILE.png] [--skip sweep equality] [--tiny]

Starts `nsa-serve serve` itself, with random weights. The sweep: Poisson arrivals, prompts of 512 to
16k tokens (log-uniform) that share nothing, 128 tokens of output, greedy, streamed. Per rate:
throughput, time to the first token, time between tokens, and goodput: requests/s that have their
first token within --ttft-ms, and the others within --itl-ms each on average. The default server
runs at every rate; one without chunked prefill, and one without asynchronous scheduling, at
--compare-rates. A rate at which the answers take twice as long as the arrivals ends the sweep.

Equality: --streams requests at once, then the same ones after each other, without a prefix cache:
no request may fail, and the tokens are compared, in bfloat16 and in float32.

Referee: aiperf 0.13 (pip install aiperf==0.13) measures the same server from its own process:

    nsa-serve serve FOLDER --load-format dummy &
    aiperf profile -m NAME --url http://127.0.0.1:8000 --endpoint-type completions --streaming \\
        --tokenizer FOLDER --request-rate 8 --request-count 96 --isl 2048 --osl 128 \\
        --extra-inputs ignore_eos:true --output-artifact-dir OUT --ui none

with FOLDER of benchmarks/gpu_models.py; its tokenizer is all that aiperf reads of it.
benchmarks/referee_tools.py runs the same command against the default model on a CPU.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_common import (
    device_options,
    engine_options,
    environment,
    make_parser,
    resolve_device,
    server_flags,
    write_result,
)
from gpu_models import MODELS, write_model
from gpu_server import RunningServer, log_tail, running_server
from serve_stats import compare_outputs, make_prompts, summarize

from nsa_client.bench import BenchConfig, run_bench
from nsa_client.errors import APIError
from nsa_client.raw_stream import post_stream
from nsa_client.sse import SSEDecoder

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no chunked prefill": {"enable_chunked_prefill": False},
    "no async scheduling": {"async_scheduling": False},
}
RATES = {"a": (4.0, 8.0, 16.0, 24.0, 32.0), "b": (0.5, 1.0, 2.0, 4.0, 6.0)}


def run_rate(server: RunningServer, rate: float, options: Any) -> dict[str, Any]:
    """Send requests at a rate and return the figures."""
    count = max(options.min_requests, round(rate * options.seconds))
    config = BenchConfig(
        base_url=server.url,
        model=server.model,
        num_prompts=count,
        request_rate=rate,
        prompts=make_prompts(
            count,
            options.min_len,
            options.max_len,
            vocab_size=server.info["model"]["vocab_size"],
            seed=f"rate {rate}",
        ),
        output_len=options.output_len,
    )
    result = asyncio.run(run_bench(config))
    figures = summarize(result, ttft_s=options.ttft_ms / 1e3, itl_s=options.itl_ms / 1e3)
    return {"rate": rate, **figures}


def warm_up(server: RunningServer, options: Any) -> None:
    """Send a few requests at once, of all lengths, that are not measured."""
    vocab_size = server.info["model"]["vocab_size"]
    prompts = make_prompts(
        8, options.min_len, options.max_len, vocab_size=vocab_size, seed="warm-up"
    )
    config = BenchConfig(
        base_url=server.url, model=server.model, num_prompts=8, prompts=prompts, output_len=16
    )
    result = asyncio.run(run_bench(config))
    if result.num_failed:
        errors = result.to_dict()["error_counts"]
        raise SystemExit(f"warm-up requests failed: {errors}\n{log_tail(server.log)}")


def sweep(folder: Path, base: dict[str, Any], options: Any, result: dict[str, Any]) -> None:
    """Measure every configuration at its rates into the result."""
    for name in options.configs:
        rates = options.rates if name == "default" else options.compare_rates
        settings = {**base, **CONFIGS[name]}
        log = folder / f"{name.replace(' ', '-')}.log"
        with running_server(folder / options.model, server_flags(settings), log=log) as server:
            print(f"{name}: healthy after {server.healthy_s:.1f} s", flush=True)
            warm_up(server, options)
            for rate in rates:
                run = {"config": name, **run_rate(server, rate, options)}
                result["sweep"].append(run)
                show(run)
                write_result(options.out, result)
                if run["duration_s"] > 2 * max(options.seconds, run["num_requests"] / rate):
                    print(f"{name}: saturated at {rate:g} requests/s", flush=True)
                    break


def show(run: dict[str, Any]) -> None:
    """Print a run of the sweep."""

    def ms(name: str) -> str:
        return "-" if run[name] is None else f"{run[name]:.1f}"

    print(
        f"{run['config']} at {run['rate']:g}/s: {run['requests_per_s']:.2f} requests/s, good "
        f"{run['good_requests_per_s']:.2f}; {run['output_tokens_per_s']:.0f} output and "
        f"{run['total_tokens_per_s']:.0f} tokens/s; ttft {ms('ttft_p50_ms')} / "
        f"{ms('ttft_p99_ms')} ms, itl {ms('itl_p50_ms')} / {ms('itl_p99_ms')} ms; "
        f"{run['num_failed']} failed, client at {run['client_cpu_share']:.0%} of a core",
        flush=True,
    )


async def stream_token_ids(url: str, body: bytes) -> list[int]:
    """Return the token ids of one streamed completion. Raises APIError or ValueError."""
    stream = await post_stream(f"{url}/v1/completions", body, {}, timeout_s=600.0)
    data = b"".join(piece for _, piece in stream.arrivals)
    if stream.status != 200:
        raise ValueError(f"HTTP {stream.status}: {data[:200]!r}")
    token_ids: list[int] = []
    events = SSEDecoder().feed(data)
    if not events or events[-1].data != "[DONE]":
        raise ValueError(f"the stream ended before [DONE]: {data[-200:]!r}")
    for event in events[:-1]:
        chunk = json.loads(event.data)
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        for choice in chunk["choices"]:
            token_ids += choice["token_ids"] or []
    return token_ids


async def stream_all(
    url: str, bodies: Sequence[bytes], *, concurrency: int
) -> tuple[list[list[int]], list[str]]:
    """Return the token ids of every request, empty where it failed, and the errors."""
    slots = asyncio.Semaphore(concurrency)
    errors: list[str] = []

    async def send(body: bytes) -> list[int]:
        async with slots:
            try:
                return await stream_token_ids(url, body)
            except (APIError, LookupError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])
                return []

    outputs = await asyncio.gather(*(send(body) for body in bodies))
    return list(outputs), errors


def equality(folder: Path, base: dict[str, Any], options: Any, result: dict[str, Any]) -> None:
    """Compare many streams at once with the same ones after each other, into the result."""
    for dtype in options.dtypes:
        settings = {**base, "dtype": dtype, "enable_prefix_caching": False}
        log = folder / f"equality-{dtype}.log"
        with running_server(folder / options.model, server_flags(settings), log=log) as server:
            prompts = make_prompts(
                options.streams,
                options.min_len,
                options.equality_len,
                vocab_size=server.info["model"]["vocab_size"],
                seed="equality",
            )
            common = {
                "model": server.model,
                "max_tokens": options.stream_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            bodies = [json.dumps({**common, "prompt": prompt}).encode() for prompt in prompts]
            print(f"{dtype}: healthy after {server.healthy_s:.1f} s", flush=True)
            start = time.perf_counter()
            together, errors = asyncio.run(
                stream_all(server.url, bodies, concurrency=options.streams)
            )
            middle = time.perf_counter()
            print(f"{dtype}: {len(bodies)} at once in {middle - start:.1f} s", flush=True)
            alone, more = asyncio.run(
                stream_all(server.url, bodies[: options.serial], concurrency=1)
            )
            end = time.perf_counter()
        run = {
            "dtype": dtype,
            "num_streams": len(bodies),
            "num_failed": len(errors) + len(more),
            "errors": sorted({*errors, *more})[:5],
            "together_s": middle - start,
            "alone_s": end - middle,
            **compare_outputs(together[: len(alone)], alone),
        }
        result["equality"].append(run)
        write_result(options.out, result)
        print(
            f"{dtype}: {run['num_streams']} streams, {run['num_failed']} failed, "
            f"{run['equal_requests']:.1%} of {run['num_requests']} requests equal, "
            f"{run['equal_tokens']:.1%} of the tokens before a difference "
            f"({run['num_distinct']} distinct); together "
            f"{run['together_s']:.1f} s, one by one {run['alone_s']:.1f} s",
            flush=True,
        )


def write_plot(runs: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the sweep; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return False
    panels = (
        ("Throughput", "output tokens/s", ("output_tokens_per_s",)),
        ("Goodput", "good requests/s", ("good_requests_per_s",)),
        ("Time to first token", "ms", ("ttft_p50_ms", "ttft_p99_ms")),
        ("Time between tokens", "ms", ("itl_p50_ms", "itl_p99_ms")),
    )
    colors = dict(zip(CONFIGS, ("#2563a8", "#c2452d", "#3d8b5f"), strict=True))
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axis, (name, unit, figures) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for config, color in colors.items():
            rows = [run for run in runs if run["config"] == config]
            for figure_name, style in zip(figures, ("-", "--"), strict=False):
                points = [(r["rate"], r[figure_name]) for r in rows if r[figure_name] is not None]
                label = config + (f" {figure_name.split('_')[1]}" if len(figures) > 1 else "")
                if points:
                    xs, ys = zip(*points, strict=True)
                    axis.plot(xs, ys, style, marker="o", markersize=4, color=color, label=label)
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_xlabel("requests/s that arrive")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    return True


def add_arguments(parser: Any) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", choices=["a", "b"], default="a")
    parser.add_argument("--rates", type=float, nargs="+", help="requests/s of the default server")
    parser.add_argument("--compare-rates", type=float, nargs="+", help="of the other servers")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals at each rate")
    parser.add_argument("--min-requests", type=int, default=16)
    parser.add_argument("--min-len", type=int, default=512)
    parser.add_argument("--max-len", type=int, default=16384)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--itl-ms", type=float, default=50.0)
    parser.add_argument("--streams", type=int, default=256, help="at once, in the comparison")
    parser.add_argument("--serial", type=int, default=256, help="of them, run again one by one")
    parser.add_argument("--stream-tokens", type=int, default=64)
    parser.add_argument("--equality-len", type=int, default=2048, help="longest prompt there")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--skip", nargs="+", choices=["sweep", "equality"], default=[])
    parser.add_argument("--plot", type=Path, help="draw the sweep to this PNG")


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    if options.tiny:
        options.seconds, options.min_requests, options.output_len = 2.0, 4, 6
        options.min_len, options.max_len, options.equality_len = 8, 100, 60
        options.streams, options.serial, options.stream_tokens = 12, 12, 6
        options.rates, options.compare_rates = [4.0], [4.0]
    options.rates = options.rates or RATES[options.model]
    options.compare_rates = options.compare_rates or options.rates[1:4:2]
    model = MODELS[options.model]
    base = {
        **device_options(resolve_device(options.device)),
        "load_format": "dummy",
        "max_model_len": options.max_len + options.output_len + options.stream_tokens,
        **engine_options(options.option),
    }
    result: dict[str, Any] = {
        "bench": "gpu-serve",
        **environment(options.commit),
        "model": model.name,
        "title": model.title,
        "settings": base,
        "seconds_of_arrivals": options.seconds,
        "prompt_lens": [options.min_len, options.max_len],
        "output_len": options.output_len,
        "ttft_ms": options.ttft_ms,
        "itl_ms": options.itl_ms,
        "sweep": [],
        "equality": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / options.model, options.model, is_tiny=options.tiny)
        if "sweep" not in options.skip:
            sweep(folder, base, options, result)
        if "equality" not in options.skip:
            equality(folder, base, options, result)
    if options.plot is not None and result["sweep"]:
        write_plot(result["sweep"], options.plot, model.title)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
