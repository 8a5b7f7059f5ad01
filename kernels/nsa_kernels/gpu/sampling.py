"""Choice of the next token of every row: argmax, or a draw after cuts by min_p, top_k and top_p.

The rules are those of `nsa_serve.sampler`. Nothing is sorted and nothing is read on the host; the
launches are the same whatever the rows ask for, and programs of a row that lacks a step return.

A row is split over programs. What they hand on are integers (a weight is a multiple of 2^-40 of the
largest), whose sums do not depend on the split, on the order, or on the other rows. Tokens are
ordered by (logit descending, id ascending): one int64 for both, so no two tokens are equal. A token
whose weight is below 2^-40 has none.

1. `_peak_kernel`: the largest logit, the lowest index that has it, and the lowest finite logit.
2. `_narrow_kernel`, twice: which of 16 intervals of logits holds the last token to be kept.
3. `_cut_kernel`: lists the tokens of that interval, and bisects among them for the exact cut.
4. `_draw_kernel`: the weights of the kept tokens by chunk, and the draw in the order of ids.

In each the program of a row that arrives last does what takes the whole row.

Legend: R rows, V vocabulary, C chunks of a row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape

# Rows of `params`, float64 [5, >= R].
TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(5)
NUM_PARAMS = 5

_CHUNK = 2048
_NARROW_CHUNK = 1024
_NUM_BINS = 16
_TILE = 4096
# Programs of all rows together; fewer for few rows, as a chunk is the least a program has.
_NARROW_PROGRAMS, _CUT_PROGRAMS, _DRAW_PROGRAMS = 2048, 528, 1056
_MIN_PROGRAMS = 8

MAX_INT = tl.constexpr(0x7FFFFFFF)
# Below the key of every token.
LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
WEIGHT_ONE = tl.constexpr(float(1 << 40))
# exp(-28) is below half of the least weight.
REACH = tl.constexpr(28.0)


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the kernels hand on, for up to `max_num_rows` rows; one step at a time uses it.

    best, masses: int64 [R, C]. lows: float32 [R, C]. sums: int64, partial sums by program and bin.
    bounds: float32 [2, R], the interval of logits that is searched: from, and below.
    needed: int64 [2, R], of counts or weights: in the interval, and in all.
    candidates: int32 [R, V]. cuts: int64 [R], key of the last token kept.
    counters: int32 [6, R], 0 between launches.
    """

    best: Tensor
    lows: Tensor
    masses: Tensor
    sums: Tensor
    bounds: Tensor
    needed: Tensor
    candidates: Tensor
    cuts: Tensor
    counters: Tensor

    @classmethod
    def create(
        cls, max_num_rows: int, vocab_size: int, device: torch.device
    ) -> "SamplingWorkspace":
        """Allocate for rows of `vocab_size` logits."""
        num_chunks = triton.cdiv(vocab_size, _CHUNK)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            best=new(max_num_rows, num_chunks, dtype=torch.int64),
            lows=new(max_num_rows, num_chunks, dtype=torch.float32),
            masses=new(max_num_rows, num_chunks, dtype=torch.int64),
            sums=new(
                max(_NARROW_PROGRAMS, _MIN_PROGRAMS * max_num_rows), _NUM_BINS, dtype=torch.int64
            ),
            bounds=new(2, max_num_rows, dtype=torch.float32),
            needed=new(2, max_num_rows, dtype=torch.int64),
            candidates=new(max_num_rows, vocab_size, dtype=torch.int32),
            cuts=new(max_num_rows, dtype=torch.int64),
            counters=new(6, max_num_rows, dtype=torch.int32),
        )


def sample_tokens(
    logits: Tensor,
    params: Tensor,
    token_ids: Tensor,
    peaks: Tensor,
    *,
    workspace: SamplingWorkspace,
    is_greedy: bool = False,
) -> None:
    """Choose a token for each row of logits, float32 [R, V].

    params: float64 [5, >= R], rows TEMPERATURE (0: greedy), TOP_K (0: off), TOP_P (1: off), MIN_P
    (0: off), UNIFORM in [0, 1). Written: token_ids int64 [>= R]; peaks float32 [>= R], the largest
    logits, NaN where there is one. A row whose peak is not finite gets the first index of it.
    is_greedy: every row is, so the other parameters are not looked at.

    Raises ValueError for shapes and dtypes that do not fit.
    """
    num_rows, vocab_size = logits.shape
    _check(logits, params, token_ids, peaks, workspace)
    if num_rows == 0:
        return
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    max_chunks = triton.next_power_of_2(num_chunks)
    work, max_num_rows = workspace, workspace.cuts.shape[0]
    row = (logits, logits.stride(0), vocab_size)
    # Without fused multiply-adds a number is the same wherever it is computed.
    exact = {"enable_fp_fusion": False}
    _peak_kernel[(num_chunks, num_rows)](
        *row, work.best, work.lows, work.bounds, work.cuts, token_ids, peaks, work.counters,
        CHUNK=_CHUNK, MAX_CHUNKS=max_chunks, num_warps=4, **exact,
    )  # fmt: skip
    if is_greedy:
        return
    options = (params, params.stride(0), peaks)
    num_programs = _num_programs(_NARROW_PROGRAMS, num_rows, triton.cdiv(vocab_size, _NARROW_CHUNK))
    for step in range(2):
        _narrow_kernel[(num_programs, num_rows)](
            *row, *options, work.bounds, work.needed, work.sums, work.counters[1 + step],
            max_num_rows, FIRST=step == 0, CHUNK=_NARROW_CHUNK, NUM_BINS=_NUM_BINS,
            num_warps=1, **exact,
        )  # fmt: skip
    _cut_kernel[(_num_programs(_CUT_PROGRAMS, num_rows, num_chunks), num_rows)](
        *row, *options, work.bounds, work.needed, work.candidates, work.candidates.stride(0),
        work.cuts, work.counters[3], work.counters[4], max_num_rows,
        CHUNK=_CHUNK, TILE=_TILE, num_warps=8, **exact,
    )  # fmt: skip
    _draw_kernel[(_num_programs(_DRAW_PROGRAMS, num_rows, num_chunks), num_rows)](
        *row, *options, work.cuts, work.masses, token_ids, work.counters[5],
        CHUNK=_CHUNK, MAX_CHUNKS=max_chunks, num_warps=4, **exact,
    )  # fmt: skip


def _num_programs(total: int, num_rows: int, num_chunks: int) -> int:
    return min(num_chunks, max(_MIN_PROGRAMS, total // num_rows))


def _check(
    logits: Tensor, params: Tensor, token_ids: Tensor, peaks: Tensor, workspace: SamplingWorkspace
) -> None:
    num_rows, vocab_size = logits.shape
    max_num_rows = workspace.cuts.shape[0]
    check_shape("workspace.candidates", workspace.candidates, (max_num_rows, vocab_size))
    sizes = {
        "the workspace": max_num_rows,
        "params": params.shape[1],
        "token_ids": token_ids.shape[0],
        "peaks": peaks.shape[0],
    }
    for name, size in sizes.items():
        if size < num_rows:
            raise ValueError(f"{name} must have room for {num_rows} rows, got {size}")
    dtypes = {
        "logits": (logits, torch.float32),
        "params": (params, torch.float64),
        "token_ids": (token_ids, torch.int64),
        "peaks": (peaks, torch.float32),
    }
    for name, (tensor, dtype) in dtypes.items():
        if tensor.dtype != dtype or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise ValueError(
                f"{name} must be {dtype} with contiguous rows, got {tensor.dtype} with strides "
                f"{tensor.stride()}"
            )


@triton.jit
def _key(x):
    """Int32 in the order of the floats; NaN is the largest, and the two zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, MAX_INT, bits ^ ((bits >> 31) & MAX_INT))


@triton.jit
def _token_key(x, ids):
    """Int64 in the order (logit ascending, id descending)."""
    return (_key(x).to(tl.int64) << 32) | (ids ^ MAX_INT).to(tl.int64)


@triton.jit
def _weight(x, peak, temperature, min_p):
    """Weights of logits, int64 in units of 2^-40."""
    # The bound keeps the quotient finite; beyond it the weight is 0 in float32 already.
    weight = tl.exp(tl.maximum(x - peak, -104.0 * temperature) / temperature)
    return (tl.where(weight < min_p, 0.0, weight) * WEIGHT_ONE).to(tl.int64)


@triton.jit
def _is_drawn(params_ptr, peaks_ptr, row):
    """Whether a row draws, and its peak."""
    peak = tl.load(peaks_ptr + row)
    is_finite = (peak == peak) & (tl.abs(peak) < float("inf"))
    return is_finite & (tl.load(params_ptr + row) > 0.0), peak


@triton.jit
def _temperature(params_ptr, row):
    # The smallest normal number: below it a temperature is greedy, and must not divide by 0.
    return tl.maximum(tl.load(params_ptr + row).to(tl.float32), 1.1754943508222875e-38)


@triton.jit
def _share(top_p, mass):
    """The least integer that is not below top_p of `mass`, from 1 to mass."""
    wanted = top_p * mass.to(tl.float64)
    share = wanted.to(tl.int64)
    share += (share.to(tl.float64) < wanted).to(tl.int64)
    return tl.minimum(tl.maximum(share, 1), mass)


@triton.jit
def _arrives_last(counter_ptr, num_programs):
    """Whether all other programs of the row are done; their stores are visible then."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _peak_kernel(
    logits_ptr,
    stride_r,
    vocab_size,
    best_ptr,
    lows_ptr,
    bounds_ptr,
    cuts_ptr,
    token_ids_ptr,
    peaks_ptr,
    counters_ptr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    chunk, row, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = ids < vocab_size
    x = tl.load(logits_ptr + row.to(tl.int64) * stride_r + ids, mask=mask, other=float("-inf"))
    best_row, lows_row = best_ptr + row * num_chunks, lows_ptr + row * num_chunks
    tl.store(best_row + chunk, tl.max(tl.where(mask, _token_key(x, ids), LOWEST), axis=0))
    # -inf is no bound to search from.
    finite = tl.where(x > float("-inf"), x, float("inf"))
    tl.store(lows_row + chunk, tl.min(finite, axis=0))
    if _arrives_last(counters_ptr + row, num_chunks):
        offs = tl.arange(0, MAX_CHUNKS)
        is_chunk = offs < num_chunks
        bests = tl.load(best_row + offs, mask=is_chunk, other=LOWEST, cache_modifier=".cg")
        best = tl.max(bests, axis=0)
        low = tl.load(lows_row + offs, mask=is_chunk, other=float("inf"), cache_modifier=".cg")
        key = (best >> 32).to(tl.int32)
        peak = (key ^ ((key >> 31) & MAX_INT)).to(tl.float32, bitcast=True)
        tl.store(token_ids_ptr + row, (best.to(tl.int32) ^ MAX_INT).to(tl.int64))
        tl.store(peaks_ptr + row, peak)
        tl.store(bounds_ptr + row, tl.min(low, axis=0))
        tl.store(cuts_ptr + row, tl.full([], LOWEST, tl.int64))


@triton.jit
def _narrow_kernel(
    logits_ptr,
    stride_r,
    vocab_size,
    params_ptr,
    stride_p,
    peaks_ptr,
    bounds_ptr,
    needed_ptr,
    sums_ptr,
    counters_ptr,
    max_num_rows,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Narrow the interval of logits of a row, which holds the last token kept, to one of its bins.

    A bin ends below at a threshold; what is summed are counts if top_k is on, else weights.
    """
    program, row, num_programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    is_drawn, peak = _is_drawn(params_ptr, peaks_ptr, row)
    top_k = tl.load(params_ptr + stride_p + row)
    top_p = tl.load(params_ptr + 2 * stride_p + row)
    by_count = (top_k > 0.0) & (top_k < vocab_size)
    if is_drawn & (by_count | (top_p < 1.0)):
        temperature = _temperature(params_ptr, row)
        min_p = tl.load(params_ptr + 3 * stride_p + row).to(tl.float32)
        low = tl.load(bounds_ptr + row)
        if FIRST:
            # None: peak is finite.
            limit = peak * 0.0 + float("inf")
            low = tl.maximum(low, peak - REACH * temperature)
        else:
            limit = tl.load(bounds_ptr + max_num_rows + row)
        high = tl.minimum(limit, peak)
        width = (high - low) * (1.0 / NUM_BINS)
        logits_row = logits_ptr + row.to(tl.int64) * stride_r
        bins = tl.arange(0, NUM_BINS)
        sums = tl.zeros([NUM_BINS], tl.int64)
        for first in range(program * CHUNK, vocab_size, num_programs * CHUNK):
            ids = first + tl.arange(0, CHUNK)
            x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf"))
            weight = _weight(x, peak, temperature, min_p)
            is_open = (weight > 0) & (x < limit)
            amount = tl.where(is_open, tl.where(by_count, 1, weight), 0)
            for i in tl.static_range(NUM_BINS):
                bound = low if i == NUM_BINS - 1 else tl.maximum(high - width * (i + 1.0), low)
                sums += tl.where(bins == i, tl.sum(tl.where(x >= bound, amount, 0), axis=0), 0)
        sums_row = sums_ptr + row * num_programs * NUM_BINS
        tl.store(sums_row + program * NUM_BINS + bins, sums)
        if _arrives_last(counters_ptr + row, num_programs):
            reached = tl.zeros([NUM_BINS], tl.int64)
            for one in range(num_programs):
                reached += tl.load(sums_row + one * NUM_BINS + bins, cache_modifier=".cg")
            if FIRST:
                total = tl.max(reached, axis=0)
                most = tl.minimum(top_k.to(tl.int64), total)
                needed = tl.where(by_count, most, _share(top_p, total))
                tl.store(needed_ptr + max_num_rows + row, needed)
            else:
                needed = tl.load(needed_ptr + row)
            found = tl.min(tl.where(reached >= needed, bins, NUM_BINS - 1), axis=0)
            before = tl.max(tl.where(bins < found, reached, 0), axis=0)
            bounds = tl.maximum(high - width * (bins + 1).to(tl.float32), low)
            bounds = tl.where(bins == NUM_BINS - 1, low, bounds)
            above = tl.min(tl.where(bins < found, bounds, limit), axis=0)
            below = tl.max(tl.where(bins >= found, bounds, low), axis=0)
            tl.store(bounds_ptr + row, below)
            tl.store(bounds_ptr + max_num_rows + row, above)
            tl.store(needed_ptr + row, needed - before)


@triton.jit
def _sum_from(key, logits_row, candidates_row, num, peak, temperature, min_p, TILE: tl.constexpr):
    """Count and weight of the candidates whose key is at least `key`."""
    count = tl.zeros([], tl.int64)
    mass = tl.zeros([], tl.int64)
    for first in range(0, num, TILE):
        offs = first + tl.arange(0, TILE)
        mask = offs < num
        ids = tl.load(candidates_row + offs, mask=mask, other=0, cache_modifier=".cg")
        x = tl.load(logits_row + ids, mask=mask, other=float("-inf"))
        mask = mask & (_token_key(x, ids) >= key)
        count += tl.sum(mask.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(mask, _weight(x, peak, temperature, min_p), 0), axis=0)
    return count, mass


@triton.jit
def _middle(low, high):
    """Mean, rounded down, of two int64 whose sum may not be one."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _search(
    low, high, needed, by_count, logits_row, candidates_row, num,
    peak, temperature, min_p, TILE: tl.constexpr,
):  # fmt: skip
    """Largest key from which on the candidates sum to `needed`, within [low, high).

    It is enough that as many tokens are kept as by that key.
    """
    # From `low` on there is enough, from `high` on there is not; between are `num_open` keys.
    num_open = num.to(tl.int64) + 1
    count_high = tl.zeros([], tl.int64)
    if num <= TILE:
        offs = tl.arange(0, TILE)
        mask = offs < num
        ids = tl.load(candidates_row + offs, mask=mask, other=0, cache_modifier=".cg")
        x = tl.load(logits_row + ids, mask=mask, other=float("-inf"))
        keys = tl.where(mask, _token_key(x, ids), LOWEST)
        weight = _weight(x, peak, temperature, min_p)
        num_open = tl.sum((keys >= low).to(tl.int32), axis=0).to(tl.int64)
        while num_open > 1:
            key = _middle(low, high)
            is_above = keys >= key
            count = tl.sum(is_above.to(tl.int32), axis=0).to(tl.int64)
            amount = count
            if not by_count:
                amount = tl.sum(tl.where(is_above, weight, 0), axis=0)
            if amount >= needed:
                low = key
                num_open = tl.where(amount == needed, 0, count - count_high)
            else:
                high = key
                num_open -= count - count_high
                count_high = count
    else:
        while num_open > 1:
            key = _middle(low, high)
            count, mass = _sum_from(
                key, logits_row, candidates_row, num, peak, temperature, min_p, TILE
            )
            amount = tl.where(by_count, count, mass)
            if amount >= needed:
                low = key
                num_open = tl.where(amount == needed, 0, count - count_high)
            else:
                high = key
                num_open -= count - count_high
                count_high = count
            # Keys above the candidates were counted in, at most one too many.
            num_open = tl.where(high - 1 == low, 0, num_open)
    return low


@triton.jit
def _cut_kernel(
    logits_ptr,
    stride_r,
    vocab_size,
    params_ptr,
    stride_p,
    peaks_ptr,
    bounds_ptr,
    needed_ptr,
    candidates_ptr,
    stride_c,
    cuts_ptr,
    counters_ptr,
    num_candidates_ptr,
    max_num_rows,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """List the tokens among which a row is cut, and find its cut.

    With top_k and top_p these are all tokens down to the interval, as top_p's cut may be anywhere
    above top_k's; else those of the interval.
    """
    program, row, num_programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    is_drawn, peak = _is_drawn(params_ptr, peaks_ptr, row)
    top_k = tl.load(params_ptr + stride_p + row)
    top_p = tl.load(params_ptr + 2 * stride_p + row)
    by_count = (top_k > 0.0) & (top_k < vocab_size)
    if is_drawn & (by_count | (top_p < 1.0)):
        temperature = _temperature(params_ptr, row)
        min_p = tl.load(params_ptr + 3 * stride_p + row).to(tl.float32)
        low = tl.load(bounds_ptr + row)
        limit = tl.load(bounds_ptr + max_num_rows + row)
        needed = tl.load(needed_ptr + row)
        both = by_count & (top_p < 1.0)
        limit = tl.where(both, float("inf"), limit)
        needed = tl.where(both, tl.load(needed_ptr + max_num_rows + row), needed)
        logits_row = logits_ptr + row.to(tl.int64) * stride_r
        candidates_row = candidates_ptr + row.to(tl.int64) * stride_c
        for first in range(program * CHUNK, vocab_size, num_programs * CHUNK):
            ids = first + tl.arange(0, CHUNK)
            x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf"))
            weight = _weight(x, peak, temperature, min_p)
            is_open = (weight > 0) & (x >= low) & (x < limit)
            num = tl.sum(is_open.to(tl.int32), axis=0)
            if num > 0:
                # In any order: what is made of them does not depend on it.
                start = tl.atomic_add(num_candidates_ptr + row, num, sem="relaxed")
                place = start + tl.cumsum(is_open.to(tl.int32), axis=0) - 1
                tl.store(candidates_row + place, ids, mask=is_open)
        if _arrives_last(counters_ptr + row, num_programs):
            num = tl.atomic_add(num_candidates_ptr + row, 0, sem="relaxed")
            lowest = _key(low).to(tl.int64) << 32
            highest = (_key(tl.minimum(limit, peak)).to(tl.int64) + 1) << 32
            cut = _search(
                lowest, highest, needed, by_count, logits_row, candidates_row, num,
                peak, temperature, min_p, TILE,
            )  # fmt: skip
            if both:
                _, mass = _sum_from(
                    cut, logits_row, candidates_row, num, peak, temperature, min_p, TILE
                )
                cut = _search(
                    cut, highest, _share(top_p, mass), by_count & (top_p >= 1.0), logits_row,
                    candidates_row, num, peak, temperature, min_p, TILE,
                )  # fmt: skip
            tl.store(cuts_ptr + row, cut)
            tl.store(num_candidates_ptr + row, 0)


@triton.jit
def _kept_weights(
    logits_row, first, vocab_size, cut, peak, temperature, min_p, CHUNK: tl.constexpr
):
    ids = first + tl.arange(0, CHUNK)
    x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf"))
    weight = _weight(x, peak, temperature, min_p)
    return tl.where(_token_key(x, ids) >= cut, weight, 0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    stride_r,
    vocab_size,
    params_ptr,
    stride_p,
    peaks_ptr,
    cuts_ptr,
    masses_ptr,
    token_ids_ptr,
    counters_ptr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Invert the distribution function of the kept tokens, in the order of their ids."""
    program, row, num_programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    is_drawn, peak = _is_drawn(params_ptr, peaks_ptr, row)
    if is_drawn:
        temperature = _temperature(params_ptr, row)
        min_p = tl.load(params_ptr + 3 * stride_p + row).to(tl.float32)
        cut = tl.load(cuts_ptr + row)
        logits_row = logits_ptr + row.to(tl.int64) * stride_r
        num_chunks = tl.cdiv(vocab_size, CHUNK)
        masses_row = masses_ptr + row * num_chunks
        for chunk in range(program, num_chunks, num_programs):
            weight = _kept_weights(
                logits_row, chunk * CHUNK, vocab_size, cut, peak, temperature, min_p, CHUNK
            )
            tl.store(masses_row + chunk, tl.sum(weight, axis=0))
        if _arrives_last(counters_ptr + row, num_programs):
            offs = tl.arange(0, MAX_CHUNKS)
            masses = tl.load(
                masses_row + offs, mask=offs < num_chunks, other=0, cache_modifier=".cg"
            )
            total = tl.sum(masses, axis=0)
            uniform = tl.load(params_ptr + 4 * stride_p + row)
            # Rounding must not lead beyond the last token.
            target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            chunk = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
            target -= tl.sum(tl.where(offs < chunk, masses, 0), axis=0)
            weight = _kept_weights(
                logits_row, chunk * CHUNK, vocab_size, cut, peak, temperature, min_p, CHUNK
            )
            place = tl.sum((tl.cumsum(weight, axis=0) <= target).to(tl.int32), axis=0)
            tl.store(token_ids_ptr + row, (chunk * CHUNK + place).to(tl.int64))
