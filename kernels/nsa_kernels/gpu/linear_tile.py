"""What the kernels of linear layers share: which rows of W a program owns, and what follows them.

Legend: M rows of x, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim, HALF_DIM D / 2
where outputs are rotated, else 0.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_rows(
    pid,
    num_out,
    num_heads,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return a program's rows of W, [BLOCK_N], which of them exist, and whether it rotates.

    Where two outputs belong together, gate and up or the halves of a head, the first of each pair
    are in the first half of the tile and the second in the second.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    offs = tl.arange(0, BLOCK_N)
    is_rotated = False
    if SWIGLU:
        rows = pid * HALF_N + offs % HALF_N
        exists = rows < num_out // 2
        rows += offs // HALF_N * (num_out // 2)
    elif HALF_DIM > 0:
        TILES: tl.constexpr = (HALF_DIM + HALF_N - 1) // HALF_N
        is_rotated = pid < num_heads * TILES
        in_half = pid % TILES * HALF_N + offs % HALF_N
        rotated = pid // TILES * (2 * HALF_DIM) + in_half + offs // HALF_N * HALF_DIM
        plain = num_heads * (2 * HALF_DIM) + (pid - num_heads * TILES) * BLOCK_N + offs
        rows = tl.where(is_rotated, rotated, plain)
        exists = tl.where(is_rotated, in_half < HALF_DIM, plain < num_out)
    else:
        rows = pid * BLOCK_N + offs
        exists = rows < num_out
    return rows, exists, is_rotated


@triton.jit
def _split_pairs(tile):
    """[2 * n, ...] -> two of [n, ...]; `tile` is [BLOCK_N, BLOCK_M]."""
    HALF_N: tl.constexpr = tile.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(tile, [2, HALF_N, tile.shape[1]]), (1, 2, 0)))


@triton.jit
def _load_rotary(
    rows,
    is_rotated,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    stride_table,
    num_rows,
    HALF_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Load the cosines and sines of a tile, [BLOCK_N, BLOCK_M] fp32; 0 where nothing rotates."""
    offs_m = tl.arange(0, BLOCK_M)
    mask = is_rotated[:, None] & (offs_m < num_rows)[None, :]
    # As many loads as outputs: a row's position is then where its cosine is wanted.
    position_ptrs = positions_ptr + offs_m[None, :] + tl.zeros(rows.shape, tl.int32)[:, None]
    position = tl.load(position_ptrs, mask=mask, other=0).to(tl.int64)
    at = position * stride_table + (rows % (2 * HALF_DIM))[:, None]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish_tile(
    y,
    rows,
    exists,
    is_rotated,
    cos,
    sin,
    bias_ptr,
    residual_ptr,
    out_ptr,
    stride_residual,
    num_rows,
    num_out,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Store a tile of products, [BLOCK_N, BLOCK_M] fp32, with what comes after them."""
    HALF_N: tl.constexpr = y.shape[0] // 2
    offs_m = tl.arange(0, y.shape[1]).to(tl.int64)
    width = num_out
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=exists, other=0.0).to(tl.float32)[:, None]
    if SWIGLU:
        gate, up = _split_pairs(y)
        y = gate / (1.0 + tl.exp(-gate)) * up
        width = num_out // 2
        rows = tl.program_id(0) * HALF_N + tl.arange(0, HALF_N)
        exists = rows < width
    elif HALF_DIM > 0:
        # The second half of the tile holds the partners of the first.
        low, high = _split_pairs(y)
        partner = tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), y.shape)
        y = tl.where(is_rotated, y * cos + partner * sin, y)
    mask = exists[:, None] & (offs_m < num_rows)[None, :]
    if residual_ptr is not None:
        at = offs_m[None, :] * stride_residual + rows[:, None]
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[None, :] * width + rows[:, None]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
