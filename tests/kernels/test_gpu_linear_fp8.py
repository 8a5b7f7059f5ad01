"""Linears in 8 bits: with what the quantizer made of both sides, sums are those of fp32.

`torch._scaled_mm` multiplies more rows than the kernel takes; without a GPU it is emulated, with
what it demands there.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.gpu import linear_fp8 as linear_fp8_module
from nsa_kernels.gpu.linear_fp8 import E4M3, linear_fp8
from nsa_kernels.gpu.linear_tile import Rotary
from nsa_kernels.gpu.quantize import quantize_rows
from tests.kernels.gpu_util import DEVICE

# On a GPU what comes out is bf16: one rounding, or two where a kernel of its own follows.
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5


def emulated_scaled_mm(
    x: Tensor,
    weight: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    (num_rows, num_in), num_out = x.shape, weight.shape[1]
    assert x.dtype == weight.dtype == E4M3 and x.is_contiguous() and weight.t().is_contiguous()
    assert num_in % 16 == 0 and num_out % 16 == 0 and num_in == weight.shape[0]
    assert scale_a.shape == (num_rows, 1) and scale_b.shape == (1, num_out)
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    assert scale_a.dtype == scale_b.dtype == torch.float32 and not use_fast_accum
    assert bias is None or bias.dtype == out_dtype
    out = (x.float() * scale_a) @ (weight.float() * scale_b)
    return (out if bias is None else out + bias.float()).to(out_dtype)


@pytest.fixture(autouse=True)
def _scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(torch, "_scaled_mm", emulated_scaled_mm)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix, and the fp32 one that it stands for."""

    weight: Tensor
    scale: Tensor

    @property
    def values(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]


def make_matrix(num_out: int, num_in: int) -> Matrix:
    return Matrix(*quantize_rows(randn(num_out, num_in) * num_in**-0.5))


def seen(x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
    """What the product sees of x."""
    values, scale = quantize_rows(x, norm)
    return values.float() * scale[:, None]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == DTYPE and actual.shape == expected.shape
    error = (actual.float() - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative error {error:.3g}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [M, heads, D], cos and sin [M, D]."""
    return x * cos[:, None] + x.roll(x.shape[-1] // 2, -1) * sin[:, None]


def check_all(num_rows: int, num_out: int, num_in: int) -> None:
    """Norm, bias and rotation; norm and gate; residual: what the layers ask for."""
    matrix, x, norm = make_matrix(num_out, num_in), randn(num_rows, num_in), (randn(num_in), 1e-6)
    heads, dim, length = 2, 16, 50
    tables = [randn(length, dim, seed=seed) for seed in (1, 2)]
    positions = (torch.arange(num_rows, device=DEVICE) * 7 % length).int()
    cos, sin = (table[positions.long()].float() for table in tables)

    bias = randn(num_out)
    expected = seen(x, norm) @ matrix.values.t() + bias.float()
    rotated = expected[:, : heads * dim].unflatten(1, (heads, dim))
    expected[:, : heads * dim] = rotate(rotated, cos, sin).flatten(1)
    rotary = Rotary(tables[0], tables[1], positions, heads, dim)
    actual = linear_fp8(x, matrix.weight, matrix.scale, bias, norm=norm, rotary=rotary)
    assert_close(actual, expected)

    gate, up = (seen(x, norm) @ matrix.values.t()).chunk(2, dim=1)
    actual = linear_fp8(x, matrix.weight, matrix.scale, norm=norm, swiglu=True)
    assert_close(actual, F.silu(gate) * up)

    residual = randn(num_rows, num_out + 8)[:, 8:]
    before = residual.clone()
    actual = linear_fp8(x, matrix.weight, matrix.scale, residual=residual)
    assert_close(actual, seen(x) @ matrix.values.t() + residual.float())
    assert torch.equal(residual, before)


@pytest.mark.parametrize("num_rows", [1, 9, 33, 65])
@pytest.mark.parametrize(("num_out", "num_in"), [(48, 48), (112, 1024), (80, 1040)])
def test_what_surrounds_the_product(num_rows: int, num_out: int, num_in: int) -> None:
    check_all(num_rows, num_out, num_in)


def test_both_ways_multiply_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = make_matrix(64, 128), randn(5, 128)
    kernel = linear_fp8(x, matrix.weight, matrix.scale)
    monkeypatch.setattr(linear_fp8_module, "MAX_SKINNY_ROWS", 0)
    by_torch = linear_fp8(x, matrix.weight, matrix.scale)
    # Sums in another order; on a GPU a few then round the other way.
    assert (kernel.float() - by_torch.float()).norm() <= 2e-3 * by_torch.float().norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    matrix, x = make_matrix(64, 272), randn(8, 272)
    whole = linear_fp8(x, matrix.weight, matrix.scale)
    for count in (1, 3):
        part = linear_fp8(x[2 : 2 + count], matrix.weight, matrix.scale)
        assert torch.equal(part, whole[2 : 2 + count])


def test_nothing_to_do_and_wrong_arguments() -> None:
    matrix = make_matrix(32, 48)
    assert linear_fp8(randn(0, 48), matrix.weight, matrix.scale).shape == (0, 32)
    with pytest.raises(ValueError, match="x must have shape"):
        linear_fp8(randn(2, 32), matrix.weight, matrix.scale)
    with pytest.raises(ValueError, match="weight_scale must have shape"):
        linear_fp8(randn(2, 48), matrix.weight, matrix.scale[:16])
    with pytest.raises(ValueError, match="contiguous and"):
        linear_fp8(randn(2, 48), matrix.values, matrix.scale)
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_fp8(randn(2, 48), matrix.weight[:31], matrix.scale[:31])
    with pytest.raises(ValueError, match="residual must have shape"):
        linear_fp8(randn(2, 48), matrix.weight, matrix.scale, residual=randn(2, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 33, 64, 1000])
@pytest.mark.parametrize(("num_out", "num_in"), [(9408, 4096), (4096, 14336), (2400, 2048)])
def test_full_size(num_rows: int, num_out: int, num_in: int) -> None:
    check_all(num_rows, num_out, num_in)
