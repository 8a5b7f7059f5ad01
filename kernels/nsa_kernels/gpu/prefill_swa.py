"""Sliding-window attention of prefill chunks, over pages: flash attention with two edges.

T tokens of the step, B rows, P pages of the longest row, HQ query heads, H KV heads, G = HQ // H,
D and Dv dimensions of keys and of values.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.common import LOG2E, block_h, prefill_block_q, split_dim
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec


@dataclass(frozen=True, slots=True)
class SwaTuning:
    """Tile shape of the kernel.

    block_n: keys of a tile, a power of two from 16 on. num_warps, num_stages: as of Triton.
    max_registers: limit for a thread, None = what the compiler likes.
    """

    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def default_tuning(head_dim: int, v_head_dim: int, dtype: torch.dtype) -> SwaTuning:
    """Tiles that fit the registers and the shared memory of a Hopper SM."""
    if dtype == torch.float32:
        return SwaTuning(block_n=16, num_warps=8, num_stages=1)
    if max(head_dim, v_head_dim) > 128:
        return SwaTuning(block_n=64, num_warps=8, num_stages=2)
    # 128 registers and two stages let two programs share an SM: each hides the other's waits.
    return SwaTuning(block_n=64, num_warps=8, num_stages=2, max_registers=128)


@triton.jit
def _load_pages(
    table_ptr,
    start,
    last,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Pages of the keys start .. start + BLOCK_N - 1 up to `last`: a scalar where one holds all."""
    key = start if PAGE_SIZE >= BLOCK_N else start + tl.arange(0, BLOCK_N)
    page = tl.load(table_ptr + key // PAGE_SIZE, mask=key <= last, other=0)
    if CHECK:
        tl.device_assert((page >= 0) & (page < num_pages), "page")
    return page


# What changes from step to step must not compile the kernel anew.
@triton.jit(do_not_specialize=["stride_table", "num_pages"])
def _prefill_swa_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
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
    stride_table,
    num_pages,
    scale_log2,
    GROUP_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHECK: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
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

    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head)
    m_i = tl.full([BLOCK_Q * BLOCK_H], -1e30, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_Q * BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q * BLOCK_H, BLOCK_DV], dtype=tl.float32)
    ALIGN: tl.constexpr = min(PAGE_SIZE, BLOCK_N)
    begin = tl.maximum(first - (WINDOW - 1), 0)
    begin_tile = begin // ALIGN * ALIGN
    page = _load_pages(table_ptr, begin_tile, last, num_pages, PAGE_SIZE, BLOCK_N, CHECK)
    for start in tl.range(begin_tile, last + 1, BLOCK_N):
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
        # Slots that no query of the tile sees may hold NaN, or belong to a page given back.
        in_tile = (key >= begin) & (key <= last)
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
        # Only tiles that reach over an edge of some query's window need the mask.
        if (start <= last - WINDOW) | (start + BLOCK_N > first + 1):
            distance = positions[:, None] - key[None, :]
            s = tl.where((distance >= 0) & (distance < WINDOW), s, -float("inf"))
        # m_i starts finite, so a row without a visible key yet has exp2(-inf) = 0 here, not NaN.
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new

    # Rows beyond the tile's tokens are not stored; their sum may be 0.
    o = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr + kv_head)
    o_rows = out_ptr + tokens.to(tl.int64)[:, None] * stride_ot + heads[:, None] * stride_oh
    tl.store(
        o_rows + offs_dv[None, :],
        o.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (offs_dv < V_DIM)[None, :],
    )


def prefill_swa(
    q: Tensor,
    cache: LayerCache,
    spec: NSASpec,
    *,
    tile_rows: Tensor,
    tile_starts: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    softmax_scale: float,
    out: Tensor,
    check: bool = False,
    tuning: SwaTuning | None = None,
) -> None:
    """Attend to the last w tokens, the query's own included: o[t] = softmax(q k (t-w, t]) v.

    q: [T, HQ, D], any strides but 1 in the last dimension; bf16, fp16 or fp32.
    cache: pages [num_pages, H, block_size, D or Dv] of the window branch are read, `window_kv`;
    this step's tokens are in them.
    tile_rows, tile_starts: int32 [num_tiles], row and first token of every tile of
    `prefill_block_q(G)` tokens. cu_seqlens_q int32 [B + 1], seq_lens int32 [B].
    page_table: int32 [B, P] of the window branch; an entry left of every window is not read.
    out: [T, HQ, Dv] in q's dtype; only the tokens of the tiles are written.
    check: assert on the device that every page id lies in the cache.

    Raises ValueError when a shape does not fit or the model has no window branch.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    k, v = cache.window_kv
    num_pages, num_kv_heads, page_size, v_head_dim = v.shape
    check_shape("k", k, (num_pages, num_kv_heads, spec.block_size, head_dim))
    check_shape("out", out, (num_tokens, num_q_heads, v_head_dim))
    if spec.window_size < 1:
        raise ValueError("window_size is 0: this model has no window branch")
    group_size = num_q_heads // num_kv_heads
    tuning = tuning or default_tuning(head_dim, v_head_dim, q.dtype)
    block_d, block_d2 = split_dim(head_dim)
    if tile_rows.shape[0] == 0:
        return
    _prefill_swa_kernel[(tile_rows.shape[0], num_kv_heads)](
        q,
        k,
        v,
        cache.k_scale,
        cache.v_scale,
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
        page_table.stride(0),
        num_pages,
        softmax_scale * LOG2E,
        GROUP_SIZE=group_size,
        KV_HEADS=num_kv_heads,
        WINDOW=spec.window_size,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        V_DIM=v_head_dim,
        BLOCK_Q=prefill_block_q(group_size),
        BLOCK_H=block_h(group_size),
        BLOCK_N=tuning.block_n,
        BLOCK_D=block_d,
        BLOCK_D2=block_d2,
        BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
        CHECK=check,
        debug=check,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
    )
