"""Which experts a token goes to, and the tokens of each expert: kernels without a host sync.

T tokens, E experts, k experts a token. A pair is a token and one of its experts; pair t * k + r is
expert number r of token t.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.pointwise import rms_norm

# Experts whose logits one program of few rows computes, and inputs that it takes at once.
_EXPERTS, _CHUNK = 8, 512
# Rows whose experts one program of many rows chooses.
_TOP_ROWS = 8
# Pairs that one program sorts, and those that it ranks among each other at once.
_SORT_PAIRS, _RANK_PAIRS = 512, 64
# Blocks of pairs whose counts are added up at once.
_COUNT_BLOCKS = 32


@triton.jit
def _store_best(
    logits,
    rows,
    exists,
    is_used,
    ids_ptr,
    weights_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Store the k largest probabilities of rows of logits, [ROWS, BLOCK_E], and their experts."""
    offs = tl.arange(0, logits.shape[1])[None, :]
    logits = tl.where(offs < NUM_EXPERTS, logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    p = tl.where(offs < NUM_EXPERTS, p / tl.sum(p, axis=1)[:, None], -1.0)
    for rank in tl.static_range(TOP_K):
        best = tl.max(p, axis=1)
        # Where a row is NaN nothing is equal: it goes to the last expert, not out of bounds.
        expert = tl.min(tl.where(p == best[:, None], offs, NUM_EXPERTS - 1), axis=1)
        at = rows * TOP_K + rank
        tl.store(ids_ptr + at, tl.where(is_used, expert, -1), mask=exists)
        tl.store(weights_ptr + at, tl.where(is_used, best, 0.0), mask=exists)
        p = tl.where(offs == expert[:, None], -1.0, p)


@triton.jit
def _route_kernel(
    x_ptr,
    norm_ptr,
    router_ptr,
    lens_ptr,
    hidden_ptr,
    logits_ptr,
    ids_ptr,
    weights_ptr,
    counters_ptr,
    eps,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, logits of EXPERTS experts, and by the last program of a row the choice."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offs = tl.arange(0, BLOCK_D)
    mask = offs < HIDDEN
    x = tl.load(x_ptr + row * HIDDEN + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    dtype = hidden_ptr.dtype.element_ty
    if part == 0:
        norm = tl.load(norm_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(hidden_ptr + row * HIDDEN + offs, (x * scale * norm).to(dtype), mask=mask)

    experts = part * EXPERTS + tl.arange(0, EXPERTS)
    w_rows = router_ptr + tl.minimum(experts, NUM_EXPERTS - 1)[:, None] * HIDDEN
    products = tl.zeros([EXPERTS, CHUNK], tl.float32)
    for first in tl.static_range(0, HIDDEN, CHUNK):
        at = first + tl.arange(0, CHUNK)
        inside = at < HIDDEN
        # From L1, rather than through shared memory.
        some = tl.load(x_ptr + row * HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = (some * scale * norm).to(dtype).to(tl.float32)
        w = tl.load(w_rows + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        products += w * h[None, :]
    logits_ptr += row * NUM_EXPERTS
    tl.store(logits_ptr + experts, tl.sum(products, axis=1), mask=experts < NUM_EXPERTS)

    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel")
    if arrived != tl.num_programs(1) - 1:
        return
    tl.store(counters_ptr + row, 0)
    every = tl.arange(0, BLOCK_E)
    logits = tl.load(logits_ptr + every, mask=every < NUM_EXPERTS, other=0.0)
    rows = row + tl.zeros([1], tl.int64)
    exists = tl.full([1], True, tl.int1)
    is_used = exists
    if lens_ptr is not None:
        is_used = tl.load(lens_ptr + rows) > 0
    _store_best(
        logits[None, :], rows, exists, is_used, ids_ptr, weights_ptr, NUM_EXPERTS, TOP_K
    )  # fmt: skip


def route_few(
    x: Tensor,
    norm: tuple[Tensor, float],
    router: Tensor,
    num_experts_per_token: int,
    *,
    counters: Tensor,
    row_lens: Tensor | None,
    launch_pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm(x) [T, hidden], ids [T, k] int32 and weights [T, k] fp32, in one launch."""
    num_rows, hidden = x.shape
    num_experts = router.shape[0]
    normed = torch.empty_like(x)
    logits = torch.empty((num_rows, num_experts), dtype=torch.float32, device=x.device)
    ids = torch.empty((num_rows, num_experts_per_token), dtype=torch.int32, device=x.device)
    weights = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    early = {"launch_pdl": True} if launch_pdl else {}
    _route_kernel[(num_rows, triton.cdiv(num_experts, _EXPERTS))](
        x,
        norm[0],
        router,
        row_lens,
        normed,
        logits,
        ids,
        weights,
        counters,
        norm[1],
        HIDDEN=hidden,
        NUM_EXPERTS=num_experts,
        TOP_K=num_experts_per_token,
        BLOCK_D=triton.next_power_of_2(hidden),
        BLOCK_E=triton.next_power_of_2(num_experts),
        CHUNK=min(_CHUNK, triton.next_power_of_2(hidden)),
        EXPERTS=_EXPERTS,
        PDL=launch_pdl,
        num_warps=8,
        **early,
    )
    return normed, ids, weights


@triton.jit(do_not_specialize=["num_rows"])
def _top_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, BLOCK_E)
    exists = rows < num_rows
    at = rows.to(tl.int64)[:, None] * NUM_EXPERTS + every[None, :]
    mask = exists[:, None] & (every < NUM_EXPERTS)[None, :]
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0)
    _store_best(logits, rows, exists, exists, ids_ptr, weights_ptr, NUM_EXPERTS, TOP_K)


def route_many(
    x: Tensor, norm: tuple[Tensor, float], router: Tensor, num_experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `route_few` does, the logits by the matrix library."""
    normed = rms_norm(x, *norm)
    if x.is_cuda and x.dtype != torch.float32:
        # Not rounded to 16 bits.
        logits = torch.mm(normed, router.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(normed.float(), router.float())
    num_rows, num_experts = logits.shape
    ids = torch.empty((num_rows, num_experts_per_token), dtype=torch.int32, device=x.device)
    weights = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    _top_kernel[(triton.cdiv(num_rows, _TOP_ROWS),)](
        logits,
        ids,
        weights,
        num_rows,
        NUM_EXPERTS=num_experts,
        TOP_K=num_experts_per_token,
        BLOCK_E=triton.next_power_of_2(num_experts),
        ROWS=_TOP_ROWS,
        num_warps=4,
    )
    return normed, ids, weights


@triton.jit
def _one_hot(ids_ptr, first, num_pairs, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr):
    """[PAIRS, BLOCK_E] int32: 1 where a pair goes to an expert."""
    pairs = first + tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    return (ids[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs_kernel(
    ids_ptr,
    counts_ptr,
    num_pairs,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKED: tl.constexpr,
):
    """Count the pairs of each expert in a block of pairs."""
    block = tl.program_id(0)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, PAIRS, RANKED):
        counts += tl.sum(_one_hot(ids_ptr, block * PAIRS + first, num_pairs, RANKED, BLOCK_E), 0)
    tl.store(counts_ptr + block * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["num_pairs"])
def _place_pairs_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    ends_ptr,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write a block of pairs to their places: by expert, then by pair.

    counts_ptr: of `_count_pairs_kernel`; None where this is the only block.
    """
    block = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    totals = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    if counts_ptr is None:
        for first in range(0, PAIRS, RANKED):
            totals += tl.sum(_one_hot(ids_ptr, first, num_pairs, RANKED, BLOCK_E), axis=0)
    else:
        for first in range(0, tl.num_programs(0), BLOCKS):
            blocks = first + tl.arange(0, BLOCKS)
            counts = tl.load(
                counts_ptr + blocks[:, None] * BLOCK_E + experts[None, :],
                mask=(blocks < tl.num_programs(0))[:, None],
                other=0,
            )
            totals += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((blocks < block)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(totals, axis=0)
    if block == 0:
        tl.store(ends_ptr + experts, ends, mask=experts < NUM_EXPERTS)
    next_place = ends - totals + before
    for first in range(0, PAIRS, RANKED):
        pair = block * PAIRS + first
        hot = _one_hot(ids_ptr, pair, num_pairs, RANKED, BLOCK_E)
        places = tl.sum(hot * (next_place[None, :] + tl.cumsum(hot, axis=0) - 1), axis=1)
        pairs = pair + tl.arange(0, RANKED)
        tl.store(pairs_ptr + places, pairs, mask=tl.sum(hot, axis=1) > 0)
        next_place += tl.sum(hot, axis=0)


def sort_pairs(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert: (pairs [T * k] int32, ends [E] int32), on the device.

    expert_ids: [T, k] int32. Pairs of an expert are in ascending order, and end before place
    `ends[e]`. Pairs of expert -1 are left out, and the places beyond hold nothing.
    """
    num_pairs, device = expert_ids.numel(), expert_ids.device
    num_blocks = triton.cdiv(num_pairs, _SORT_PAIRS)
    block_e = triton.next_power_of_2(num_experts)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    sizes = {"BLOCK_E": block_e, "PAIRS": _SORT_PAIRS, "RANKED": _RANK_PAIRS, "num_warps": 8}
    counts = None
    if num_blocks > 1:
        counts = torch.empty((num_blocks, block_e), dtype=torch.int32, device=device)
        _count_pairs_kernel[(num_blocks,)](expert_ids, counts, num_pairs, **sizes)
    _place_pairs_kernel[(num_blocks,)](
        expert_ids,
        counts,
        pairs,
        ends,
        num_pairs,
        NUM_EXPERTS=num_experts,
        BLOCKS=_COUNT_BLOCKS,
        **sizes,
    )
    return pairs, ends
