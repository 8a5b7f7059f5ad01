"""Coarse windows of InfLLM-v2: their mean keys, and the log-sum-exp that scores are relative to.

A coarse window is a compression window of `lse_len` tokens every `lse_stride`, of which only the
key is kept. It may be longer than a page, so its tokens are looked up one by one.
`reference.selection_lse` is the specification; for prefill tokens `prefill_cmp` computes it, over
the coarse keys as over any compressed ones.

Legend: Nd decode rows, B rows, P pages of the longest row, W windows that close in prefill chunks,
HQ query heads, H KV heads, G = HQ // H, D width of keys, E coarse entries a page.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import LOG2E, to_fp8
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec

# Coarse entries of a loop step, and tokens of a window that are loaded at once.
TILE_ENTRIES = 32
WINDOW_ROWS = tl.constexpr(32)
# As for the compressed keys, see `decode_cmp`; selection reads the partial results of every split.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 16


def file_coarse_keys(
    cache: LayerCache,
    window_rows: Tensor,
    window_ends: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    check: bool = False,
) -> None:
    """Average the keys of coarse windows whose tokens are all in the cache: into cache.k_lse.

    window_rows, window_ends: [W] int32, row of a window and the count of the row's tokens at its
    end. page_table: [B, P] int32. check: assert on the device that page ids are the cache's.
    """
    assert cache.k_lse is not None
    num_pages, num_kv_heads, _, head_dim = cache.k.shape
    num_windows = window_rows.shape[0]
    if num_windows == 0:
        return
    _file_kernel[(num_windows, num_kv_heads)](
        cache.k,
        cache.k_lse,
        window_rows,
        window_ends,
        page_table,
        page_table.stride(0),
        num_pages,
        LSE_LEN=spec.lse_len,
        LSE_STRIDE=spec.lse_stride,
        BLOCK_SIZE=spec.block_size,
        DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        CHECK=check,
        num_warps=4,
        debug=check,
    )


def decode_lse(
    q: Tensor,
    k: Tensor,
    cache: LayerCache,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    num_sms: int,
    shape: tuple[int, int] | None = None,
    launch_pdl: bool = False,
    check: bool = False,
) -> Tensor:
    """File the coarse keys that decode rows complete; return the log-sum-exps [Nd, HQ, splits].

    fp32, log2 of the split's sum of exp2((q k_lse) * softmax_scale * log2(e)); -inf for an empty
    split, and for a row that selects all its blocks and needs none.

    q: [Nd, HQ, D], k: [Nd, H, D], last stride 1; k is this step's, whether or not it is in the
    cache. seq_lens: [B] int32, tokens with this step's, 0 for a padding row, which touches no
    cache. page_table: [B, P] int32.
    shape: rows and pages to be cut for, at least Nd and P; None = those. launch_pdl: start while
    the kernel in front ends, and wait for it on the device. check: assert page ids in range.
    """
    assert cache.k_lse is not None
    num_rows, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, entries, _ = cache.k_lse.shape
    group_size = num_q_heads // num_kv_heads
    shape_rows, shape_pages = shape or (num_rows, page_table.shape[1])
    num_tiles = triton.cdiv(shape_pages * entries, TILE_ENTRIES)
    wanted = PROGRAMS_PER_SM * num_sms // max(1, shape_rows * num_kv_heads)
    splits = max(1, min(num_tiles, wanted, MAX_SPLITS))
    lse2 = q.new_empty((num_rows, num_q_heads, splits), dtype=torch.float32)
    if num_rows == 0:
        return lse2
    _decode_lse_kernel[(num_kv_heads, splits, num_rows)](
        q,
        k,
        cache.k,
        cache.k_lse,
        cache.k_scale,
        seq_lens,
        page_table,
        lse2,
        softmax_scale * LOG2E,
        num_pages,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        page_table.stride(0),
        GROUP_SIZE=group_size,
        LSE_LEN=spec.lse_len,
        LSE_STRIDE=spec.lse_stride,
        BLOCK_SIZE=spec.block_size,
        NUM_DENSE=spec.num_dense_tokens,
        DIM=head_dim,
        BLOCK_H=max(16, triton.next_power_of_2(group_size)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        TILE_E=TILE_ENTRIES,
        CHECK=check,
        PDL=launch_pdl,
        num_warps=4,
        debug=check,
        **({"launch_pdl": True} if launch_pdl else {}),
    )
    return lse2


@triton.jit
def _sum_keys(
    k_cache_ptr,
    pages_ptr,
    first,
    kv_head,
    num_kv_heads,
    num_pages,
    COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Sum the keys of the tokens first .. first + COUNT - 1 as the cache holds them: [BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, COUNT, WINDOW_ROWS):
        offs = start + tl.arange(0, WINDOW_ROWS)
        mask = offs < COUNT
        token = first + offs
        page = tl.load(pages_ptr + token // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
        if CHECK:
            is_page = (page >= 0) & (page < num_pages)
            tl.device_assert(is_page | (mask == 0), "page id outside the cache")
        row = (page * num_kv_heads + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
        x = tl.load(
            k_cache_ptr + row[:, None] * DIM + offs_d[None, :],
            mask=mask[:, None] & (offs_d < DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), axis=0)
    return total


@triton.jit
def _store_key(
    total,
    k_lse_ptr,
    pages_ptr,
    end,
    kv_head,
    num_kv_heads,
    LSE_LEN: tl.constexpr,
    LSE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the mean of the window that ends with token end - 1, in the page of that token."""
    ENTRIES: tl.constexpr = BLOCK_SIZE // LSE_STRIDE
    offs_d = tl.arange(0, BLOCK_D)
    entry = end // LSE_STRIDE - 1
    page = tl.load(pages_ptr + entry // ENTRIES).to(tl.int64)
    row = (page * num_kv_heads + kv_head) * ENTRIES + entry % ENTRIES
    mean = (total / LSE_LEN).to(k_lse_ptr.dtype.element_ty)
    tl.store(k_lse_ptr + row * DIM + offs_d, mean, mask=offs_d < DIM)


# What changes from step to step must not compile the kernel anew.
@triton.jit(
    do_not_specialize=["stride_pb", "num_pages"],
    do_not_specialize_on_alignment=["window_rows_ptr", "window_ends_ptr"],
)
def _file_kernel(
    k_cache_ptr,
    k_lse_ptr,
    window_rows_ptr,
    window_ends_ptr,
    page_table_ptr,
    stride_pb,
    num_pages,
    LSE_LEN: tl.constexpr,
    LSE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One program is one window and KV head."""
    window, kv_head = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.load(window_rows_ptr + window).to(tl.int64)
    end = tl.load(window_ends_ptr + window)
    pages_ptr = page_table_ptr + row * stride_pb
    total = _sum_keys(
        k_cache_ptr, pages_ptr, end - LSE_LEN, kv_head, num_kv_heads, num_pages,
        LSE_LEN, BLOCK_SIZE, DIM, BLOCK_D, CHECK,
    )  # fmt: skip
    _store_key(
        total, k_lse_ptr, pages_ptr, end, kv_head, num_kv_heads,
        LSE_LEN, LSE_STRIDE, BLOCK_SIZE, DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pages", "stride_pb"])
def _decode_lse_kernel(
    q_ptr,
    k_ptr,
    k_cache_ptr,
    k_lse_ptr,
    k_scale_ptr,
    seq_lens_ptr,
    page_table_ptr,
    lse2_ptr,
    scale,
    num_pages,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_pb,
    GROUP_SIZE: tl.constexpr,
    LSE_LEN: tl.constexpr,
    LSE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_DENSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_E: tl.constexpr,
    CHECK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program is one split of the coarse keys of a row and KV head."""
    ENTRIES: tl.constexpr = BLOCK_SIZE // LSE_STRIDE
    WINDOW_STRIDES: tl.constexpr = LSE_LEN // LSE_STRIDE
    kv_head, split = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    num_kv_heads, num_splits = tl.num_programs(0), tl.num_programs(1)
    pages_ptr = page_table_ptr + batch * stride_pb
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seq_len = tl.load(seq_lens_ptr + batch)
    num_visible = seq_len // LSE_STRIDE
    row_tiles = tl.where(seq_len > NUM_DENSE, tl.cdiv(num_visible, TILE_E), 0)
    tiles_per_split = tl.cdiv(row_tiles, num_splits)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, row_tiles)

    # The split that reads the newest entry files it; split 0 where none is read.
    owner = tl.maximum(row_tiles - 1, 0) // tl.maximum(tiles_per_split, 1)
    if (split == owner) & (seq_len >= LSE_LEN) & (seq_len % LSE_STRIDE == 0):
        total = _sum_keys(
            k_cache_ptr, pages_ptr, seq_len - LSE_LEN, kv_head, num_kv_heads, num_pages,
            LSE_LEN - 1, BLOCK_SIZE, DIM, BLOCK_D, CHECK,
        )  # fmt: skip
        # The step's own token may not be in the cache yet.
        new = tl.load(
            k_ptr + batch * stride_kt + kv_head * stride_kh + offs_d, mask=mask_d, other=0
        )
        if k_scale_ptr is not None:
            new = to_fp8(new, tl.load(k_scale_ptr + kv_head))
        _store_key(
            total + new.to(tl.float32), k_lse_ptr, pages_ptr, seq_len, kv_head, num_kv_heads,
            LSE_LEN, LSE_STRIDE, BLOCK_SIZE, DIM, BLOCK_D,
        )  # fmt: skip
        # Other threads of this program read the entry below.
        tl.debug_barrier()

    offs_h = tl.arange(0, BLOCK_H)
    offs_e = tl.arange(0, TILE_E)
    mask_h = offs_h < GROUP_SIZE
    q_row = q_ptr + batch * stride_qt + kv_head * GROUP_SIZE * stride_qh
    q = tl.load(
        q_row + offs_h[:, None] * stride_qh + offs_d[None, :],
        mask=mask_h[:, None] & mask_d[None, :],
        other=0.0,
    )
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head)
    # Finite, so that a tile in which nothing is visible adds exp2(-inf) = 0 and not NaN.
    m_i = tl.full([BLOCK_H], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_H], tl.float32)
    for tile in range(first_tile, end_tile):
        entry = tile * TILE_E + offs_e
        is_visible = (entry >= WINDOW_STRIDES - 1) & (entry < num_visible)
        page = tl.load(pages_ptr + entry // ENTRIES, mask=is_visible, other=0)
        if CHECK:
            is_page = (page >= 0) & (page < num_pages)
            tl.device_assert(is_page | (is_visible == 0), "page id outside the cache")
        row = (page.to(tl.int64) * num_kv_heads + kv_head) * ENTRIES + entry % ENTRIES
        k_ptrs = k_lse_ptr + row[:, None] * DIM + offs_d[None, :]
        k = tl.load(k_ptrs, mask=is_visible[:, None] & mask_d[None, :], other=0.0).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(is_visible[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), axis=1)
        m_i = m_new
    lse2 = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))
    head = (batch * num_kv_heads + kv_head) * GROUP_SIZE + offs_h
    tl.store(lse2_ptr + head * num_splits + split, lse2, mask=mask_h)
