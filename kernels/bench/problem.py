"""The operator's inputs for the benches: geometries, shuffled paged caches, counts of bytes."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa_kernels import ops
from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.metadata import LayerCache, build_metadata
from nsa_kernels.spec import NSASpec

GEOMETRIES = {
    "paper": NSASpec(),
    "fla": NSASpec(cmp_len=64, cmp_stride=64),
}
CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Numbers and widths of the heads, and the dtype of everything, or all but the cache."""

    num_q_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, all KV heads."""
        itemsize = int((self.cache_dtype or self.dtype).itemsize)
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * itemsize

    @property
    def query_bytes_per_token(self) -> int:
        """Bytes of one token's queries, output and gates."""
        return self.num_q_heads * (self.head_dim + self.v_head_dim + 3) * int(self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class InputSet:
    """One layer's inputs: q [T, HQ, D], k [T, H, D], v [T, H, Dv], gates [T, HQ, 3], its cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    cache: LayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One step over several layers of random data.

    plans: of the step, and for decode of the steps before it, until the cadence of compression (one
    window closes every cmp_stride tokens) has passed once; calls take turns.
    """

    spec: NSASpec
    heads: Heads
    plans: list[ops.AttnPlan]
    pages: list[list[int]]
    sets: list[InputSet] = field(default_factory=list)

    @property
    def plan(self) -> ops.AttnPlan:
        """Plan of the step itself."""
        return self.plans[0]

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(D)."""
        return float(self.heads.head_dim**-0.5)

    def run(self, inputs: InputSet, plan: "ops.AttnPlan | None" = None) -> Tensor:
        """Run the whole operator, from appending to the gated sum: [T, HQ, Dv]."""
        return ops.nsa_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.gates,
            inputs.cache,
            plan or self.plan,
            self.spec,
            softmax_scale=self.softmax_scale,
        )

    def calls(self) -> list[Callable[[], Tensor]]:
        """Callables that go through input sets and plans. A repeated step rewrites its slots."""
        num_calls = max(len(self.sets), len(self.plans))
        turns = [
            (self.sets[i % len(self.sets)], self.plans[i % len(self.plans)])
            for i in range(num_calls)
        ]
        return [lambda turn=turn: self.run(*turn) for turn in turns]  # type: ignore[misc]


def make_problem(
    spec: NSASpec,
    heads: Heads,
    *,
    starts: Sequence[int],
    query_lens: Sequence[int],
    num_sets: int = 1,
    device: str = "cuda",
    seed: int = 0,
) -> Problem:
    """Random layers in which row b holds starts[b] tokens and query_lens[b] more are added.

    If every row adds one token the step is a decode step, else all rows are prefill chunks. The
    rows' pages are a random permutation of the whole pool.
    """
    is_decode = all(length == 1 for length in query_lens)
    counts = [math.ceil((a + n) / spec.block_size) for a, n in zip(starts, query_lens, strict=True)]
    num_pages = sum(counts) + 1
    shuffled = list(range(1, num_pages))
    random.Random(seed).shuffle(shuffled)
    pages = []
    for count in counts:
        pages.append(shuffled[:count])
        del shuffled[:count]
    # Shorter than a stride, rows would run out of tokens.
    num_plans = min(spec.cmp_stride, min(starts) + 1) if is_decode else 1
    metas = [
        build_metadata(
            pages,
            [start - i for start in starts],
            query_lens,
            spec,
            num_decode_rows=len(pages) if is_decode else 0,
        )
        for i in range(num_plans)
    ]
    # Meta tensors stand for a GPU's, to compile without one.
    plan_attention = gpu_plan.plan_attention if device == "meta" else ops.plan_attention
    plans = [
        plan_attention(
            meta,
            spec,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            dtype=heads.dtype,
            device=torch.device(device),
        )
        for meta in metas
    ]
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=heads.dtype, device=device, generator=generator)

    def cache_pages(tokens: int, width: int) -> Tensor:
        return randn(num_pages, heads.num_kv_heads, tokens, width).to(
            heads.cache_dtype or heads.dtype
        )

    num_tokens, kv_heads = sum(query_lens), heads.num_kv_heads
    scale = None
    if heads.cache_dtype is not None:
        scale = torch.ones(kv_heads, dtype=torch.float32, device=device)
    sets = [
        InputSet(
            q=randn(num_tokens, heads.num_q_heads, heads.head_dim),
            k=randn(num_tokens, kv_heads, heads.head_dim),
            v=randn(num_tokens, kv_heads, heads.v_head_dim),
            gates=torch.sigmoid(randn(num_tokens, heads.num_q_heads, 3)),
            cache=LayerCache(
                cache_pages(spec.block_size, heads.head_dim),
                cache_pages(spec.block_size, heads.v_head_dim),
                cache_pages(spec.cmp_entries_per_page, heads.head_dim),
                cache_pages(spec.cmp_entries_per_page, heads.v_head_dim),
                k_scale=scale,
                v_scale=scale,
            ),
        )
        for _ in range(num_sets)
    ]
    return Problem(spec=spec, heads=heads, plans=plans, pages=pages, sets=sets)


def decode_tokens(spec: NSASpec, context: int) -> tuple[float, int]:
    """Raw tokens and compressed entries that one decode row has to read, at least.

    Raw: the union of selected blocks and window. A free choice lies inside the window as often as
    one made at random.
    """
    size = spec.block_size
    num_blocks = math.ceil(context / size)
    window_blocks = spec.window_size / size
    forced = spec.num_init_blocks + spec.num_local_blocks
    if num_blocks <= spec.num_selected_blocks:
        return float(context), spec.num_windows(context)
    new_in_window = max(0.0, window_blocks - spec.num_local_blocks)
    free = spec.num_selected_blocks - forced
    both = free * new_in_window / (num_blocks - forced)
    blocks = spec.num_selected_blocks + new_in_window - both
    return min(float(context), blocks * size), spec.num_windows(context)


def decode_bytes(spec: NSASpec, heads: Heads, batch: int, context: int) -> float:
    """Bytes that one decode step has to move, at least: keys and values, queries, output."""
    raw, entries = decode_tokens(spec, context)
    return batch * ((raw + entries) * heads.kv_bytes_per_token + heads.query_bytes_per_token)


def dense_decode_bytes(heads: Heads, batch: int, context: int) -> float:
    """Bytes that dense attention has to move in a decode step."""
    return batch * float(context * heads.kv_bytes_per_token + heads.query_bytes_per_token)


def prefill_flops(spec: NSASpec, heads: Heads, length: int, start: int = 0) -> float:
    """Operations that the three branches need for the queries at start .. length - 1.

    A visible (query, key) pair costs 2 (D + Dv) a head; scores are counted once, pooling and
    selection not at all.
    """
    positions = torch.arange(start, length, dtype=torch.int64)
    seen = positions + 1
    windows = ((seen - spec.cmp_len).div(spec.cmp_stride, rounding_mode="floor") + 1).clamp(min=0)
    whole_blocks = (spec.num_selected_blocks - 1) * spec.block_size
    selected = torch.minimum(seen, whole_blocks + positions % spec.block_size + 1)
    pairs = windows + selected + seen.clamp(max=spec.window_size)
    per_pair = 2 * (heads.head_dim + heads.v_head_dim) * heads.num_q_heads
    return float(pairs.sum()) * per_pair


def dense_prefill_flops(heads: Heads, length: int) -> float:
    """Operations of causal dense attention over `length` tokens."""
    pairs = length * (length + 1) / 2
    return pairs * 2 * (heads.head_dim + heads.v_head_dim) * heads.num_q_heads
