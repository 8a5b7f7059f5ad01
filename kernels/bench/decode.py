"""Decode: one token a row, the whole operator against dense attention and fla's NSA.

    python kernels/bench/decode.py [--quick] [--batches 1 8] [--contexts 8192] [--skip fla]
                                   [--cache-dtype fp8]
    python kernels/bench/decode.py --kv-per-branch [--tiny]

Everything runs from a CUDA graph over rotated input sets (timing.py). "floor" is the time that the
bytes a decode step has to move take at the copy bandwidth of the same run; the peers' floor is
that of dense attention. The bar is the fastest dense peer; with an FP8 cache there is none.
--kv-per-branch runs another table, of the paper's own heads (branches.py).
"""

import functools
import time
from dataclasses import asdict, replace
from typing import Any

import branches
import peers
import torch
from problem import (
    CACHE_DTYPES,
    GEOMETRIES,
    Heads,
    Problem,
    decode_bytes,
    dense_decode_bytes,
    make_problem,
)
from timing import (
    copy_bytes_per_s,
    finish,
    kernel_times,
    make_parser,
    matmul_flops_per_s,
    num_sets,
    time_graph,
)

BATCHES = [1, 8, 16, 32]
CONTEXTS = [8192, 32768, 65536]
# The paper's own model: keys wider than values.
PAPER_HEADS = Heads(head_dim=192)


def decode_problem(geometry: str, heads: Heads, batch: int, context: int) -> Problem:
    """A decode step after which every row has `context` tokens."""
    spec = GEOMETRIES[geometry]
    return make_problem(
        spec,
        heads,
        starts=[context - 1] * batch,
        query_lens=[1] * batch,
        num_sets=num_sets(decode_bytes(spec, heads, batch, context)),
    )


def measure_operator(
    geometry: str,
    heads: Heads,
    batch: int,
    context: int,
    *,
    bytes_per_s: float,
    budget_s: float,
    with_kernels: bool,
    problem: Problem | None = None,
) -> dict[str, Any]:
    """Time the operator on one shape, and set it beside its byte floor."""
    problem = problem or decode_problem(geometry, heads, batch, context)
    timing = time_graph(problem.calls(), budget_s=budget_s)
    moved = decode_bytes(GEOMETRIES[geometry], heads, batch, context)
    row: dict[str, Any] = {
        "geometry": geometry,
        "cache_dtype": str(heads.cache_dtype or heads.dtype),
        "head_dims": [heads.head_dim, heads.v_head_dim],
        "batch": batch,
        "context": context,
        **asdict(timing),
        "floor_bytes": moved,
        "floor_ms": moved / bytes_per_s * 1e3,
        "of_floor": moved / bytes_per_s * 1e3 / timing.ms,
        "num_sets": len(problem.sets),
    }
    if with_kernels:
        row["kernels_ms"] = _kernels(problem)
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print one shape: the operator, its floor, and every peer with the speed-up over it."""
    dims = "/".join(map(str, row["head_dims"]))
    text = (
        f"{row['geometry']:6} {dims:8} b{row['batch']:<3} {row['context']:7} "
        f"{row['ms'] * 1e3:9.1f} {row['floor_ms'] * 1e3:8.1f} {row['of_floor']:6.0%} "
    )
    bar = row.get("bar")
    text += f"{bar['speedup']:6.2f}x vs {bar['name']}" if bar else ""
    for name, result in row.get("peers", {}).items():
        text += f" | {name} "
        text += f"{result['ms'] * 1e3:.1f}" if "ms" in result else "-"
    print(text + ("" if row["how"] == "graph" else f"  ({row['how']})"), flush=True)


def main() -> None:
    """Measure all shapes, print the table and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out, or 'peers'")
    parser.add_argument("--cache-dtype", default="auto", choices=CACHE_DTYPES)
    parser.add_argument("--kernels", action="store_true", help="also profile each shape's kernels")
    parser.add_argument(
        "--kv-per-branch", action="store_true", help="192/128 and 128/128, K/V per branch"
    )
    parser.add_argument("--tiny", action="store_true", help="a trial of --kv-per-branch, no GPU")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.kv_per_branch or args.tiny:
        results = branches.run(
            args.batches, args.contexts, skip=args.skip, quick=args.quick, tiny=args.tiny
        )
        finish("decode-branches", results, out=args.out, started=started)
        return
    args.batches, args.contexts = args.batches or BATCHES, args.contexts or CONTEXTS
    if args.quick:
        args.batches, args.contexts = [1, 8], [8192, 65536]
    budget_s = 0.08 if args.quick else 0.2
    if args.cache_dtype != "auto":
        # Theirs is of 16 bits: no bar for another one.
        args.skip = [*args.skip, "peers"]
    heads = Heads(cache_dtype=CACHE_DTYPES[args.cache_dtype])
    bytes_per_s, flops_per_s = copy_bytes_per_s(), matmul_flops_per_s()
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {flops_per_s / 1e12:.0f} TFLOP/s")
    peer_errors = {} if "peers" in args.skip else peers.check_decode_peers(heads)
    print("peers' relative error:", peer_errors)
    print("geometry, head dims, batch, context, us, floor us, floor / us, bar | peers in us")
    rows = []
    operator = functools.partial(
        measure_operator, bytes_per_s=bytes_per_s, budget_s=budget_s, with_kernels=args.kernels
    )
    for batch in args.batches:
        for context in sorted(args.contexts):
            dense: dict[str, dict[str, Any]] = {}
            for geometry in args.geometries:
                problem = decode_problem(geometry, heads, batch, context)
                row = operator(geometry, heads, batch, context, problem=problem)
                if not dense and "peers" not in args.skip:
                    builders = peers.dense_decode(heads, problem, batch, context)
                    for name, build in builders.items():
                        if name not in args.skip:
                            dense[name] = peers.measure(build, budget_s=budget_s)
                del problem
                row["peers"] = dict(dense)
                bar = peers.fastest(dense)
                if bar is not None:
                    row["bar"] = {"name": bar[0], "ms": bar[1], "speedup": bar[1] / row["ms"]}
                    moved = dense_decode_bytes(heads, batch, context)
                    row["bar"]["of_floor"] = moved / bytes_per_s * 1e3 / bar[1]
                if geometry == "fla" and not {"fla", "peers"} & set(args.skip):
                    build_fla = functools.partial(peers.fla_decode, heads, batch, context)
                    row["peers"]["fla"] = peers.measure(build_fla, budget_s=budget_s)
                rows.append(row)
                print_row(row)
                torch.cuda.empty_cache()
    if "paper" in args.geometries:
        batch, context = args.batches[-1], max(args.contexts)
        paper_heads = replace(PAPER_HEADS, cache_dtype=heads.cache_dtype)
        rows.append(operator("paper", paper_heads, batch, context))
        print_row(rows[-1])
    results = {
        "copy_bytes_per_s": bytes_per_s,
        "bf16_matmul_flops_per_s": flops_per_s,
        "peer_relative_errors": peer_errors,
        "rows": rows,
    }
    finish("decode", results, out=args.out, started=started)


def _kernels(problem: Problem) -> dict[str, float] | str:
    """Milliseconds of each kernel, over rotated inputs; a message where profiling fails."""
    calls = problem.calls()

    def all_sets() -> None:
        for call in calls:
            call()

    try:
        times = kernel_times(all_sets)
    except Exception as error:  # no profiler on this machine
        return f"{type(error).__name__}: {error}"
    return {name: ms / len(calls) for name, ms in times}


if __name__ == "__main__":
    main()
