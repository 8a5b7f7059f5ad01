"""Prefill attention to the selected blocks, block by block instead of query by query.

Read query by query, every (token, KV head) loads its own blocks: at 64k tokens far more than L2
delivers. Here a program loads one block once and visits the queries that chose it, all heads of a
token together. Each visit leaves a partial result, normalised, with its log-sum-exp; a last kernel
merges a query's partial results and adds the branches with their gates.

Forced blocks need no list of visitors and are not merged one by one: a query's partial result 0
is plain attention to all of them, those after it are its free blocks (see `prefill_index`).

Legend: T tokens of the step, R tokens of the sub-chunk, B rows, HQ / H query / KV heads,
G = HQ // H, D / Dv width of keys / values, P pages of the longest row, S selected blocks, N = 1 +
free blocks a query can choose: its partial results.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.common import LOG2E, block_h
from nsa_kernels.gpu.prefill_index import (
    ITEM_FIELDS,
    BlockIndex,
    build_index,
    entry_base,
    num_free_blocks,
)
from nsa_kernels.gpu.prefill_merge import merge_and_combine
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates


@dataclass(frozen=True, slots=True, kw_only=True)
class SlcTuning:
    """What changes the speed of `prefill_slc` and not its result.

    free_*: the kernel over free blocks; forced_*: the one over forced blocks. rows: (token, head)
    pairs of a tile. maxnreg: registers of a thread at most, so that more programs share an SM.
    queries_per_item: visitors that a program takes at most. block_n: keys of a loop step.
    """

    queries_per_item: int = 32
    free_rows: int = 64
    free_warps: int = 4
    free_maxnreg: int | None = None
    forced_rows: int = 128
    forced_block_n: int = 64
    forced_warps: int = 8
    forced_stages: int = 2
    forced_maxnreg: int | None = None
    merge_warps: int = 4
    merge_unroll: int = 4


def default_tuning(
    group_size: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> SlcTuning:
    """Tile sizes that fit the registers and the shared memory of a Hopper SM.

    head_dim: the wider one of keys and values.
    """
    padded_heads = block_h(group_size)
    if dtype == torch.float32:
        # Full precision runs on the scalar units: small tiles, for the registers' sake.
        rows = max(16, padded_heads)
        return SlcTuning(
            free_rows=rows, forced_rows=rows, forced_block_n=32,
            forced_warps=4, forced_stages=1,
        )  # fmt: skip
    rows = max(64, padded_heads)
    is_wide = head_dim > 128
    # Two programs of 8 warps an SM, or three of 4 warps, where the accumulators leave room for it.
    free_warps = 8 if rows > 64 or block_size > 64 else 4
    return SlcTuning(
        free_rows=rows,
        free_warps=free_warps,
        free_maxnreg=None if is_wide or rows > 64 else 128 if free_warps == 8 else 168,
        forced_rows=max(128, padded_heads),
        forced_maxnreg=None if is_wide or rows > 128 else 128,
    )


def sub_chunk_tokens(
    bound_bytes: int,
    spec: NSASpec,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    v_head_dim: int,
    dtype: torch.dtype,
) -> int:
    """R: how many tokens a sub-chunk may have for its workspace to stay under bound_bytes.

    At least 16. The lists' starts, 16 bytes for each block of every row and KV head, come on top.
    """
    num_free = num_free_blocks(spec)
    per_head = (1 + num_free) * (v_head_dim * dtype.itemsize + 4)
    per_index = num_kv_heads * (4 + num_free * (4 + 4 + 4 * ITEM_FIELDS.value))
    return int(max(16, bound_bytes // (num_q_heads * per_head + per_index)))


def prefill_slc(
    q: Tensor,
    block_indices: Tensor,
    o_cmp: Tensor | None,
    o_swa: Tensor | None,
    gates: Gates,
    cache: LayerCache,
    token_rows: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    cu_blocks: Tensor,
    spec: NSASpec,
    *,
    num_blocks: int,
    softmax_scale: float,
    first_token: int,
    out: Tensor,
    sigmoid_gates: bool = False,
    check: bool = False,
    tuning: SlcTuning | None = None,
) -> None:
    """Write out[t] = g_cmp * o_cmp[t] + g_slc * o_slc[t] + g_swa * o_swa[t] for R tokens.

    The R tokens are first_token .. first_token + R - 1 of the step's T.
    q: [T, HQ, D], last stride 1. block_indices: [R, H, S] int32, -1 for none, every query's forced
    blocks among them, in any order; other blocks than a query's candidates 0..IC are ignored.
    o_cmp, o_swa: [T, HQ, Dv], or None for branches that are not used. gates: [T, HQ, 3] in the
    order (cmp, slc, swa), or three constants. sigmoid_gates: `gates` holds logits.
    cache: pages of k and v, of which only tokens before the rows' seq_lens are read.
    token_rows, positions: [T]. seq_lens: [B]. page_table: [B, P]. cu_blocks: [B + 1], prefix sums
    of ceil(seq_lens / block_size), and num_blocks the last of them. All int32.
    out: [T, HQ, Dv], last stride 1. check: assert on the device that page ids are the cache's.

    Raises ValueError when a shape does not fit.
    """
    num_tokens = block_indices.shape[0]
    _, num_q_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = cache.k.shape[1], cache.v.shape[3]
    group_size = num_q_heads // num_kv_heads
    check_shape("block_indices", block_indices, (num_tokens, num_kv_heads, spec.block_table_width))
    check_shape("out", out, (q.shape[0], num_q_heads, v_head_dim))
    check_shape("cache.k", cache.k, (cache.k.shape[0], num_kv_heads, spec.block_size, head_dim))
    if tuning is None:
        tuning = default_tuning(group_size, max(head_dim, v_head_dim), spec.block_size, q.dtype)
    if num_tokens == 0:
        return
    num_free = num_free_blocks(spec)
    shape = (num_tokens, num_kv_heads, 1 + num_free, group_size)
    partial = torch.empty((*shape, v_head_dim), dtype=q.dtype, device=q.device)
    partial_lse2 = torch.empty(shape, dtype=torch.float32, device=q.device)
    scale_log2 = softmax_scale * LOG2E
    _launch_forced(
        q, cache, token_rows, positions, seq_lens, page_table, spec, partial, partial_lse2,
        scale_log2=scale_log2, first_token=first_token, check=check, tuning=tuning,
    )  # fmt: skip
    index = None
    if num_free:
        index = build_index(
            block_indices.contiguous(),
            token_rows,
            positions,
            page_table,
            cu_blocks,
            num_blocks=num_blocks,
            num_pages=cache.k.shape[0],
            spec=spec,
            first_token=first_token,
            queries_per_item=tuning.queries_per_item,
            check=check,
        )
        _launch_free(
            q, cache, index, spec, partial, partial_lse2,
            scale_log2=scale_log2, first_token=first_token, tuning=tuning,
        )  # fmt: skip
    merge_and_combine(
        partial,
        partial_lse2,
        index.num_free if index is not None else None,
        o_cmp,
        o_swa,
        gates,
        num_kv_heads=num_kv_heads,
        first_token=first_token,
        num_tokens=num_tokens,
        out=out,
        sigmoid_gates=sigmoid_gates,
        num_warps=tuning.merge_warps,
        unroll=tuning.merge_unroll,
    )


def _launch_forced(
    q: Tensor,
    cache: LayerCache,
    token_rows: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    partial: Tensor,
    partial_lse2: Tensor,
    *,
    scale_log2: float,
    first_token: int,
    check: bool,
    tuning: SlcTuning,
) -> None:
    """Write every query's partial result 0: attention to its forced blocks."""
    num_tokens, num_kv_heads, num_partials, group_size, v_head_dim = partial.shape
    block_q = tuning.forced_rows // block_h(group_size)
    _forced_attention_kernel[(triton.cdiv(num_tokens, block_q), num_kv_heads)](
        q,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        partial,
        partial_lse2,
        token_rows,
        positions,
        seq_lens,
        page_table,
        page_table.stride(0),
        cache.k.shape[0],
        first_token,
        num_tokens,
        q.stride(0),
        q.stride(1),
        scale_log2,
        GROUP_SIZE=group_size,
        HEAD_DIM=q.shape[2],
        V_DIM=v_head_dim,
        PAGE_SIZE=spec.block_size,
        NUM_INIT=spec.num_init_blocks,
        NUM_LOCAL=spec.num_local_blocks,
        NUM_PARTIALS=num_partials,
        BLOCK_Q=block_q,
        BLOCK_H=block_h(group_size),
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
        BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
        BLOCK_N=tuning.forced_block_n,
        CHECK=check,
        debug=check,
        maxnreg=tuning.forced_maxnreg,
        num_warps=tuning.forced_warps,
        num_stages=tuning.forced_stages,
    )


def _launch_free(
    q: Tensor,
    cache: LayerCache,
    index: BlockIndex,
    spec: NSASpec,
    partial: Tensor,
    partial_lse2: Tensor,
    *,
    scale_log2: float,
    first_token: int,
    tuning: SlcTuning,
) -> None:
    """Write the partial results 1, 2, ... : one for every free block that a query chose."""
    _, num_kv_heads, num_partials, group_size, v_head_dim = partial.shape
    block_size = max(16, spec.block_size)
    # In fp32 a whole block may not fit: it is cut, and read again for every tile of queries.
    block_n = min(32, block_size) if q.dtype == torch.float32 else block_size
    _free_attention_kernel[(index.max_items,)](
        q,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        partial,
        partial_lse2,
        index.lists,
        index.items,
        index.totals,
        first_token,
        q.stride(0),
        q.stride(1),
        scale_log2,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=q.shape[2],
        V_DIM=v_head_dim,
        PAGE_SIZE=spec.block_size,
        NUM_PARTIALS=num_partials,
        BLOCK_Q=tuning.free_rows // block_h(group_size),
        BLOCK_H=block_h(group_size),
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
        BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
        BLOCK_N=block_n,
        ENTRY_BASE=entry_base(num_partials),
        maxnreg=tuning.free_maxnreg,
        num_warps=tuning.free_warps,
    )


@triton.jit
def _load_rows(ptr, offs, mask, offs_d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A [rows, BLOCK] tile whose row i starts at ptr + offs[i]; 0 where masked or beyond DIM."""
    tile_mask = mask[:, None] if BLOCK == DIM else mask[:, None] & (offs_d < DIM)[None, :]
    return tl.load(ptr + offs[:, None] + offs_d[None, :], mask=tile_mask, other=0.0)


@triton.jit
def _store_rows(ptr, offs, mask, offs_d, value, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store a [rows, BLOCK] tile whose row i starts at ptr + offs[i], past what L2 should keep."""
    tile_mask = mask[:, None] if BLOCK == DIM else mask[:, None] & (offs_d < DIM)[None, :]
    value = value.to(ptr.dtype.element_ty)
    # Partial results are more than L2 holds, queries and keys are not.
    tl.store(ptr + offs[:, None] + offs_d[None, :], value, mask=tile_mask, cache_modifier=".cs")


@triton.jit
def _attend(q, k, v, visible, scale_log2, m_i, l_i, acc):
    """One step of the online softmax over the keys k [BLOCK_N, D]: new (m_i, l_i, acc)."""
    s2 = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    s2 = tl.where(visible, s2, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s2, axis=1))
    # A row that has seen nothing yet has -inf here, and must not become NaN.
    m_safe = tl.where(m_new > -float("inf"), m_new, 0.0)
    alpha = tl.exp2(m_i - m_safe)
    p = tl.exp2(s2 - m_safe[:, None])
    l_new = l_i * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_new, acc


@triton.jit(do_not_specialize=["stride_page_row", "num_pages", "first_token", "num_tokens"])
def _forced_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    partial_ptr,
    partial_lse2_ptr,
    token_rows_ptr,
    positions_ptr,
    seq_lens_ptr,
    page_table_ptr,
    stride_page_row,
    num_pages,
    first_token,
    num_tokens,
    stride_qt,
    stride_qh,
    scale_log2,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    """BLOCK_Q neighbouring tokens with all heads of one KV head, over their forced blocks."""
    pid_head, num_heads = tl.program_id(1), tl.num_programs(1)
    offs_r = tl.arange(0, BLOCK_Q * BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    first = tl.program_id(0) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, num_tokens) - 1
    local = first + offs_r // BLOCK_H
    member = offs_r % BLOCK_H
    mask_r = (local <= last) & (member < GROUP_SIZE)
    step_token = first_token + local
    row_of = tl.load(token_rows_ptr + step_token, mask=local <= last, other=-1)
    position = tl.load(positions_ptr + step_token, mask=local <= last, other=0)
    q_offs = step_token.to(tl.int64) * stride_qt + (pid_head * GROUP_SIZE + member) * stride_qh
    q = _load_rows(q_ptr, q_offs, mask_r, offs_d, HEAD_DIM, BLOCK_D)
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + pid_head)

    m_i = tl.full((BLOCK_Q * BLOCK_H,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_Q * BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_Q * BLOCK_H, BLOCK_DV), tl.float32)
    # Nearly always one row; a tile that spans several visits their keys one after the other.
    first_row = tl.load(token_rows_ptr + first_token + first)
    last_row = tl.load(token_rows_ptr + first_token + last)
    for row in range(first_row, last_row + 1):
        is_mine = row_of == row
        low = tl.min(tl.where(is_mine, position, 2147483647))
        high = tl.max(tl.where(is_mine, position, -1))
        # A padding row has no tokens in the cache, whatever its position says.
        end = tl.minimum(high + 1, tl.load(seq_lens_ptr + row))
        # Keys [0, init_end) in tiles, then [local_start, end). Tiles begin at multiples of BLOCK_N,
        # so that a query's sums do not depend on where its step or sub-chunk was cut.
        init_end = tl.minimum(NUM_INIT * PAGE_SIZE, end)
        init_tiles = (init_end + BLOCK_N - 1) // BLOCK_N
        local_first = tl.maximum(init_end, (low // PAGE_SIZE - NUM_LOCAL + 1) * PAGE_SIZE)
        local_start = local_first // BLOCK_N * BLOCK_N
        num_tiles = init_tiles + tl.maximum(end - local_start + BLOCK_N - 1, 0) // BLOCK_N
        # Bounds of what a query sees there; nothing, if it belongs to another row.
        first_local = tl.maximum(position // PAGE_SIZE - NUM_LOCAL + 1, NUM_INIT) * PAGE_SIZE
        last_key = tl.where(is_mine, tl.minimum(position, end - 1), -1)
        pages_ptr = page_table_ptr + row * stride_page_row
        for tile in range(num_tiles):
            is_init = tile < init_tiles
            start = tl.where(is_init, tile * BLOCK_N, local_start + (tile - init_tiles) * BLOCK_N)
            key = start + offs_n
            # Of a tile of several pages, only those that somebody's forced blocks are.
            mask_n = (key < end) & tl.where(is_init, key < init_end, key >= local_first)
            if PAGE_SIZE % BLOCK_N == 0:
                # A tile lies in one page: a scalar base and constant offsets.
                page = tl.load(pages_ptr + start // PAGE_SIZE)
                base = (page.to(tl.int64) * num_heads + pid_head) * PAGE_SIZE + start % PAGE_SIZE
                offs = offs_n
            else:
                page = tl.load(pages_ptr + key // PAGE_SIZE, mask=mask_n, other=0)
                base = tl.cast(0, tl.int64)
                offs = (page.to(tl.int64) * num_heads + pid_head) * PAGE_SIZE + key % PAGE_SIZE
            if CHECK:
                tl.device_assert((page >= 0) & (page < num_pages), "page id outside the cache")
            k = _load_rows(
                k_ptr + base * HEAD_DIM, offs * HEAD_DIM, mask_n, offs_d, HEAD_DIM, BLOCK_D
            )
            v = _load_rows(v_ptr + base * V_DIM, offs * V_DIM, mask_n, offs_dv, V_DIM, BLOCK_DV)
            k, v = k.to(q.dtype), v.to(q.dtype)
            low_key = tl.where(is_init, 0, first_local)
            high_key = tl.minimum(last_key, tl.where(is_init, init_end - 1, end))
            visible = (key[None, :] >= low_key[:, None]) & (key[None, :] <= high_key[:, None])
            m_i, l_i, acc = _attend(q, k, v, visible, scale_log2, m_i, l_i, acc)

    # Only padding has no keys: acc is 0 there, and m_i is -inf.
    l_i = tl.where(l_i > 0.0, l_i, 1.0)
    acc = acc * (1.0 / l_i)[:, None]
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + pid_head)
    lse2 = m_i + tl.log2(l_i)
    out_row = (local.to(tl.int64) * num_heads + pid_head) * (NUM_PARTIALS * GROUP_SIZE) + member
    _store_rows(partial_ptr, out_row * V_DIM, mask_r, offs_dv, acc, V_DIM, BLOCK_DV)
    tl.store(partial_lse2_ptr + out_row, lse2, mask=mask_r)


@triton.jit(do_not_specialize=["first_token"])
def _free_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    partial_ptr,
    partial_lse2_ptr,
    lists_ptr,
    items_ptr,
    totals_ptr,
    first_token,
    stride_qt,
    stride_qh,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRY_BASE: tl.constexpr,
):
    """One work item: a block of keys, kept on chip, and the queries of a stretch of its list.

    A query's result does not depend on its neighbours in the tile, hence not on the order of the
    list, which varies from run to run. Free blocks are complete and in the past: no masks.
    """
    pid_item = tl.program_id(0)
    # The grid is an upper bound that the host can know.
    if pid_item >= tl.load(totals_ptr + 1):
        return
    item_ptr = items_ptr + pid_item * ITEM_FIELDS
    page = tl.load(item_ptr).to(tl.int64)
    kv_head = tl.load(item_ptr + 1)
    first_entry = tl.load(item_ptr + 2)
    num_queries = tl.load(item_ptr + 3)

    IS_RESIDENT: tl.constexpr = BLOCK_N >= PAGE_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    block_row = (page * NUM_KV_HEADS + kv_head) * PAGE_SIZE
    mask_n = offs_n < PAGE_SIZE
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    if IS_RESIDENT:
        k = _load_rows(k_ptr, (block_row + offs_n) * HEAD_DIM, mask_n, offs_d, HEAD_DIM, BLOCK_D)
        v = _load_rows(v_ptr, (block_row + offs_n) * V_DIM, mask_n, offs_dv, V_DIM, BLOCK_DV)
        k, v = k.to(q_ptr.dtype.element_ty), v.to(q_ptr.dtype.element_ty)
    # Base addresses of this KV head's share of the first token, and offsets that fit 32 bits.
    offs_r = tl.arange(0, BLOCK_Q * BLOCK_H)
    member = offs_r % BLOCK_H
    first_row = kv_head * (NUM_PARTIALS * GROUP_SIZE)
    token_rows = NUM_KV_HEADS * NUM_PARTIALS * GROUP_SIZE
    q_ptr += tl.cast(first_token, tl.int64) * stride_qt + kv_head * GROUP_SIZE * stride_qh
    partial_ptr += first_row * V_DIM
    partial_lse2_ptr += first_row
    lists_ptr += first_entry
    # The queries of the next step are loaded into registers while this step computes; the list is
    # read a step earlier yet. Triton's own pipelining would start the loads after the stores.
    step_q = offs_r // BLOCK_H
    entry = tl.load(lists_ptr + step_q, mask=step_q < num_queries, other=0)
    later = BLOCK_Q + step_q
    next_entry = tl.load(lists_ptr + later, mask=later < num_queries, other=0)
    q_offs = (entry // ENTRY_BASE).to(tl.int64) * stride_qt + member * stride_qh
    mask_r = (step_q < num_queries) & (member < GROUP_SIZE)
    next_q = _load_rows(q_ptr, q_offs, mask_r, offs_d, HEAD_DIM, BLOCK_D)
    for first in tl.range(0, num_queries, BLOCK_Q, num_stages=1):
        q = next_q
        token = (entry // ENTRY_BASE).to(tl.int64)
        part = entry % ENTRY_BASE
        mask_r = (first + step_q < num_queries) & (member < GROUP_SIZE)
        entry = next_entry
        q_offs = (entry // ENTRY_BASE).to(tl.int64) * stride_qt + member * stride_qh
        mask_q = (first + BLOCK_Q + step_q < num_queries) & (member < GROUP_SIZE)
        next_q = _load_rows(q_ptr, q_offs, mask_q, offs_d, HEAD_DIM, BLOCK_D)
        later = first + 2 * BLOCK_Q + step_q
        next_entry = tl.load(lists_ptr + later, mask=later < num_queries, other=0)
        if IS_RESIDENT:
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if BLOCK_N > PAGE_SIZE:
                s = tl.where(mask_n[None, :], s, -float("inf"))
            m_i = tl.max(s, axis=1) * scale_log2
            p = tl.exp2(s * scale_log2 - m_i[:, None])
            l_i = tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            m_i = tl.full((BLOCK_Q * BLOCK_H,), -float("inf"), tl.float32)
            l_i = tl.zeros((BLOCK_Q * BLOCK_H,), tl.float32)
            acc = tl.zeros((BLOCK_Q * BLOCK_H, BLOCK_DV), tl.float32)
            visible = mask_n[None, :] & (offs_r >= 0)[:, None]
            for start in tl.range(0, PAGE_SIZE, BLOCK_N, num_stages=1):
                offs = block_row + start + offs_n
                k_n = _load_rows(k_ptr, offs * HEAD_DIM, mask_n, offs_d, HEAD_DIM, BLOCK_D)
                v_n = _load_rows(v_ptr, offs * V_DIM, mask_n, offs_dv, V_DIM, BLOCK_DV)
                k_n, v_n = k_n.to(q.dtype), v_n.to(q.dtype)
                m_i, l_i, acc = _attend(q, k_n, v_n, visible, scale_log2, m_i, l_i, acc)
        acc = acc * (1.0 / l_i)[:, None]
        if v_scale_ptr is not None:
            acc *= v_scale
        out_offs = token * (token_rows * V_DIM) + (part * GROUP_SIZE + member) * V_DIM
        _store_rows(partial_ptr, out_offs, mask_r, offs_dv, acc, V_DIM, BLOCK_DV)
        lse2_offs = token * token_rows + part * GROUP_SIZE + member
        tl.store(partial_lse2_ptr + lse2_offs, m_i + tl.log2(l_i), mask=mask_r)
