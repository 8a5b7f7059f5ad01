"""How every bench here measures: CUDA graphs over rotated inputs, and the machine's ceilings.

A bench hands over one callable for each input set. All of them are captured, in turn, into one CUDA
graph, so that launch gaps are those of serving and no call finds its inputs in L2: the sets
together have to be larger than it (`num_sets`). Milliseconds are those of one call, by events
around a replay, the median over replays.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

Call = Callable[[], object]

# Bytes that the input sets of one measurement touch together: more than twice the 50 MB of L2.
ROTATED_BYTES = 128 * 1024**2
MAX_SETS = 32


@dataclass(frozen=True, slots=True)
class Timing:
    """ms: median of one call; spread: (slowest - fastest) / median over replays.

    how: "graph", "events: why capture failed", or "host" without a GPU, for trials.
    """

    ms: float
    spread: float
    how: str


def num_sets(touched_bytes: float) -> int:
    """Input sets to rotate among when one call touches that many bytes."""
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // max(1, int(touched_bytes)))))


def time_graph(calls: Sequence[Call], *, min_calls: int = 10, budget_s: float = 0.25) -> Timing:
    """Time one call of `calls`, which do the same work on different inputs.

    min_calls: calls a graph holds at least (fewer if one takes over 20 ms). budget_s: seconds of
    replays; at least 3 are made.
    """
    if not torch.cuda.is_available():
        return _time_host(calls[:2])
    for call in calls[:2]:
        call()  # compiles and tunes
    first_ms = _elapsed_ms(calls[0])
    if first_ms > 20:
        min_calls = 1
    rounds = max(1, -(-min_calls // len(calls)))
    graph = torch.cuda.CUDAGraph()
    how = "graph"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        run: Call = graph.replay
    except Exception as error:  # peers that read device values on the host cannot be captured
        torch.cuda.synchronize()
        how = f"events: {type(error).__name__}: {error}".splitlines()[0][:160]

        def run_all() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        run = run_all
    num_calls = rounds * len(calls)
    once_ms = max(_elapsed_ms(run), 1e-3)
    num_replays = int(min(50, max(3, budget_s * 1e3 / once_ms)))
    times = [_elapsed_ms(run) / num_calls for _ in range(num_replays)]
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / median, how)


def _time_host(calls: Sequence[Call]) -> Timing:
    """Time each call once by the host's clock."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / median, "host")


def kernel_times(call: Call, *, repeats: int = 3) -> list[tuple[str, float]]:
    """Milliseconds that each kernel of one call runs, in descending order, by the profiler."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = [
        (event.key, event.self_device_time_total / 1e3 / repeats)
        for event in profile.key_averages()
    ]
    return sorted(((n, ms) for n, ms in times if ms > 0), key=lambda item: -item[1])


def copy_bytes_per_s() -> float:
    """Bytes read plus written a second by a large device-to-device copy."""
    source = torch.randn(2 * 1024**3, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    # Not from a graph: there a copy is a node of its own kind, and slower.
    target.copy_(source)
    ms = min(_elapsed_ms(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() * source.element_size() / (ms * 1e-3)


def matmul_flops_per_s(size: int = 8192) -> float:
    """Floating-point operations a second of a large bf16 matrix product on random data."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    timing = time_graph([lambda: torch.mm(a, b, out=out)], min_calls=8)
    return 2 * size**3 / (timing.ms * 1e-3)


def environment() -> dict[str, Any]:
    """What a number depends on: versions, the GPU, the command and the commit if known."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit,
    }


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that all benches share."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sizes and few repeats")
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    return parser


def finish(name: str, results: dict[str, Any], *, out: Path | None, started: float) -> None:
    """Print the last line, JSON, and write it to `out`."""
    seconds = round(time.perf_counter() - started, 1)
    report = {"bench": name, **environment(), "seconds": seconds, **results}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _elapsed_ms(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
