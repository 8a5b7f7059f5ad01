"""Linear layers of few rows: y = x @ W^T with what surrounds it, at the speed of reading W.

Three kernels compute the same: `gemv` for one row, `skinny` for few, `gemm` for up to 64. Here are
the checks, the choice among them and the matrix library, and what that does for more rows.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.gemm import GemmConfig, can_gemm, gemm_config, launch_gemm
from nsa_kernels.gpu.gemv import GemvConfig, can_gemv, gemv_config, launch_gemv
from nsa_kernels.gpu.linear_tile import Rotary
from nsa_kernels.gpu.plan import has_dependent_launch
from nsa_kernels.gpu.pointwise import apply_rotary_, rms_norm
from nsa_kernels.gpu.pointwise import swiglu as swiglu_rows
from nsa_kernels.gpu.skinny import SkinnyConfig, launch_skinny, skinny_config

# Above, PyTorch's matrix product is faster: it reads x once for many rows of W.
MAX_SKINNY_ROWS = 64
# Rows of a step whose large layers are faster for an early start, and whose small ones are not.
_EARLY_ROWS = range(2, 17)
# Both sides of a weight that is large in this sense.
_EARLY_SIDE = 4096

LinearConfig = SkinnyConfig | GemvConfig | GemmConfig


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    rotary: Rotary | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
    launch_pdl: bool | None = None,
) -> Tensor:
    """Return x @ weight^T + bias, [M, N], of x [M, K] and weight [N, K], for any M.

    norm: (weight [K], eps), RMSNorm of x first. swiglu: weight is [gate; up], [2I, K], and the
    result silu(gate) * up, [M, I]. rotary: applied to the first outputs. residual: [M, N], added
    last. out_dtype: of the result, else that of x. out: where to write it, contiguous; it may be
    the residual itself, which saves a copy.
    Sums, bias, residual and rotation are fp32 and rounded once where one of our kernels runs
    (M <= MAX_SKINNY_ROWS); PyTorch rounds in between.
    There a row's result is bit-equal whatever the other rows are and for every M of one class:
    1, 2 to 8, 9 to 16, 17 to 32, 33 to 64. Above, and where `choose_config` finds the
    matrix library faster (some weights of more than 16 rows), it is what that makes of it.

    config, launch_pdl: for measuring; None: `choose_config` and `starts_early`. With dependent
    launch, weight, bias, norm weight and rotary tables must not be written by a kernel that may
    still be running.

    Raises ValueError when shapes or dtypes do not fit, or rotary meets swiglu or residual.
    """
    num_rows, num_out = _check(x, weight, bias, norm, residual, swiglu, rotary)
    dtype = x.dtype if out_dtype is None else out_dtype
    if out is not None:
        check_shape("out", out, (num_rows, num_out))
        if out.dtype != dtype or not out.is_contiguous():
            raise ValueError(f"out must be {dtype} and contiguous, got {out.dtype}")
    if num_rows == 0:
        return torch.empty((0, num_out), dtype=dtype, device=x.device) if out is None else out
    if config is None:
        if weight.is_contiguous() and x.stride(1) == 1:
            config = choose_config(num_rows, weight.shape[0], weight.shape[1], x.dtype)
        if config is None:
            return linear_by_torch(x, weight, bias, norm, residual, swiglu, rotary, dtype, out)
    if out is None:
        out = torch.empty((num_rows, num_out), dtype=dtype, device=x.device)
    if launch_pdl is None:
        launch_pdl = starts_early(num_rows, weight) and _can_launch_early(x.device)
    if norm is not None and not isinstance(config, GemvConfig) and not config.fold_norm:
        x, norm = rms_norm(x, *norm), None
    arguments = (x, weight, bias, norm, residual, swiglu, rotary, out)
    if isinstance(config, GemvConfig):
        launch_gemv(*arguments, config=config, launch_pdl=launch_pdl)
    elif isinstance(config, GemmConfig):
        launch_gemm(*arguments, config=config, launch_pdl=launch_pdl)
    else:
        launch_skinny(*arguments, config=config, launch_pdl=launch_pdl)
    return out


def choose_config(
    num_rows: int, num_out: int, num_in: int, dtype: torch.dtype
) -> LinearConfig | None:
    """The fastest kernel for M rows and a [num_out, num_in] weight; None for the matrix library.

    Measured on an H200 with `kernels/bench/linear.py --tune2`, layers of 1B and 8B models.
    """
    config: LinearConfig | None = None
    if can_gemv(num_rows, num_out, num_in, dtype):
        config = gemv_config(num_rows, num_out, num_in)
    if config is None and can_gemm(num_rows, dtype):
        config = gemm_config(num_rows, num_out, num_in)
    if config is None and num_rows <= MAX_SKINNY_ROWS:
        config = skinny_config(num_rows, num_out, num_in, dtype)
    return config


def starts_early(num_rows: int, weight: Tensor) -> bool:
    """Whether a linear layer starts before the kernel in front of it has ended.

    It then takes registers and shared memory from that one. On an H200, four linears of an 8B layer
    in turn take 134.7 us for one row against 140.3 with early starts, 142.8 against 138.4 for 4,
    141.7 against 136.8 for 8, 136.3 against 134.5 for 16, 144.1 against 144.8 for 32. Small
    layers were measured with attention between them, which can turn the result: a decode step of a
    1B model takes 1.082 ms for one row against 1.047 with early starts, 1.179 against 1.205 for 8,
    1.319 against 1.275 for 32. Other rows follow those of their class.
    """
    is_large = min(weight.shape) >= _EARLY_SIDE
    return is_large == (num_rows in _EARLY_ROWS)


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    return has_dependent_launch(device)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
) -> tuple[int, int]:
    """Return (M, outputs), or raise ValueError naming what does not fit."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [M, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    if bias is not None:
        check_shape("bias", bias, (num_out,))
    if norm is not None:
        check_shape("norm weight", norm[0], (num_in,))
    if swiglu:
        if num_out % 2:
            raise ValueError(f"swiglu needs a weight of an even number of rows, got {num_out}")
        num_out //= 2
    if residual is not None:
        check_shape("residual", residual, (num_rows, num_out))
        if residual.stride(1) != 1:
            raise ValueError("residual must have a contiguous last dimension")
    if rotary is not None:
        if swiglu or residual is not None:
            raise ValueError("rotary goes with neither swiglu nor residual")
        check_shape("positions", rotary.positions, (num_rows,))
        check_shape("sin_table", rotary.sin_table, tuple(rotary.cos_table.shape))
        if rotary.cos_table.shape[1] != rotary.head_dim or rotary.head_dim % 2:
            raise ValueError(
                f"rotary tables must be [positions, head_dim] with an even head_dim, got "
                f"{tuple(rotary.cos_table.shape)} and head_dim {rotary.head_dim}"
            )
        if rotary.cos_table.stride() != rotary.sin_table.stride() or (
            rotary.cos_table.stride(1) != 1
        ):
            raise ValueError("rotary tables must have equal strides, the last of them 1")
        if rotary.num_heads * rotary.head_dim > num_out:
            raise ValueError(
                f"rotary covers {rotary.num_heads} heads of {rotary.head_dim}, more than the "
                f"{num_out} outputs"
            )
    return num_rows, num_out


def linear_by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The same by PyTorch's matrix product and the kernels of `pointwise`."""
    if norm is not None:
        x = rms_norm(x, *norm)
    if residual is not None and bias is None and not swiglu and residual.dtype == x.dtype == dtype:
        return torch.addmm(residual, x, weight.t(), out=out)
    is_plain = bias is None and residual is None and rotary is None and not swiglu
    if is_plain and x.is_cuda and dtype == torch.float32 != x.dtype:
        # Not rounded to 16 bits in between.
        product = torch.mm(x, weight.t(), out_dtype=dtype)
        return product if out is None else out.copy_(product)
    result = F.linear(x, weight, bias)
    if swiglu:
        result = swiglu_rows(result)
    if rotary is not None:
        width = rotary.num_heads * rotary.head_dim
        heads = result[:, :width].unflatten(1, (rotary.num_heads, rotary.head_dim))
        apply_rotary_(heads, rotary.cos_table, rotary.sin_table, rotary.positions)
    if residual is not None:
        result = result + residual
    return result.to(dtype) if out is None else out.copy_(result)
