"""Decode cost against context length, set beside the model of the paper: s / d + 1536 tokens read.

    python kernels/bench/context.py [--quick] [--batch 8] [--out FILE.json] [--plot FILE.png]

The time is fitted as a + b * bytes(s), where bytes(s) is what s / d compressed entries and
S * block_size + w tokens weigh: a is the fixed cost, 1 / b the bandwidth at which more context is
read. The plot shows the measured points, the fit, and dense attention.
"""

import functools
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from decode import measure_operator
from problem import GEOMETRIES, Heads
from timing import copy_bytes_per_s, finish, make_parser

CONTEXTS = [4096 * 2**i for i in range(8)]


def model_bytes(geometry: str, heads: Heads, batch: int, context: int) -> float:
    """Bytes of the paper's count of tokens: s / d compressed, S blocks, w in the window."""
    spec = GEOMETRIES[geometry]
    fixed = spec.num_selected_blocks * spec.block_size + spec.window_size
    return float(batch * (context / spec.cmp_stride + fixed) * heads.kv_bytes_per_token)


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares of milliseconds over model bytes: a (fixed_ms), 1 / b, and R squared."""
    moved = np.array([row["model_bytes"] for row in rows])
    ms = np.array([row["ms"] for row in rows])
    slope, fixed = np.polyfit(moved, ms, 1)
    residual = ms - (slope * moved + fixed)
    spread = float(((ms - ms.mean()) ** 2).sum())
    return {
        "fixed_ms": float(fixed),
        "ms_per_byte": float(slope),
        "bytes_per_s": float(1e3 / slope),
        "r_squared": 1.0 - float((residual**2).sum()) / spread,
    }


def plot(path: Path, rows: list[dict[str, Any]], fitted: dict[str, float], batch: int) -> None:
    """Draw time over context on two logarithmic axes."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")

    contexts = [row["context"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.loglog(contexts, [row["ms"] for row in rows], "o", label="NSA, measured")
    line = [fitted["fixed_ms"] + fitted["ms_per_byte"] * row["model_bytes"] for row in rows]
    label = f"{fitted['fixed_ms'] * 1e3:.0f} us + (s/d + 1536) at "
    label += f"{fitted['bytes_per_s'] / 1e12:.2f} TB/s"
    axes.loglog(contexts, line, "-", label=label)
    axes.loglog(contexts, [row["floor_ms"] for row in rows], ":", label="NSA, byte floor")
    dense = [(row["context"], row["dense"]["ms"]) for row in rows if "ms" in row["dense"]]
    if dense:
        axes.loglog(*zip(*dense, strict=True), "s--", label="dense (torch flash, packed)")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("one decode step of one layer, ms")
    axes.set_title(f"{torch.cuda.get_device_name()}, batch {batch}, 64 / 4 heads of 128, bf16")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measure all contexts, fit, plot, print the table and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--geometry", default="paper", choices=GEOMETRIES)
    parser.add_argument("--plot", type=Path, help="PNG; default: beside --out")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.quick:
        args.contexts = args.contexts[::2]
    heads, bytes_per_s = Heads(), copy_bytes_per_s()
    budget_s = 0.08 if args.quick else 0.2
    print("context, us, floor us, floor / us, dense us")
    rows = []
    for context in sorted(args.contexts):
        row = measure_operator(
            args.geometry,
            heads,
            args.batch,
            context,
            bytes_per_s=bytes_per_s,
            budget_s=budget_s,
            with_kernels=False,
        )
        torch.cuda.empty_cache()
        row["model_bytes"] = model_bytes(args.geometry, heads, args.batch, context)
        build = functools.partial(
            peers.sdpa_decode, "flash", heads, args.batch, context, packed=True
        )
        row["dense"] = peers.measure(build, budget_s=budget_s)
        rows.append(row)
        dense_us = row["dense"].get("ms", float("nan")) * 1e3
        print(
            f"{context:7} {row['ms'] * 1e3:9.1f} {row['floor_ms'] * 1e3:8.1f} "
            f"{row['of_floor']:6.0%} {dense_us:9.1f}",
            flush=True,
        )
    results: dict[str, Any] = {"batch": args.batch, "copy_bytes_per_s": bytes_per_s, "rows": rows}
    if len(rows) > 2:
        fitted = results["fit"] = fit(rows)
        print(
            f"fit: {fitted['fixed_ms'] * 1e3:.1f} us + bytes at "
            f"{fitted['bytes_per_s'] / 1e12:.2f} TB/s, R^2 {fitted['r_squared']:.4f}"
        )
        target = args.plot or (args.out.with_suffix(".png") if args.out else None)
        if target is not None:
            try:
                plot(target, rows, fitted, args.batch)
            except ImportError as error:
                print(f"no plot: {error}")
    finish("context", results, out=args.out, started=started)


if __name__ == "__main__":
    main()
