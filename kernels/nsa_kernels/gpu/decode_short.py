"""Decode of few rows with short contexts: the whole attention of a row and KV head in one program.

At such sizes nothing but latency counts: three kernels that wait for one another cost more than
what they compute. Here keys, values and probabilities stay in registers from the append to the
gated sum, and nothing is merged. What does not depend on the kernel in front (page ids, compressed
entries, the window) is on its way before that one has ended.

Only where a block is one compression window, so that its probabilities, summed over the heads, are
the block scores (`can_decode_short`). Other dialects and longer contexts: `decode_cmp`,
`decode_select`, `decode_slc`. Scores are computed as there, and ties go to the lower block.

Nd decode rows, HQ query heads, H KV heads, G = HQ // H, D and Dv dimensions of keys and values,
S selected blocks, P pages of the longest row. "lse2" as everywhere: log2(sum(2 ** s2)).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import LOG2E
from nsa_kernels.gpu.decode_select import _finalists, _pack, _rank, _unpack
from nsa_kernels.gpu.decode_slc import _load_gate
from nsa_kernels.gpu.select import score_keys
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates
from nsa_kernels.torch_plan import Branches

# A program holds the entries of all pages at once, and all tokens that it selects; the window,
# too, while it selects.
MAX_PAGES = 256
MAX_TILE_BYTES = 64 << 10
MAX_GROUP_SIZE = 32
# Rows times KV heads: a program each, and early programs must not be in the way of others.
MAX_GROUPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortLimits:
    """Sizes up to which `can_decode_short`: pages of a row, rows times KV heads (0: never)."""

    pages: int = MAX_PAGES
    groups: int = MAX_GROUPS


def can_decode_short(
    spec: NSASpec,
    cache: LayerCache,
    branches: Branches,
    *,
    dtype: torch.dtype,
    num_q_heads: int,
    shape: tuple[int, int],
    limits: ShortLimits,
) -> bool:
    """Whether `decode_short` computes decode rows of a layer; the rule has no other parts.

    shape: rows and pages that the kernels are cut for. The dialect: a block is one compression
    window, with the mean and without coarse keys, dense rows or keys of its own for a branch; all
    three branches are on. The sizes: 16-bit or fp32 caches, tiles that fit into registers.
    """
    num_kv_heads, head_dim, v_head_dim = cache.k.shape[1], cache.k.shape[3], cache.v.shape[3]
    is_dialect = (
        branches.cmp
        and branches.slc
        and branches.swa
        and spec.window_size > 0
        and spec.cmp_len == spec.cmp_stride == spec.block_size
        and spec.score_map == "overlap"
        and not spec.lse_len
        and not spec.dense_len
        and cache.k_swa is None
        and cache.k_scale is None
        and cache.k.dtype == dtype
    )
    width = _padded(head_dim) + _padded(v_head_dim)
    selected = triton.next_power_of_2(spec.num_selected_blocks) * spec.block_size
    tile_bytes = max(selected, _padded(spec.window_size)) * width * dtype.itemsize
    return (
        is_dialect
        and tile_bytes <= MAX_TILE_BYTES
        and _padded(shape[1]) * width * dtype.itemsize <= MAX_TILE_BYTES
        and num_q_heads // num_kv_heads <= MAX_GROUP_SIZE
        and shape[1] <= limits.pages
        and shape[0] * num_kv_heads <= limits.groups
    )


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def decode_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    cache: LayerCache,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    shape_pages: int | None = None,
    sigmoid_gates: bool = False,
    out: Tensor | None = None,
    block_indices: Tensor | None = None,
    launch_pdl: bool = False,
    is_settled: bool = False,
    check: bool = False,
    num_warps: int = 8,
    max_registers: int | None = None,
) -> Tensor:
    """Append the tokens of the decode rows and attend: [Nd, HQ, Dv], zeros for a padding row.

    For what `can_decode_short` allows. q: [Nd, HQ, D], k: [Nd, H, D], v: [Nd, H, Dv], last stride
    1. gates: [Nd, HQ, 3] likewise, logits when `sigmoid_gates`, or three constants.
    seq_lens: [Nd or more] int32, tokens with this step's, 0 for a padding row, which touches no
    cache. page_table: [Nd or more, P] int32. shape_pages: pages to be cut for, at least P.
    out: contiguous, of q's dtype. block_indices: [Nd, H, S] int32, where to write the selected
    blocks (-1 for none), None for nowhere.
    launch_pdl: start while the kernel in front ends, and let the next one start. is_settled: with
    launch_pdl, `seq_lens`, `page_table` and what earlier steps left in the cache may be read
    without waiting: their writers had ended before the kernel in front was launched.
    check: assert on the device that page ids are inside the cache.

    Raises ValueError when softmax_scale is not positive or out is not contiguous.
    """
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    num_rows, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, block_size, v_head_dim = cache.v.shape
    if out is None:
        out = q.new_empty((num_rows, num_q_heads, v_head_dim))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if num_rows == 0:
        return out
    group_size = num_q_heads // num_kv_heads
    gate_tensor = gates if isinstance(gates, Tensor) else None
    gate_values = (None, None, None) if isinstance(gates, Tensor) else gates
    num_selected = spec.num_selected_blocks
    is_legacy = spec.selection == "fla_legacy"
    num_picks = (
        num_selected // 2
        if is_legacy
        else num_selected - spec.num_init_blocks - spec.num_local_blocks
    )
    _decode_short_kernel[(num_kv_heads, num_rows)](
        q,
        k,
        v,
        gate_tensor,
        cache.k,
        cache.v,
        cache.k_cmp,
        cache.v_cmp,
        seq_lens,
        page_table,
        block_indices,
        out,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        0 if gate_tensor is None else gate_tensor.stride(0),
        0 if gate_tensor is None else gate_tensor.stride(1),
        *gate_values,
        softmax_scale * LOG2E,
        num_pages,
        page_table.stride(0),
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_H=max(16, triton.next_power_of_2(group_size)),
        BLOCK_D=_padded(head_dim),
        BLOCK_DV=_padded(v_head_dim),
        BLOCK_SIZE=block_size,
        NUM_ENTRIES=max(
            _padded(shape_pages or page_table.shape[1]), int(triton.next_power_of_2(num_selected))
        ),
        WINDOW_SIZE=spec.window_size,
        WINDOW_TOKENS=_padded(spec.window_size),
        NUM_SELECTED=num_selected,
        BLOCK_S=max(int(triton.next_power_of_2(num_selected)), 16 // block_size),
        NUM_PICKS=num_picks,
        SLOTS=int(triton.next_power_of_2(max(num_picks, 1))),
        NUM_INIT=spec.num_init_blocks,
        NUM_LOCAL=spec.num_local_blocks,
        LEGACY=is_legacy,
        SIGMOID_GATES=sigmoid_gates,
        CHECK=check,
        PDL=launch_pdl,
        SETTLED=launch_pdl and is_settled,
        num_warps=num_warps,
        maxnreg=max_registers,
        debug=check,
        **({"launch_pdl": True} if launch_pdl else {}),
    )
    return out


@triton.jit
def _place(values, NUM_PICKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks [BLOCK_S] of the NUM_PICKS largest of [N] different values, -1 for the others.

    Negative values are nobody's block.
    """
    values = _finalists(values, SLOTS)
    _, block = _unpack(values)
    rank = tl.where(values >= 0, _rank(values), NUM_PICKS)
    place = tl.arange(0, BLOCK_S)
    is_here = (rank[:, None] == place[None, :]) & (place < NUM_PICKS)[None, :]
    # One candidate at most for each place.
    return tl.sum(tl.where(is_here, block[:, None] + 1, 0), axis=0) - 1


@triton.jit
def _select(
    scores,
    num_blocks,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """The selected blocks [BLOCK_S] from the scores [N] of blocks 0 .. N-1, -1 for none."""
    NUM: tl.constexpr = scores.shape[0]
    place = tl.arange(0, BLOCK_S)
    block = tl.arange(0, NUM)
    keys = score_keys(scores, block, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
    if LEGACY:
        # One half from the past, one from the NUM_SELECTED last blocks.
        first_present = tl.maximum(num_blocks - 1, 0) // NUM_SELECTED * NUM_SELECTED
        past = _pack(tl.where(block >= first_present, -1, keys), block)
        chosen = _place(past, NUM_PICKS, SLOTS, BLOCK_S)
        present = tl.minimum(first_present + place, NUM - 1)
        exists = (place < NUM_SELECTED) & (first_present + place < num_blocks)
        present_keys = tl.where(exists, tl.gather(keys, present, axis=0), -1)
        # What does not exist needs a value of its own, too.
        present_values = _pack(present_keys, first_present + place)
        rank = tl.where(exists, _rank(present_values), NUM_PICKS)
        is_here = (rank[:, None] + NUM_PICKS == place[None, :]) & (rank < NUM_PICKS)[:, None]
        picked = tl.sum(tl.where(is_here, (first_present + place)[:, None] + 1, 0), axis=0) - 1
        chosen = tl.where(place < NUM_PICKS, chosen, picked)
    else:
        rest = place - NUM_PICKS
        forced = tl.where(rest < NUM_INIT, rest, num_blocks - NUM_LOCAL + rest - NUM_INIT)
        chosen = forced
        if NUM_PICKS > 0:
            free = _place(_pack(keys, block), NUM_PICKS, SLOTS, BLOCK_S)
            chosen = tl.where(rest < 0, free, forced)
    chosen = tl.where(num_blocks <= NUM_SELECTED, place, chosen)
    return tl.where((place < NUM_SELECTED) & (chosen < num_blocks), chosen, -1)


@triton.jit
def _load_rows(ptr, rows, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [N, BLOCK] of a cache [.., DIM]; 0 where not `mask`."""
    offs = tl.arange(0, BLOCK)
    mask = mask[:, None]
    if BLOCK != DIM:
        mask = mask & (offs < DIM)[None, :]
    return tl.load(ptr + rows[:, None] * DIM + offs[None, :], mask=mask, other=0.0)


@triton.jit
def _softmax(s, visible):
    """Probabilities relative to a finite maximum, that maximum and their sum, a row each."""
    s = tl.where(visible[None, :], s, float("-inf"))
    top = tl.max(s, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - top[:, None])
    return p, top, tl.sum(p, axis=1)


@triton.jit
def _attend(q, k, v, visible, scale):
    """Attention to one tile: [M, Dv] fp32, 0 where nothing is visible."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    p, _, total = _softmax(s, visible)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    # Not total > 0: a NaN must go on to where it is noticed.
    return o / tl.where(total != 0, total, 1.0)[:, None]


@triton.jit
def _mean(new, old, COUNT: tl.constexpr):
    """Mean of a token and the COUNT - 1 before it, as the cache holds it."""
    total = new.to(tl.float32) + tl.sum(old.to(tl.float32), axis=0)
    return (total / COUNT).to(new.dtype)


@triton.jit(do_not_specialize=["num_pages", "stride_pb"])
def _decode_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gates_ptr,  # [Nd, HQ, 3] or None
    k_cache_ptr,  # [num_pages, H, BLOCK_SIZE, D]
    v_cache_ptr,
    k_cmp_ptr,  # [num_pages, H, 1, D]
    v_cmp_ptr,
    seq_lens_ptr,
    page_table_ptr,
    block_indices_ptr,
    out_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    gate_cmp,
    gate_slc,
    gate_swa,
    scale,
    num_pages,
    stride_pb,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
    SIGMOID_GATES: tl.constexpr,
    CHECK: tl.constexpr,
    PDL: tl.constexpr,
    SETTLED: tl.constexpr,
):
    """One program is one row and KV head."""
    if PDL:
        # All programs run by then, and whoever comes waits for the end of this kernel.
        tl.extra.cuda.gdc_launch_dependents()
        if not SETTLED:
            tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_d, mask_dv = offs_d < HEAD_DIM, offs_dv < V_HEAD_DIM
    page_table_ptr += batch * stride_pb

    # What is in the cache already: the last token, and a window that ends with it, are not.
    seq_len = tl.load(seq_lens_ptr + batch)
    position = seq_len - 1
    num_blocks = tl.cdiv(seq_len, BLOCK_SIZE)
    num_visible = seq_len // BLOCK_SIZE
    num_old = tl.maximum(position, 0) // BLOCK_SIZE
    closes = num_visible > num_old
    offs_e = tl.arange(0, NUM_ENTRIES)
    pages = tl.load(page_table_ptr + offs_e, mask=offs_e < num_blocks, other=0)
    window_start = tl.maximum(seq_len - WINDOW_SIZE, 0)
    # Tokens, not whole pages: these would be twice as many once rounded up.
    token_w = window_start + tl.arange(0, WINDOW_TOKENS)
    in_window = token_w < seq_len
    page_w = tl.load(page_table_ptr + token_w // BLOCK_SIZE, mask=in_window, other=0)
    page = tl.load(
        page_table_ptr + tl.maximum(position, 0) // BLOCK_SIZE, mask=seq_len > 0, other=0
    )
    if CHECK:
        tl.device_assert((pages >= 0) & (pages < num_pages), "page id outside the cache")
    entry_rows = pages.to(tl.int64) * num_kv_heads + kv_head
    k_cmp = _load_rows(k_cmp_ptr, entry_rows, offs_e < num_old, HEAD_DIM, BLOCK_D)
    v_cmp = _load_rows(v_cmp_ptr, entry_rows, offs_e < num_old, V_HEAD_DIM, BLOCK_DV)
    page_row = page.to(tl.int64) * num_kv_heads + kv_head
    offs_b = tl.arange(0, BLOCK_SIZE)
    is_old = (offs_b < BLOCK_SIZE - 1) & closes
    k_old = _load_rows(k_cache_ptr, page_row * BLOCK_SIZE + offs_b, is_old, HEAD_DIM, BLOCK_D)
    v_old = _load_rows(v_cache_ptr, page_row * BLOCK_SIZE + offs_b, is_old, V_HEAD_DIM, BLOCK_DV)
    rows_w = (page_w.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + token_w % BLOCK_SIZE
    old_w = in_window & (token_w < position)
    k_win = _load_rows(k_cache_ptr, rows_w, old_w, HEAD_DIM, BLOCK_D)
    v_win = _load_rows(v_cache_ptr, rows_w, old_w, V_HEAD_DIM, BLOCK_DV)

    if SETTLED:
        tl.extra.cuda.gdc_wait()
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < GROUP_SIZE
    head = kv_head * GROUP_SIZE + offs_h
    k_new = tl.load(
        k_ptr + batch * stride_kt + kv_head * stride_kh + offs_d, mask=mask_d, other=0.0
    )
    v_new = tl.load(
        v_ptr + batch * stride_vt + kv_head * stride_vh + offs_dv, mask=mask_dv, other=0.0
    )
    q = tl.load(
        q_ptr + batch * stride_qt + head[:, None] * stride_qh + offs_d[None, :],
        mask=mask_h[:, None] & mask_d[None, :],
        other=0.0,
    )
    gates_row = batch * stride_gt + head * stride_gh
    g_cmp = _load_gate(gates_ptr, gates_row, mask_h, gate_cmp, SIGMOID_GATES)
    g_slc = _load_gate(gates_ptr, gates_row + 1, mask_h, gate_slc, SIGMOID_GATES)
    g_swa = _load_gate(gates_ptr, gates_row + 2, mask_h, gate_swa, SIGMOID_GATES)

    k_mean, v_mean = _mean(k_new, k_old, BLOCK_SIZE), _mean(v_new, v_old, BLOCK_SIZE)
    is_new = closes & (offs_e == num_old)
    k_cmp = tl.where(is_new[:, None], k_mean[None, :], k_cmp)
    v_cmp = tl.where(is_new[:, None], v_mean[None, :], v_cmp)
    s = tl.dot(q, tl.trans(k_cmp), input_precision="ieee") * scale
    p, top, total = _softmax(s, offs_e < num_visible)
    total = tl.where(total != 0, total, 1.0)
    lse2 = top + tl.log2(total)
    weight = tl.where(mask_h, tl.exp2(top - lse2), 0.0)
    scores = tl.sum(p * weight[:, None], axis=0)
    chosen = _select(
        scores, num_blocks,
        NUM_SELECTED, BLOCK_S, NUM_PICKS, SLOTS, NUM_INIT, NUM_LOCAL, LEGACY,
    )  # fmt: skip
    chosen_pages = tl.gather(pages, tl.maximum(chosen, 0), axis=0)
    TOKENS: tl.constexpr = BLOCK_S * BLOCK_SIZE
    shape: tl.constexpr = (BLOCK_S, BLOCK_SIZE)
    token = tl.where(chosen >= 0, chosen * BLOCK_SIZE, 1 << 30)[:, None] + offs_b[None, :]
    rows = (chosen_pages.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE
    rows = tl.reshape(tl.broadcast_to(rows[:, None] + offs_b[None, :], shape), [TOKENS])
    token = tl.reshape(token, [TOKENS])
    k_slc = _load_rows(k_cache_ptr, rows, token < position, HEAD_DIM, BLOCK_D)
    v_slc = _load_rows(v_cache_ptr, rows, token < position, V_HEAD_DIM, BLOCK_DV)

    # While those are on their way:
    o_cmp = tl.dot(p.to(v_cmp.dtype), v_cmp, input_precision="ieee") / total[:, None]
    is_last = token_w == position
    k_win = tl.where(is_last[:, None], k_new[None, :], k_win)
    v_win = tl.where(is_last[:, None], v_new[None, :], v_win)
    out = g_cmp * o_cmp + g_swa * _attend(q, k_win, v_win, in_window, scale)
    if seq_len > 0:
        slot = page_row * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(k_cache_ptr + slot * HEAD_DIM + offs_d, k_new, mask=mask_d)
        tl.store(v_cache_ptr + slot * V_HEAD_DIM + offs_dv, v_new, mask=mask_dv)
        if closes:
            tl.store(k_cmp_ptr + page_row * HEAD_DIM + offs_d, k_mean, mask=mask_d)
            tl.store(v_cmp_ptr + page_row * V_HEAD_DIM + offs_dv, v_mean, mask=mask_dv)
    if block_indices_ptr is not None:
        place = tl.arange(0, BLOCK_S)
        indices = block_indices_ptr + (batch * num_kv_heads + kv_head) * NUM_SELECTED + place
        tl.store(indices, chosen, mask=place < NUM_SELECTED)

    is_last = token == position
    k_slc = tl.where(is_last[:, None], k_new[None, :], k_slc)
    v_slc = tl.where(is_last[:, None], v_new[None, :], v_slc)
    out += g_slc * _attend(q, k_slc, v_slc, token < seq_len, scale)
    out = tl.where(seq_len > 0, out, 0.0)
    num_heads = num_kv_heads * GROUP_SIZE
    tl.store(
        out_ptr + (batch * num_heads + head)[:, None] * V_HEAD_DIM + offs_dv[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_h[:, None] & mask_dv[None, :],
    )
