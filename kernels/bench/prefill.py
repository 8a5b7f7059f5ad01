"""Prefill: one whole sequence, the whole operator against dense causal attention and fla's NSA.

    python kernels/bench/prefill.py [--quick] [--contexts 8192] [--chunk 8192] [--skip fla cudnn]

TFLOP/s counts what the three branches need (problem.py), "dense equivalent" what causal dense
attention would have needed in the same time. With --chunk N only the last N tokens of each context
are prefilled, over a cache that holds the others; there is no peer for that.

    python kernels/bench/prefill.py --compare [--quick] [--models a b] [--cases 8k 32k 64k 4x2k]

compares two ways to score blocks, stage by stage, for the models of benchmarks/gpu_models.py, and
tiles for each stage unless --quick; see prefill_compare.py. --workers processes compile first.
"""

import argparse
import functools
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import peers
import prefill_compare
import torch
from problem import GEOMETRIES, Heads, dense_prefill_flops, make_problem, prefill_flops
from timing import (
    finish,
    kernel_times,
    make_parser,
    matmul_flops_per_s,
    time_graph,
)

CONTEXTS = [8192, 32768, 65536]


def measure_operator(
    geometry: str, heads: Heads, context: int, *, chunk: int | None, budget_s: float
) -> dict[str, Any]:
    """Time the operator on one sequence and split the time among its kernels."""
    spec = GEOMETRIES[geometry]
    length = min(chunk or context, context)
    start = context - length
    problem = make_problem(spec, heads, starts=[start], query_lens=[length])
    calls = problem.calls()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timing = time_graph(calls, min_calls=4, budget_s=budget_s)
    flops = prefill_flops(spec, heads, context, start)
    row: dict[str, Any] = {
        "geometry": geometry,
        "head_dims": [heads.head_dim, heads.v_head_dim],
        "context": context,
        "chunk": length,
        **asdict(timing),
        "flops": flops,
        "flops_per_s": flops / (timing.ms * 1e-3),
        "workspace_bytes": torch.cuda.max_memory_allocated() - before,
    }
    if start == 0:
        row["dense_flops_per_s"] = dense_prefill_flops(heads, context) / (timing.ms * 1e-3)
    try:
        row["kernels_ms"] = dict(kernel_times(calls[0]))
    except Exception as error:  # no profiler on this machine
        row["kernels_ms"] = f"{type(error).__name__}: {error}"
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print one shape, its peers, and a line for each kernel that takes 1% or more."""
    text = f"{row['geometry']:6} {row['context']:7} {row['chunk']:7} {row['ms']:9.2f} ms "
    text += f"{row['flops_per_s'] / 1e12:6.1f} TFLOP/s"
    if "dense_flops_per_s" in row:
        text += f" ({row['dense_flops_per_s'] / 1e12:.0f} dense equivalent)"
    text += f" {row['workspace_bytes'] / 2**20:.0f} MiB"
    for name, result in row.get("peers", {}).items():
        text += f" | {name} "
        text += (
            f"{result['ms']:.2f} ms ({result['ms'] / row['ms']:.2f}x)" if "ms" in result else "-"
        )
    print(text + ("" if row["how"] == "graph" else f"  ({row['how']})"), flush=True)
    if isinstance(row["kernels_ms"], dict):
        total = sum(row["kernels_ms"].values())
        for name, ms in row["kernels_ms"].items():
            if ms >= 0.01 * total:
                print(f"    {name[:60]:60} {ms:9.3f} ms {ms / total:5.0%}")
    else:
        print(f"    no kernel times: {row['kernels_ms']}")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what --compare understands."""
    models, cases = prefill_compare.MODELS, prefill_compare.CASES
    parser.add_argument("--compare", action="store_true", help="two ways to score blocks")
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--cases", nargs="+", default=list(cases), choices=cases)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--part", help="i/n: only compile this share")


def run_compare(args: argparse.Namespace, started: float) -> None:
    """Compile and measure what --compare asks for, or compile one worker's share of it."""
    tune = not args.quick
    if args.part is not None:
        prefill_compare.compile_share(args.models, args.cases, args.part, tune=tune)
        return
    compile_s = prefill_compare.compile_all(sys.argv[1:], args.workers)
    print(f"compiled in {compile_s:.1f} s", flush=True)
    results = prefill_compare.compare(args.models, args.cases, tune=tune)
    finish("prefill-compare", {"compile_s": compile_s, **results}, out=args.out, started=started)


def main() -> None:
    """Measure all shapes, print the table and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--chunk", type=int, help="prefill the last CHUNK tokens only")
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out, or 'peers'")
    add_compare_arguments(parser)
    args = parser.parse_args()
    started = time.perf_counter()
    if args.compare:
        run_compare(args, started)
        return
    if args.quick:
        args.contexts = [8192, 32768]
    if args.chunk is not None:
        args.skip.append("peers")
    budget_s = 0.1 if args.quick else 0.5
    heads = Heads()
    flops_per_s = matmul_flops_per_s()
    print(f"bf16 matmul {flops_per_s / 1e12:.0f} TFLOP/s")
    rows = []
    # Ascending, so that fla tunes itself on the smallest size: its keys leave the length out.
    for context in sorted(args.contexts):
        dense: dict[str, dict[str, Any]] = {}
        for geometry in args.geometries:
            row = measure_operator(geometry, heads, context, chunk=args.chunk, budget_s=budget_s)
            torch.cuda.empty_cache()
            if not dense and "peers" not in args.skip:
                for backend in peers.BACKENDS:
                    if backend not in args.skip:
                        build = functools.partial(peers.sdpa_prefill, backend, heads, context)
                        dense[backend] = peers.measure(build, budget_s=budget_s)
            row["peers"] = dict(dense)
            if geometry == "fla" and not {"fla", "peers"} & set(args.skip):
                build = functools.partial(peers.fla_prefill, heads, context)
                row["peers"]["fla"] = peers.measure(build, budget_s=budget_s)
            rows.append(row)
            print_row(row)
    results = {"bf16_matmul_flops_per_s": flops_per_s, "rows": rows}
    finish("prefill", results, out=args.out, started=started)


if __name__ == "__main__":
    main()
