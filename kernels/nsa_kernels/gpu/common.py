"""What the Triton kernels share: tile shapes that must agree between kernels, and their limits."""

import torch
import triton
import triton.language as tl

from nsa_kernels.spec import NSASpec

# exp2 is the hardware's exponential: scores are scaled by log2(e), and every log-sum-exp that
# kernels exchange ("lse2") is in base 2.
LOG2E = 1.4426950408889634

# (token, head) pairs of one prefill tile: the height of a Hopper matrix instruction, twice.
PREFILL_ROWS = 128

# Bound of each of the two prefill workspaces, block scores and partial outputs. A prefill runs in
# sub-chunks of tokens that stay under it; one tile of tokens is the least.
WORKSPACE_BYTES = 512 << 20

# Most blocks that a query lists: with more, lists cost more than they save.
MAX_TABLE_WIDTH = 1024


@triton.jit
def to_fp8(x, scale):
    """Round x / scale to what an FP8 cache holds. Saturates at 448, e4m3's largest; NaN stays."""
    x = x.to(tl.float32) / scale
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


def block_h(group_size: int) -> int:
    """Query heads of a group, padded to a power of two for the tile shapes."""
    return int(triton.next_power_of_2(group_size))


def prefill_block_q(group_size: int) -> int:
    """Tokens of one prefill tile, so that tokens x padded heads fill PREFILL_ROWS."""
    return max(1, PREFILL_ROWS // block_h(group_size))


def split_dim(dim: int) -> tuple[int, int]:
    """Cover `dim` with one power of two, or with two when that wastes less: 192 = 128 + 64."""
    whole = max(16, triton.next_power_of_2(dim))
    low = whole // 2
    high = max(16, triton.next_power_of_2(dim - low)) if dim > low else low
    return (low, high) if low >= 16 and low + high < whole else (whole, 0)


def score_tile_entries(entries_per_page: int) -> int:
    """Flat compressed entries of one score tile; a multiple of the entries of two pages."""
    return max(64, 2 * entries_per_page)


def score_unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of prefill's score units, for queries of `dtype`: 11 bits keep bf16's order."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def score_bytes_per_token(
    num_q_heads: int, num_score_tiles: int, dtype: torch.dtype, spec: NSASpec
) -> int:
    """Bytes of score workspace (units, spill, tile maximum) that `prefill_cmp` needs a token."""
    tile_entries = score_tile_entries(spec.cmp_entries_per_page)
    units = tile_entries
    if spec.score_map == "overlap":
        units //= spec.cmp_entries_per_page
    return num_q_heads * num_score_tiles * (units * score_unit_dtype(dtype).itemsize + 8)


def group_score_bytes_per_token(num_kv_heads: int, num_score_tiles: int, spec: NSASpec) -> int:
    """Bytes of score workspace (units, spill) that `prefill_scores` needs a token."""
    tile_entries = score_tile_entries(spec.cmp_entries_per_page)
    if spec.score_map == "max_pool":
        return num_kv_heads * num_score_tiles * tile_entries * 4
    has_spill = spec.strides_per_window > 1
    num_blocks = num_score_tiles * tile_entries // spec.cmp_entries_per_page
    return num_kv_heads * num_blocks * (8 if has_spill else 4)


def check_geometry(spec: NSASpec) -> None:
    """Raise ValueError for a geometry that the kernels cannot tile."""
    for name in ("block_size", "cmp_stride"):
        value = getattr(spec, name)
        if value & (value - 1):
            raise ValueError(
                f"{name} must be a power of two on a GPU, got {value}; "
                "use device cpu for this model"
            )
    if spec.block_size > 128:
        raise ValueError(f"block_size must be at most 128 on a GPU, got {spec.block_size}")
    if spec.lse_stride & (spec.lse_stride - 1) or spec.lse_len > 16 * spec.lse_stride:
        raise ValueError(
            "lse_stride must be a power of two, and lse_len at most 16 of them, on a GPU, got "
            f"lse_stride {spec.lse_stride} and lse_len {spec.lse_len}; "
            "use device cpu for this model"
        )
    if spec.block_table_width > MAX_TABLE_WIDTH:
        raise ValueError(
            f"a query may select at most {MAX_TABLE_WIDTH} blocks on a GPU, got "
            f"{spec.block_table_width} with num_selected_blocks {spec.num_selected_blocks} and "
            f"dense_len {spec.dense_len}; attention that is dense at any length is a window "
            "branch whose window_size is the longest context"
        )
