"""Rows in e4m3 against the arithmetic in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.gpu.quantize import E4M3, quantize_rows
from tests.kernels.gpu_util import DEVICE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Half a step of e4m3, relative to the number.
STEP = 1 / 16


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_quantized(out: Tensor, scales: Tensor, expected: Tensor, slack: float) -> None:
    """Within a step of e4m3, relative or (around zero) of the row's scale."""
    assert out.dtype == E4M3 and scales.dtype == torch.float32
    values = out.float() * scales[:, None]
    bound = torch.maximum(expected.abs() * (STEP + slack), scales[:, None] * STEP / 64)
    error = (values - expected).abs()
    assert (error <= bound * (1 + 1e-5)).all(), f"{(error / bound).max():.3g} times the bound"
    largest = out.float().abs().amax(dim=1)
    assert (largest == 448).all()


@DTYPES
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 1), (3, 63), (2, 1000), (5, 2048)])
def test_quantize_rows(dtype: torch.dtype, num_rows: int, columns: int) -> None:
    x = randn(num_rows, columns + 3, dtype=dtype)[:, 3:]
    x *= torch.logspace(-3, 3, num_rows, device=DEVICE)[:, None].to(dtype)
    out, scales = quantize_rows(x)
    assert_quantized(out, scales, x.float(), slack=0.0)


@DTYPES
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 48), (3, 600)])
def test_norm_comes_first(dtype: torch.dtype, num_rows: int, columns: int) -> None:
    x, weight = randn(num_rows, columns, dtype=dtype), randn(columns, dtype=dtype)
    out, scales = quantize_rows(x, (weight, 1e-6))
    expected = F.rms_norm(x.float(), (columns,), weight.float(), 1e-6)
    # What the norm rounds to its dtype; the interpreter cuts that off.
    slack = {torch.float32: 1e-6, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}[dtype]
    assert_quantized(out, scales, expected, slack)


def test_zeros_and_nothing() -> None:
    out, scales = quantize_rows(torch.zeros(2, 40, device=DEVICE))
    assert not out.float().any() and (scales > 0).all() and scales.isfinite().all()
    out, scales = quantize_rows(torch.zeros(0, 40, device=DEVICE))
    assert out.shape == (0, 40) and scales.shape == (0,)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"norm weight must have shape \(8,\)"):
        quantize_rows(torch.empty(2, 8), (torch.ones(4), 1e-5))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        quantize_rows(torch.empty(8, 2).t())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4097])
@pytest.mark.parametrize("columns", [2048, 4096, 14336])
def test_full_size(num_rows: int, columns: int) -> None:
    x, weight = (randn(rows, columns, dtype=torch.bfloat16) for rows in (num_rows, 1))
    out, scales = quantize_rows(x)
    assert_quantized(out, scales, x.float(), slack=0.0)
    out, scales = quantize_rows(x, (weight[0], 1e-6))
    expected = F.rms_norm(x, (columns,), weight[0], 1e-6).float()
    assert_quantized(out, scales, expected, slack=1 / 128)
