"""Routing and routed experts against their specification; GPU if there is one, else interpreter."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import moe_reference
from nsa_kernels.gpu import moe
from nsa_kernels.gpu.moe_decode import MAX_FEW_ROWS, ExpertTile, experts_of_few
from nsa_kernels.gpu.moe_route import sort_pairs
from tests.kernels.gpu_util import DEVICE

# Kernels may compute on memory that nobody wrote, and drop the result; numpy sees it in passing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

# Relative, of sums of a few hundred products in another order; bf16: activations, and parts of many
# rows, are rounded in between. The interpreter truncates to bf16.
TOLERANCE = {
    torch.float32: 3e-6,
    torch.bfloat16: 6e-3 if DEVICE.type == "cuda" else 1.5e-2,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


class Layer:
    """A mixture: hidden, E experts of width I."""

    def __init__(self, hidden: int, num_experts: int, width: int, dtype: torch.dtype) -> None:
        scale = hidden**-0.5
        self.norm = ((1.0 + 0.1 * randn(hidden, dtype=dtype)).to(dtype), EPS)
        self.router = randn(num_experts, hidden, dtype=dtype, scale=2 * scale)
        self.gate_up = randn(num_experts, 2 * width, hidden, dtype=dtype, scale=scale)
        self.down = randn(num_experts, hidden, width, dtype=dtype, scale=width**-0.5)
        self.counters = moe.make_counters(DEVICE)

    def route(self, x: Tensor, top_k: int, row_lens: Tensor | None = None) -> moe.Routing:
        return moe.route(
            x, self.norm, self.router, top_k, counters=self.counters, row_lens=row_lens
        )

    def expected(self, routing: moe.Routing, residual: Tensor) -> Tensor:
        found = moe_reference.routed_experts(
            routing.hidden, routing.expert_ids, routing.weights, self.gate_up, self.down
        )
        return residual.float() + found


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.3g}"


# (rows, hidden, experts, width, k): one row and the ends of each class; widths of no tile; fewer
# experts than pairs, and more; beyond few rows both heights of tiles.
SIZES = [
    (1, 64, 5, 24, 2),
    (1, 72, 72, 40, 6),
    (2, 64, 5, 24, 2),
    (8, 72, 72, 40, 6),
    (9, 40, 12, 23, 3),
    (33, 64, 9, 24, 1),
    (64, 48, 6, 32, 6),
    (65, 64, 5, 24, 2),
    (130, 40, 3, 37, 3),
    (301, 32, 2, 16, 1),
]
EVERY_SIZE = pytest.mark.parametrize(("rows", "hidden", "experts", "width", "top_k"), SIZES)


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@EVERY_SIZE
def test_routing(
    dtype: torch.dtype, rows: int, hidden: int, experts: int, width: int, top_k: int
) -> None:
    layer = Layer(hidden, experts, width, dtype)
    x = randn(rows, hidden, dtype=dtype, seed=1, scale=3.0)
    routing = layer.route(x, top_k)
    normed = torch.nn.functional.rms_norm(x.float(), (hidden,), layer.norm[0].float(), EPS)
    assert_near(routing.hidden, normed, 2e-6 if dtype == torch.float32 else 8e-3)
    assert routing.expert_ids.dtype == torch.int32 and routing.weights.dtype == torch.float32
    # By score, and with the layer's own rows, so that no rounding decides between near ties.
    ids, weights = moe_reference.route(routing.hidden, layer.router, top_k)
    assert_near(routing.weights, weights, 1e-5)
    probabilities = (routing.hidden.float() @ layer.router.float().T).softmax(1)
    chosen = probabilities.gather(1, routing.expert_ids.long())
    torch.testing.assert_close(chosen, weights, rtol=1e-5, atol=0.0)
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
    assert (routing.expert_ids == ids).float().mean() > 0.99
    assert not layer.counters.any()


@pytest.mark.parametrize("rows", [3, 70])
def test_equal_experts_go_by_their_number(rows: int) -> None:
    layer = Layer(32, 11, 8, torch.float32)
    # Their products are equal in any order of summation.
    layer.router[1::2] = 0.0
    x = randn(rows, 32, dtype=torch.float32)
    x[0] = 0.0
    routing = layer.route(x, 4)
    assert routing.expert_ids[0].tolist() == [0, 1, 2, 3]
    ids, _ = moe_reference.route(routing.hidden, layer.router, 4)
    assert torch.equal(routing.expert_ids, ids)


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@EVERY_SIZE
def test_routed_experts(
    dtype: torch.dtype, rows: int, hidden: int, experts: int, width: int, top_k: int
) -> None:
    layer = Layer(hidden, experts, width, dtype)
    x = randn(rows, hidden, dtype=dtype, seed=1)
    residual = randn(rows, hidden, dtype=dtype, seed=2, scale=0.1)
    routing = layer.route(x, top_k)
    expected = layer.expected(routing, residual)
    actual = moe.routed_experts(routing, layer.gate_up, layer.down, residual=residual)
    assert actual.dtype == dtype
    assert_near(actual, expected, TOLERANCE[dtype])
    into = moe.routed_experts(routing, layer.gate_up, layer.down, residual=residual, out=residual)
    assert into.data_ptr() == residual.data_ptr() and torch.equal(into, actual)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [7, 40, 64, 200])
def test_all_rows_choose_the_same_experts(rows: int) -> None:
    """One expert has more rows than a tile, and most have none."""
    layer = Layer(32, 20, 16, torch.float32)
    x = randn(1, 32, dtype=torch.float32).repeat(rows, 1)
    routing = layer.route(x, 3)
    actual = moe.routed_experts(routing, layer.gate_up, layer.down, residual=torch.zeros_like(x))
    assert_near(actual, layer.expected(routing, torch.zeros_like(x)), TOLERANCE[torch.float32])
    if rows <= MAX_FEW_ROWS:
        assert torch.equal(actual, actual[:1].repeat(rows, 1))


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize("rows", [5, 30])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, rows: int) -> None:
    layer = Layer(64, 12, 24, dtype)
    x = randn(rows, 64, dtype=dtype)
    others = randn(rows, 64, dtype=dtype, seed=9)
    others[2] = x[2]
    results = []
    for given in (x, others):
        routing = layer.route(given, 4)
        out = moe.routed_experts(routing, layer.gate_up, layer.down, residual=given)
        results.append((out[2], routing.expert_ids[2], routing.weights[2]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 4, 24])
def test_padding_rows_take_no_expert(rows: int) -> None:
    layer = Layer(64, 12, 24, torch.float32)
    x = randn(rows, 64, dtype=torch.float32)
    row_lens = torch.arange(rows, dtype=torch.int32, device=DEVICE) % 2
    x[0] = torch.nan
    routing = layer.route(x, 3, row_lens)
    assert (routing.expert_ids[0::2] == -1).all() and not routing.weights[0::2].any()
    residual = randn(rows, 64, dtype=torch.float32, seed=5)
    actual = moe.routed_experts(routing, layer.gate_up, layer.down, residual=residual)
    assert torch.equal(actual[0::2], residual[0::2])
    if rows > 1:
        expected = layer.expected(layer.route(x, 3), residual)
        assert_near(actual[1::2], expected[1::2], TOLERANCE[torch.float32])


@pytest.mark.parametrize("rows", [3, 30, 70])
def test_a_row_that_is_not_a_number_keeps_to_itself(rows: int) -> None:
    layer = Layer(64, 12, 24, torch.float32)
    x = randn(rows, 64, dtype=torch.float32)
    expected = moe.routed_experts(layer.route(x, 3), layer.gate_up, layer.down, residual=x)
    x[1] = torch.nan
    routing = layer.route(x, 3)
    assert (routing.expert_ids >= 0).all() and (routing.expert_ids < 12).all()
    actual = moe.routed_experts(routing, layer.gate_up, layer.down, residual=x)
    others = torch.arange(rows) != 1
    assert_near(actual[others], expected[others], TOLERANCE[torch.float32])
    assert actual[1].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (63, 3), (171, 3), (512, 2), (777, 6)])
def test_pairs_are_sorted_by_expert_and_keep_their_order(rows: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 11, (rows, top_k), generator=generator, dtype=torch.int32)
    ids[ids == 7] = 3
    pairs, ends = sort_pairs(ids.to(DEVICE), 11)
    expected = ids.flatten().sort(stable=True).indices
    assert torch.equal(pairs.cpu().long(), expected)
    counts = ids.flatten().bincount(minlength=11)
    assert torch.equal(ends.cpu().long(), counts.cumsum(0))


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize(("rows", "block_m"), [(1, 8), (7, 8), (20, 16)])
def test_weights_as_the_wide_operand(dtype: torch.dtype, rows: int, block_m: int) -> None:
    layer = Layer(72, 12, 24, dtype)
    x = randn(rows, 72, dtype=dtype)
    routing = layer.route(x, 3)
    tile = ExpertTile(block_m, 64, 32, 4, 2, is_wide=True)
    parts = experts_of_few(
        routing.hidden,
        routing.expert_ids,
        layer.gate_up,
        layer.down,
        tiles=(tile, tile),
        launch_pdl=False,
    )
    actual = (parts.view(rows, 3, 72) * routing.weights[..., None]).sum(1)
    assert_near(actual, layer.expected(routing, torch.zeros_like(x)), TOLERANCE[dtype])


def test_the_grouped_product_of_torch_gives_the_same() -> None:
    layer = Layer(64, 5, 24, torch.bfloat16)
    x = randn(100, 64, dtype=torch.bfloat16)
    routing = layer.route(x, 2)
    residual = torch.zeros_like(x)
    found = [
        moe.routed_experts(routing, layer.gate_up, layer.down, residual=residual, method=method)
        for method in ("triton", "torch")
    ]
    assert_near(found[1], found[0], 2 * TOLERANCE[torch.bfloat16])


def test_nothing_for_no_rows() -> None:
    layer = Layer(64, 5, 24, torch.float32)
    x = randn(0, 64, dtype=torch.float32)
    routing = layer.route(x, 2)
    assert moe.routed_experts(routing, layer.gate_up, layer.down, residual=x).shape == (0, 64)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    layer = Layer(64, 5, 24, torch.float32)
    x = randn(3, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="num_experts_per_token must be from 1 to 5"):
        layer.route(x, 6)
    with pytest.raises(ValueError, match="x and router must have one dtype"):
        layer.route(x.half(), 2)
    with pytest.raises(ValueError, match="row_lens must have shape"):
        layer.route(x, 2, torch.ones(4, dtype=torch.int32, device=DEVICE))
    routing = layer.route(x, 2)
    with pytest.raises(ValueError, match="gate_up must have shape"):
        moe.routed_experts(routing, layer.gate_up[:, 1:], layer.down, residual=x)
    with pytest.raises(ValueError, match="down must be contiguous"):
        moe.routed_experts(routing, layer.gate_up, layer.down.half(), residual=x)
    with pytest.raises(ValueError, match="residual must have shape"):
        moe.routed_experts(routing, layer.gate_up, layer.down, residual=x[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 256, 1000])
def test_the_shape_of_the_paper(rows: int) -> None:
    assert rows <= MAX_FEW_ROWS or rows > 64
    layer = Layer(2560, 72, 1472, torch.bfloat16)
    x = randn(rows, 2560, dtype=torch.bfloat16, seed=3)
    routing = layer.route(x, 6)
    residual = torch.zeros_like(x)
    expected = torch.zeros(rows, 2560, device=DEVICE)
    for expert in range(72):
        tokens, ranks = (routing.expert_ids == expert).nonzero(as_tuple=True)
        gate, up = (routing.hidden[tokens].float() @ layer.gate_up[expert].float().T).chunk(2, 1)
        part = (torch.nn.functional.silu(gate) * up) @ layer.down[expert].float().T
        expected.index_add_(0, tokens, part * routing.weights[tokens, ranks, None])
    for method in ("triton", "torch"):
        actual = moe.routed_experts(
            routing, layer.gate_up, layer.down, residual=residual, method=method
        )
        assert_near(actual, expected, TOLERANCE[torch.bfloat16])
