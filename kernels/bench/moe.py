"""A mixture-of-experts layer against the matrix library, the grouped product and a dense layer.

    python kernels/bench/moe.py [--tune] [--tiny] [--rows 1 8 32 512 4096] [--out FILE.json]

The shape of the 27B preset: hidden 2560, 72 experts of width 1472, 6 a token, 2 shared. Times are
of a call from a CUDA graph over several layers and inputs, which L2 does not hold:

    layer   norm, routing, shared and routed experts, sum, as the decoder runs them
    early   the same, kernels of few rows launched before the one in front has ended
    route   norm and routing alone; experts: the routed experts and the sum alone
    loop    routed experts, two products of the matrix library for each expert that is used; which
            these are, and their rows, is known beforehand: a server would have to ask the device
    torch   routed experts by torch._grouped_mm, with the sort before and the sum after it
    dense   a dense MLP as wide as the experts of a token: 8 times 1472

`floor` is the larger of the weights of the distinct experts that are used (and router and shared
ones) over --bandwidth, and of the products over --flops. --tune times every candidate tile of both
products. Kernels are compiled first, by --workers processes (`--part i/n`: one share).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from linear import compile_only
from timing import Timing, finish, make_parser, time_graph
from torch import Tensor
from trial import start_trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nsa_kernels.gpu import moe
from nsa_kernels.gpu.linear import linear
from nsa_kernels.gpu.moe_decode import (
    MAX_FEW_ROWS,
    ExpertTile,
    expert_tile,
    experts_of_few,
    sum_experts,
)
from nsa_kernels.gpu.moe_prefill import (
    GroupedTile,
    experts_by_torch,
    experts_of_many,
    grouped_tiles,
)
from nsa_kernels.gpu.moe_route import sort_pairs
from nsa_kernels.gpu.pointwise import swiglu

EPS = 1e-6
ROWS = (1, 8, 32, 512, 4096)
NUM_LAYERS, NUM_INPUTS = 3, 4
# (block_n, slice_k, num_warps, num_stages, is_wide) of few rows, by the rows of x in a tile.
FEW_TILES: dict[int, list[tuple[Any, ...]]] = {
    8: [
        (32, 64, 4, 4),
        (16, 128, 4, 4),
        (16, 64, 4, 6),
        (32, 64, 4, 6),
        (32, 128, 4, 3),
        (32, 32, 4, 6),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 32, 8, 4),
        (64, 128, 4, 4, True),
        (64, 128, 4, 3, True),
        (64, 64, 4, 5, True),
    ],
    16: [
        (64, 64, 4, 3),
        (32, 64, 4, 4),
        (32, 64, 4, 3),
        (32, 128, 4, 3),
        (64, 32, 4, 4),
        (64, 32, 8, 3),
        (16, 128, 4, 4),
        (64, 128, 4, 4, True),
        (64, 128, 4, 3, True),
        (64, 64, 4, 5, True),
        (128, 64, 4, 4, True),
    ],
}
# (block_m, block_n, block_k, num_warps, num_stages) of many rows: gate_up, down.
GROUPED_TILES: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = (
    [
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 64, 8, 4),
        (128, 64, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
    ],
    [
        (64, 128, 64, 4, 4),
        (64, 128, 128, 4, 3),
        (64, 256, 64, 4, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
    ],
)

Tile = ExpertTile | GroupedTile


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a layer, by default those of the preset of 27B."""

    hidden: int = 2560
    width: int = 1472
    num_experts: int = 72
    top_k: int = 6
    num_shared: int = 2
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


# For a trial on the CPU; the interpreter is right in fp32 only.
TINY = Shape(hidden=64, width=32, num_experts=8, top_k=2, dtype=torch.float32, device="cpu")
TINY_ROWS = (1, 3, MAX_FEW_ROWS + 1)


class Layer:
    """Random weights of one layer on a device, of the scale that a decoder's have."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        hidden, width, experts = shape.hidden, shape.width, shape.num_experts
        dtype, device = shape.dtype, shape.device

        def some(*sizes: int) -> Tensor:
            values = torch.empty(sizes, dtype=dtype, device=device)
            return values if device == "meta" else values.normal_(0.0, sizes[-1] ** -0.5)

        self.norm = (torch.ones(hidden, dtype=dtype, device=device), EPS)
        self.router = some(experts, hidden)
        self.gate_up = some(experts, 2 * width, hidden)
        self.down = some(experts, hidden, width)
        self.shared_gate_up = some(2 * shape.num_shared * width, hidden)
        self.shared_down = some(hidden, shape.num_shared * width)
        dense = (shape.top_k + shape.num_shared) * width
        self.dense_gate_up, self.dense_down = some(2 * dense, hidden), some(hidden, dense)
        self.counters = torch.zeros(MAX_FEW_ROWS, dtype=torch.int32, device=device)

    def rows(self, num_rows: int) -> Tensor:
        """Random inputs of the layer."""
        shape = self.shape
        return torch.randn(num_rows, shape.hidden, dtype=shape.dtype, device=shape.device)

    def route(self, x: Tensor, *, early: bool = False) -> moe.Routing:
        return moe.route(
            x, self.norm, self.router, self.shape.top_k, counters=self.counters, launch_pdl=early
        )

    def run(self, x: Tensor, *, early: bool = False) -> Tensor:
        """The whole layer, as `TritonMoE` runs it."""
        routing = self.route(x, early=early)
        hidden = linear(routing.hidden, self.shared_gate_up, swiglu=True)
        x = linear(hidden, self.shared_down, residual=x)
        return moe.routed_experts(
            routing, self.gate_up, self.down, residual=x, out=x, launch_pdl=early
        )

    def dense(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.dense_gate_up, norm=self.norm, swiglu=True)
        return linear(hidden, self.dense_down, residual=x)

    def experts(self, routing: moe.Routing, residual: Tensor) -> Tensor:
        return moe.routed_experts(routing, self.gate_up, self.down, residual=residual)

    def by_torch(self, routing: moe.Routing, residual: Tensor) -> Tensor:
        pairs, ends = sort_pairs(routing.expert_ids, self.shape.num_experts)
        parts = experts_by_torch(routing.hidden, pairs, ends, self.gate_up, self.down)
        return sum_experts(
            parts,
            routing.expert_ids,
            routing.weights,
            residual=residual,
            out=torch.empty_like(residual),
            launch_pdl=False,
        )

    def loop(self, routing: moe.Routing, residual: Tensor) -> Callable[[], Tensor]:
        """Two products for each expert that is used; reads which these are, once, here."""
        used = []
        for expert in routing.expert_ids.unique().tolist():
            tokens, ranks = (routing.expert_ids == expert).nonzero(as_tuple=True)
            weights = routing.weights[tokens, ranks].unsqueeze(1).to(self.shape.dtype)
            used.append((expert, tokens, weights))

        def run() -> Tensor:
            out = residual.clone()
            for expert, tokens, weights in used:
                both = routing.hidden.index_select(0, tokens) @ self.gate_up[expert].t()
                part = swiglu(both) @ self.down[expert].t()
                out.index_add_(0, tokens, part * weights)
            return out

        return run

    def product(self, routing: moe.Routing, which: int, tile: Tile) -> Tensor:
        """Both products, of which number `which` has this tile and the other that of the table."""
        x, ids, dtype = routing.hidden, routing.expert_ids, self.shape.dtype
        if isinstance(tile, ExpertTile):
            few = [expert_tile(len(x), dtype)] * 2
            few[which] = tile
            return experts_of_few(
                x, ids, self.gate_up, self.down, tiles=(few[0], few[1]), launch_pdl=False
            )
        many = list(grouped_tiles(ids.numel(), self.shape.num_experts, dtype))
        many[which] = tile
        pairs, ends = sort_pairs(ids, self.shape.num_experts)
        return experts_of_many(x, pairs, ends, self.gate_up, self.down, tiles=(many[0], many[1]))


def candidates(num_rows: int, which: int) -> list[Tile]:
    """Every tile to try for a product of so many rows, that of the table first."""
    if num_rows > MAX_FEW_ROWS:
        shape = Shape()
        num_pairs = num_rows * shape.top_k
        table: Tile = grouped_tiles(num_pairs, shape.num_experts, shape.dtype)[which]
        found: list[Tile] = [GroupedTile(*sizes) for sizes in GROUPED_TILES[which]]
    else:
        few = expert_tile(num_rows, Shape().dtype)
        table, found = few, [ExpertTile(few.block_m, *s) for s in FEW_TILES[few.block_m]]
    return list(dict.fromkeys([table, *found]))


def jobs(rows: list[int], *, tune: bool) -> list[tuple[int, int, Tile | None, bool]]:
    """(rows, product, tile, early) of what the bench runs; tile None: the whole layer."""
    found: list[tuple[int, int, Tile | None, bool]] = []
    for num_rows in rows:
        found.append((num_rows, 0, None, False))
        if num_rows <= MAX_FEW_ROWS:
            found.append((num_rows, 0, None, True))
        if tune:
            found += [
                (num_rows, w, tile, False) for w in (0, 1) for tile in candidates(num_rows, w)
            ]
    return found


def compile_share(work: list[tuple[int, int, Tile | None, bool]], part: str) -> None:
    """Compile number i, i + n, ... of `work`, where part is "i/n"."""
    index, count = (int(number) for number in part.split("/"))
    with compile_only():
        shape = Shape(device="meta")
        layer = Layer(shape)
        for num_rows, which, tile, early in work[index::count]:
            x = torch.empty(num_rows, shape.hidden, dtype=shape.dtype, device="meta")
            try:
                if tile is None:
                    layer.run(x, early=early)
                    layer.dense(x)
                    sort_pairs(layer.route(x).expert_ids, shape.num_experts)
                else:
                    layer.product(layer.route(x), which, tile)
            except Exception as error:  # the bench will meet it again, and say so
                print(f"{num_rows} {tile}: {type(error).__name__}: {error}"[:300], flush=True)


def compile_all(arguments: list[str], num_workers: int) -> float:
    """Compile in so many processes; return the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, __file__, *arguments]
    workers = [
        subprocess.Popen([*command, "--part", f"{i}/{num_workers}"]) for i in range(num_workers)
    ]
    for worker in workers:
        worker.wait()
    return time.perf_counter() - started


class Inputs:
    """Layers and rows of one measurement, and where the rows go."""

    def __init__(self, layers: list[Layer], num_rows: int) -> None:
        # Many rows use all experts: one set of them is enough.
        num_inputs = NUM_INPUTS if num_rows <= MAX_FEW_ROWS else 1
        self.sets = [(layer, layer.rows(num_rows)) for _ in range(num_inputs) for layer in layers]
        self.routings = [layer.route(x) for layer, x in self.sets]
        used = [routing.expert_ids.unique().numel() for routing in self.routings]
        self.num_used = sum(used) / len(used)

    def us(self, make: Callable[[Layer, Tensor, moe.Routing], Callable[[], object]]) -> float:
        """Microseconds of a call, made for each of the sets."""
        calls = [
            make(layer, x, routing)
            for (layer, x), routing in zip(self.sets, self.routings, strict=True)
        ]
        timing: Timing = time_graph(calls, min_calls=len(calls), budget_s=0.02)
        if timing.how not in ("graph", "host"):
            print(f"not in a graph: {timing.how}")
        return timing.ms * 1e3


def floor_us(
    shape: Shape, num_rows: int, num_used: float, args: argparse.Namespace
) -> tuple[float, float]:
    """(least time of the layer, of its routed experts): weights read once, or products."""
    expert = 3 * shape.hidden * shape.width
    rest = shape.num_shared * expert + shape.num_experts * shape.hidden
    found = []
    for weights, products in (
        (num_used * expert + rest, num_rows * (shape.top_k * expert + rest)),
        (num_used * expert, num_rows * shape.top_k * expert),
    ):
        found.append(max(2 * weights / args.bandwidth, 2 * products / args.flops) * 1e6)
    return found[0], found[1]


def measure(layers: list[Layer], num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time everything for so many rows, and print a line."""
    inputs = Inputs(layers, num_rows)
    ways: dict[str, Callable[[Layer, Tensor, moe.Routing], Callable[[], object]]] = {
        "layer": lambda layer, x, _: lambda: layer.run(x),
        "route": lambda layer, x, _: lambda: layer.route(x),
        "experts": lambda layer, x, routing: lambda: layer.experts(routing, x),
        "loop": lambda layer, x, routing: layer.loop(routing, x),
        "torch": lambda layer, x, routing: lambda: layer.by_torch(routing, x),
        "dense": lambda layer, x, _: lambda: layer.dense(x),
    }
    if num_rows <= MAX_FEW_ROWS and layers[0].shape.device == "cuda":
        ways["early"] = lambda layer, x, _: lambda: layer.run(x, early=True)
    us: dict[str, float | None] = {}
    for name, make in ways.items():
        try:
            us[name] = round(inputs.us(make), 2)
        except Exception as error:
            print(f"{name} of {num_rows} rows: {type(error).__name__}: {error}"[:300])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            us[name] = None
    layer_floor, experts_floor = floor_us(layers[0].shape, num_rows, inputs.num_used, args)
    record = {
        "rows": num_rows,
        "distinct_experts": round(inputs.num_used, 1),
        "us": us,
        "floor_us": round(layer_floor, 2),
        "experts_floor_us": round(experts_floor, 2),
        "of_floor": {
            name: round((layer_floor if name in ("layer", "early") else experts_floor) / value, 3)
            for name, value in us.items()
            if value and name not in ("route", "dense")
        },
    }
    shown = " ".join(f"{name} {value}" for name, value in us.items())
    print(
        f"rows {num_rows:5} experts {inputs.num_used:5.1f}: us {shown}; floor {layer_floor:.1f}, "
        f"of experts {experts_floor:.1f}; reached {record['of_floor']}",
        flush=True,
    )
    return record


def tune(layers: list[Layer], num_rows: int) -> list[dict[str, Any]]:
    """Time every candidate tile of both products, and print the fastest."""
    inputs = Inputs(layers, num_rows)
    records = []
    for which, name in enumerate(("gate_up", "down")):
        times: list[tuple[float, Tile]] = []
        for tile in candidates(num_rows, which):
            try:
                us = inputs.us(
                    lambda layer, _, routing, w=which, t=tile: (  # type: ignore[misc]
                        lambda: layer.product(routing, w, t)
                    )
                )
            except Exception as error:
                print(f"{name} {num_rows} {tile}: {error}"[:200])
                torch.cuda.synchronize()
                continue
            times.append((us, tile))
        table = times[0][0] if times else float("nan")
        ranked = sorted(times, key=lambda item: item[0])
        shown = ", ".join(f"{tile} {us:.2f}" for us, tile in ranked[:4])
        print(f"{name} rows {num_rows}: both products with {shown}; table {table:.2f}", flush=True)
        records.append(
            {
                "product": name,
                "rows": num_rows,
                "us": {str(tile): round(us, 2) for us, tile in ranked},
            }
        )
    return records


def check(layers: list[Layer]) -> None:
    """Compare few rows, many rows and the matrix library; raise SystemExit where they differ."""
    for num_rows in (8, MAX_FEW_ROWS + 1):
        x = layers[0].rows(num_rows)
        routing, nothing = layers[0].route(x), torch.zeros_like(x)
        expected = layers[0].loop(routing, nothing)().double()
        for name in ("experts", "by_torch"):
            actual = getattr(layers[0], name)(routing, nothing).double()
            error = float((actual - expected).norm() / expected.norm())
            if not error < 2e-2:
                raise SystemExit(f"{name} of {num_rows} rows is wrong: relative error {error:.3g}")


@torch.inference_mode()
def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that runs on the GPU."""
    torch.manual_seed(0)
    layers = [Layer(TINY if args.tiny else Shape()) for _ in range(1 if args.tiny else NUM_LAYERS)]
    check(layers)
    tuned: list[dict[str, Any]] = []
    if args.tune:
        for num_rows in args.rows:
            tuned += tune(layers, num_rows)
    return {"rows": [measure(layers, num_rows, args) for num_rows in args.rows], "tuned": tuned}


def main() -> None:
    """Compile, tune if asked, measure, and print lines and JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--tiny", action="store_true", help="a trial of a tiny layer, no GPU")
    parser.add_argument("--tune", action="store_true", help="time every candidate tile")
    parser.add_argument("--bandwidth", type=float, default=4.25e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=800e12, help="bf16 products, a second")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--part", help="i/n: only compile this share")
    args = parser.parse_args()
    started = time.perf_counter()
    args.rows = args.rows or list(TINY_ROWS if args.tiny else (1, 32, 4096) if args.quick else ROWS)
    if args.tiny:
        start_trial()
        finish("moe", run_all(args), out=args.out, started=started)
        return
    if args.part:
        compile_share(jobs(args.rows, tune=args.tune), args.part)
        return
    compile_s = compile_all(sys.argv[1:], args.workers)
    print(f"compiled in {compile_s:.1f} s")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: kernels were compiled, nothing is measured")
    results = run_all(args)
    finish("moe", {"compile_s": round(compile_s, 1), **results}, out=args.out, started=started)


if __name__ == "__main__":
    main()
