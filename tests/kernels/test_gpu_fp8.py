"""FP8 caches: what the pages hold to the bit, and attention to just that.

In the interpreter, or on a GPU where there is one. The reference runs on the dequantised contents
of the cache, so it differs from the kernels by summation order alone, whatever FP8 costs. What it
costs is the subject of one test only. Caches start out full of NaN.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.metadata import LayerCache, build_metadata
from nsa_kernels.ops import Branches, CompressionMLP, nsa_attention, plan_attention
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import SPECS, Problem, assert_close, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

E4M3 = torch.float8_e4m3fn
PAPER, FLA = SPECS["paper"], SPECS["fla"]
# Of keys and of values of two KV heads: one a power of two, one not.
SCALES = ([0.125, 0.013], [0.03, 0.0625])
POWERS = ([0.125, 2.0], [0.25, 2.0**-5])


@pytest.fixture(autouse=True)
def prefill_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend block by block, as over long contexts, unless a test asks for "short"."""
    if getattr(request, "param", "long") == "long":
        monkeypatch.setattr(gpu_plan, "short_context", lambda spec: 0)


BOTH_PATHS = pytest.mark.parametrize("prefill_path", ["long", "short"], indirect=True)


def make(
    spec: NSASpec,
    lengths: list[int],
    scales: tuple[list[float], list[float]] = SCALES,
    **arguments: object,
) -> Problem:
    return make_problem(spec, lengths, path="gpu", device=DEVICE, scales=scales, **arguments)  # type: ignore[arg-type]


def dequantised(problem: Problem, row: int, stop: int) -> tuple[Tensor, ...]:
    """k, v [stop, H, D] and k_cmp, v_cmp [N, H, D] in fp32, as the row's pages hold them."""
    cache, spec = problem.cache, problem.spec
    assert cache.k_scale is not None and cache.v_scale is not None
    pages = torch.tensor(problem.pages[row])
    parts = []
    for raw, compressed, scale in (
        (cache.k, cache.k_cmp, cache.k_scale),
        (cache.v, cache.v_cmp, cache.v_scale),
    ):
        factor = scale.cpu()[:, None]
        tokens = reference.gather_pages(raw.float().cpu(), pages, stop) * factor
        entries = reference.gather_cmp(compressed.float().cpu(), pages, stop, spec)
        parts.append((tokens, entries * factor))
    (k, k_cmp), (v, v_cmp) = parts
    return k, v, k_cmp, v_cmp


def expected(problem: Problem, row: int, start: int, stop: int) -> Tensor:
    """The specification on what the cache holds, for the tokens [start, stop)."""
    spec, scale = problem.spec, problem.softmax_scale
    k, v, k_cmp, v_cmp = dequantised(problem, row, stop)
    q, positions = problem.q[row][start:stop], torch.arange(start, stop)
    o_cmp, lse = reference.cmp_attention(q, k_cmp, v_cmp, positions, spec, softmax_scale=scale)
    if problem.cache.k_lse is not None:
        assert problem.cache.k_scale is not None
        pages, stored = torch.tensor(problem.pages[row]), problem.cache.k_lse.float().cpu()
        k_lse = reference.gather_cmp(stored, pages, stop, spec.coarse)
        k_lse = k_lse * problem.cache.k_scale.cpu()[:, None]
        lse = reference.selection_lse(q, k_lse, positions, spec, softmax_scale=scale)
    scores = reference.block_scores(
        q,
        k_cmp,
        lse,
        positions,
        spec,
        softmax_scale=scale,
        num_blocks=-(-stop // spec.block_size),
    )
    blocks = reference.select_blocks(scores, positions, spec)
    o_slc, _ = reference.slc_attention(q, k, v, blocks, positions, spec, softmax_scale=scale)
    o_swa, _ = reference.swa_attention(q, k, v, positions, spec, softmax_scale=scale)
    return reference.combine(o_cmp, o_slc, o_swa, problem.gates[row][start:stop])


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """What a cache holds of x [T, H, D], with a scale for each head."""
    return (x / scale[:, None]).clamp(-448, 448).to(E4M3)


def contents(cache: LayerCache) -> list[Tensor]:
    """The bits of the four tensors."""
    return [x.view(torch.uint8).cpu() for x in (cache.k, cache.v, cache.k_cmp, cache.v_cmp)]


@BOTH_PATHS
@pytest.mark.parametrize("name", ["paper", "legacy", "no_window", "max_pool", "infllm"])
def test_prefill_then_decode_attend_to_what_the_cache_holds(name: str) -> None:
    spec = SPECS[name]
    lengths = [spec.cmp_len + 1, 6 * spec.block_size + 5]
    problem = make(spec, lengths, group=2)
    prompts = [length - 2 for length in lengths]
    outputs = problem.run([0, 0], prompts)
    for row, prompt in enumerate(prompts):
        assert_close(outputs[row], expected(problem, row, 0, prompt))
    for step in range(2):
        starts = [prompt + step for prompt in prompts]
        outputs = problem.run(starts, [1, 1], num_decode_rows=2)
        for row, start in enumerate(starts):
            assert_close(outputs[row], expected(problem, row, start, start + 1))


@BOTH_PATHS
def test_a_mixed_step_in_bf16(prefill_path: None) -> None:
    """Queries and probabilities are rounded to 8 bits: 2 ** -9 of a term, a few at a time."""
    problem = make(FLA, [70, 75], dtype=torch.bfloat16, dim=32, v_dim=32)
    problem.run([0, 0], [69, 40])
    decoded, chunk = problem.run([69, 40], [1, 35], num_decode_rows=1)
    assert_close(decoded, expected(problem, 0, 69, 70), 1e-2)
    assert_close(chunk, expected(problem, 1, 40, 75), 1e-2)


@pytest.mark.parametrize("off", ["cmp", "slc", "swa"])
def test_a_branch_may_be_off(off: str) -> None:
    problem = make(FLA, [70])
    branches = dataclasses.replace(Branches(), **{off: False})
    for gates in problem.gates:
        gates[..., ("cmp", "slc", "swa").index(off)] = 0
    prefilled = problem.run([0], [68], branches=branches)[0]
    decoded = problem.run([68], [1], num_decode_rows=1, branches=branches)[0]
    actual = torch.cat((prefilled, decoded))
    assert_close(actual, expected(problem, 0, 0, 69))


def test_pages_hold_rounded_tokens_and_the_mean_of_those() -> None:
    """To the bit, and saturated; whoever writes them, and however the prompt is cut."""
    length = 2 * PAPER.block_size + PAPER.cmp_stride + 3
    found = []
    for edges, num_decoded in (
        ([0, length], 0),
        ([0, 7, PAPER.cmp_len - 1, PAPER.cmp_len, PAPER.block_size + 9, length], 0),
        ([0, 2 * PAPER.block_size + 1], PAPER.cmp_stride + 2),
    ):
        problem = make(PAPER, [length], POWERS, dtype=torch.bfloat16, group=1)
        # Out of range, the first in one head and the second in both.
        problem.k[0][3] = 500.0
        problem.v[0][40, :, 1] = -3e4
        for start, stop in itertools.pairwise(edges):
            problem.run([start], [stop - start])
        for start in range(edges[-1], edges[-1] + num_decoded):
            problem.run([start], [1], num_decode_rows=1)
        found.append(contents(problem.cache))
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)
    pages = torch.tensor(problem.pages[0])
    for x, raw, compressed, scale in (
        (problem.k[0], problem.cache.k, problem.cache.k_cmp, POWERS[0]),
        (problem.v[0], problem.cache.v, problem.cache.v_cmp, POWERS[1]),
    ):
        stored = to_fp8(x, torch.tensor(scale)).float()
        assert stored.abs().max() == 448
        capacity = len(pages) * PAPER.block_size
        tokens = reference.gather_pages(raw.float().cpu(), pages, capacity)
        assert torch.equal(tokens[:length], stored)
        assert tokens[length:].isnan().all()
        entries = reference.gather_cmp(compressed.float().cpu(), pages, length, PAPER)
        assert torch.equal(entries, reference.compress_mean(stored, PAPER).to(E4M3).float())


def test_learned_compression_of_what_the_pages_hold() -> None:
    length = 3 * PAPER.block_size + 5
    problem = make(PAPER, [length], mlp=True, group=2)
    assert problem.mlps is not None
    prompt = 2 * PAPER.block_size - 3
    outputs = problem.run([0], [prompt])
    outputs += problem.run([prompt], [40])
    for start in range(prompt + 40, length):
        outputs += problem.run([start], [1], num_decode_rows=1)
    assert_close(torch.cat(outputs)[-3:], expected(problem, 0, length - 3, length))
    k, v, *_ = dequantised(problem, 0, length)
    pages = torch.tensor(problem.pages[0])
    for x, compressed, mlp, scale in (
        (k, problem.cache.k_cmp, problem.mlps[0], problem.cache.k_scale),
        (v, problem.cache.v_cmp, problem.mlps[1], problem.cache.v_scale),
    ):
        assert scale is not None
        weights = CompressionMLP(*(w.cpu() for w in (mlp.pos, mlp.w1, mlp.b1, mlp.w2, mlp.b2)))
        exact = reference.compress_mlp(x, PAPER, weights)
        wanted = to_fp8(exact, scale.cpu()).float()
        actual = reference.gather_cmp(compressed.float().cpu(), pages, length, PAPER)
        # Sums in another order may round to a neighbour.
        assert (actual == wanted).float().mean() > 0.995
        assert (wanted.abs() == 448).any(), "some entry should saturate"
        assert ((actual - wanted).abs() <= wanted.abs() / 8 + 2**-9).all()


def test_decoding_does_not_depend_on_chunks() -> None:
    """Equal pages give equal outputs, to the bit."""
    length = 5 * FLA.block_size + 3
    outputs = []
    for cuts in ([0, length - 1], [0, 5, 16, 17, 50, length - 1]):
        problem = make(FLA, [length])
        for start, stop in itertools.pairwise(cuts):
            problem.run([start], [stop - start])
        outputs += problem.run([length - 1], [1], num_decode_rows=1)
    assert torch.equal(outputs[0], outputs[1])


def test_nan_is_stored_as_nan() -> None:
    """A key that is not a number: clamping must not turn it into one."""
    problem = make(FLA, [20], group=1)
    problem.k[0][18:, 1, 2] = torch.nan
    prefilled = problem.run([0], [19])[0]
    problem.run([19], [1], num_decode_rows=1)
    assert prefilled[18, 1].isnan().all() and prefilled[:, 0].isfinite().all()
    k, *_ = dequantised(problem, 0, 20)
    assert torch.equal(k.isnan(), problem.k[0].isnan())


def test_what_fp8_costs() -> None:
    """Against exact keys and values: 3 bits of mantissa are 2.6 % rms of every key and value.

    Values that have nothing in common are the worst case: their average is as far off as they are.
    """
    length = 6 * PAPER.block_size
    problem = make(PAPER, [length], POWERS, dim=32, v_dim=32, group=2, heads=2)
    problem.q[0] /= 2
    actual = problem.run([0], [length])[0]
    exact = problem.expected(0, 0, length)
    error = (actual - exact).norm() / exact.norm()
    assert 0.01 < error <= 0.05
    _, _, k_cmp, _ = dequantised(problem, 0, length)
    positions = torch.arange(length)
    chosen = []
    for entries in (k_cmp, reference.compress_mean(problem.k[0], PAPER)):
        _, lse = reference.cmp_attention(
            problem.q[0], entries, entries, positions, PAPER, softmax_scale=problem.softmax_scale
        )
        scores = reference.block_scores(
            problem.q[0], entries, lse, positions, PAPER,
            softmax_scale=problem.softmax_scale, num_blocks=6,
        )  # fmt: skip
        chosen.append(reference.select_blocks(scores, positions, PAPER))
    same = (chosen[0][:, :, :, None] == chosen[1][:, :, None, :]) & (chosen[0] >= 0)[..., None]
    agreement = same.any(3).sum() / (chosen[0] >= 0).sum()
    import sys

    sys.stderr.write(f"relative rms error {error:.3%}, agreement {agreement:.3%}\n")
    assert agreement >= 0.97


def test_a_cache_and_its_scales_go_together() -> None:
    problem = make(FLA, [20])
    cache = problem.cache
    for broken, message in (
        (dataclasses.replace(cache, k_scale=None, v_scale=None), "0 scales"),
        (dataclasses.replace(cache, v_scale=None), "1 scales"),
        (dataclasses.replace(cache, k_cmp=cache.k_cmp.float()), "3 of the four"),
        (dataclasses.replace(cache, k_scale=torch.ones(3)), "shape"),
        (dataclasses.replace(cache, k_scale=torch.ones(2).double()), "float32"),
        (dataclasses.replace(cache, k_swa=cache.k), "share"),
    ):
        problem.cache = broken
        with pytest.raises(ValueError, match=message if message != "share" else "k_swa"):
            problem.run([0], [20])


def test_the_cpu_path_refuses_fp8() -> None:
    problem = make_problem(FLA, [20], scales=POWERS)
    with pytest.raises(ValueError, match="the CPU has no FP8 cache"):
        problem.run([0], [20])
    # Nor does a plan for the CPU help a cache elsewhere.
    meta = build_metadata([[1, 2]], [0], [20], FLA)
    plan = plan_attention(meta, FLA, num_q_heads=6, num_kv_heads=2, dtype=torch.float32)
    q, k = torch.zeros(20, 6, 16), torch.zeros(20, 2, 16)
    with pytest.raises(ValueError, match="the CPU has no FP8 cache"):
        nsa_attention(q, k, k, (1.0, 1.0, 1.0), problem.cache, plan, FLA, softmax_scale=0.25)
