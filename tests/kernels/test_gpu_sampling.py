"""The sampling kernels against the sampler of the CPU, on rows made to be difficult.

Greedy rows, sets of top_k and ties are exact. Weights are multiples of 2^-40 of the largest and
exponentials differ in their last bits, so where a draw or top_p falls between two tokens within a
share of 1e-6 either is right; the seeds here are fixed and fall nowhere near.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels.gpu.sampling import SamplingWorkspace, sample_tokens
from nsa_serve.request import SamplingParams
from nsa_serve.row_search import draw_by_index
from nsa_serve.sampling_cut import cut_weights, is_cut
from tests.kernels.gpu_util import DEVICE

VOCAB_SIZE = 4099
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 1e-40},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB_SIZE - 1},
    {"top_k": VOCAB_SIZE},
    {"top_k": 10**9, "top_p": 0.5},
    {"top_p": 1e-300},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 700, "top_p": 0.99, "min_p": 0.001},
]


def randn(rows: int, vocab_size: int, *, seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def uniforms_of(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, dtype=torch.float64, generator=generator).tolist()


def run(
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    *,
    is_greedy: bool = False,
    repeats: int = 1,
) -> tuple[list[int], Tensor]:
    """Return the tokens and the peaks of each row."""
    num_rows, vocab_size = logits.shape
    columns = [
        (item.temperature, max(item.top_k, 0), item.top_p, item.min_p, uniform)
        for item, uniform in zip(params, uniforms, strict=True)
    ]
    table = torch.tensor(columns, dtype=torch.float64).T.contiguous().to(DEVICE)
    workspace = SamplingWorkspace.create(num_rows, vocab_size, DEVICE)
    token_ids = torch.full((num_rows,), -7, dtype=torch.int64, device=DEVICE)
    peaks = torch.full((num_rows,), -7.0, device=DEVICE)
    logits = logits.to(DEVICE)
    for _ in range(repeats):  # the second time in a used workspace
        sample_tokens(logits, table, token_ids, peaks, workspace=workspace, is_greedy=is_greedy)
    assert not workspace.counters.any(), "a launch leaves the counters as it found them"
    return token_ids.tolist(), peaks.cpu()


def expected(row: Tensor, params: SamplingParams, uniform: float) -> int:
    """The token that the functions of the CPU sampler choose."""
    peak = row.max()
    if params.is_greedy:
        return int((row == peak).nonzero()[0, 0])
    temperature = max(params.temperature, torch.finfo(torch.float32).tiny)
    weights = ((row - peak) / temperature).exp()[None]
    weights = weights.masked_fill(weights < params.min_p, 0.0)
    if is_cut(params, row.shape[0]):
        weights = cut_weights(weights, [params])
    return int(draw_by_index(weights, torch.tensor([uniform], dtype=torch.float64))[0])


def check(logits: Tensor, options: Sequence[dict[str, Any]]) -> None:
    params = [SamplingParams(**item) for item in options]
    uniforms = uniforms_of(len(params))
    token_ids, peaks = run(logits, params, uniforms, repeats=2)
    want = [expected(*args) for args in zip(logits, params, uniforms, strict=True)]
    assert token_ids == want
    assert torch.equal(peaks, logits.amax(-1))


# All alike; a flat row; a usual one; one of which most weights are 0.
@pytest.mark.parametrize(
    ("scale", "is_rounded"), [(0.0, False), (0.3, False), (3.0, False), (3.0, True), (40.0, True)]
)
def test_tokens_are_those_of_the_cpu_sampler(scale: float, is_rounded: bool) -> None:
    logits = randn(len(OPTIONS), VOCAB_SIZE, seed=7, scale=scale)
    check(logits.round() if is_rounded else logits, OPTIONS)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 1025, 2048])
def test_small_vocabularies(vocab_size: int) -> None:
    check(randn(len(OPTIONS), vocab_size, seed=1, scale=2.0), OPTIONS)


def test_tokens_without_weight_and_one_that_outweighs_all() -> None:
    logits = randn(len(OPTIONS), 1500, seed=2, scale=1.0)
    logits[:, 100:1400] = -math.inf
    check(logits, OPTIONS)
    logits[:, 1234] = 80.0
    check(logits, OPTIONS)
    # Far below, but not without: an outlier stretches what is searched.
    logits[:, 1234] = 12.0
    check(logits, OPTIONS)


def test_more_candidates_than_a_tile_are_searched_alike() -> None:
    vocab_size = 9001
    flat = randn(1, vocab_size, seed=3, scale=1e-4).round(decimals=4) + 1
    # All within one interval beside a token far below them, and ties of thousands.
    flat[0, 17] = -20.0
    options: list[dict[str, Any]] = [
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_k": 8000, "top_p": 0.5},
    ]
    check(flat.expand(3, -1).contiguous(), options)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.75}])
def test_ties_at_the_cut_go_to_the_lower_ids(options: dict[str, Any]) -> None:
    row = torch.full((1, 300), -9.0)
    row[0, [250, 20, 77, 130, 131, 290]] = 1.0
    uniforms = [(i + 0.5) / 12 for i in range(12)]
    token_ids, _ = run(row.expand(12, -1), [SamplingParams(**options)] * 12, uniforms)
    # Half of six, and of hundreds that weigh little, takes a fourth; of the first four it is three.
    assert set(token_ids) <= {20, 77, 130} | ({131} if options == {"top_p": 0.5} else set())
    assert {20, 77, 130} <= set(token_ids)


def test_bad_rows_say_so_and_leave_others_alone() -> None:
    clean = randn(5, VOCAB_SIZE, seed=4, scale=3.0)
    logits = clean.clone()
    logits[1, [40, 3000]] = math.nan
    logits[2, 3] = math.inf
    logits[4] = -math.inf
    for options in ({"temperature": 0.0}, {"top_p": 0.9}):
        params = [SamplingParams(**options)] * 5
        token_ids, peaks = run(logits, params, uniforms_of(5))
        untouched, _ = run(clean, params, uniforms_of(5))
        assert peaks.isfinite().tolist() == [True, False, False, True, False]
        assert peaks[1].isnan() and peaks[2] == math.inf and peaks[4] == -math.inf
        # Any id will do for the next step's input, as long as it is one.
        assert [token_ids[row] for row in (1, 2, 4)] == [40, 3, 0]
        assert [token_ids[row] for row in (0, 3)] == [untouched[row] for row in (0, 3)]


def test_zeros_of_both_signs_tie() -> None:
    row = torch.full((2, 64), -1.0)
    row[:, 9], row[:, 12] = -0.0, 0.0
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=1)]
    assert run(row, params, [0.0, 0.5])[0] == [9, 9]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = randn(len(OPTIONS), 2500, seed=5, scale=2.0)
    params = [SamplingParams(**item) for item in OPTIONS]
    uniforms = uniforms_of(len(params))
    together, _ = run(logits, params, uniforms)
    backwards, _ = run(logits.flip(0), params[::-1], uniforms[::-1])
    assert backwards[::-1] == together
    for row in range(1, len(params), 5):
        alone, _ = run(logits[row : row + 1], params[row : row + 1], uniforms[row : row + 1])
        assert alone == together[row : row + 1]


def test_greedy_steps_need_one_kernel() -> None:
    logits = randn(3, VOCAB_SIZE, seed=6, scale=3.0).round()
    params = [SamplingParams(temperature=0.0)] * 3
    want, _ = run(logits, params, [0.0] * 3)
    assert run(logits, params, [0.0] * 3, is_greedy=True)[0] == want


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_filtered_distribution(options: dict[str, Any]) -> None:
    num_draws = 60
    row = randn(1, 50, seed=8, scale=1.5)
    params = SamplingParams(**options)
    weights = (row - row.max()).exp()
    weights = weights.masked_fill(weights < params.min_p, 0.0)
    if is_cut(params, 50):
        weights = cut_weights(weights, [params])
    probabilities = (weights.double() / weights.double().sum())[0].tolist()
    token_ids, _ = run(row.expand(num_draws, -1), [params] * num_draws, uniforms_of(num_draws))
    counts = Counter(token_ids)
    for token_id, probability in enumerate(probabilities):
        # Six standard deviations, and none at all for a token that was cut.
        bound = 6 * math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[token_id] - num_draws * probability) <= bound, token_id


def test_wrong_arguments_are_refused() -> None:
    workspace = SamplingWorkspace.create(2, 10, DEVICE)
    token_ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    peaks = torch.zeros(2, device=DEVICE)
    params = torch.zeros(5, 2, dtype=torch.float64, device=DEVICE)
    logits = torch.zeros(2, 10, device=DEVICE)

    def call(logits: Tensor, params: Tensor) -> None:
        sample_tokens(logits, params, token_ids, peaks, workspace=workspace)

    with pytest.raises(ValueError, match=r"workspace.candidates must have shape \(2, 9\)"):
        call(logits[:, :9], params)
    with pytest.raises(ValueError, match="workspace must have room for 3 rows, got 2"):
        call(torch.zeros(3, 10, device=DEVICE), params)
    with pytest.raises(ValueError, match=r"logits must be torch.float32"):
        call(logits.half(), params)
    with pytest.raises(ValueError, match=r"params must be torch.float64"):
        call(logits, params.float())
    call(logits[:0], params)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 32, 256])
def test_full_size(num_rows: int) -> None:
    vocab_size = 128256
    for scale in (0.5, 3.0):
        options = [OPTIONS[row % len(OPTIONS)] for row in range(num_rows)]
        logits = randn(num_rows, vocab_size, seed=num_rows, scale=scale)
        params = [SamplingParams(**item) for item in options]
        uniforms = uniforms_of(num_rows)
        token_ids, _ = run(logits, params, uniforms)
        want = [expected(*args) for args in zip(logits, params, uniforms, strict=True)]
        # A hundred thousand tokens are so dense that some draw falls within rounding of a border.
        wrong = [(a, b) for a, b in zip(token_ids, want, strict=True) if a != b]
        assert len(wrong) <= 1 + num_rows // 20, wrong
        # Where it does, it is the next token of those kept; greedy rows are exact.
        for row in range(num_rows):
            if params[row].is_greedy:
                assert token_ids[row] == want[row]
