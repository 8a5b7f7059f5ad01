"""The whole Triton operator against the fp32 specification: interpreter, or GPU where there is one.

Every case checks page bounds in the kernels, and starts from caches full of NaN.
"""

import math

import pytest
import torch

from nsa_kernels import reference
from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.gpu.common import WORKSPACE_BYTES
from nsa_kernels.gpu.plan import GpuPlan, plan_attention
from nsa_kernels.gpu.prefill_scores import can_score_pass
from nsa_kernels.metadata import build_metadata
from nsa_kernels.ops import Branches
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import SPECS, Problem, assert_close, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GPU_SPECS = {name: spec for name, spec in SPECS.items() if name not in ("odd", "infllm")}
PAPER = GPU_SPECS["paper"]


def make(spec: NSASpec, lengths: list[int], **arguments: object) -> Problem:
    return make_problem(spec, lengths, path="gpu", device=DEVICE, **arguments)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def prefill_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend block by block, as over long contexts, unless a test asks for "short"."""
    if getattr(request, "param", "long") == "long":
        monkeypatch.setattr(gpu_plan, "short_context", lambda spec: 0)


BOTH_PATHS = pytest.mark.parametrize("prefill_path", ["long", "short"], indirect=True)


def fill(problem: Problem, row: int, stop: int) -> None:
    """Bring a row's first tokens into the cache: not by the interpreter, whose time they are."""
    path = problem.path
    problem.path = "torch" if DEVICE.type == "cpu" else path
    problem.run([0], [stop], rows=[row])
    problem.path = path


@BOTH_PATHS
@pytest.mark.parametrize("name", GPU_SPECS)
def test_prefill_then_decode_of_ragged_rows(name: str) -> None:
    spec = GPU_SPECS[name]
    lengths = [spec.cmp_len + 1, spec.block_size + 2, 6 * spec.block_size + 5]
    problem = make(spec, lengths, heads=1)
    prompts = [length - 2 for length in lengths]
    outputs = problem.run([0, 0, 0], prompts)
    for row, prompt in enumerate(prompts):
        assert_close(outputs[row], problem.expected(row, 0, prompt))
    for step in range(2):
        starts = [prompt + step for prompt in prompts]
        outputs = problem.run(starts, [1, 1, 1], num_decode_rows=3)
        for row, start in enumerate(starts):
            assert_close(outputs[row], problem.expected(row, start, start + 1))


@BOTH_PATHS
@pytest.mark.parametrize("name", GPU_SPECS)
def test_chunks_equal_the_whole(name: str) -> None:
    spec = GPU_SPECS[name]
    length = 4 * spec.block_size + 3
    problem = make(spec, [length], heads=1, group=2)
    parts, start = [], 0
    for chunk in (7, spec.block_size + 1, length):
        stop = min(start + chunk, length)
        parts += problem.run([start], [stop - start])
        start = stop
    assert_close(torch.cat(parts), problem.expected(0, 0, length))


@pytest.mark.parametrize("score_pass", [False, True])
@pytest.mark.parametrize("name", GPU_SPECS)
def test_both_ways_to_score_blocks(
    name: str, score_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of rows whose blocks are all selected, and where scores are all that is wanted."""
    monkeypatch.setattr(gpu_plan, "prefers_score_pass", lambda group_size, spec: score_pass)
    spec = GPU_SPECS[name]
    if not can_score_pass(spec):
        with pytest.raises(ValueError, match="score_pass"):
            gpu_plan.plan_attention(
                build_metadata([[1]], [0], [1], spec),
                spec,
                num_q_heads=1,
                num_kv_heads=1,
                dtype=torch.float32,
                device=DEVICE,
                score_pass=True,
            )
        return
    length = (spec.num_selected_blocks + 3) * spec.block_size + 5
    problem = make(spec, [length, 40], heads=1, group=2)
    start = length - 2 * spec.block_size - 1
    fill(problem, 0, start)
    outputs = problem.run([start, 0], [length - start, 40])
    assert_close(outputs[0], problem.expected(0, start, length))
    assert_close(outputs[1], problem.expected(1, 0, 40))
    gates, branches = (0.0, 1.0, 0.0), Branches(cmp=False, slc=True, swa=False)
    outputs = problem.run([start], [length - start], rows=[0], branches=branches, gates=gates)
    full = torch.tensor(gates).expand(length - start, 2, 3)
    assert_close(outputs[0], problem.expected(0, start, length, full))


@pytest.mark.parametrize("name", ["paper", "fla"])
def test_decode_crosses_every_boundary(name: str) -> None:
    spec = GPU_SPECS[name]
    prompt, steps = 3 * spec.block_size - 2, spec.cmp_stride + 3
    problem = make(spec, [prompt + steps], heads=1)
    fill(problem, 0, prompt)
    outputs = [problem.run([prompt + i], [1], num_decode_rows=1)[0] for i in range(steps)]
    assert_close(torch.cat(outputs), problem.expected(0, prompt, prompt + steps))


@BOTH_PATHS
@pytest.mark.parametrize("name", ["paper", "fla", "max_pool"])
def test_decode_rows_and_chunks_share_a_step(name: str) -> None:
    spec = GPU_SPECS[name]
    lengths = [5, 300, 40, 150]
    starts = [4, 299, 0, 143]
    problem = make(spec, lengths, heads=1)
    for row, start in enumerate(starts):
        if start:
            fill(problem, row, start)
    query_lens = [length - start for length, start in zip(lengths, starts, strict=True)]
    outputs = problem.run(starts, query_lens, num_decode_rows=2)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert_close(outputs[row], problem.expected(row, start, length))


@pytest.mark.parametrize(
    ("group", "dim", "v_dim"), [(1, 16, 16), (3, 60, 60), (8, 32, 16), (16, 192, 128), (64, 32, 32)]
)
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    spec = NSASpec(cmp_len=16, cmp_stride=8, block_size=16, num_selected_blocks=4, window_size=24)
    problem = make(spec, [97], heads=1, group=group, dim=dim, v_dim=v_dim, seed=group)
    assert_close(problem.run([0], [96])[0], problem.expected(0, 0, 96))
    assert_close(problem.run([96], [1], num_decode_rows=1)[0], problem.expected(0, 96, 97))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    spec = NSASpec(block_size=block_size, cmp_len=16, cmp_stride=8, num_selected_blocks=4)
    length = 5 * block_size + 9
    problem = make(spec, [length], heads=1, group=2)
    assert_close(problem.run([0], [length - 1])[0], problem.expected(0, 0, length - 1))
    last = problem.run([length - 1], [1], num_decode_rows=1)[0]
    assert_close(last, problem.expected(0, length - 1, length))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_learned_compression_and_keys_of_a_branch(mlp: bool, separate: bool) -> None:
    problem = make(PAPER, [230, 57], mlp=mlp, separate=separate, heads=1)
    problem.run([0, 0], [129, 30])
    outputs = problem.run([30, 129], [17, 94], rows=[1, 0])
    assert_close(outputs[0], problem.expected(1, 30, 47))
    assert_close(outputs[1], problem.expected(0, 129, 223))
    for step in range(2):
        outputs = problem.run([47 + step, 223 + step], [1, 1], rows=[1, 0], num_decode_rows=2)
        assert_close(outputs[0], problem.expected(1, 47 + step, 48 + step))
        assert_close(outputs[1], problem.expected(0, 223 + step, 224 + step))


@pytest.mark.parametrize(
    "gates", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (0.0, 0.5, 0.25)]
)
def test_constant_gates_skip_unused_branches(gates: tuple[float, float, float]) -> None:
    problem = make(PAPER, [330, 41], heads=1)
    branches = Branches(*(gate != 0.0 for gate in gates))
    full = torch.tensor(gates).expand(329, 3, 3)
    outputs = problem.run([0, 0], [329, 41], branches=branches, gates=gates)
    assert_close(outputs[0], problem.expected(0, 0, 329, full))
    assert_close(outputs[1], problem.expected(1, 0, 41, full[:41]))
    last = problem.run([329], [1], rows=[0], num_decode_rows=1, branches=branches, gates=gates)
    assert_close(last[0], problem.expected(0, 329, 330, full[:1]))


def test_gate_logits_pass_through_the_sigmoid() -> None:
    problem = make(PAPER, [90, 70])
    outputs = problem.run([0, 0], [89, 70], gate_logits=True)
    assert_close(outputs[0], problem.expected(0, 0, 89))
    last = problem.run([89], [1], rows=[0], num_decode_rows=1, gate_logits=True)[0]
    assert_close(last, problem.expected(0, 89, 90))


@pytest.mark.parametrize("name", GPU_SPECS)
def test_equal_scores_choose_the_lower_block(name: str) -> None:
    """Zero keys and 2^k windows: all probabilities are the same power of two, so ties are exact.

    The values differ, so a query that chose other blocks among the tied has another output.
    """
    spec = GPU_SPECS[name]
    length = 31 * spec.cmp_stride + spec.cmp_len
    assert spec.num_windows(length) == 32
    problem = make(spec, [length], heads=1, group=2)
    problem.k[0].zero_()
    expected = problem.expected(0, length - 1, length)
    fill(problem, 0, length - 2)
    assert_close(problem.run([length - 2], [2])[0][-1:], expected)
    assert_close(problem.run([length - 1], [1], num_decode_rows=1)[0], expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)], ids=["bf16", "fp16"]
)
def test_half_precision_stays_near_the_specification(dtype: torch.dtype, tolerance: float) -> None:
    # All blocks are selected, to keep near ties of rounded scores out of it.
    spec = NSASpec(num_selected_blocks=8, window_size=96)
    problem = make(spec, [300], dim=64, v_dim=64, dtype=dtype, heads=1)
    assert_close(problem.run([0], [299])[0], problem.expected(0, 0, 299), tolerance)
    last = problem.run([299], [1], num_decode_rows=1)[0]
    assert_close(last, problem.expected(0, 299, 300), tolerance)


def _read_blocks(problem: Problem, position: int) -> torch.Tensor:
    """[H, num_blocks] bool: selected by the query at `position`, or touched by its window."""
    spec, stop = problem.spec, position + 1
    positions = torch.tensor([position])
    q, scale = problem.q[0][position:stop], problem.softmax_scale
    k_cmp = reference.compress_mean(problem.k[0][:stop], spec)
    _, lse = reference.cmp_attention(q, k_cmp, k_cmp, positions, spec, softmax_scale=scale)
    num_blocks = math.ceil(stop / spec.block_size)
    scores = reference.block_scores(
        q, k_cmp, lse, positions, spec, softmax_scale=scale, num_blocks=num_blocks
    )
    chosen = reference.select_blocks(scores, positions, spec)[0].long()
    read = torch.zeros(chosen.shape[0], num_blocks, dtype=torch.bool)
    read.scatter_(1, chosen.clamp(min=0), True)
    first = max(0, position - spec.window_size + 1)
    if spec.window_size:
        read[:, first // spec.block_size :] = True
    return read


@pytest.mark.parametrize("name", ["paper", "fla", "max_pool"])
@pytest.mark.parametrize("decode", [True, False])
def test_only_selected_and_windowed_pages_are_read(name: str, decode: bool) -> None:
    """NaN in every other page, and head of a page, changes nothing."""
    spec = GPU_SPECS[name]
    length = 8 * spec.block_size + 7
    problem = make(spec, [length], heads=2, group=2)
    fill(problem, 0, length - 1)
    read = _read_blocks(problem, length - 1)
    assert 0 < int((~read).sum()) < read.numel()
    for head, block in (~read).nonzero().tolist():
        problem.cache.k[problem.pages[0][block], head] = torch.nan
        problem.cache.v[problem.pages[0][block], head] = torch.nan
    # Compressed entries that the query may not see: the first ones, and those past its end.
    last = problem.run([length - 1], [1], num_decode_rows=int(decode))[0]
    assert_close(last, problem.expected(0, length - 1, length))


def test_padding_rows_of_a_decode_batch_do_nothing() -> None:
    problem = make(PAPER, [200, 200])
    fill(problem, 0, 199)
    meta = build_metadata([problem.pages[0], [0]], [199, 0], [1, 1], PAPER, num_decode_rows=2)
    meta.seq_lens[1] = 0
    meta.page_table[1] = 0
    plan = plan_attention(
        meta,
        PAPER,
        num_q_heads=6,
        num_kv_heads=2,
        dtype=torch.float32,
        device=DEVICE,
        check_bounds=True,
    )
    output = run_plan(problem, plan, [(0, 199), (0, 199)])
    assert_close(output[:1], problem.expected(0, 199, 200))
    assert output[1].eq(0).all()
    null_page = [t[0] for t in (problem.cache.k, problem.cache.v, problem.cache.k_cmp)]
    assert all(page.isnan().all() for page in null_page), "a padding row wrote"


def run_plan(problem: Problem, plan: GpuPlan, tokens: list[tuple[int, int]]) -> torch.Tensor:
    """Run a plan made by hand on the given (row, position) tokens."""
    from nsa_kernels.ops import nsa_attention

    def step(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([tensors[row][i] for row, i in tokens]).to(DEVICE)

    return nsa_attention(
        step(problem.q),
        step(problem.k),
        step(problem.v),
        step(problem.gates),
        problem.cache,
        plan,
        problem.spec,
        softmax_scale=problem.softmax_scale,
    ).cpu()


def test_a_step_leaves_the_counters_at_zero() -> None:
    problem = make(PAPER, [150])
    fill(problem, 0, 149)
    meta = build_metadata([problem.pages[0]], [149], [1], PAPER, num_decode_rows=1)
    plan = plan_attention(
        meta, PAPER, num_q_heads=6, num_kv_heads=2, dtype=torch.float32, device=DEVICE
    )
    first = run_plan(problem, plan, [(0, 149)])
    assert plan.counters.eq(0).all()
    assert torch.equal(first, run_plan(problem, plan, [(0, 149)])), "a repeated step differs"


def test_geometry_without_kernels_is_refused() -> None:
    meta = build_metadata([[1]], [0], [5], SPECS["odd"])
    with pytest.raises(ValueError, match="block_size must be a power of two on a GPU, got 12"):
        plan_attention(
            meta, SPECS["odd"], num_q_heads=2, num_kv_heads=1, dtype=torch.float32, device=DEVICE
        )


@pytest.mark.parametrize("score_pass", [False, True])
def test_score_workspace_stays_under_its_bound(score_pass: bool) -> None:
    spec = NSASpec()
    num_tokens = 1 << (17 if score_pass else 14)
    pages = list(range(1, 257 + num_tokens // 64))
    meta = build_metadata([pages], [16384], [num_tokens], spec)
    plan = plan_attention(
        meta,
        spec,
        num_q_heads=64,
        num_kv_heads=4,
        dtype=torch.bfloat16,
        device=DEVICE,
        score_pass=score_pass,
    )
    assert plan.prefill is not None
    chunks = plan.prefill.score_chunks
    assert [c.first_token for c in chunks[1:]] == [
        c.first_token + c.num_tokens for c in chunks[:-1]
    ]
    assert chunks[-1].first_token + chunks[-1].num_tokens == num_tokens
    assert len(chunks) > 1
    # 64 entries are 16 blocks: of each KV head, with as many spills, 4 bytes each; or of each query
    # head, 2 bytes each, the spill and the maximum of 4 bytes each.
    tile_bytes = 4 * 16 * (4 + 4) if score_pass else 64 * (16 * 2 + 8)
    for chunk in chunks:
        assert chunk.num_tokens * chunk.num_score_tiles * tile_bytes <= WORKSPACE_BYTES
