"""What the benchmarks of the GPU engine share: prompts, options of the engine, results.

A result is one JSON object: what was run (`environment`), and what the benchmark adds. It is
written after every part, so that a run that is cut short leaves what it had.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens: a trial")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the engine, such as quantization=fp8; may be given again",
    )
    return parser


def engine_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE settings; values are JSON where they can be, else text.

    Raises SystemExit for a pair without "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SystemExit(f"--option takes NAME=VALUE, got {pair!r}")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options


def server_flags(options: dict[str, Any]) -> list[str]:
    """Return settings of the engine as flags of `nsa-serve serve`."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu"; auto is a GPU where torch sees one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_options(device: str, utilization: float | None = None) -> dict[str, Any]:
    """Return the settings that differ between devices: a CPU knows no share of GPU memory."""
    if device == "cpu":
        return {"device": "cpu", "page_memory": "1GiB"}
    return {"device": "cuda", "gpu_memory_utilization": utilization or 0.9}


def make_prompt(row: int, length: int, vocab_size: int, *, seed: str = "") -> list[int]:
    """Return random token ids: of one row and seed, a short prompt is the start of a long one.

    Rows and seeds do not share so much as a page. The last tokens, special ones, are left out.
    """
    rng = random.Random(f"{seed}/{row}")
    limit = vocab_size - max(16, vocab_size // 400)
    return [int(rng.random() * limit) for _ in range(length)]


def environment(commit: str | None = None) -> dict[str, Any]:
    """Return what a number depends on: versions, the GPU or CPU, the command and the commit."""
    has_gpu = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or _git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "device_name": torch.cuda.get_device_name() if has_gpu else "CPU",
    }


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_s(run: Callable[[], object]) -> float:
    """Return the seconds of one call, up to the end of what it left on the GPU."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def percentile(samples: Sequence[float], q: float) -> float | None:
    """Return the q-th percentile (0 to 100), linear between samples; None without samples."""
    if not samples:
        return None
    if len(samples) == 1:
        return samples[0]
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * q / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, whole or not, where it was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _git_commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
