"""The linear layers of a decode step, against PyTorch and against reading the weights.

    python kernels/bench/linear.py [--tune2] [--models A B] [--rows 1 8 32] [--out FILE.json]
    python kernels/bench/linear.py --against FILE.json

Every layer of two models, with what is fused into it, from a CUDA graph over rotated weights that
L2 does not hold: `ours` as the engine runs it (`choose_config`, `starts_early`), `torch` the matrix
library with separate kernels around it, `floor` the bytes of the weights over --bandwidth. `l2`:
ours where the weights are in L2. The chain is the four linears of a decoder layer in turn, 16
layers in one graph, per layer: `table` as the engine runs it, then all of them started early and
none.

--tune2 (or --tune) times every candidate instead, with the start that the engine gives that layer,
prints the fastest, runs the chain of the fastest, too, and then says what the table loses against
them. Names: `gemv PAIRS x unroll x warps`, `gemm BLOCK_N x block_k x warps / stages`, and that of
the skinny kernel, `BLOCK_N x slice_k x warps / stages`.

--against says the same of the table as it is now and an earlier result of --tune2, without a GPU.

Kernels are compiled first, by --workers processes (`--part i/n` compiles one share and ends).
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import finish, make_parser, num_sets, time_graph
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nsa_kernels.gpu.gemm import GEMM_ROW_CLASSES, GemmConfig
from nsa_kernels.gpu.gemv import LANES_K, GemvConfig, can_gemv
from nsa_kernels.gpu.linear import (
    LinearConfig,
    choose_config,
    linear,
    linear_by_torch,
    starts_early,
)
from nsa_kernels.gpu.linear_tile import Rotary
from nsa_kernels.gpu.skinny import MAX_FOLDED_NORM_ROWS, SkinnyConfig, row_class

NUM_LAYERS = 16
EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
TUNED_ROWS = (1, 4, 8, 16, 32)
# Weights of a measurement from L2 are at most so large: half of an H200's.
L2_BYTES = 25e6
# (block_n, slice_k, num_warps, num_stages) of the skinny kernel, by class of rows.
SKINNY_TILES = {
    8: [
        (16, 128, 4, 3),
        (16, 128, 4, 4),
        (16, 128, 8, 2),
        (16, 128, 8, 3),
        (16, 128, 16, 2),
        (16, 256, 2, 4),
        (16, 256, 4, 2),
        (16, 256, 4, 3),
        (16, 256, 8, 2),
        (16, 64, 4, 6),
        (32, 64, 4, 4),
        (32, 128, 4, 3),
        (32, 128, 8, 2),
        (64, 64, 4, 3),
    ],
    16: [
        (16, 128, 4, 4),
        (16, 128, 8, 3),
        (16, 256, 4, 3),
        (16, 64, 4, 5),
        (32, 64, 4, 4),
        (32, 128, 4, 3),
        (64, 64, 4, 3),
    ],
    32: [(16, 64, 4, 4), (16, 64, 8, 3), (32, 64, 4, 4), (64, 64, 4, 3)],
}
# (block_n, block_k, num_warps, num_stages) of gemm, by class of rows, and of which of them the norm
# is tried inside, too.
GEMM_TILES = {
    16: [(64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3)],
    32: [(64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3)],
}
FOLDED_GEMM_TILES = ((64, 128, 4, 4), (64, 256, 4, 3), (32, 256, 4, 3))
# (pairs, unroll, num_warps) of gemv, for one row and for more.
GEMV_TILES = [(1, 4, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (2, 8, 2), (8, 2, 4)]
GEMV_TILES_OF_ROWS = [(1, 1, 1), (1, 2, 1), (2, 2, 2), (4, 2, 4)]
NUM_SMS, MIN_SPLIT_STEPS = 132, 4
# What a choice may lose against the fastest that was measured before it is worth a line.
LOSS = 0.02


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: weight [num_weights, num_in], and the name of what is fused."""

    name: str
    num_weights: int
    num_in: int
    fused: str
    num_rotated: int = 0
    head_dim: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_weights, self.num_in

    @property
    def weight_bytes(self) -> int:
        return 2 * self.num_weights * self.num_in

    @property
    def num_out(self) -> int:
        return self.num_weights // 2 if self.fused == "norm+swiglu" else self.num_weights


MODELS = {
    "A": (
        Layer("A.qkvg", 2400, 2048, "norm+rotary", 34, 64),
        Layer("A.o", 2048, 2048, "residual"),
        Layer("A.gate_up", 16384, 2048, "norm+swiglu"),
        Layer("A.down", 2048, 8192, "residual"),
        Layer("A.head", 128256, 2048, "norm+logits"),
    ),
    "B": (
        Layer("B.qkvg", 9408, 4096, "norm+rotary", 68, 128),
        Layer("B.o", 4096, 8192, "residual"),
        Layer("B.gate_up", 28672, 4096, "norm+swiglu"),
        Layer("B.down", 4096, 14336, "residual"),
        Layer("B.head", 128256, 4096, "norm+logits"),
    ),
}


class Inputs:
    """What a layer takes beside its weight, for M rows, in bf16 on `device`."""

    def __init__(self, layer: Layer, num_rows: int, device: str) -> None:
        def some(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        self.x = some(num_rows, layer.num_in)
        norm = (some(layer.num_in), EPS) if "norm" in layer.fused else None
        rotary = None
        if "rotary" in layer.fused:
            positions = torch.arange(num_rows, dtype=torch.int32, device=device)
            cos, sin = some(4096, layer.head_dim), some(4096, layer.head_dim)
            rotary = Rotary(cos, sin, positions, layer.num_rotated, layer.head_dim, is_settled=True)
        residual = some(num_rows, layer.num_out) if "residual" in layer.fused else None
        self.norm, self.rotary, self.residual = norm, rotary, residual
        self.swiglu = "swiglu" in layer.fused
        self.dtype = torch.float32 if "logits" in layer.fused else torch.bfloat16

    def ours(
        self,
        weight: Tensor,
        config: LinearConfig | None,
        *,
        x: Tensor | None = None,
        launch_pdl: bool | None = None,
    ) -> Tensor:
        return linear(
            self.x if x is None else x,
            weight,
            norm=self.norm,
            residual=self.residual,
            swiglu=self.swiglu,
            rotary=self.rotary,
            out_dtype=self.dtype,
            config=config,
            launch_pdl=launch_pdl,
        )

    def by_torch(self, weight: Tensor, *, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return linear_by_torch(
            x, weight, None, self.norm, self.residual, self.swiglu, self.rotary, self.dtype
        )


def table_config(layer: Layer, num_rows: int) -> LinearConfig | None:
    """The configuration that `linear` would choose."""
    config = choose_config(num_rows, layer.num_weights, layer.num_in, torch.bfloat16)
    if isinstance(config, SkinnyConfig) and "norm" not in layer.fused:
        return replace(config, fold_norm=True)  # the same without a norm, and by one name
    return config


def candidates(layer: Layer, num_rows: int) -> list[LinearConfig]:
    """Every configuration to try, that of the table first."""
    found: list[LinearConfig] = []
    default, has_norm = table_config(layer, num_rows), "norm" in layer.fused
    if default is not None:
        found.append(default)
    if isinstance(default, SkinnyConfig) and has_norm:
        found.append(replace(default, fold_norm=not default.fold_norm))
    if can_gemv(num_rows, layer.num_weights, layer.num_in, torch.bfloat16):
        for pairs, unroll, num_warps in GEMV_TILES if num_rows == 1 else GEMV_TILES_OF_ROWS:
            if layer.num_in % (unroll * LANES_K) == 0:
                found.append(GemvConfig(pairs, unroll, num_warps, early=False))
    size = row_class(num_rows)
    # One of the heads' dozen waves of programs is like another.
    skinny_tiles = SKINNY_TILES[size] if "logits" not in layer.fused else []
    for tile in [*skinny_tiles, (32, 64, 4, 4)]:
        found.append(SkinnyConfig(*tile, fold_norm=not has_norm or size <= MAX_FOLDED_NORM_ROWS))
        if has_norm and layer.num_weights < NUM_SMS * 64 and size <= MAX_FOLDED_NORM_ROWS:
            found.append(SkinnyConfig(*tile, fold_norm=False))
    gemm_size = next(size for size in GEMM_ROW_CLASSES if size >= num_rows)
    for block_n, block_k, num_warps, num_stages in GEMM_TILES[gemm_size]:
        tile = (block_n, block_k, num_warps, num_stages)
        # As many programs as keep all multiprocessors busy, and twice that.
        num_tiles = -(-layer.num_weights // block_n)
        wave = 1 << (max(1, NUM_SMS // num_tiles) - 1).bit_length()
        most = max(1, layer.num_in // block_k // MIN_SPLIT_STEPS)
        for splits in {min(most, wave), min(most, 2 * wave) if num_tiles < 2 * NUM_SMS else 1}:
            found.append(GemmConfig(*tile, splits))
            if has_norm and tile in FOLDED_GEMM_TILES:
                found.append(GemmConfig(*tile, splits, fold_norm=True))
    return list(dict.fromkeys(found))


@contextmanager
def compile_only() -> Iterator[None]:
    """Let kernel launches compile and not run, so that inputs may be without memory."""
    if not torch.cuda.is_available():
        import offline

        with offline.capture():
            yield
        return
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


def jobs(layers: list[Layer], rows: list[int], *, tune: bool) -> list[tuple[Layer, int, Any, Any]]:
    """(layer, rows, configuration, launch_pdl) of every kernel that the bench will run, once."""
    found: dict[Any, tuple[Layer, int, Any, Any]] = {}
    for layer, num_rows in itertools.product(layers, rows):
        default = table_config(layer, num_rows)
        for config in candidates(layer, num_rows) if tune else [default]:
            if config is None:
                continue
            # One kernel does for all rows of a class.
            size = row_class(num_rows)
            if isinstance(config, GemvConfig):
                size = num_rows
            elif isinstance(config, GemmConfig):
                size = max(16, size)
            has_chain = not layer.name.endswith("head")
            engine = starts_early(num_rows, torch.empty(layer.shape, device="meta"))
            for launch_pdl in (False, True) if has_chain else (engine,):
                found.setdefault(
                    (layer, size, config, launch_pdl), (layer, num_rows, config, launch_pdl)
                )
    return list(found.values())


def compile_share(work: list[tuple[Layer, int, Any, Any]], part: str) -> None:
    """Compile the kernels number i, i + n, ... of `work`, where part is "i/n"."""
    index, count = (int(number) for number in part.split("/"))
    with compile_only():
        for layer, num_rows, config, launch_pdl in work[index::count]:
            weight = torch.empty(layer.shape, dtype=torch.bfloat16, device="meta")
            try:
                Inputs(layer, num_rows, "meta").ours(weight, config, launch_pdl=launch_pdl)
            except Exception as error:  # the bench will meet it again, and say so
                print(f"{layer.name} {num_rows} {config}: {type(error).__name__}: {error}"[:300])


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


def time_us(call: Any, weights: list[Tensor]) -> float:
    """Microseconds of call(weight), in a graph over all weights."""
    calls = [(lambda weight=weight: call(weight)) for weight in weights]
    is_large = weights[0].numel() > 64e6
    timing = time_graph(calls, min_calls=4 if is_large else 16, budget_s=0.005)
    if timing.how != "graph":
        print(f"not in a graph: {timing.how}")
    return timing.ms * 1e3


def describe(config: LinearConfig | None) -> str:
    """A configuration in a few characters: its kernel and the numbers of its constructor."""
    if config is None:
        return "torch"
    if isinstance(config, GemvConfig):
        early = " early" if config.early else ""
        return f"gemv {config.pairs}x{config.unroll}x{config.num_warps}{early}"
    if isinstance(config, GemmConfig):
        tile = f"gemm {config.block_n}x{config.block_k}x{config.num_warps}/{config.num_stages}"
        return f"{tile} split {config.splits}{' norm inside' if config.fold_norm else ''}"
    apart = "" if config.fold_norm else " norm apart"
    return f"{config.block_n}x{config.slice_k}x{config.num_warps}/{config.num_stages}{apart}"


def make_weights(layer: Layer) -> list[Tensor]:
    """As many weights as L2 cannot hold."""
    scale = layer.num_in**-0.5
    return [
        torch.randn(layer.shape, dtype=torch.bfloat16, device="cuda") * scale
        for _ in range(num_sets(layer.weight_bytes))
    ]


def tune_layer(layer: Layer, weights: list[Tensor], rows: list[int]) -> list[dict[str, Any]]:
    """Time every candidate as the engine would start it; print the three fastest of each rows."""
    records: list[dict[str, Any]] = []
    for num_rows in rows:
        inputs = Inputs(layer, num_rows, "cuda")
        times: dict[str, float] = {}
        for config in candidates(layer, num_rows):
            try:
                times[describe(config)] = time_us(
                    lambda w, c=config, i=inputs: i.ours(w, c), weights
                )
            except Exception as error:
                print(f"{layer.name} {num_rows} {describe(config)}: {error}"[:200])
                torch.cuda.synchronize()
        times["torch"] = time_us(inputs.by_torch, weights)
        ranked = sorted(times, key=times.__getitem__)
        shown = ", ".join(f"{name} {times[name]:.2f}" for name in ranked[:3])
        default = times.get(describe(table_config(layer, num_rows)), float("nan"))
        print(f"{layer.name:10} M {num_rows:3}: {shown}; table {default:.2f}", flush=True)
        records.append(
            {
                "layer": layer.name,
                "rows": num_rows,
                "us": {name: round(times[name], 3) for name in ranked},
            }
        )
    return records


def compare_choices(tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the table chooses now against the fastest of each record of `tune_layer`.

    loss: time of the choice over the best, less 1; None if the choice was not measured.
    """
    layers = {layer.name: layer for model in MODELS.values() for layer in model}
    found = []
    for record in tuned:
        layer, num_rows = layers[record["layer"]], record["rows"]
        us: dict[str, float] = {}
        for name, value in record["us"].items():
            # Results of older versions have a prefetch that is no more, and no norm apart.
            name = name.replace(" no prefetch", "")
            if "norm" not in layer.fused:
                name = name.removesuffix(" norm apart")
            us[name] = min(value, us.get(name, value))
        choice, best = describe(table_config(layer, num_rows)), min(us, key=us.__getitem__)
        loss = round(us[choice] / us[best] - 1, 4) if choice in us else None
        found.append(
            {"layer": layer.name, "rows": num_rows, "choice": choice, "best": best, "loss": loss}
        )
    return found


def print_losses(choices: list[dict[str, Any]]) -> None:
    """Print the choices that lose more than LOSS, or are not known, and a summary."""
    known = [choice["loss"] for choice in choices if choice["loss"] is not None]
    for choice in choices:
        loss = choice["loss"]
        if loss is None or loss > LOSS:
            shown = "not measured" if loss is None else f"{100 * loss:+.1f} %"
            at = f"{choice['layer']} M {choice['rows']}"
            print(f"table at {at}: {choice['choice']}, {shown} against {choice['best']}")
    if known:
        mean, worst = sum(known) / len(known), max(known)
        print(f"table: {100 * mean:.2f} % over the best on average, {100 * worst:.1f} % at worst")


def measure_layer(
    layer: Layer, weights: list[Tensor], rows: list[int], bandwidth: float
) -> list[dict[str, Any]]:
    """Time the table's configuration against PyTorch and the floor, and print a line each."""
    records: list[dict[str, Any]] = []
    floor = layer.weight_bytes / bandwidth * 1e6
    for num_rows in rows:
        inputs = Inputs(layer, num_rows, "cuda")
        ours = time_us(lambda w, i=inputs: i.ours(w, None), weights)
        by_torch = time_us(inputs.by_torch, weights)
        l2 = None
        if layer.weight_bytes <= L2_BYTES:
            l2 = time_us(lambda w, i=inputs: i.ours(w, None), weights[:1])
        config = describe(table_config(layer, num_rows))
        print(
            f"{layer.name:10} {num_rows:3} {ours:8.2f} {by_torch:8.2f} {floor:8.2f} "
            f"{ours - floor:7.2f} {'-' if l2 is None else f'{l2:.2f}':>7}  {config}",
            flush=True,
        )
        records.append(
            {
                "layer": layer.name,
                "rows": num_rows,
                "us": round(ours, 3),
                "torch_us": round(by_torch, 3),
                "floor_us": round(floor, 3),
                "l2_us": None if l2 is None else round(l2, 3),
                "config": config,
            }
        )
    return records


def measure_chain(
    model: str,
    rows: list[int],
    bandwidth: float,
    best: dict[tuple[str, int], LinearConfig | None],
) -> list[dict[str, Any]]:
    """Time a decoder layer's four linears in turn, per layer of 16, and print a line each.

    best: by (layer, rows), None for PyTorch, to run beside the table's; empty if not tuned.
    """
    layers = MODELS[model][:4]
    weights = {
        (layer, i): torch.randn(layer.shape, dtype=torch.bfloat16, device="cuda").mul_(
            layer.num_in**-0.5
        )
        for layer in layers
        for i in range(NUM_LAYERS)
    }
    floor = sum(layer.weight_bytes for layer in layers) / bandwidth * 1e6
    records: list[dict[str, Any]] = []
    for num_rows in rows:
        inputs = [Inputs(layer, num_rows, "cuda") for layer in layers]
        table = [table_config(layer, num_rows) for layer in layers]
        kinds: dict[str, tuple[list[LinearConfig | None], bool | None]] = {
            "table": (table, None),
            "table early": (table, True),
            "table not early": (table, False),
            "torch": ([None] * len(layers), False),
        }
        if best:
            fastest = [best[layer.name, num_rows] for layer in layers]
            kinds |= {"tuned early": (fastest, True), "tuned not early": (fastest, False)}

        def chain(
            configs: list[LinearConfig | None], launch_pdl: bool | None, inputs: Any = inputs
        ) -> Tensor:
            x: Tensor = inputs[0].x
            for i in range(NUM_LAYERS):
                for layer, given, config in zip(layers, inputs, configs, strict=True):
                    # Attention would stand before o: its output is as wide as o takes.
                    x, weight = x[:, : layer.num_in], weights[layer, i]
                    if config is None:
                        x = given.by_torch(weight, x=x)
                    else:
                        x = given.ours(weight, config, x=x, launch_pdl=launch_pdl)
            return x

        us = {}
        for how, kind in kinds.items():
            timing = time_graph([functools.partial(chain, *kind)], min_calls=1, budget_s=0.02)
            us[how] = round(timing.ms * 1e3 / NUM_LAYERS, 2)
        shown = ", ".join(f"{how} {value:.2f}" for how, value in us.items())
        print(f"{model} layer x{num_rows:<3} us: {shown}; floor {floor:.2f}", flush=True)
        records.append(
            {
                "model": model,
                "rows": num_rows,
                "floor_us": round(floor, 2),
                "us": us,
                "table": [describe(config) for config in table],
                "tuned": [describe(best[layer.name, num_rows]) for layer in layers] if best else [],
            }
        )
    return records


def main() -> None:
    """Compile, tune if asked, measure, and print tables and JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--layers", nargs="+", help="names such as A.o; all if absent")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--tune", "--tune2", action="store_true", help="time every candidate")
    parser.add_argument("--against", type=Path, help="only compare the table with this result")
    parser.add_argument("--no-chain", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=4.25e12, help="bytes a second")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--part", help="i/n: only compile this share")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.against:
        choices = compare_choices(json.loads(args.against.read_text())["tuned"])
        print_losses(choices)
        finish("linear", {"choices": choices}, out=args.out, started=started)
        return
    layers = [
        layer
        for model in args.models
        for layer in MODELS[model]
        if not args.layers or layer.name in args.layers
    ]
    rows = args.rows or list(TUNED_ROWS if args.tune else ROWS[:3] if args.quick else ROWS)
    if args.tune and max(rows) > max(SKINNY_TILES):
        parser.error(f"--tune has candidates for at most {max(SKINNY_TILES)} rows, got {max(rows)}")
    if args.part:
        compile_share(jobs(layers, rows, tune=args.tune), args.part)
        return
    torch.manual_seed(0)
    compile_s = compile_all(sys.argv[1:], args.workers)
    print(f"compiled in {compile_s:.1f} s")
    results = run_all(args, layers, rows)
    finish("linear", {"compile_s": round(compile_s, 1), **results}, out=args.out, started=started)


@torch.inference_mode()
def run_all(args: argparse.Namespace, layers: list[Layer], rows: list[int]) -> dict[str, Any]:
    """Everything that runs on the GPU."""
    results: dict[str, Any] = {"tuned": [], "layers": [], "chains": []}
    best: dict[tuple[str, int], LinearConfig | None] = {}
    if not args.tune:
        print(f"{'layer':10} {'M':>3} {'ours':>8} {'torch':>8} {'floor':>8} {'over':>7} l2, us")
    for layer in layers:
        weights = make_weights(layer)
        if args.tune:
            by_name = {describe(c): c for num_rows in rows for c in candidates(layer, num_rows)}
            for record in tune_layer(layer, weights, rows):
                results["tuned"].append(record)
                best[layer.name, record["rows"]] = by_name.get(next(iter(record["us"])))
        else:
            results["layers"] += measure_layer(layer, weights, rows, args.bandwidth)
        del weights
    if args.tune:
        results["choices"] = compare_choices(results["tuned"])
        print_losses(results["choices"])
    if not args.no_chain and not args.layers:
        for model in args.models:
            results["chains"] += measure_chain(model, rows, args.bandwidth, best)
    return results


if __name__ == "__main__":
    main()
