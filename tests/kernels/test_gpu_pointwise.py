"""Pointwise kernels against PyTorch's operators, which round in the same places."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.gpu.pointwise import add_rms_norm, apply_rotary_, rms_norm, swiglu
from tests.kernels.gpu_util import DEVICE

# fp32 differs by summation order and exp; of 16-bit results a few may round the other way. The
# interpreter cuts bf16 off instead of rounding it, twice in some of these.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2e-3 if DEVICE.type == "cuda" else 1.6e-2,
    torch.float16: 3e-4,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[actual.dtype], f"relative error {error:.3g}"


def expected_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rolled = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos[:, None], rolled, sin[:, None])


@DTYPES
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 1), (3, 60), (2, 1000), (5, 2048)])
def test_rms_norm(dtype: torch.dtype, num_tokens: int, hidden: int) -> None:
    x = randn(num_tokens, hidden + 3, dtype=dtype)[:, 3:]
    weight = randn(hidden, dtype=dtype)
    assert_near(rms_norm(x, weight, 1e-5), F.rms_norm(x, (hidden,), weight, 1e-5))


@DTYPES
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 48), (4, 600)])
def test_add_rms_norm(dtype: torch.dtype, num_tokens: int, hidden: int) -> None:
    x, residual = randn(num_tokens, hidden, dtype=dtype), randn(num_tokens, hidden, dtype=dtype)
    residual = residual.flip(0) + 1
    weight = randn(hidden, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert_near(total, x + residual)
    assert_near(normed, F.rms_norm(total, (hidden,), weight, 1e-6))


@DTYPES
@pytest.mark.parametrize(("num_heads", "dim"), [(1, 2), (5, 20), (9, 64), (20, 96)])
def test_rotary_in_place(dtype: torch.dtype, num_heads: int, dim: int) -> None:
    fused = randn(3, num_heads * dim + 7, dtype=dtype)
    before = fused.clone()
    x = fused[:, : num_heads * dim].unflatten(1, (num_heads, dim))
    cos, sin = randn(3, dim, dtype=dtype), randn(3, dim, dtype=dtype) + 1
    expected = expected_rotary(x.clone(), cos, sin)
    assert apply_rotary_(x, cos, sin) is x
    assert_near(x, expected)
    assert torch.equal(fused[:, num_heads * dim :], before[:, num_heads * dim :])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rotary_by_tables(index_dtype: torch.dtype) -> None:
    dtype = torch.float32
    x = randn(3, 2, 20, dtype=dtype)
    cos, sin = randn(9, 20, dtype=dtype), randn(9, 20, dtype=dtype) + 1
    positions = torch.tensor([8, 0, 5], dtype=index_dtype, device=DEVICE)
    expected = expected_rotary(x.clone(), cos[positions.long()], sin[positions.long()])
    assert_near(apply_rotary_(x, cos, sin, positions), expected)


@DTYPES
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 100), (2, 3000)])
def test_swiglu(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    gate_up = randn(num_tokens, 2 * size + 5, dtype=dtype)[:, : 2 * size] * 4
    gate, up = gate_up.chunk(2, dim=-1)
    assert_near(swiglu(gate_up), F.silu(gate) * up)


def test_nothing_to_do_and_wrong_shapes() -> None:
    empty = torch.empty(0, 8, device=DEVICE)
    assert swiglu(empty).shape == (0, 4)
    assert rms_norm(empty, torch.ones(8, device=DEVICE), 1e-5).shape == (0, 8)
    with pytest.raises(ValueError, match="even last dimension"):
        swiglu(torch.empty(2, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        rms_norm(torch.empty(2, 8), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="even last dimension"):
        apply_rotary_(torch.empty(1, 1, 3), torch.empty(1, 3), torch.empty(1, 3))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 4097])
def test_full_size(dtype: torch.dtype, num_tokens: int) -> None:
    for hidden in (4096, 5120, 16384, 40000):
        x, weight = randn(num_tokens, hidden, dtype=dtype), randn(hidden, dtype=dtype)
        assert_near(rms_norm(x, weight, 1e-5), F.rms_norm(x, (hidden,), weight, 1e-5))
        normed, total = add_rms_norm(x, x * 2, weight, 1e-5)
        assert torch.equal(total, x + x * 2)
        assert_near(normed, F.rms_norm(total, (hidden,), weight, 1e-5))
    fused = randn(num_tokens, 72 * 128, dtype=dtype)
    x = fused[:, : 68 * 128].unflatten(1, (68, 128))
    cos, sin = randn(num_tokens, 128, dtype=dtype), randn(num_tokens, 128, dtype=dtype) + 1
    expected = expected_rotary(x.clone(), cos, sin)
    assert_near(apply_rotary_(x, cos, sin), expected)
    gate_up = randn(num_tokens, 2 * 14336, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_near(swiglu(gate_up), F.silu(gate) * up)
