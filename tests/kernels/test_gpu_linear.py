"""The linear layers of few rows against fp64, in every combination of what is fused into them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.gpu import gemm
from nsa_kernels.gpu.gemm import GEMM_ROW_CLASSES, GemmConfig
from nsa_kernels.gpu.gemv import GemvConfig, can_gemv
from nsa_kernels.gpu.linear import (
    MAX_SKINNY_ROWS,
    LinearConfig,
    choose_config,
    linear,
    starts_early,
)
from nsa_kernels.gpu.linear_tile import Rotary
from nsa_kernels.gpu.skinny import ROW_CLASSES, SkinnyConfig, row_class, skinny_config
from tests.kernels.gpu_util import DEVICE

# Of the norm of the result: rounding of x * norm weight and of the result, once each. The
# interpreter cuts bf16 off instead of rounding it, which biases; fp32 differs by summation order,
# and a GPU's exp, rsqrt and division are good to 2 units in the last place.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3 if DEVICE.type == "cuda" else 1.2e-2,
    torch.float16: 6e-4,
}
# PyTorch's product rounds between the steps as well.
TOLERANCE_OF_MANY = {dtype: 3 * bound for dtype, bound in TOLERANCE.items()}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
HEAD_DIM, MAX_POSITIONS = 20, 37


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def make_rotary(num_rows: int, num_heads: int, dtype: torch.dtype) -> Rotary:
    angle = torch.arange(MAX_POSITIONS)[:, None] * torch.linspace(1, 0.1, HEAD_DIM // 2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    positions = (torch.arange(num_rows) * 11 + 5) % MAX_POSITIONS
    return Rotary(
        cos.to(DEVICE, dtype),
        sin.to(DEVICE, dtype),
        positions.to(DEVICE, torch.int32),
        num_heads,
        HEAD_DIM,
    )


def expected_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
) -> Tensor:
    """The same in fp64."""
    y = x.double()
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + norm[1]) * norm[0].double()
    y = y @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    if swiglu:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    if rotary is not None:
        width = rotary.num_heads * rotary.head_dim
        heads = y[:, :width].unflatten(1, (rotary.num_heads, rotary.head_dim))
        at = rotary.positions.long()
        cos, sin = rotary.cos_table[at].double()[:, None], rotary.sin_table[at].double()[:, None]
        heads = heads * cos + heads.roll(rotary.head_dim // 2, -1) * sin
        y = torch.cat((heads.flatten(1), y[:, width:]), dim=1)
    if residual is not None:
        y = y + residual.double()
    return y


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.3g}"


# K a multiple of the step and not, N of the tile and not; M up to both ends of every class.
SHAPES = [(1, 64, 512), (3, 50, 200), (8, 33, 1000), (17, 111, 520), (33, 100, 264)]
FUSIONS = ["plain", "norm", "bias", "residual", "norm+bias+residual"]
PAIRS = ["swiglu", "norm+bias+swiglu", "swiglu+residual", "rotary", "norm+bias+rotary"]


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("fused", FUSIONS + PAIRS)
def test_every_fusion(
    dtype: torch.dtype, num_rows: int, num_out: int, num_in: int, fused: str
) -> None:
    check_fusion(dtype, num_rows, num_out, num_in, fused, tolerance=TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "num_out", "num_in"), [(1, 66, 256), (2, 50, 768), (3, 68, 2048), (4, 70, 1024)]
)
@pytest.mark.parametrize("fused", FUSIONS + PAIRS)
def test_every_fusion_of_few_rows(
    dtype: torch.dtype, num_rows: int, num_out: int, num_in: int, fused: str
) -> None:
    """Without matrix instructions: whole steps of K, pairs of outputs."""
    assert can_gemv(num_rows, num_out, num_in, dtype)
    for config in (GemvConfig(8, 1, 4), GemvConfig(4, 1, 1, early=False)):
        check_fusion(
            dtype, num_rows, num_out, num_in, fused, tolerance=TOLERANCE[dtype], config=config
        )


# Whole, split, and more splits than there are steps; K a multiple of the step or not.
GEMM_TILES = [
    GemmConfig(64, 32, 4, 3),
    GemmConfig(64, 32, 4, 3, fold_norm=True),
    GemmConfig(32, 64, 4, 4, splits=3),
    GemmConfig(128, 32, 4, 3, splits=40, fold_norm=True),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", GEMM_TILES, ids=str)
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("fused", FUSIONS + PAIRS)
def test_every_fusion_of_a_warp_group(
    config: GemmConfig, num_rows: int, num_out: int, num_in: int, fused: str
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check_fusion(
            dtype, num_rows, num_out, num_in, fused, tolerance=TOLERANCE[dtype], config=config
        )
    counters = gemm._kept_counters(randn(1, dtype=dtype).device)
    assert not counters.any()  # for the next launch


@pytest.mark.parametrize("size", GEMM_ROW_CLASSES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("fold_norm", [False, True])
def test_a_row_of_a_warp_group_does_not_depend_on_the_others(
    size: int, splits: int, fold_norm: bool
) -> None:
    """Nor on how many there are in its class."""
    config = GemmConfig(64, 32, 4, 3, splits=splits, fold_norm=fold_norm)
    x = randn(size, 136, dtype=torch.bfloat16)
    weight = randn(80, 136, dtype=torch.bfloat16, seed=1)
    norm = (randn(136, dtype=torch.bfloat16, seed=2), 1e-5)
    expected = linear(x, weight, norm=norm, config=config)
    for num_rows in {size // 2 + 1, size - 1 if size > 16 else 1, size}:
        others = x[:num_rows].flip(0) * 3
        others[0] = x[0]
        others[-1] = x[num_rows - 1]
        actual = linear(others, weight, norm=norm, config=config)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[-1], expected[num_rows - 1])


def test_sizes_that_a_warp_group_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GemmConfig(64, 32, 4, 3, splits=2)
    for x in (randn(2, 64, dtype=torch.float32), randn(65, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="bf16 or fp16 of at most 64 rows"):
            linear(x, randn(70, 64, dtype=x.dtype), config=config)
    x, weight = (randn(count, 64, dtype=torch.bfloat16) for count in (2, 70))
    monkeypatch.setattr(gemm, "MAX_SPLIT_TILES", 1)
    with pytest.raises(ValueError, match="2 tiles are too many to split: 1 at most"):
        linear(x, weight, config=config)


@DTYPES
@pytest.mark.parametrize("fused", FUSIONS + PAIRS)
def test_rows_beyond_the_skinny_kernel(dtype: torch.dtype, fused: str) -> None:
    check_fusion(dtype, MAX_SKINNY_ROWS + 1, 70, 96, fused, tolerance=TOLERANCE_OF_MANY[dtype])


def check_fusion(
    dtype: torch.dtype,
    num_rows: int,
    num_out: int,
    num_in: int,
    fused: str,
    *,
    tolerance: float,
    config: LinearConfig | None = None,
    rotated_heads: int | None = None,
) -> None:
    is_swiglu, is_rotary = "swiglu" in fused, "rotary" in fused
    num_weights = 2 * num_out if is_swiglu else num_out
    # Columns beside x and the residual: they are views of something wider.
    x = randn(num_rows, num_in + 8, dtype=dtype)[:, :num_in]
    weight = randn(num_weights, num_in, dtype=dtype, seed=1, scale=num_in**-0.5)
    bias = randn(num_weights, dtype=dtype, seed=2) if "bias" in fused else None
    norm = (randn(num_in, dtype=dtype, seed=3) + 1, 1e-5) if "norm" in fused else None
    residual = (
        randn(num_rows, num_out + 3, dtype=dtype, seed=4)[:, :num_out]
        if "residual" in fused
        else None
    )
    rotary = None
    if is_rotary:
        heads = num_out // HEAD_DIM if rotated_heads is None else rotated_heads
        rotary = make_rotary(num_rows, heads, dtype)
    actual = linear(
        x,
        weight,
        bias,
        norm=norm,
        residual=residual,
        swiglu=is_swiglu,
        rotary=rotary,
        config=config,
    )
    assert actual.dtype == dtype
    expected = expected_linear(x, weight, bias, norm, residual, is_swiglu, rotary)
    assert_near(actual, expected, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("num_warps", [1, 2, 8])
def test_every_tile(block_n: int, num_warps: int) -> None:
    config = SkinnyConfig(block_n, 32, num_warps, 3)
    for fused in ("norm", "swiglu", "rotary"):
        check_fusion(
            torch.bfloat16,
            5,
            90,
            72,
            fused,
            tolerance=TOLERANCE[torch.bfloat16],
            config=config,
            rotated_heads=2,
        )


def test_folded_and_separate_norm_agree() -> None:
    for fold_norm in (False, True):
        config = SkinnyConfig(16, 32, 2, 2, fold_norm=fold_norm)
        check_fusion(
            torch.bfloat16, 3, 40, 100, "norm", tolerance=TOLERANCE[torch.bfloat16], config=config
        )


@pytest.mark.parametrize("num_rows", [2, MAX_SKINNY_ROWS + 1])
def test_logits_keep_the_precision_of_the_sums(num_rows: int) -> None:
    x = randn(num_rows, 96, dtype=torch.bfloat16)
    weight = randn(40, 96, dtype=torch.bfloat16, seed=1)
    actual = linear(x, weight, out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    exact = num_rows <= MAX_SKINNY_ROWS
    # A matrix unit adds with a few bits less than fp32 has, and far more than bf16.
    assert_near(actual, x.double() @ weight.double().t(), 1e-5 if exact else 4e-3)


@pytest.mark.parametrize("num_rows", [0, 3, MAX_SKINNY_ROWS + 1])
def test_the_result_goes_where_it_is_wanted(num_rows: int) -> None:
    x, weight = (randn(count, 48, dtype=torch.bfloat16) for count in (num_rows, 20))
    expected = linear(x, weight, out_dtype=torch.float32)
    out = torch.full((num_rows, 20), torch.nan, device=DEVICE)
    assert linear(x, weight, out_dtype=torch.float32, out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"out must be torch\.bfloat16 and contiguous"):
        linear(x, weight, out=out)


@pytest.mark.parametrize("num_rows", [3, MAX_SKINNY_ROWS + 1])
def test_the_residual_may_be_overwritten(num_rows: int) -> None:
    x, residual = (randn(num_rows, size, dtype=torch.bfloat16) for size in (48, 20))
    weight = randn(20, 48, dtype=torch.bfloat16, seed=1)
    expected = linear(x, weight, residual=residual)
    assert linear(x, weight, residual=residual, out=residual) is residual
    assert torch.equal(residual, expected)


@DTYPES
@pytest.mark.parametrize("size", ROW_CLASSES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, size: int) -> None:
    """Nor, within a class, on how many there are."""
    x = randn(size, 136, dtype=dtype)
    weight = randn(48, 136, dtype=dtype, seed=1)
    norm = (randn(136, dtype=dtype, seed=2), 1e-5)
    expected = linear(x, weight, norm=norm)
    for num_rows in {size // 2 + 1, size - 1 if size > 8 else 1, size}:
        assert row_class(num_rows) == size
        others = x[:num_rows].flip(0) * 3
        others[0] = x[0]
        others[-1] = x[num_rows - 1]
        actual = linear(others, weight, norm=norm)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[-1], expected[num_rows - 1])


def test_other_rows_may_hold_anything() -> None:
    """A padding row of NaN or infinity leaves the others as they are."""
    x = randn(3, 64, dtype=torch.bfloat16)
    weight = randn(32, 64, dtype=torch.bfloat16, seed=1)
    expected = linear(x, weight)
    x[1] = math.nan
    x[0, 5] = math.inf
    assert torch.equal(linear(x, weight)[2], expected[2])


@DTYPES
def test_configurations_fit_every_number_of_rows(dtype: torch.dtype) -> None:
    for num_rows in range(1, MAX_SKINNY_ROWS + 1):
        for num_out, num_in in [(2400, 2048), (16384, 2048), (4096, 14336), (128256, 4096)]:
            config = skinny_config(num_rows, num_out, num_in, dtype)
            assert config is None or config.block_n <= 32 * config.num_warps


@DTYPES
def test_rows_of_one_class_have_one_kernel(dtype: torch.dtype) -> None:
    """What makes a row's result the same for every number of rows of its class."""
    for num_out, num_in in MODEL_SHAPES:
        for first, last in [(2, 8), (9, 16), (17, 32), (33, MAX_SKINNY_ROWS)]:
            sizes = range(first, last + 1)
            assert len({choose_config(size, num_out, num_in, dtype) for size in sizes}) == 1


# Of the decoder layers and heads of 1B and 8B models, for which the choice was measured; and one
# too small for all multiprocessors.
MODEL_SHAPES = [
    (1024, 1024),
    (2400, 2048),
    (2048, 2048),
    (16384, 2048),
    (2048, 8192),
    (128256, 2048),
    (9408, 4096),
    (4096, 8192),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
]
# Every kernel that is chosen for them, by the most rows of a class.
CHOSEN = dict.fromkeys(
    (size, config)
    for size in (1, *ROW_CLASSES)
    for shape in MODEL_SHAPES
    if (config := choose_config(size, *shape, torch.bfloat16)) is not None
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("size", "config"), CHOSEN, ids=str)
def test_every_chosen_kernel(size: int, config: LinearConfig) -> None:
    """Against fp64, and a row is the same whatever the others and how many they are."""
    num_in = 1024 if isinstance(config, GemvConfig) else 200
    for fused in ("norm+rotary", "norm+swiglu", "residual"):
        tolerance = TOLERANCE[torch.bfloat16]
        check_fusion(torch.bfloat16, size, 70, num_in, fused, tolerance=tolerance, config=config)
    x = randn(size, num_in, dtype=torch.bfloat16)
    weight = randn(80, num_in, dtype=torch.bfloat16, seed=1)
    norm = (randn(num_in, dtype=torch.bfloat16, seed=2), 1e-5)
    expected = linear(x, weight, norm=norm, config=config)
    for num_rows in {2 if size == 8 else size // 2 + 1, size}:
        others = x[:num_rows].flip(0) * 3
        others[0], others[-1] = x[0], x[num_rows - 1]
        actual = linear(others, weight, norm=norm, config=config)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[-1], expected[num_rows - 1])


def test_what_starts_early() -> None:
    """Large layers of a few rows: a kernel in front has then something left to give."""
    large, narrow = (torch.empty(size, device="meta") for size in ((4096, 14336), (16384, 2048)))
    early = [num_rows for num_rows in range(1, 65) if starts_early(num_rows, large)]
    assert early == list(range(2, 17))
    early = [num_rows for num_rows in range(1, 65) if starts_early(num_rows, narrow)]
    assert early == [1, *range(17, 65)]


def test_positions_that_are_settled() -> None:
    rotary = make_rotary(3, 2, torch.bfloat16)
    x, weight = randn(3, 40, dtype=torch.bfloat16), randn(60, 40, dtype=torch.bfloat16)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    settled = replace(rotary, is_settled=True)
    assert torch.equal(linear(x, weight, rotary=settled), linear(x, weight, rotary=rotary))


def test_positions_of_either_integer_type() -> None:
    rotary = make_rotary(2, 1, torch.float32)
    wide = replace(rotary, positions=rotary.positions.long())
    x, weight = randn(2, 32, dtype=torch.float32), randn(24, 32, dtype=torch.float32)
    assert torch.equal(linear(x, weight, rotary=rotary), linear(x, weight, rotary=wide))


def test_weight_that_is_not_contiguous() -> None:
    x = randn(2, 32, dtype=torch.float32)
    weight = randn(32, 24, dtype=torch.float32)
    assert_near(linear(x, weight.t()), x.double() @ weight.double(), 1e-6)


def test_nothing_to_do_and_what_does_not_fit() -> None:
    x, weight = torch.empty(2, 8, device=DEVICE), torch.empty(6, 8, device=DEVICE)
    assert linear(x[:0], weight, swiglu=True).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x must be \[M, K\] and weight \[N, K\]"):
        linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="one dtype"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\)"):
        linear(x, weight, weight[0])
    with pytest.raises(ValueError, match=r"norm weight must have shape \(8,\)"):
        linear(x, weight, norm=(x[0, 1:], 1e-5))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3\)"):
        linear(x, weight, swiglu=True, residual=x)
    with pytest.raises(ValueError, match="even number of rows"):
        linear(x, weight[:5], swiglu=True)
    rotary = make_rotary(2, 1, torch.float32)
    with pytest.raises(ValueError, match="neither swiglu nor residual"):
        linear(x, weight, swiglu=True, rotary=rotary)
    with pytest.raises(ValueError, match="more than the 6 outputs"):
        linear(x, weight, rotary=rotary)
    with pytest.raises(ValueError, match=r"positions must have shape \(1,\)"):
        linear(x[:1], weight, rotary=rotary)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 16, 24, 32, 63, 64, 65])
@pytest.mark.parametrize(
    "config",
    [
        None,
        GemmConfig(64, 128, 4, 4, splits=4),
        GemmConfig(64, 128, 4, 4, splits=2, fold_norm=True),
        GemmConfig(32, 256, 4, 3, fold_norm=True),
    ],
    ids=str,
)
def test_full_size(dtype: torch.dtype, num_rows: int, config: GemmConfig | None) -> None:
    if config is not None and num_rows > GEMM_ROW_CLASSES[-1]:
        pytest.skip("one kernel takes at most 64 rows")
    tolerance = TOLERANCE_OF_MANY[dtype]
    for num_out, num_in, fused in [
        (2400, 2048, "norm+rotary"),
        (4096, 8192, "residual"),
        (14336, 4096, "norm+swiglu"),
        (4096, 14336, "residual"),
        (128256, 2048, "norm"),
    ]:
        check_fusion(dtype, num_rows, num_out, num_in, fused, tolerance=tolerance, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("wide", "split"),
    [
        (None, None),
        (GemmConfig(64, 128, 4, 4), GemmConfig(64, 128, 4, 4, splits=8)),
        (GemmConfig(64, 128, 4, 4, splits=2, fold_norm=True), GemmConfig(32, 128, 4, 4)),
    ],
    ids=str,
)
def test_chain_of_early_launches(wide: GemmConfig | None, split: GemmConfig | None) -> None:
    """Layers in a row, each started while the one before runs, give what they give one by one."""
    width, inner, num_layers = 2048, 4096, 8
    weights = [
        (
            randn(2 * inner, width, dtype=torch.bfloat16, seed=i, scale=width**-0.5),
            randn(width, inner, dtype=torch.bfloat16, seed=i, scale=inner**-0.5),
        )
        for i in range(num_layers)
    ]
    norm = (randn(width, dtype=torch.bfloat16, seed=1) + 1, 1e-5)

    def chain(x: Tensor, *, one_by_one: bool) -> Tensor:
        for up, down in weights:
            inner_x = linear(x, up, norm=norm, swiglu=True, config=wide, launch_pdl=not one_by_one)
            x = linear(inner_x, down, residual=x, config=split, launch_pdl=not one_by_one)
            if one_by_one:
                torch.cuda.synchronize()
        return x

    for num_rows in (1, 8, 32, 64):
        x = randn(num_rows, width, dtype=torch.bfloat16)
        expected = chain(x, one_by_one=True)
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        for _ in range(5):
            assert torch.equal(chain(x, one_by_one=False), expected)
        with torch.cuda.graph(graph):
            out = chain(static, one_by_one=False)
        for _ in range(5):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)
