"""The fp32 specification against brute force: float64 numpy, one query and one head at a time.

TOLERANCE: both sides see the same fp32 inputs, so they differ by fp32 rounding alone: at most
1100 terms of size 1, each off by 6e-8 relative, after softmax weights that sum to 1. 2e-5 is some
four times what is seen and a thousandth of what a wrong token, window or gate makes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsa_kernels import reference as ref
from nsa_kernels.spec import NSASpec

Array = NDArray[np.float64]
TOLERANCE = 2e-5

PAPER = NSASpec()
OVERLAP = NSASpec(
    cmp_len=8, cmp_stride=4, block_size=16, num_selected_blocks=4, num_local_blocks=2, window_size=9
)
SPECS = {
    "overlap": OVERLAP,
    "identity": NSASpec(
        cmp_len=16,
        cmp_stride=16,
        block_size=16,
        num_selected_blocks=4,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=0,
    ),
    "three_strides": replace(OVERLAP, cmp_len=12, block_size=24, window_size=33),
    "disjoint": replace(OVERLAP, cmp_len=4, window_size=1),
    "window_is_block": replace(OVERLAP, cmp_len=16, num_init_blocks=2),
    "stride_1": replace(OVERLAP, cmp_len=3, cmp_stride=1, block_size=5, num_selected_blocks=7),
    "max_pool": replace(OVERLAP, score_map="max_pool", num_init_blocks=0, num_local_blocks=3),
    "legacy": replace(OVERLAP, cmp_len=4, block_size=4, selection="fla_legacy", num_init_blocks=0),
}
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 111, 200)
# (H, G, D, Dv)
HEADS = ((2, 3, 16, 16), (1, 1, 60, 20), (3, 8, 16, 24), (2, 16, 60, 60), (1, 8, 192, 128))
CASES = [
    pytest.param(SPECS[name], num_tokens, HEADS[i % len(HEADS)], id=f"{name}-T{num_tokens}")
    for i, (num_tokens, name) in enumerate(itertools.product(LENGTHS, SPECS))
]
CASES += [
    pytest.param(PAPER, 1100, (1, 16, 192, 128), id="paper-T1100"),
    pytest.param(replace(PAPER, score_map="max_pool"), 1100, (2, 3, 16, 16), id="max_pool-T1100"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run small matrices on one thread: on a busy machine a second one multiplies the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass
class Inputs:
    """Random tensors of one case; `scale` is softmax_scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    positions: Tensor
    scale: float


def make_inputs(spec: NSASpec, num_tokens: int, heads: tuple[int, int, int, int]) -> Inputs:
    num_kv_heads, group_size, dim, v_dim = heads
    gen = torch.Generator().manual_seed(num_tokens * 1009 + dim)
    # Queries at both ends of the sequence and at a few places between, in no order.
    places = {0, num_tokens - 1, num_tokens // 2} | set(range(max(0, num_tokens - 18), num_tokens))
    places |= set(torch.randint(num_tokens, (12,), generator=gen).tolist())
    order = torch.tensor(sorted(places))[torch.randperm(len(places), generator=gen)]
    num_q_heads = num_kv_heads * group_size
    k = torch.randn(num_tokens, num_kv_heads, dim, generator=gen)
    v = torch.randn(num_tokens, num_kv_heads, v_dim, generator=gen)
    return Inputs(
        # Sharp enough that the blocks' scores stand apart.
        q=3 * torch.randn(len(order), num_q_heads, dim, generator=gen),
        k=k,
        v=v,
        k_cmp=ref.compress_mean(k, spec),
        v_cmp=ref.compress_mean(v, spec),
        gates=torch.rand(len(order), num_q_heads, 3, generator=gen),
        positions=order,
        scale=dim**-0.5,
    )


def f64(x: Tensor) -> Array:
    return x.double().numpy()


def assert_near(actual: Tensor, expected: Array) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def attend(query: Array, keys: Array, values: Array, scale: float) -> tuple[Array, float]:
    """Softmax attention of one query over the rows of keys and values."""
    if not len(keys):
        return np.zeros(values.shape[1]), -np.inf
    logits = keys @ query * scale
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum(), float(logits.max() + np.log(weights.sum()))


def brute_attention(
    x: Inputs, k: Tensor, v: Tensor, seen: dict[tuple[int, int], list[int]]
) -> tuple[Array, Array]:
    """Attention where query i of KV head h sees the keys seen[i, h]."""
    q, keys, values = f64(x.q), f64(k), f64(v)
    group_size = q.shape[1] // keys.shape[1]
    o, lse = np.zeros((*q.shape[:2], values.shape[2])), np.zeros(q.shape[:2])
    for i, head in np.ndindex(*q.shape[:2]):
        h = head // group_size
        rows = seen[i, h]
        o[i, head], lse[i, head] = attend(q[i, head], keys[rows, h], values[rows, h], x.scale)
    return o, lse


def ends_by(num_windows: int, position: int, spec: NSASpec) -> list[int]:
    """Windows whose tokens are all at or before `position`."""
    return [
        c
        for c in range(num_windows)
        if max(range(c * spec.cmp_stride, c * spec.cmp_stride + spec.cmp_len)) <= position
    ]


def brute_cmp(x: Inputs, spec: NSASpec) -> tuple[Array, Array]:
    num_windows, num_kv_heads, _ = x.k_cmp.shape
    seen = {
        (i, h): ends_by(num_windows, t, spec)
        for i, t in enumerate(x.positions.tolist())
        for h in range(num_kv_heads)
    }
    return brute_attention(x, x.k_cmp, x.v_cmp, seen)


def brute_scores(x: Inputs, spec: NSASpec, num_blocks: int) -> Array:
    """Eq. 8 to 10, with the 1-based indices of the paper; max_pool by comparing token ranges."""
    q, k_cmp = f64(x.q), f64(x.k_cmp)
    num_windows, num_kv_heads, _ = k_cmp.shape
    group_size = q.shape[1] // num_kv_heads
    scores = np.zeros((len(q), num_kv_heads, num_blocks))
    for i, h in np.ndindex(len(q), num_kv_heads):
        p_cmp = np.zeros(num_windows)
        seen = ends_by(num_windows, int(x.positions[i]), spec)
        for head in range(h * group_size, (h + 1) * group_size):
            logits = k_cmp[seen, h] @ q[i, head] * x.scale
            p_cmp[seen] += np.exp(
                logits - attend(q[i, head], k_cmp[seen, h], k_cmp[seen, h], x.scale)[1]
            )
        for block in range(num_blocks):
            if spec.score_map == "overlap":
                scores[i, h, block] = eq9(p_cmp, block + 1, spec)
            else:
                scores[i, h, block] = best_touching(p_cmp, block, spec)
    return scores


def eq9(p_cmp: Array, block_from_1: int, spec: NSASpec) -> float:
    total = 0.0
    per_block = spec.block_size // spec.cmp_stride
    for m in range(per_block):
        for n in range(spec.cmp_len // spec.cmp_stride):
            window_from_1 = per_block * block_from_1 - m - n
            if 1 <= window_from_1 <= len(p_cmp):
                total += p_cmp[window_from_1 - 1]
    return total


def best_touching(p_cmp: Array, block: int, spec: NSASpec) -> float:
    block_tokens = set(range(block * spec.block_size, (block + 1) * spec.block_size))
    touching = [
        p
        for c, p in enumerate(p_cmp)
        if block_tokens & set(range(c * spec.cmp_stride, c * spec.cmp_stride + spec.cmp_len))
    ]
    return max(touching, default=0.0)


def brute_select(scores: Array, position: int, spec: NSASpec) -> list[int]:
    """Blocks chosen from one row of scores."""
    current = position // spec.block_size
    row = np.array(scores[: current + 1], dtype=np.float64)
    row[: spec.num_init_blocks] = np.inf
    row[max(0, current - spec.num_local_blocks + 1) :] = np.inf
    size = spec.num_selected_blocks
    if spec.selection == "exact":
        return sorted(np.lexsort((np.arange(len(row)), -row))[:size].tolist())
    # The kernel's schedule: a sorted buffer of `size` slots meets one sorted chunk after another.
    buffer: list[tuple[float, int]] = []
    for start in range(0, len(row), size):
        chunk = sorted((-float(row[j]), j) for j in range(start, min(start + size, len(row))))
        chunk += [(np.inf, -1)] * (size - len(chunk))
        buffer = sorted(buffer[: size // 2] + chunk[: size // 2]) if start else chunk
    return sorted(j for _, j in buffer if j >= 0)


def num_blocks_of(x: Inputs, spec: NSASpec) -> int:
    return -(-len(x.k) // spec.block_size)


def run_selection(x: Inputs, spec: NSASpec) -> tuple[Tensor, Tensor]:
    _, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, spec, softmax_scale=x.scale)
    scores = ref.block_scores(
        x.q,
        x.k_cmp,
        lse,
        x.positions,
        spec,
        softmax_scale=x.scale,
        num_blocks=num_blocks_of(x, spec),
    )
    return scores, ref.select_blocks(scores, x.positions, spec)


@pytest.mark.parametrize(("spec", "num_tokens", "heads"), CASES)
def test_every_branch_equals_brute_force(
    spec: NSASpec, num_tokens: int, heads: tuple[int, int, int, int]
) -> None:
    x = make_inputs(spec, num_tokens, heads)
    scores, block_indices = run_selection(x, spec)
    keys = list(np.ndindex(len(x.q), heads[0]))
    at = x.positions.tolist()

    o_cmp, lse_cmp = brute_cmp(x, spec)
    o, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, spec, softmax_scale=x.scale)
    assert_near(o, o_cmp)
    assert_near(lse, lse_cmp)

    want_scores = brute_scores(x, spec, num_blocks_of(x, spec))
    assert_near(scores, want_scores)

    seen = {
        (i, h): [
            t for t in range(at[i] + 1) if t // spec.block_size in block_indices[i, h].tolist()
        ]
        for i, h in keys
    }
    o_slc, lse_slc = brute_attention(x, x.k, x.v, seen)
    o, lse = ref.slc_attention(
        x.q, x.k, x.v, block_indices, x.positions, spec, softmax_scale=x.scale
    )
    assert_near(o, o_slc)
    assert_near(lse, lse_slc)

    seen = {(i, h): [t for t in range(at[i] + 1) if at[i] - t < spec.window_size] for i, h in keys}
    o_swa, lse_swa = brute_attention(x, x.k, x.v, seen)
    o, lse = ref.swa_attention(x.q, x.k, x.v, x.positions, spec, softmax_scale=x.scale)
    assert_near(o, o_swa)
    assert_near(lse, lse_swa)

    g = f64(x.gates)
    want = g[..., 0, None] * o_cmp + g[..., 1, None] * o_slc + g[..., 2, None] * o_swa
    o = ref.nsa_attention(
        x.q, x.k, x.v, x.k_cmp, x.v_cmp, x.gates, x.positions, spec, softmax_scale=x.scale
    )
    assert_near(o, want)


@pytest.mark.parametrize(("spec", "num_tokens", "heads"), CASES)
def test_selection_follows_its_rule(
    spec: NSASpec, num_tokens: int, heads: tuple[int, int, int, int]
) -> None:
    x = make_inputs(spec, num_tokens, heads)
    scores, block_indices = run_selection(x, spec)
    assert block_indices.dtype == torch.int32
    assert block_indices.shape == (len(x.q), heads[0], spec.num_selected_blocks)
    for i, h in np.ndindex(len(x.q), heads[0]):
        position = int(x.positions[i])
        current = position // spec.block_size
        row = block_indices[i, h].tolist()
        chosen = [j for j in row if j >= 0]
        assert row == chosen + [-1] * (spec.num_selected_blocks - len(chosen))
        assert chosen == brute_select(f64(scores[i, h]), position, spec)
        assert set(range(max(0, current + 1 - spec.num_local_blocks), current + 1)) <= set(chosen)
        if spec.selection == "exact":
            assert len(chosen) == min(spec.num_selected_blocks, current + 1)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_tokens", [1, 11, 47, 130])
def test_mean_and_mlp_compression_equal_loops(name: str, num_tokens: int) -> None:
    spec = SPECS[name]
    gen = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 3, 6, generator=gen)
    weights = ref.CompressionMLP(
        pos=torch.randn(spec.cmp_len, 6, generator=gen),
        w1=torch.randn(11, spec.cmp_len * 6, generator=gen) / spec.cmp_len,
        b1=torch.randn(11, generator=gen),
        w2=torch.randn(5, 11, generator=gen),
        b2=torch.randn(5, generator=gen),
    )
    mean, mlp = [], []
    start = 0
    while start + spec.cmp_len <= num_tokens:
        window = f64(x[start : start + spec.cmp_len])  # [l, H, D]
        mean.append(window.sum(axis=0) / spec.cmp_len)
        w1 = f64(weights.w1).reshape(11, spec.cmp_len, 6)
        hidden = np.einsum("ald,lhd->ha", w1, window + f64(weights.pos)[:, None]) + f64(weights.b1)
        mlp.append(np.einsum("ca,ha->hc", f64(weights.w2), hidden / (1 + np.exp(-hidden))))
        start += spec.cmp_stride
    assert len(mean) == spec.num_windows(num_tokens)
    want_mlp = np.array(mlp).reshape(-1, 3, 5) + f64(weights.b2)
    assert_near(ref.compress_mean(x, spec), np.array(mean).reshape(-1, 3, 6))
    assert_near(ref.compress_mlp(x, spec, weights), want_mlp)


@pytest.mark.parametrize(
    ("geometry", "want"),
    [
        ((32, 16, 64), {0: [2, 2, 2, 1], 4: [1, 2, 2, 2, 1]}),
        ((64, 64, 64), {0: [1], 4: [1]}),
        ((16, 16, 64), {0: [1, 1, 1, 1], 4: [1, 1, 1, 1]}),
        ((12, 4, 24), {0: [3, 3, 3, 3, 2, 1], 4: [1, 2, 3, 3, 3, 3, 2, 1]}),
        ((64, 16, 64), {0: [4, 3, 2, 1], 4: [1, 2, 3, 4, 3, 2, 1]}),
    ],
)
def test_overlap_weights_are_the_shared_strides(
    geometry: tuple[int, int, int], want: dict[int, list[int]]
) -> None:
    cmp_len, cmp_stride, block_size = geometry
    spec = NSASpec(cmp_len=cmp_len, cmp_stride=cmp_stride, block_size=block_size)
    weights = ref.overlap_weights(60, 10, spec)
    for block, column in want.items():
        first = max(0, block * block_size // cmp_stride - (cmp_len // cmp_stride - 1))
        expected = torch.zeros(60)
        expected[first : first + len(column)] = torch.tensor(column, dtype=torch.float32)
        assert torch.equal(weights[:, block], expected)


def test_max_pool_is_kernel_5_stride_4_padding_1_for_32_16_64() -> None:
    spec = replace(PAPER, score_map="max_pool")
    x = make_inputs(spec, 64 * 9 + 15, (2, 3, 16, 16))
    x.positions = torch.full_like(x.positions, len(x.k) - 1)
    scores, _ = run_selection(x, spec)
    logits = torch.einsum("thgd,chd->thgc", x.q.reshape(-1, 2, 3, 16), x.k_cmp) * x.scale
    p = logits.softmax(dim=-1).sum(dim=2)  # [Tq, H, N]
    # The tail block has no windows of its own; a zero for each of its strides makes it a full one.
    padded = torch.nn.functional.pad(p, (0, 4 * scores.shape[2] - p.shape[2]))
    pooled = torch.nn.functional.max_pool1d(padded, kernel_size=5, stride=4, padding=1)
    torch.testing.assert_close(scores, pooled, rtol=TOLERANCE, atol=TOLERANCE)


def test_max_pool_sums_the_group_before_it_pools() -> None:
    spec = NSASpec(
        cmp_len=1, cmp_stride=1, block_size=2, num_selected_blocks=2, num_local_blocks=1,
        score_map="max_pool",
    )  # fmt: skip
    q = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
    k_cmp = torch.eye(2)[:, None]
    positions = torch.tensor([1])
    _, lse = ref.cmp_attention(q, k_cmp, k_cmp, positions, spec, softmax_scale=1.0)
    scores = ref.block_scores(q, k_cmp, lse, positions, spec, softmax_scale=1.0, num_blocks=1)
    # The heads prefer different windows: pooled first, the sum would be near 2.
    assert scores.item() == pytest.approx(1.0, abs=1e-6)


def test_scores_are_normalised_by_the_lse_they_are_given() -> None:
    x = make_inputs(OVERLAP, 65, (2, 3, 16, 16))
    _, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, OVERLAP, softmax_scale=x.scale)
    args = (x.positions, OVERLAP)
    base = ref.block_scores(x.q, x.k_cmp, lse, *args, softmax_scale=x.scale, num_blocks=5)
    halved = ref.block_scores(
        x.q, x.k_cmp, lse + np.log(2), *args, softmax_scale=x.scale, num_blocks=5
    )
    torch.testing.assert_close(halved, base / 2, rtol=TOLERANCE, atol=TOLERANCE)
    absent = torch.full_like(lse, -torch.inf)
    none = ref.block_scores(x.q, x.k_cmp, absent, *args, softmax_scale=x.scale, num_blocks=5)
    assert torch.equal(none, torch.zeros_like(base))


def test_overlap_scores_of_a_full_softmax_sum_to_the_strides_of_all_windows() -> None:
    x = make_inputs(OVERLAP, 64, (2, 3, 16, 16))
    scores, _ = run_selection(x, OVERLAP)
    seen = x.positions >= OVERLAP.cmp_len - 1
    total = scores.sum(dim=-1)[seen]
    # Three heads, whose probabilities sum to 1, and two strides a window.
    torch.testing.assert_close(total, torch.full_like(total, 6.0), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 17, 63, 65, 111])
def test_all_blocks_selected_is_dense_causal_attention(num_tokens: int) -> None:
    spec = replace(OVERLAP, num_selected_blocks=7)
    x = make_inputs(spec, num_tokens, (2, 3, 16, 24))
    positions = torch.arange(num_tokens)
    q = torch.randn(num_tokens, 6, 16, generator=torch.Generator().manual_seed(3))
    blocks = torch.tensor([6, 0, 3, -1, 5, 2, 1, 4], dtype=torch.int32).expand(num_tokens, 2, 8)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(),
        x.k.transpose(0, 1).double().repeat_interleave(3, dim=0),
        x.v.transpose(0, 1).double().repeat_interleave(3, dim=0),
        is_causal=True,
    ).transpose(0, 1)
    o, _ = ref.slc_attention(q, x.k, x.v, blocks, positions, spec, softmax_scale=0.25)
    assert_near(o, f64(dense))
    wide = replace(spec, window_size=num_tokens)
    o, _ = ref.swa_attention(q, x.k, x.v, positions, wide, softmax_scale=0.25)
    assert_near(o, f64(dense))


def test_equal_scores_go_to_the_lower_block() -> None:
    positions = torch.tensor([16 * 9 + 3])
    scores = torch.zeros(1, 1, 10)
    assert ref.select_blocks(scores, positions, OVERLAP).tolist() == [[[0, 1, 8, 9]]]
    scores[0, 0, [3, 5, 7]] = 0.5
    assert ref.select_blocks(scores, positions, OVERLAP).tolist() == [[[0, 3, 8, 9]]]
    scores[0, 0, 6] = 0.5 + 2**-24 * 2
    assert ref.select_blocks(scores, positions, OVERLAP).tolist() == [[[0, 6, 8, 9]]]


def test_forced_blocks_beat_any_score_and_later_blocks_are_no_candidates() -> None:
    scores = torch.tensor([[[-5.0, 1e9, 2e9, -5.0, -6.0, 3e9, 4e9]]])
    positions = torch.tensor([16 * 4 + 15])
    assert ref.select_blocks(scores, positions, OVERLAP).tolist() == [[[0, 2, 3, 4]]]
    first = torch.tensor([15])
    assert ref.select_blocks(scores, first, OVERLAP).tolist() == [[[0, -1, -1, -1]]]


@pytest.mark.parametrize("num_blocks", [4, 5, 8, 9, 12, 13, 16, 31])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_legacy_rule_equals_the_running_merge(num_blocks: int, size: int) -> None:
    spec = replace(SPECS["legacy"], num_selected_blocks=size, num_local_blocks=1)
    gen = torch.Generator().manual_seed(num_blocks * size)
    # Few distinct values, so that ties are everywhere.
    scores = torch.randint(6, (20, 2, num_blocks), generator=gen).float()
    positions = torch.full((20,), num_blocks * spec.block_size - 1)
    got = ref.select_blocks(scores, positions, spec)
    for i, h in np.ndindex(20, 2):
        want = brute_select(f64(scores[i, h]), int(positions[i]), spec)
        assert [j for j in got[i, h].tolist() if j >= 0] == want


def test_legacy_rule_attends_to_fewer_blocks_at_the_start_of_a_chunk() -> None:
    spec = replace(SPECS["legacy"], num_selected_blocks=16, num_local_blocks=1)
    scores = torch.arange(17.0).flip(0)[None, None]
    got = ref.select_blocks(scores, torch.tensor([16 * 4]), spec)
    assert got.tolist() == [[[*range(8), 16, *[-1] * 7]]]


def test_a_window_is_seen_from_its_last_token_on() -> None:
    x = make_inputs(OVERLAP, 65, (1, 1, 16, 16))
    for position, num_seen in ((6, 0), (7, 1), (10, 1), (11, 2), (64, 15)):
        q, at = x.q[:1], torch.tensor([position])
        _, lse = ref.cmp_attention(q, x.k_cmp, x.v_cmp, at, OVERLAP, softmax_scale=x.scale)
        expected = torch.logsumexp(x.k_cmp[:num_seen, 0] @ q[0, 0] * x.scale, dim=0)
        torch.testing.assert_close(lse[0, 0], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_before_the_first_window_cmp_is_zero_with_lse_minus_infinity() -> None:
    x = make_inputs(OVERLAP, 7, (2, 3, 16, 24))
    assert x.k_cmp.shape == (0, 2, 16)
    o, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, OVERLAP, softmax_scale=x.scale)
    assert torch.equal(o, torch.zeros(len(x.q), 6, 24))
    assert torch.equal(lse, torch.full((len(x.q), 6), -torch.inf))


@pytest.mark.parametrize("window_size", [1, 9, 64])
def test_the_sliding_window_holds_exactly_window_size_tokens(window_size: int) -> None:
    spec = replace(OVERLAP, window_size=window_size)
    q, k, at = torch.zeros(1, 1, 4), torch.zeros(65, 1, 4), torch.tensor([64])
    v = torch.eye(65)[:, None]  # [T, 1, T]: the output lists the weight of every token
    o, lse = ref.swa_attention(q, k, v, at, spec, softmax_scale=1.0)
    expected = torch.zeros(65)
    expected[65 - window_size :] = 1 / window_size
    torch.testing.assert_close(o[0, 0], expected, rtol=1e-6, atol=0)
    assert lse.item() == pytest.approx(np.log(window_size), abs=1e-6)


def test_no_window_and_no_block_give_zero_with_lse_minus_infinity() -> None:
    x = make_inputs(OVERLAP, 33, (2, 3, 16, 24))
    none = torch.full((len(x.q), 2, 4), -1, dtype=torch.int32)
    no_window = replace(OVERLAP, window_size=0)
    for o, lse in (
        ref.swa_attention(x.q, x.k, x.v, x.positions, no_window, softmax_scale=x.scale),
        ref.slc_attention(x.q, x.k, x.v, none, x.positions, OVERLAP, softmax_scale=x.scale),
    ):
        assert torch.equal(o, torch.zeros(len(x.q), 6, 24))
        assert torch.equal(lse, torch.full((len(x.q), 6), -torch.inf))


@pytest.mark.parametrize("name", SPECS)
def test_a_chunk_of_queries_equals_the_rows_of_the_whole(name: str) -> None:
    spec = SPECS[name]
    x = make_inputs(spec, 111, (2, 3, 16, 24))
    gen = torch.Generator().manual_seed(5)
    q, gates = torch.randn(111, 6, 16, generator=gen), torch.rand(111, 6, 3, generator=gen)
    whole = ref.nsa_attention(
        q, x.k, x.v, x.k_cmp, x.v_cmp, gates, torch.arange(111), spec, softmax_scale=x.scale
    )
    for start, end in ((0, 1), (0, 15), (15, 64), (64, 110), (110, 111)):
        # A chunk's queries have only the tokens up to its end, and the windows complete by then.
        num_windows = spec.num_windows(end)
        chunk = ref.nsa_attention(
            q[start:end],
            x.k[:end],
            x.v[:end],
            x.k_cmp[:num_windows],
            x.v_cmp[:num_windows],
            gates[start:end],
            torch.arange(start, end),
            spec,
            softmax_scale=x.scale,
        )
        torch.testing.assert_close(chunk, whole[start:end], rtol=TOLERANCE, atol=TOLERANCE)


def test_given_block_indices_replace_the_selection() -> None:
    x = make_inputs(OVERLAP, 200, (2, 3, 16, 24))
    only_slc = torch.zeros_like(x.gates)
    only_slc[..., 1] = 1
    args = (x.q, x.k, x.v, x.k_cmp, x.v_cmp, only_slc, x.positions, OVERLAP)
    _, chosen = run_selection(x, OVERLAP)
    first = torch.tensor([0, -1, -1, -1], dtype=torch.int32).expand_as(chosen)
    selected = ref.nsa_attention(*args, softmax_scale=x.scale)
    same = ref.nsa_attention(*args, softmax_scale=x.scale, block_indices=chosen)
    other = ref.nsa_attention(*args, softmax_scale=x.scale, block_indices=first)
    want, _ = ref.slc_attention(x.q, x.k, x.v, first, x.positions, OVERLAP, softmax_scale=x.scale)
    assert torch.equal(selected, same)
    assert torch.equal(other, want)
    assert not torch.allclose(selected, other, atol=0.01)


def test_gates_are_in_the_order_cmp_slc_swa() -> None:
    o_cmp, o_slc, o_swa = (torch.full((1, 1, 2), value) for value in (1.0, 10.0, 100.0))
    gates = torch.tensor([[[0.5, 0.25, 0.125]]])
    assert ref.combine(o_cmp, o_slc, o_swa, gates).tolist() == [[[15.5, 15.5]]]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_tokens", [1, 24, 111])
def test_gathering_pages_gives_back_what_was_filed(name: str, num_tokens: int) -> None:
    spec = SPECS[name]
    gen = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 2, 3, generator=gen)
    num_pages = -(-num_tokens // spec.block_size)
    table = 1 + torch.randperm(num_pages + 4, generator=gen)[:num_pages].to(torch.int32)
    cache = torch.full((num_pages + 5, 2, spec.block_size, 3), torch.nan)
    for i in range(num_tokens):
        cache[int(table[i // spec.block_size]), :, i % spec.block_size] = x[i]
    row = torch.cat((table, torch.tensor([-1, -1], dtype=torch.int32)))
    assert torch.equal(ref.gather_pages(cache, row, num_tokens), x)

    x_cmp = ref.compress_mean(x, spec)
    cmp_cache = torch.full((num_pages + 5, 2, spec.cmp_entries_per_page, 3), torch.nan)
    for j in range(len(x_cmp)):
        # The slot of a window is the stride, counted within the page, that its last token is in.
        last_token = j * spec.cmp_stride + spec.cmp_len - 1
        page = int(table[last_token // spec.block_size])
        cmp_cache[page, :, last_token % spec.block_size // spec.cmp_stride] = x_cmp[j]
    assert torch.equal(ref.gather_cmp(cmp_cache, row, num_tokens, spec), x_cmp)


def test_gathering_refuses_a_page_table_that_does_not_cover_the_tokens() -> None:
    cache = torch.zeros(4, 1, 16, 2)
    with pytest.raises(ValueError, match="must name 2 pages, got 1"):
        ref.gather_pages(cache, torch.tensor([3]), 17)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got \[-1, 3\]"):
        ref.gather_pages(cache, torch.tensor([3, -1]), 17)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got \[4\]"):
        ref.gather_pages(cache, torch.tensor([4]), 1)
    with pytest.raises(ValueError, match="cmp_cache must have shape"):
        ref.gather_cmp(cache, torch.tensor([3]), 16, OVERLAP)


def test_wrong_shapes_and_positions_are_named() -> None:
    x = make_inputs(OVERLAP, 33, (2, 3, 16, 24))
    swa = ref.swa_attention
    with pytest.raises(ValueError, match="5 query and 2 KV heads"):
        swa(x.q[:, :5], x.k, x.v, x.positions, OVERLAP, softmax_scale=x.scale)
    with pytest.raises(ValueError, match=r"k must have shape \[any, any, 15\]"):
        swa(x.q[..., :15], x.k, x.v, x.positions, OVERLAP, softmax_scale=x.scale)
    with pytest.raises(ValueError, match=r"v must have shape \[33, 2, any\], got \[32, 2, 24\]"):
        swa(x.q, x.k, x.v[1:], x.positions, OVERLAP, softmax_scale=x.scale)
    with pytest.raises(ValueError, match=r"positions must be in \[0, 33\), got 33 to 33"):
        swa(x.q[:1], x.k, x.v, torch.tensor([33]), OVERLAP, softmax_scale=x.scale)
    with pytest.raises(ValueError, match="gates must have shape"):
        ref.combine(x.q, x.q, x.q, x.gates[..., :2])
    with pytest.raises(ValueError, match="positions must be in"):
        ref.select_blocks(torch.zeros(1, 1, 2), torch.tensor([32]), OVERLAP)
    weights = ref.CompressionMLP(
        pos=torch.zeros(8, 16), w1=torch.zeros(4, 8 * 15), b1=torch.zeros(4),
        w2=torch.zeros(16, 4), b2=torch.zeros(16),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"w1 must have shape \[4, 128\], got \[4, 120\]"):
        ref.compress_mlp(x.k, OVERLAP, weights)
