"""Prefill attention to the selected blocks while the context is short: all keys, most masked.

Where a query chooses a good part of all blocks, the queries of a tile together choose nearly all of
them. Then plain flash attention with a mask is faster than visiting block by block (`prefill_slc`),
whose partial results cost a write and a read of every query's output for every block it chose. The
gated sum of the branches ends the same kernel.

T tokens of the step, R of them prefill tokens, B rows, P pages of the longest row, HQ query heads,
H KV heads, G = HQ // H, D and Dv dimensions of keys and of values, S selected blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.common import LOG2E, block_h, prefill_block_q, split_dim
from nsa_kernels.gpu.prefill_merge import _gate
from nsa_kernels.gpu.prefill_swa import SwaTuning, _load_pages
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates

# Blocks whose choice is one bit of an int32 a query.
WORD_BLOCKS = tl.constexpr(32)
# The time of `prefill_slc` grows with the blocks a query chooses, that of this kernel with the
# keys it sees; they are equal at about so many keys, in the mean over queries, for each block. An
# H200 had 1500 (32 heads of 64) and 2000 (64 heads of 128) for 16 blocks.
SHORT_KEYS_PER_BLOCK = 96
# Blocks of a query's list that are turned into bits at once.
LIST_STEP = 32


def short_context(spec: NSASpec) -> int:
    """Return the mean number of keys before a query up to which this kernel is the faster one."""
    return SHORT_KEYS_PER_BLOCK * spec.num_selected_blocks


def default_tuning(head_dim: int, v_head_dim: int, dtype: torch.dtype) -> SwaTuning:
    """Tiles that fit the registers and the shared memory of a Hopper SM."""
    if dtype == torch.float32:
        return SwaTuning(block_n=16, num_warps=8, num_stages=1)
    if max(head_dim, v_head_dim) > 128:
        return SwaTuning(block_n=64, num_warps=8, num_stages=2)
    # Two programs an SM. At 128 dimensions the accumulators spill, and it is still 20 % faster than
    # one program of three stages (H200).
    return SwaTuning(block_n=64, num_warps=8, num_stages=2, max_registers=128)


@triton.jit(do_not_specialize=["first_token", "num_pages", "stride_table"])
def _prefill_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    block_indices_ptr,
    o_cmp_ptr,
    o_swa_ptr,
    gates_ptr,
    out_ptr,
    tile_rows_ptr,
    tile_starts_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    page_table_ptr,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_branch_t,
    stride_branch_h,
    stride_gate_t,
    stride_gate_h,
    stride_gate_branch,
    stride_table,
    num_pages,
    first_token,
    g_cmp,
    g_slc,
    g_swa,
    scale_log2,
    GROUP_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SIGMOID_GATES: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    CHECK: tl.constexpr,
):
    # The last tiles of a row read most: they begin first.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows_ptr + tile)
    start_token = tl.load(tile_starts_ptr + tile)
    stop_token = tl.minimum(start_token + BLOCK_Q, tl.load(cu_seqlens_ptr + row + 1))
    # Position of token i of the step = i + shift.
    shift = tl.load(seq_lens_ptr + row) - tl.load(cu_seqlens_ptr + row + 1)
    first, last = start_token + shift, stop_token - 1 + shift
    table_ptr = page_table_ptr + row.to(tl.int64) * stride_table

    offs_m = tl.arange(0, BLOCK_Q * BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_s = tl.arange(0, BLOCK_S)
    tokens = start_token + offs_m // BLOCK_H
    heads = kv_head * GROUP_SIZE + offs_m % BLOCK_H
    in_rows = (tokens < stop_token) & (offs_m % BLOCK_H < GROUP_SIZE)
    positions = tokens + shift
    q_rows = q_ptr + tokens.to(tl.int64)[:, None] * stride_qt + heads[:, None] * stride_qh
    q = tl.load(
        q_rows + offs_d[None, :], mask=in_rows[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0
    )
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D + tl.arange(0, BLOCK_D2)
        q2 = tl.load(
            q_rows + offs_d2[None, :],
            mask=in_rows[:, None] & (offs_d2 < HEAD_DIM)[None, :],
            other=0.0,
        )
    # Choices are read once a token, or by every row of the tile.
    choosers = start_token + tl.arange(0, BLOCK_Q) if BY_TOKEN else tokens
    chosen_row = (choosers - first_token).to(tl.int64) * KV_HEADS + kv_head
    chosen_ptrs = block_indices_ptr + chosen_row[:, None] * NUM_SELECTED + offs_s[None, :]
    # With BY_TOKEN, a tile of keys in one block is masked row by row.
    MASK_ROWS: tl.constexpr = BY_TOKEN and PAGE_SIZE >= BLOCK_N

    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head)
    m_i = tl.full([BLOCK_Q * BLOCK_H], -1e30, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_Q * BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q * BLOCK_H, BLOCK_DV], dtype=tl.float32)
    WORD_KEYS: tl.constexpr = WORD_BLOCKS * PAGE_SIZE
    page = _load_pages(table_ptr, 0, last, num_pages, PAGE_SIZE, BLOCK_N, CHECK)
    word = tl.zeros([BLOCK_Q * BLOCK_H], tl.int32)
    for start in tl.range(0, last + 1, BLOCK_N):
        word_start = start // WORD_KEYS * WORD_KEYS
        if start == word_start:
            # Bit i: the query chose the i-th block from here. It chose none twice.
            bits = tl.zeros([choosers.shape[0]], tl.int32)
            for first_s in tl.static_range(0, NUM_SELECTED, BLOCK_S):
                is_listed = (choosers < stop_token)[:, None]
                is_listed &= (first_s + offs_s < NUM_SELECTED)[None, :]
                chosen_block = tl.load(chosen_ptrs + first_s, mask=is_listed, other=-1)
                place = chosen_block - word_start // PAGE_SIZE
                is_here = (place >= 0) & (place < WORD_BLOCKS)
                bits += tl.sum(tl.where(is_here, 1 << tl.where(is_here, place, 0), 0), axis=1)
            if BY_TOKEN:
                bits = tl.broadcast_to(bits[:, None], [BLOCK_Q, BLOCK_H])
                bits = tl.reshape(bits, [BLOCK_Q * BLOCK_H])
            word = bits
        if PAGE_SIZE >= BLOCK_N:
            # Only a scalar changes from tile to tile.
            base = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE_SIZE + start % PAGE_SIZE
            offsets = tl.arange(0, BLOCK_N)
        else:
            base = kv_head * PAGE_SIZE
            slots = (start + tl.arange(0, BLOCK_N)) % PAGE_SIZE
            offsets = page.to(tl.int64) * (KV_HEADS * PAGE_SIZE) + slots
        # A tile ahead, so that the copies of keys and values do not wait for it.
        page = _load_pages(table_ptr, start + BLOCK_N, last, num_pages, PAGE_SIZE, BLOCK_N, CHECK)
        key = start + tl.arange(0, BLOCK_N)
        # Slots beyond the tile's last query may hold NaN.
        in_tile = key <= last
        k_rows = k_ptr + base * HEAD_DIM + offsets[None, :] * HEAD_DIM
        k = tl.load(
            k_rows + offs_d[:, None],
            mask=in_tile[None, :] & (offs_d < HEAD_DIM)[:, None],
            other=0.0,
        ).to(q.dtype)
        s = tl.dot(q, k, input_precision="ieee")
        if BLOCK_D2 > 0:
            k2 = tl.load(
                k_rows + offs_d2[:, None],
                mask=in_tile[None, :] & (offs_d2 < HEAD_DIM)[:, None],
                other=0.0,
            ).to(q.dtype)
            s = tl.dot(q2, k2, s, input_precision="ieee")
        v = tl.load(
            v_ptr + base * V_DIM + offsets[:, None] * V_DIM + offs_dv[None, :],
            mask=in_tile[:, None] & (offs_dv < V_DIM)[None, :],
            other=0.0,
        ).to(q.dtype)
        in_causal = start + BLOCK_N <= first + 1
        if MASK_ROWS:
            if not in_causal:
                s = tl.where(key[None, :] <= positions[:, None], s, -float("inf"))
            chosen = ((word >> ((start - word_start) // PAGE_SIZE)) & 1) > 0
            top = tl.where(chosen, tl.max(s, axis=1) * scale_log2, -float("inf"))
            m_new = tl.maximum(m_i, top)
            # A row that did not choose the block has probabilities of exp2(-inf) = 0.
            m_ref = tl.where(chosen, m_new, float("inf"))
        else:
            if BY_TOKEN:
                # Bits of the tile: what they are tested against is constant.
                bits = 1 << (tl.arange(0, BLOCK_N) // PAGE_SIZE)
                tile_word = word >> ((start - word_start) // PAGE_SIZE)
                visible = (tile_word[:, None] & bits[None, :]) != 0
            else:
                block = (key - word_start) // PAGE_SIZE
                visible = ((word[:, None] >> block[None, :]) & 1) > 0
            if not in_causal:
                visible = visible & (key[None, :] <= positions[:, None])
            s = tl.where(visible, s, -float("inf"))
            # m_i starts finite: a row without a visible key yet has exp2(-inf) = 0, not NaN.
            m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
            m_ref = m_new
        p = tl.exp2(s * scale_log2 - m_ref[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new

    gate_offset = tokens.to(tl.int64) * stride_gate_t + heads * stride_gate_h
    gate = _gate(gates_ptr, g_slc, gate_offset + stride_gate_branch, in_rows, SIGMOID_GATES)
    # Rows beyond the tile's tokens are not stored; their sum may be 0.
    if v_scale_ptr is not None:
        gate *= tl.load(v_scale_ptr + kv_head)
    o = acc * (gate / tl.where(l_i > 0, l_i, 1.0))[:, None]
    mask = in_rows[:, None] & (offs_dv < V_DIM)[None, :]
    branch_rows = tokens.to(tl.int64) * stride_branch_t + heads * stride_branch_h
    branch_offset = branch_rows[:, None] + offs_dv[None, :]
    if o_cmp_ptr is not None:
        gate = _gate(gates_ptr, g_cmp, gate_offset, in_rows, SIGMOID_GATES)
        o += gate[:, None] * tl.load(o_cmp_ptr + branch_offset, mask=mask, other=0.0).to(tl.float32)
    if o_swa_ptr is not None:
        gate = _gate(gates_ptr, g_swa, gate_offset + 2 * stride_gate_branch, in_rows, SIGMOID_GATES)
        o += gate[:, None] * tl.load(o_swa_ptr + branch_offset, mask=mask, other=0.0).to(tl.float32)
    o_rows = out_ptr + tokens.to(tl.int64)[:, None] * stride_ot + heads[:, None] * stride_oh
    tl.store(o_rows + offs_dv[None, :], o.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_short(
    q: Tensor,
    block_indices: Tensor,
    o_cmp: Tensor | None,
    o_swa: Tensor | None,
    gates: Gates,
    cache: LayerCache,
    spec: NSASpec,
    *,
    tile_rows: Tensor,
    tile_starts: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    softmax_scale: float,
    first_token: int,
    out: Tensor,
    sigmoid_gates: bool = False,
    check: bool = False,
    tuning: SwaTuning | None = None,
    by_token: bool = True,
) -> None:
    """Write out[t] = g_cmp * o_cmp[t] + g_slc * o_slc[t] + g_swa * o_swa[t] for the tiles' tokens.

    The same result as `prefill_slc`, and the same arguments as far as they are named alike:
    block_indices: [R, H, width] int32 of the tokens from first_token on, -1 for none, no block
    twice; width is `spec.block_table_width`.
    o_cmp, o_swa: contiguous [T, HQ, Dv], or None.
    tile_rows, tile_starts: int32 [num_tiles], row and first token of every tile of
    `prefill_block_q(G)` tokens. cu_seqlens_q int32 [B + 1], seq_lens int32 [B], page_table int32
    [B, P]. Every page of a row is read. by_token: unpack a token's choices once for all heads, and
    mask whole rows where a tile of keys is one block; for speed alone.

    Raises ValueError when a shape does not fit.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, v_head_dim = cache.v.shape
    selected = spec.block_table_width
    shape = (num_tokens, num_q_heads, v_head_dim)
    check_shape("block_indices", block_indices, (num_tokens - first_token, num_kv_heads, selected))
    for name, branch in (("o_cmp", o_cmp), ("o_swa", o_swa), ("out", out)):
        if branch is not None:
            check_shape(name, branch, shape)
    group_size = num_q_heads // num_kv_heads
    tuning = tuning or default_tuning(head_dim, v_head_dim, q.dtype)
    block_d, block_d2 = split_dim(head_dim)
    if tile_rows.shape[0] == 0:
        return
    g_cmp, g_slc, g_swa = (0.0, 0.0, 0.0) if isinstance(gates, Tensor) else gates
    gate_strides = gates.stride() if isinstance(gates, Tensor) else (0, 0, 0)
    _prefill_short_kernel[(tile_rows.shape[0], num_kv_heads)](
        q,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        block_indices,
        o_cmp,
        o_swa,
        gates if isinstance(gates, Tensor) else None,
        out,
        tile_rows,
        tile_starts,
        cu_seqlens_q,
        seq_lens,
        page_table,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        num_q_heads * v_head_dim,
        v_head_dim,
        *gate_strides,
        page_table.stride(0),
        num_pages,
        first_token,
        g_cmp,
        g_slc,
        g_swa,
        softmax_scale * LOG2E,
        GROUP_SIZE=group_size,
        KV_HEADS=num_kv_heads,
        NUM_SELECTED=selected,
        BLOCK_S=min(triton.next_power_of_2(selected), LIST_STEP),
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        V_DIM=v_head_dim,
        BLOCK_Q=prefill_block_q(group_size),
        BLOCK_H=block_h(group_size),
        BLOCK_N=tuning.block_n,
        BLOCK_D=block_d,
        BLOCK_D2=block_d2,
        BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
        SIGMOID_GATES=sigmoid_gates,
        BY_TOKEN=by_token,
        CHECK=check,
        debug=check,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
    )
