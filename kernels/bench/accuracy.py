"""Accuracy: the operator's outputs and selections against fp32 arithmetic on the same inputs.

    python kernels/bench/accuracy.py [--quick] [--contexts 4096 16384] [--dtypes bf16]
                                     [--cache-dtype fp8]

Two ragged sequences go through a prefill in two chunks and a few decode steps, over caches that
hold NaN wherever nothing was written. Outputs are compared given the blocks that the kernels chose
(near ties would make other choices incomparable): relative error of the whole, and of the worst
token. The choice is judged by the fp32 scores of the freely chosen blocks over those of the best.
"""

import contextlib
import importlib
import inspect
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import oracle
import torch
from problem import CACHE_DTYPES, DTYPES, GEOMETRIES, Heads
from timing import finish, make_parser
from torch import Tensor

from nsa_kernels import ops
from nsa_kernels.metadata import LayerCache, build_metadata
from nsa_kernels.spec import NSASpec

CONTEXTS = [4096, 16384]
DECODE_STEPS = 4


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence: q [T, HQ, D], k [T, H, D], v [T, H, Dv], gates [T, HQ, 3], and its pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    pages: list[int]


def make_sequences(
    spec: NSASpec, heads: Heads, lengths: list[int], seed: int
) -> tuple[list[Sequence], LayerCache]:
    """Random sequences in shuffled pages of a cache full of NaN (the null page holds zeros)."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=heads.dtype, device="cuda", generator=generator)

    counts = [-(-length // spec.block_size) for length in lengths]
    num_pages = sum(counts) + 2
    shuffled = list(range(1, num_pages))
    random.Random(seed).shuffle(shuffled)
    kv_heads = heads.num_kv_heads
    sequences = [
        Sequence(
            q=randn(length, heads.num_q_heads, heads.head_dim) * 2,
            k=randn(length, kv_heads, heads.head_dim),
            v=randn(length, kv_heads, heads.v_head_dim),
            gates=torch.sigmoid(randn(length, heads.num_q_heads, 3)),
            pages=[shuffled.pop() for _ in range(count)],
        )
        for length, count in zip(lengths, counts, strict=True)
    ]

    def poisoned(tokens: int, width: int) -> Tensor:
        shape = (num_pages, kv_heads, tokens, width)
        cache = torch.full(shape, torch.nan, dtype=heads.dtype, device="cuda")
        cache[0] = 0
        return cache.to(heads.cache_dtype or heads.dtype)

    size, entries = spec.block_size, spec.cmp_entries_per_page
    cache = LayerCache(
        poisoned(size, heads.head_dim),
        poisoned(size, heads.v_head_dim),
        poisoned(entries, heads.head_dim),
        poisoned(entries, heads.v_head_dim),
        k_scale=None if heads.cache_dtype is None else torch.ones(kv_heads, device="cuda"),
        v_scale=None if heads.cache_dtype is None else torch.ones(kv_heads, device="cuda"),
    )
    return sequences, cache


def run_step(
    sequences: list[Sequence],
    cache: LayerCache,
    spec: NSASpec,
    heads: Heads,
    starts: list[int],
    stops: list[int],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Add tokens [start, stop) of every sequence: outputs and chosen blocks of each."""
    lens = [stop - start for start, stop in zip(starts, stops, strict=True)]
    is_decode = all(length == 1 for length in lens)
    meta = build_metadata(
        [s.pages for s in sequences],
        starts,
        lens,
        spec,
        num_decode_rows=len(lens) if is_decode else 0,
    )
    plan = ops.plan_attention(
        meta,
        spec,
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        dtype=heads.dtype,
        device=torch.device("cuda"),
    )
    parts = list(zip(sequences, starts, stops, strict=True))
    with recorded_choices() as choices:
        out = ops.nsa_attention(
            torch.cat([s.q[a:b] for s, a, b in parts]),
            torch.cat([s.k[a:b] for s, a, b in parts]),
            torch.cat([s.v[a:b] for s, a, b in parts]),
            torch.cat([s.gates[a:b] for s, a, b in parts]),
            cache,
            plan,
            spec,
            softmax_scale=heads.head_dim**-0.5,
        )
    chosen = list(torch.cat(choices).split(lens)) if choices else None
    return list(out.split(lens)), chosen


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Tensor]]:
    """Collect the block_indices [R, H, S] that reach the selected attention, in token order."""
    found: list[Tensor] = []
    patched: list[tuple[ModuleType, str, Any]] = []
    for stem in ("attention", "decode_slc", "prefill_slc"):
        module = importlib.import_module(f"nsa_kernels.gpu.{stem}")
        for name in ("decode_slc", "prefill_slc"):
            function = getattr(module, name, None)
            if inspect.isfunction(function):
                patched.append((module, name, function))
                setattr(module, name, _recording(function, found))
    try:
        yield found
    finally:
        for module, name, function in patched:
            setattr(module, name, function)


def judge_selection(expected: oracle.Expected, positions: Tensor, spec: NSASpec) -> dict[str, Any]:
    """Compare the fp32 scores of the chosen blocks with those of the best blocks."""
    scores, indices = expected.scores, expected.indices.long()
    num_blocks = scores.shape[2]
    forced = oracle.forced_blocks(positions, num_blocks, spec)[:, None].expand_as(scores)
    counts = torch.zeros(*scores.shape[:2], num_blocks + 1, device=scores.device)
    counts.scatter_add_(2, indices.where(indices >= 0, num_blocks), torch.ones_like(indices) * 1.0)
    counts = counts[..., :-1]
    free = scores.masked_fill(forced, 0.0)
    num_free = spec.num_selected_blocks - spec.num_init_blocks - spec.num_local_blocks
    candidates = (positions // spec.block_size + 1)[:, None]
    best = free.topk(min(num_free, num_blocks), dim=2).values.sum(2)
    share = ((free * counts.clamp(max=1)).sum(2) / best.clamp(min=1e-30)).where(best > 0, 1.0)
    expected_count = candidates.clamp(max=spec.num_selected_blocks)
    future = torch.arange(num_blocks, device=scores.device) >= candidates[..., None]
    return {
        "score_share_mean": float(share.mean()),
        "score_share_min": float(share.min()),
        "sets_below_best": float((share < 1 - 1e-6).float().mean()),
        "invalid_sets": int(
            (
                (counts.sum(2) != expected_count)
                | (counts > 1).any(2)
                | (forced & (counts == 0)).any(2)
                | ((counts > 0) & future).any(2)
            ).sum()
        ),
    }


def measure(geometry: str, heads: Heads, context: int, seed: int) -> list[dict[str, Any]]:
    """Run one shape and return a row for prefill and one for decode."""
    spec, lengths = GEOMETRIES[geometry], [context, context * 3 // 4 + 5]
    sequences, cache = make_sequences(spec, heads, lengths, seed)
    prompts = [length - DECODE_STEPS for length in lengths]
    edges = [[0, 0], [n // 2 + 1 for n in prompts]]
    edges += [[n + i for n in prompts] for i in range(DECODE_STEPS + 1)]
    steps = [
        (starts, *run_step(sequences, cache, spec, heads, starts, stops))
        for starts, stops in itertools.pairwise(edges)
    ]
    rows = []
    for phase, own in (("prefill", steps[:2]), ("decode", steps[2:])):
        errors, worst, judged = [], [], []
        for b, sequence in enumerate(sequences):
            actual = torch.cat([out[b] for _, out, _ in own]).float()
            first = own[0][0][b]
            part = slice(first, first + len(actual))
            positions = torch.arange(first, first + len(actual), device="cuda")
            chosen = [choice[b] for _, _, choice in own if choice is not None]
            expected = oracle.attend(
                sequence.q[part],
                sequence.k[: part.stop],
                sequence.v[: part.stop],
                sequence.gates[part],
                positions,
                spec,
                softmax_scale=heads.head_dim**-0.5,
                block_indices=torch.cat(chosen) if chosen else None,
            )
            difference = (actual - expected.out).flatten(1)
            norms = expected.out.flatten(1).norm(dim=1)
            errors.append(float(difference.norm() / norms.norm()))
            worst.append(float((difference.norm(dim=1) / norms).max()))
            judged.append(judge_selection(expected, positions, spec))
        row = {"phase": phase, "geometry": geometry, "context": context, "dtype": str(heads.dtype)}
        row |= {"cache_dtype": str(heads.cache_dtype or heads.dtype)}
        row |= {"head_dims": [heads.head_dim, heads.v_head_dim]}
        # A NaN must win over every number.
        row |= {"error": _worst(errors), "worst_token_error": _worst(worst)}
        row |= {"seen_choices": bool(chosen)}
        for name in judged[0]:
            combine = min if name.startswith("score_share") else max
            row[name] = combine(item[name] for item in judged)
        rows.append(row)
    return rows


def main() -> None:
    """Measure all shapes, print the table and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--cache-dtype", default="auto", choices=CACHE_DTYPES)
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    if args.quick:
        args.contexts = args.contexts[:1]
    torch.backends.cuda.matmul.allow_tf32 = False
    cache_dtype = CACHE_DTYPES[args.cache_dtype]
    shapes = [
        (geometry, Heads(dtype=DTYPES[dtype], cache_dtype=cache_dtype), context)
        for geometry in args.geometries
        for dtype in args.dtypes
        for context in args.contexts
    ]
    if "paper" in args.geometries:
        shapes.append(("paper", Heads(head_dim=192, cache_dtype=cache_dtype), args.contexts[0]))
    print("phase, geometry, head dims, dtype, context, error, worst token | selection")
    rows = []
    for geometry, heads, context in shapes:
        for row in measure(geometry, heads, context, args.seed):
            rows.append(row)
            print(
                f"{row['phase']:7} {geometry:6} {'/'.join(map(str, row['head_dims'])):8} "
                f"{row['dtype'][6:]:9} {context:6} {row['error']:9.2e} "
                f"{row['worst_token_error']:9.2e} | share of the best score: mean "
                f"{row['score_share_mean']:.6f}, min {row['score_share_min']:.6f}; below the best "
                f"{row['sets_below_best']:.2%}, invalid {row['invalid_sets']}"
                + ("" if row["seen_choices"] else " (blocks chosen by the oracle)"),
                flush=True,
            )
    finish("accuracy", {"seed": args.seed, "rows": rows}, out=args.out, started=started)


def _recording(function: Any, found: list[Tensor]) -> Any:
    signature = inspect.signature(function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        indices = signature.bind(*args, **kwargs).arguments.get("block_indices")
        if indices is not None:
            found.append(indices.clone())
        return function(*args, **kwargs)

    return wrapper


def _worst(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).max())


if __name__ == "__main__":
    main()
