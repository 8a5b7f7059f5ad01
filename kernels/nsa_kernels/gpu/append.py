"""Append a step's keys and values to the paged cache, and compress the windows that it closes.

T tokens of the step, B rows, P pages of the longest row, W windows of prefill chunks, H KV heads,
D and Dv dimensions of keys and of values.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import to_fp8
from nsa_kernels.gpu.compress import (
    compress_mlp,
    entry_offset,
    load_stored,
    load_window,
    locate_window,
    token_pointers,
)
from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec

# Tokens that one program copies, and elements that it holds at once.
BLOCK_T = 32
MAX_TILE = 8192


@triton.jit
def _copy_tokens(
    x_ptr,
    stride_t,
    stride_h,
    cache_ptr,
    scale_ptr,
    page_table_ptr,
    stride_table,
    num_pages,
    tokens,
    rows,
    positions,
    live,
    head,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HELD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Copy the live tokens of one head to their slots; a page of the cache has HELD of them."""
    offs_d = tl.arange(0, BLOCK_D)
    table = page_table_ptr + rows.to(tl.int64) * stride_table
    pages = tl.load(table + positions // PAGE_SIZE, mask=live, other=0).to(tl.int64)
    if CHECK:
        tl.device_assert((pages >= 0) & (pages < num_pages) | (live == 0), "page")
    slots = (pages * KV_HEADS + head) * HELD + positions % HELD
    mask = live[:, None] & (offs_d < DIM)[None, :]
    source = x_ptr + tokens.to(tl.int64)[:, None] * stride_t + head * stride_h + offs_d[None, :]
    x = tl.load(source, mask=mask, other=0.0)
    if scale_ptr is not None:
        x = to_fp8(x, tl.load(scale_ptr + head))
    tl.store(cache_ptr + slots[:, None] * DIM + offs_d[None, :], x, mask=mask)


@triton.jit
def _append_tile(
    tensors,
    strides,
    plan,
    counts,
    pid,
    head,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Copy one tile of tokens, or average one window."""
    x_ptr, raw_ptr, swa_ptr, cache_ptr, cache_swa_ptr, old_ptr, entries_ptr, scale_ptr = tensors
    x_t, x_h, raw_t, raw_h, swa_t, swa_h = strides
    token_rows, positions_ptr, seq_lens, cu_seqlens = plan[0], plan[1], plan[2], plan[3]
    page_table, swa_table, window_rows, window_ends = plan[4], plan[5], plan[6], plan[7]
    num_tokens, num_copies, num_candidates, first_row, num_decode_rows = (
        counts[0], counts[1], counts[2], counts[3], counts[4],
    )  # fmt: skip
    num_pages, num_swa_pages, stride_table, stride_swa = counts[5], counts[6], counts[7], counts[8]
    offs_d = tl.arange(0, BLOCK_D)

    if pid < num_copies:
        tokens = first_row + pid * BLOCK_T + tl.arange(0, BLOCK_T)
        in_step = tokens < num_tokens
        rows = tl.load(token_rows + tokens, mask=in_step, other=0)
        positions = tl.load(positions_ptr + tokens, mask=in_step, other=0)
        live = in_step & (tl.load(seq_lens + rows, mask=in_step, other=0) > 0)
        positions = tl.where(live, positions, 0)
        _copy_tokens(
            x_ptr, x_t, x_h, cache_ptr, scale_ptr, page_table, stride_table, num_pages, tokens,
            rows, positions, live, head, DIM, BLOCK_D, KV_HEADS, PAGE_SIZE, PAGE_SIZE, CHECK,
        )  # fmt: skip
        if SEPARATE:
            _copy_tokens(
                swa_ptr, swa_t, swa_h, cache_swa_ptr, None, swa_table, stride_swa, num_swa_pages,
                tokens, rows, positions, live, head, DIM, BLOCK_D, KV_HEADS, PAGE_SIZE, PAGE_SIZE,
                CHECK,
            )  # fmt: skip
            # A single token replaces one that its own window has left, if any, so no window of this
            # launch reads the slot. Those of longer rows are kept by a later launch.
            _copy_tokens(
                raw_ptr, raw_t, raw_h, old_ptr, None, swa_table, stride_swa, num_swa_pages, tokens,
                rows, positions, live & (tokens < num_decode_rows), head, DIM, BLOCK_D, KV_HEADS,
                PAGE_SIZE, CMP_LEN, CHECK,
            )  # fmt: skip
    else:
        row, end, closes = load_window(
            pid - num_copies, num_candidates, window_rows, window_ends, seq_lens, first_row,
            num_decode_rows, CMP_LEN, CMP_STRIDE,
        )  # fmt: skip
        if closes:
            if SEPARATE:
                old_table, stride_old, num_old = swa_table, stride_swa, num_swa_pages
            else:
                old_table, stride_old, num_old = page_table, stride_table, num_pages
            first, token_shift, row_start, older, newer = locate_window(
                row, end, head, closes, num_old, seq_lens, cu_seqlens, old_table, stride_old,
                KV_HEADS, DIM, PAGE_SIZE, CMP_LEN, SEPARATE, CHECK,
            )  # fmt: skip
            total = tl.zeros([BLOCK_D], dtype=tl.float32)
            for start in tl.static_range(0, CMP_LEN, BLOCK_L):
                offs_l = start + tl.arange(0, BLOCK_L)
                mask = (offs_l < CMP_LEN)[:, None] & (offs_d < DIM)[None, :]
                if scale_ptr is not None:
                    x = load_stored(
                        raw_ptr, raw_t, raw_h, old_ptr, tl.load(scale_ptr + head), head,
                        first + offs_l, first, token_shift, row_start, older, newer, offs_d, mask,
                        DIM, PAGE_SIZE,
                    )  # fmt: skip
                else:
                    source = token_pointers(
                        raw_ptr, raw_t, raw_h, old_ptr, head, first + offs_l, first, token_shift,
                        row_start, older, newer, DIM, PAGE_SIZE, CMP_LEN, SEPARATE,
                    )  # fmt: skip
                    x = tl.load(source[:, None] + offs_d[None, :], mask=mask, other=0.0)
                total += tl.sum(x.to(tl.float32), axis=0)
            offset = entry_offset(
                row, end, head, closes, num_pages, page_table, stride_table, KV_HEADS,
                PAGE_SIZE // CMP_STRIDE, DIM, CMP_STRIDE, CHECK,
            )  # fmt: skip
            # In FP8 the scale of an entry is that of its tokens, and their mean is in range.
            mean = (total / CMP_LEN).to(entries_ptr.dtype.element_ty)
            tl.store(entries_ptr + offset + offs_d, mean, mask=offs_d < DIM)


# What changes from step to step must not compile the kernel anew; it would within a tuple.
@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_copies",
        "num_candidates",
        "first_row",
        "num_decode_rows",
        "num_pages",
        "num_swa_pages",
        "stride_table",
        "stride_swa",
    ]
)
def _append_kernel(
    keys,
    values,
    key_strides,
    value_strides,
    plan,
    num_tokens,
    num_copies,
    num_candidates,
    first_row,
    num_decode_rows,
    num_pages,
    num_swa_pages,
    stride_table,
    stride_swa,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK_D: tl.constexpr,
    V_BLOCK_D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECK: tl.constexpr,
):
    counts = (
        num_tokens,
        num_copies,
        num_candidates,
        first_row,
        num_decode_rows,
        num_pages,
        num_swa_pages,
        stride_table,
        stride_swa,
    )
    # Heads vary fastest: the heads of a token lie next to each other in the projection.
    pid, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    if tl.program_id(1) == 0:
        _append_tile(
            keys, key_strides, plan, counts, pid, head, K_DIM, K_BLOCK_D, KV_HEADS, PAGE_SIZE,
            CMP_LEN, CMP_STRIDE, BLOCK_T, BLOCK_L, SEPARATE, CHECK,
        )  # fmt: skip
    else:
        _append_tile(
            values, value_strides, plan, counts, pid, head, V_DIM, V_BLOCK_D, KV_HEADS, PAGE_SIZE,
            CMP_LEN, CMP_STRIDE, BLOCK_T, BLOCK_L, SEPARATE, CHECK,
        )  # fmt: skip


# What changes from step to step must not compile the kernel anew.
@triton.jit(do_not_specialize=["first_token", "num_tokens", "num_pages", "stride_table"])
def _tail_kernel(
    k_ptr,
    v_ptr,
    k_strides,
    v_strides,
    k_tail_ptr,
    v_tail_ptr,
    token_rows_ptr,
    positions_ptr,
    seq_lens_ptr,
    swa_table_ptr,
    first_token,
    num_tokens,
    num_pages,
    stride_table,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK_D: tl.constexpr,
    V_BLOCK_D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CMP_LEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Keep those tokens of a tile, of one head, that are among the last of their window page."""
    pid, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    tokens = first_token + pid * BLOCK_T + tl.arange(0, BLOCK_T)
    in_step = tokens < num_tokens
    rows = tl.load(token_rows_ptr + tokens, mask=in_step, other=0)
    positions = tl.load(positions_ptr + tokens, mask=in_step, other=0)
    seq_lens = tl.load(seq_lens_ptr + rows, mask=in_step, other=0)
    page_stops = tl.minimum((positions // PAGE_SIZE + 1) * PAGE_SIZE, seq_lens)
    kept = in_step & (seq_lens > 0) & (positions >= page_stops - CMP_LEN)
    if tl.program_id(1) == 0:
        _copy_tokens(
            k_ptr, k_strides[0], k_strides[1], k_tail_ptr, None, swa_table_ptr, stride_table,
            num_pages, tokens, rows, positions, kept, head, K_DIM, K_BLOCK_D, KV_HEADS, PAGE_SIZE,
            CMP_LEN, CHECK,
        )  # fmt: skip
    else:
        _copy_tokens(
            v_ptr, v_strides[0], v_strides[1], v_tail_ptr, None, swa_table_ptr, stride_table,
            num_pages, tokens, rows, positions, kept, head, V_DIM, V_BLOCK_D, KV_HEADS, PAGE_SIZE,
            CMP_LEN, CHECK,
        )  # fmt: skip


def append_kv(
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    spec: NSASpec,
    *,
    token_rows: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    window_rows: Tensor | None,
    window_ends: Tensor | None,
    num_decode_rows: int,
    first_row: int = 0,
    compress: bool = True,
    mlps: tuple[CompressionMLP, CompressionMLP] | None = None,
    branch_kv: BranchKV | None = None,
    swa_page_table: Tensor | None = None,
    check: bool = False,
    block_t: int = BLOCK_T,
    num_warps: int = 4,
) -> None:
    """Write a step's keys and values to their pages, and every window that closes in it.

    k [T, H, D], v [T, H, Dv]: views of a fused projection will do. token_rows, positions [T],
    seq_lens [B], cu_seqlens_q [B + 1], page_table [B, P], all int32. window_rows, window_ends
    int32 [W]: row of each window that closes in a prefill chunk, and the count of tokens at its
    end, None without chunks. Decode rows find out themselves whether theirs closes; a row with
    seq_lens 0 is padding.
    first_row: 0, or num_decode_rows when the decode rows are appended by another kernel.
    compress: False where neither compression nor selection is used. mlps: of keys and of values,
    None = mean of the window, summed in fp32 and rounded once; in an FP8 cache the mean of what
    its pages hold.
    branch_kv, swa_page_table (int32 [B, P]): of a cache where every branch has keys and values of
    its own; the window branch goes to the window pages, and of what is compressed the last tokens
    of each to its tail.
    check: assert on the device that every page lies in the cache.
    block_t, num_warps: tuning.

    Raises ValueError when branch_kv and the tensors that go with it are not all there.
    """
    raw_k, raw_v = (branch_kv.k_cmp, branch_kv.v_cmp) if branch_kv else (k, v)
    swa_k, swa_v = (branch_kv.k_swa, branch_kv.v_swa) if branch_kv else (k, v)
    old_k, old_v = (cache.k_tail, cache.v_tail) if branch_kv else (cache.k, cache.v)
    companions = (swa_page_table, cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail)
    if len({branch_kv is None, *(tensor is None for tensor in companions)}) > 1:
        raise ValueError(
            "branch_kv, swa_page_table and the cache's k_swa, v_swa, k_tail and v_tail go "
            "together: expected all or none of them"
        )
    num_tokens, kv_heads, k_dim = k.shape
    v_dim = v.shape[2]
    num_copies = triton.cdiv(num_tokens - first_row, block_t)
    averages = compress and mlps is None
    num_windows = 0 if window_rows is None else window_rows.shape[0]
    num_candidates = num_decode_rows - first_row + num_windows if averages else 0
    blocks_d = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    sizes = {
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_BLOCK_D": blocks_d[0],
        "V_BLOCK_D": blocks_d[1],
        "KV_HEADS": kv_heads,
        "PAGE_SIZE": spec.block_size,
        "CMP_LEN": spec.cmp_len,
        "BLOCK_T": block_t,
        "CHECK": check,
        "debug": check,
        "num_warps": num_warps,
    }
    block_l = min(triton.next_power_of_2(spec.cmp_len), MAX_TILE // max(blocks_d))
    if num_copies + num_candidates:
        _append_kernel[((num_copies + num_candidates) * kv_heads, 2)](
            (k, raw_k, swa_k, cache.k, cache.k_swa, old_k, cache.k_cmp, cache.k_scale),
            (v, raw_v, swa_v, cache.v, cache.v_swa, old_v, cache.v_cmp, cache.v_scale),
            _strides(k, raw_k, swa_k),
            _strides(v, raw_v, swa_v),
            (
                token_rows,
                positions,
                seq_lens,
                cu_seqlens_q,
                page_table,
                swa_page_table,
                # Never read when there are none.
                seq_lens if window_rows is None else window_rows,
                seq_lens if window_ends is None else window_ends,
            ),
            num_tokens,
            num_copies,
            num_candidates,
            first_row,
            num_decode_rows,
            cache.k.shape[0],
            0 if cache.k_swa is None else cache.k_swa.shape[0],
            page_table.stride(0),
            0 if swa_page_table is None else swa_page_table.stride(0),
            CMP_STRIDE=spec.cmp_stride,
            BLOCK_L=block_l,
            SEPARATE=branch_kv is not None,
            **sizes,
        )
    if compress and mlps is not None:
        compress_mlp(
            raw_k,
            raw_v,
            cache,
            mlps,
            spec,
            seq_lens=seq_lens,
            cu_seqlens_q=cu_seqlens_q,
            page_table=page_table,
            window_rows=window_rows,
            window_ends=window_ends,
            num_decode_rows=num_decode_rows,
            first_row=first_row,
            swa_page_table=swa_page_table,
            check=check,
        )
    if swa_page_table is not None and num_tokens > num_decode_rows:
        # After compression: a window of this step may have read what is overwritten here.
        assert cache.k_tail is not None
        num_tiles = triton.cdiv(num_tokens - num_decode_rows, block_t)
        _tail_kernel[(num_tiles * kv_heads, 2)](
            raw_k,
            raw_v,
            _strides(raw_k),
            _strides(raw_v),
            cache.k_tail,
            cache.v_tail,
            token_rows,
            positions,
            seq_lens,
            swa_page_table,
            num_decode_rows,
            num_tokens,
            cache.k_tail.shape[0],
            swa_page_table.stride(0),
            **sizes,
        )


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Token and head strides of each."""
    return tuple(stride for x in tensors for stride in (x.stride(0), x.stride(1)))
