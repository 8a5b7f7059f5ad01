"""Find the compression windows that close in a step, and map them through the learned MLP.

B rows, W windows of prefill chunks, H KV heads, E compressed entries a page, D width of a tensor.
A candidate is a decode row, whose window closes or not, or one of the W windows, which do. The
tokens of a window that belong to this step are read from the step's own tensor, older ones from the
pages (or from the tails of window pages, where compression has keys and values of its own), so that
nothing has to be written before. Of an FP8 cache an entry is a function of what the pages hold: the
step's own tokens are rounded as they are stored before they are compressed, so that entries do not
depend on how a prompt was cut into chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import to_fp8
from nsa_kernels.metadata import LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec

# Programs that fill the GPU: below this, the first product is split along its inner dimension.
MIN_PROGRAMS = 256


@triton.jit
def load_window(
    index,
    num_candidates,
    window_rows_ptr,
    window_ends_ptr,
    seq_lens_ptr,
    first_row,
    num_decode_rows,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
):
    """Return row, end (count of tokens) and whether it closes, for candidates of any shape."""
    num_decode = num_decode_rows - first_row
    is_decode = index < num_decode
    in_list = (index >= num_decode) & (index < num_candidates)
    listed = tl.load(window_rows_ptr + index - num_decode, mask=in_list, other=0)
    row = tl.where(is_decode, first_row + index, listed)
    seq_len = tl.load(seq_lens_ptr + row, mask=is_decode, other=0)
    listed_end = tl.load(window_ends_ptr + index - num_decode, mask=in_list, other=0)
    end = tl.where(is_decode, seq_len, listed_end)
    # l is a multiple of d, so a window closes whenever the count of tokens is one from l on.
    return row, end, (end >= CMP_LEN) & (end % CMP_STRIDE == 0)


@triton.jit
def locate_window(
    row,
    end,
    head,
    valid,
    num_old,
    seq_lens_ptr,
    cu_seqlens_ptr,
    old_table_ptr,
    stride_table,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Return where the tokens of a window are: see `token_pointers`.

    old_table_ptr: table of the num_old pages that older tokens are read from; with SEPARATE those
    are window pages, and it is their tails that are read.
    """
    row = row.to(tl.int64)
    row_stop = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0)
    row_start = tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    seq_len = tl.load(seq_lens_ptr + row, mask=valid, other=0)
    first = end - CMP_LEN
    # l <= block_size: a window lies in two pages at most.
    table = old_table_ptr + row * stride_table
    older = tl.load(table + first // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    newer = tl.load(table + (end - 1) // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    if CHECK:
        tl.device_assert((older >= 0) & (older < num_old) | (valid == 0), "page")
        tl.device_assert((newer >= 0) & (newer < num_old) | (valid == 0), "page")
    held: tl.constexpr = CMP_LEN if SEPARATE else PAGE_SIZE
    older = (older * KV_HEADS + head) * (held * DIM)
    newer = (newer * KV_HEADS + head) * (held * DIM)
    return first, row_stop - seq_len, row_start, older, newer


@triton.jit
def token_pointers(
    x_ptr,
    stride_t,
    stride_h,
    old_ptr,
    head,
    position,
    first,
    token_shift,
    row_start,
    older,
    newer,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    """Point at the vector of the token at `position` of a window that `locate_window` located."""
    token = position + token_shift
    page = tl.where(position // PAGE_SIZE == first // PAGE_SIZE, older, newer)
    held: tl.constexpr = CMP_LEN if SEPARATE else PAGE_SIZE
    slot = page + (position % held) * DIM
    new = x_ptr + token.to(tl.int64) * stride_t + head * stride_h
    return tl.where(token >= row_start, new, old_ptr + slot)


@triton.jit
def load_stored(
    x_ptr,
    stride_t,
    stride_h,
    old_ptr,
    scale,
    head,
    position,
    first,
    token_shift,
    row_start,
    older,
    newer,
    offs_d,
    mask,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Load tokens [N] of a window as the FP8 cache holds them, or is to: [N, D] fp32, x / scale."""
    token = position + token_shift
    is_new = (token >= row_start)[:, None]
    page = tl.where(position // PAGE_SIZE == first // PAGE_SIZE, older, newer)
    slot = page + (position % PAGE_SIZE) * DIM
    old = tl.load(old_ptr + slot[:, None] + offs_d[None, :], mask=mask & (is_new == 0), other=0.0)
    new = x_ptr + token.to(tl.int64) * stride_t + head * stride_h
    x = tl.load(new[:, None] + offs_d[None, :], mask=mask & is_new, other=0.0)
    return tl.where(is_new, to_fp8(x, scale).to(tl.float32), old.to(tl.float32))


@triton.jit
def entry_offset(
    row,
    end,
    head,
    valid,
    num_pages,
    page_table_ptr,
    stride_table,
    KV_HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DIM: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Return where the window that ends with `end` tokens is filed, in elements."""
    entry = end // CMP_STRIDE - 1
    table = page_table_ptr + row.to(tl.int64) * stride_table
    page = tl.load(table + entry // ENTRIES, mask=valid, other=0).to(tl.int64)
    if CHECK:
        tl.device_assert((page >= 0) & (page < num_pages) | (valid == 0), "page")
    return ((page * KV_HEADS + head) * ENTRIES + entry % ENTRIES) * DIM


@triton.jit
def _hidden_tile(
    tensors,
    strides,
    mlp,
    plan,
    counts,
    pid_m,
    pid_n,
    split,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECK: tl.constexpr,
):
    """hidden[split, m, n] = the split's tokens of (window + pos) @ w1^T, in fp32."""
    x_ptr, old_ptr, _, hidden_ptr, scale_ptr = tensors
    stride_t, stride_h = strides
    pos_ptr, w1_ptr, _, _, _ = mlp
    seq_lens, cu_seqlens, page_table, swa_table, window_rows, window_ends = plan
    num_candidates, first_row, num_decode_rows = counts[0], counts[1], counts[2]
    num_rows = num_candidates * KV_HEADS

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    head = offs_m % KV_HEADS
    row, end, closes = load_window(
        offs_m // KV_HEADS, num_candidates, window_rows, window_ends, seq_lens, first_row,
        num_decode_rows, CMP_LEN, CMP_STRIDE,
    )  # fmt: skip
    # Decode rows seldom close a window: most tiles of a decode step have nothing to do.
    if tl.max(closes.to(tl.int32), axis=0) > 0:
        if SEPARATE:
            old_table, num_old, stride_old = swa_table, counts[4], counts[6]
        else:
            old_table, num_old, stride_old = page_table, counts[3], counts[5]
        first, token_shift, row_start, older, newer = locate_window(
            row, end, head, closes, num_old, seq_lens, cu_seqlens, old_table, stride_old, KV_HEADS,
            DIM, PAGE_SIZE, CMP_LEN, SEPARATE, CHECK,
        )  # fmt: skip
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < HIDDEN
        w1_rows = w1_ptr + offs_n.to(tl.int64)[None, :] * (CMP_LEN * DIM)
        CHUNKS: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
        TOKENS: tl.constexpr = CMP_LEN // SPLITS
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for step in range(TOKENS * CHUNKS):
            token = split * TOKENS + step // CHUNKS
            offs_k = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
            in_k = offs_k < DIM
            mask = closes[:, None] & in_k[None, :]
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + head)
                x = load_stored(
                    x_ptr, stride_t, stride_h, old_ptr, scale[:, None], head, first + token, first,
                    token_shift, row_start, older, newer, offs_k, mask, DIM, PAGE_SIZE,
                ) * scale[:, None]  # fmt: skip
            else:
                source = token_pointers(
                    x_ptr, stride_t, stride_h, old_ptr, head, first + token, first, token_shift,
                    row_start, older, newer, DIM, PAGE_SIZE, CMP_LEN, SEPARATE,
                )  # fmt: skip
                x = tl.load(source[:, None] + offs_k[None, :], mask=mask, other=0.0)
            pos = tl.load(pos_ptr + token * DIM + offs_k, mask=in_k, other=0.0)
            # Rounded to the model's dtype like every tensor between the layers of the MLP.
            x = (x.to(tl.float32) + pos.to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)
            w1 = tl.load(
                w1_rows + (token * DIM + offs_k)[:, None],
                mask=in_n[None, :] & in_k[:, None],
                other=0.0,
            )
            acc = tl.dot(x, w1, acc, input_precision="ieee")
        hidden = hidden_ptr + (split.to(tl.int64) * num_rows + offs_m)[:, None] * HIDDEN
        tl.store(hidden + offs_n[None, :], acc, mask=closes[:, None] & in_n[None, :])


@triton.jit
def _entry_tile(
    tensors,
    mlp,
    plan,
    counts,
    pid_m,
    pid_n,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK: tl.constexpr,
):
    """File silu(hidden + b1) @ w2^T + b2, rounded after every step."""
    _, _, entries_ptr, hidden_ptr, scale_ptr = tensors
    _, _, b1_ptr, w2_ptr, b2_ptr = mlp
    seq_lens, _, page_table, _, window_rows, window_ends = plan
    num_candidates, first_row, num_decode_rows, num_pages, _, stride_table, _ = counts
    dtype = w2_ptr.dtype.element_ty
    num_rows = num_candidates * KV_HEADS

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    head = offs_m % KV_HEADS
    row, end, closes = load_window(
        offs_m // KV_HEADS, num_candidates, window_rows, window_ends, seq_lens, first_row,
        num_decode_rows, CMP_LEN, CMP_STRIDE,
    )  # fmt: skip
    if tl.max(closes.to(tl.int32), axis=0) > 0:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < DIM
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            in_k = offs_k < HIDDEN
            mask = closes[:, None] & in_k[None, :]
            hidden = hidden_ptr + offs_m.to(tl.int64)[:, None] * HIDDEN + offs_k[None, :]
            h = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
            for _ in range(SPLITS):
                h += tl.load(hidden, mask=mask, other=0.0)
                hidden += num_rows * HIDDEN
            b1 = tl.load(b1_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
            h = (h + b1[None, :]).to(dtype).to(tl.float32)
            h = (h / (1.0 + tl.exp(-h))).to(dtype)
            w2 = tl.load(
                w2_ptr + offs_n.to(tl.int64)[None, :] * HIDDEN + offs_k[:, None],
                mask=in_n[None, :] & in_k[:, None],
                other=0.0,
            )
            acc = tl.dot(h, w2, acc, input_precision="ieee")
        b2 = tl.load(b2_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
        offset = entry_offset(
            row, end, head, closes, num_pages, page_table, stride_table, KV_HEADS,
            PAGE_SIZE // CMP_STRIDE, DIM, CMP_STRIDE, CHECK,
        )  # fmt: skip
        targets = entries_ptr + offset[:, None] + offs_n[None, :]
        phi = (acc + b2[None, :]).to(dtype)
        if scale_ptr is not None:
            phi = to_fp8(phi, tl.load(scale_ptr + head)[:, None])
        tl.store(targets, phi, mask=closes[:, None] & in_n[None, :])


# What changes from step to step must not compile the kernel anew; it would within a tuple.
@triton.jit(
    do_not_specialize=[
        "num_candidates",
        "first_row",
        "num_decode_rows",
        "num_pages",
        "num_old",
        "stride_table",
        "stride_swa",
    ]
)
def _hidden_kernel(
    keys,
    values,
    key_strides,
    value_strides,
    key_mlp,
    value_mlp,
    plan,
    num_candidates,
    first_row,
    num_decode_rows,
    num_pages,
    num_old,
    stride_table,
    stride_swa,
    K_HIDDEN: tl.constexpr,
    V_HIDDEN: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_BLOCK_K: tl.constexpr,
    V_BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECK: tl.constexpr,
):
    counts = (
        num_candidates,
        first_row,
        num_decode_rows,
        num_pages,
        num_old,
        stride_table,
        stride_swa,
    )
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if tl.program_id(2) == 0:
        _hidden_tile(
            keys, key_strides, key_mlp, plan, counts, pid // TILES_N, pid % TILES_N, split,
            K_HIDDEN, K_DIM, KV_HEADS, PAGE_SIZE, CMP_LEN, CMP_STRIDE, SPLITS, BLOCK_M, BLOCK_N,
            K_BLOCK_K, SEPARATE, CHECK,
        )  # fmt: skip
    else:
        _hidden_tile(
            values, value_strides, value_mlp, plan, counts, pid // TILES_N, pid % TILES_N, split,
            V_HIDDEN, V_DIM, KV_HEADS, PAGE_SIZE, CMP_LEN, CMP_STRIDE, SPLITS, BLOCK_M, BLOCK_N,
            V_BLOCK_K, SEPARATE, CHECK,
        )  # fmt: skip


# What changes from step to step must not compile the kernel anew; it would within a tuple.
@triton.jit(
    do_not_specialize=[
        "num_candidates",
        "first_row",
        "num_decode_rows",
        "num_pages",
        "num_old",
        "stride_table",
        "stride_swa",
    ]
)
def _entry_kernel(
    keys,
    values,
    key_mlp,
    value_mlp,
    plan,
    num_candidates,
    first_row,
    num_decode_rows,
    num_pages,
    num_old,
    stride_table,
    stride_swa,
    K_HIDDEN: tl.constexpr,
    V_HIDDEN: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    counts = (
        num_candidates,
        first_row,
        num_decode_rows,
        num_pages,
        num_old,
        stride_table,
        stride_swa,
    )
    pid = tl.program_id(0)
    if tl.program_id(1) == 0:
        _entry_tile(
            keys, key_mlp, plan, counts, pid // TILES_N, pid % TILES_N, K_HIDDEN, K_DIM, KV_HEADS,
            PAGE_SIZE, CMP_LEN, CMP_STRIDE, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K, CHECK,
        )  # fmt: skip
    else:
        _entry_tile(
            values, value_mlp, plan, counts, pid // TILES_N, pid % TILES_N, V_HIDDEN, V_DIM,
            KV_HEADS, PAGE_SIZE, CMP_LEN, CMP_STRIDE, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K, CHECK,
        )  # fmt: skip


def compress_mlp(
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    mlps: tuple[CompressionMLP, CompressionMLP],
    spec: NSASpec,
    *,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    window_rows: Tensor | None,
    window_ends: Tensor | None,
    num_decode_rows: int,
    first_row: int = 0,
    swa_page_table: Tensor | None = None,
    check: bool = False,
    block_m: int | None = None,
    block_n: int | None = None,
    splits: int | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """File phi = w2 silu(w1 flatten(window + pos) + b1) + b2 of every window that closes (Eq. 7).

    k [T, H, D], v [T, H, Dv]: the step's tokens that are compressed; with `swa_page_table` [B, P]
    int32 older ones come from cache.k_tail and cache.v_tail, else from the pages.
    seq_lens [B], cu_seqlens_q [B + 1], page_table [B, P], all int32. window_rows, window_ends
    int32 [W]: row of each window that closes in a prefill chunk, and the count of tokens at its
    end, None without chunks. Decode rows [first_row, num_decode_rows) find out themselves whether
    theirs closes.
    mlps: of keys and of values, in the dtype of k and v; every step is rounded to it and
    accumulated in fp32. An FP8 cache saturates.
    block_m, block_n, splits (a power of two that divides l), num_warps, num_stages: tuning.
    """
    kv_heads, k_dim, v_dim = k.shape[1], k.shape[2], v.shape[2]
    num_candidates = num_decode_rows - first_row
    if window_rows is not None:
        num_candidates += window_rows.shape[0]
    num_rows = num_candidates * kv_heads
    if num_rows == 0:
        return
    separate = swa_page_table is not None
    old_k, old_v = (cache.k_tail, cache.v_tail) if separate else (cache.k, cache.v)
    if old_k is None or old_v is None:
        raise ValueError("swa_page_table needs a cache with k_tail and v_tail")
    exact = k.dtype == torch.float32
    if block_m is None:
        large = 32 if exact else 64 if num_rows <= 4096 else 128
        block_m = 16 if num_rows <= 256 else large
    if block_n is None:
        block_n = 64 if block_m < 128 or exact else 128
    hidden_sizes = mlps[0].w1.shape[0], mlps[1].w1.shape[0]
    tiles_m, tiles_n = triton.cdiv(num_rows, block_m), triton.cdiv(max(hidden_sizes), block_n)
    if splits is None:
        splits = 1
        while spec.cmp_len % (2 * splits) == 0 and 2 * tiles_m * tiles_n * splits < MIN_PROGRAMS:
            splits *= 2
    hidden = [
        torch.empty((splits, num_rows, size), dtype=torch.float32, device=k.device)
        for size in hidden_sizes
    ]
    tensors = (
        (k, old_k, cache.k_cmp, hidden[0], cache.k_scale),
        (v, old_v, cache.v_cmp, hidden[1], cache.v_scale),
    )
    weights = tuple((m.pos, m.w1, m.b1, m.w2, m.b2) for m in mlps)
    plan = (
        seq_lens,
        cu_seqlens_q,
        page_table,
        swa_page_table,
        # Never read when there are none.
        seq_lens if window_rows is None else window_rows,
        seq_lens if window_ends is None else window_ends,
    )
    counts = (
        num_candidates,
        first_row,
        num_decode_rows,
        cache.k.shape[0],
        old_k.shape[0],
        page_table.stride(0),
        0 if swa_page_table is None else swa_page_table.stride(0),
    )
    geometry = {
        "K_HIDDEN": hidden_sizes[0],
        "V_HIDDEN": hidden_sizes[1],
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "KV_HEADS": kv_heads,
        "PAGE_SIZE": spec.block_size,
        "CMP_LEN": spec.cmp_len,
        "CMP_STRIDE": spec.cmp_stride,
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "CHECK": check,
        "debug": check,
        "num_warps": num_warps if block_m < 128 else 2 * num_warps,
    }
    _hidden_kernel[(tiles_m * tiles_n, splits, 2)](
        *tensors,
        (k.stride(0), k.stride(1)),
        (v.stride(0), v.stride(1)),
        *weights,
        plan,
        *counts,
        BLOCK_N=block_n,
        K_BLOCK_K=_inner_block(k_dim, exact),
        V_BLOCK_K=_inner_block(v_dim, exact),
        TILES_N=tiles_n,
        SEPARATE=separate,
        num_stages=2 if exact else num_stages,
        **geometry,
    )
    block_n = min(block_n, max(16, triton.next_power_of_2(max(k_dim, v_dim))))
    tiles_n = triton.cdiv(max(k_dim, v_dim), block_n)
    _entry_kernel[(tiles_m * tiles_n, 2)](
        *tensors,
        *weights,
        plan,
        *counts,
        BLOCK_N=block_n,
        BLOCK_K=32,
        TILES_N=tiles_n,
        num_stages=2,
        **geometry,
    )


def _inner_block(dim: int, exact: bool) -> int:
    """Columns of one inner step: as many as divide the vectors, so that no lane is masked off."""
    largest = 32 if exact else 64
    if dim % largest == 0:
        return largest
    return 32 if dim % 32 == 0 else max(16, min(largest, 1 << (dim - 1).bit_length()))
