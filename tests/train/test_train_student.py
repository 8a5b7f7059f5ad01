"""The student's forward pass is what the engine computes; its losses are what they say."""

from pathlib import Path

import export
import losses
import numpy as np
import pytest
import quality_branches
import student as student_module
import torch
import torch.nn.functional as F
from student import Student, branch_shares, open_base, student_config
from torch import Tensor

from nsa_serve.errors import ModelError
from nsa_serve.request import EngineRequest
from tests.engine.engine_runs import greedy, make_engine, run
from tests.train.tiny import CONFIG, merged_checkpoint, write_base

CPU = torch.device("cpu")
# Log-probabilities of size 10 after two layers of fp32, summed in another order.
TOLERANCE = 1e-4


def make_student(folder: Path, rope: str = "yarn:8", dtype: torch.dtype = torch.float32) -> Student:
    """A student in which everything that is trained matters."""
    base = open_base(str(folder), CPU, dtype)
    config, _ = student_config(base.config, rope, 2048)
    torch.manual_seed(1)
    student = Student(base, config, rank=3)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if ".a." not in name:
                value += torch.randn_like(value) * 0.05
            # The adapter is stored in bf16.
            value.copy_(value.bfloat16())
    return student


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("student") / "base")


def make_ids(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(3, CONFIG.vocab_size, (1, num_tokens), generator=generator)


def log_probabilities(student: Student, ids: Tensor) -> Tensor:
    """Of each token after the first."""
    with torch.no_grad():
        logits = student(ids).hidden[0] @ student.head.T
    return logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def engine_log_probabilities(model: Path, ids: Tensor) -> Tensor:
    engine = make_engine(model, max_model_len=2048)
    request = EngineRequest(
        request_id="r", prompt_token_ids=ids[0].tolist(), params=greedy(1, prompt_logprobs=0)
    )
    result = run(engine, [request])["r"]
    assert result.prompt_logprobs is not None
    return torch.tensor([entry.logprob for entry in result.prompt_logprobs])


@pytest.mark.parametrize("rope", ["yarn:8", "theta:5000"])
def test_the_engine_computes_what_is_trained(base: Path, tmp_path: Path, rope: str) -> None:
    """1301 tokens: blocks are selected, the window is full, and the old context is exceeded."""
    student = make_student(base, rope)
    merged = student.merged_weights()
    model = merged_checkpoint(tmp_path / "merged", student.config, merged)
    ids = make_ids(1301)
    theirs = engine_log_probabilities(model, ids)
    torch.testing.assert_close(
        log_probabilities(student, ids), theirs, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_the_engine_loads_the_adapter(base: Path, tmp_path: Path) -> None:
    student = make_student(base)
    _, model = student_config(student.base.config, "yarn:8", 0)
    folder = tmp_path / "adapter"
    assert (
        export.write_adapter(student, folder, model, {}) == (folder / export.ADAPTER).stat().st_size
    )
    ids = make_ids(1301)
    theirs = engine_log_probabilities(folder, ids)
    torch.testing.assert_close(
        log_probabilities(student, ids), theirs, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_the_engines_shares_are_those_of_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each branch's share, taken from the engine's layers with one gate open at a time."""
    monkeypatch.setattr(student_module, "SHARE_STRIDE", 1)
    student = make_student(base)
    folder = tmp_path / "adapter"
    export.write_adapter(student, folder, student_config(student.base.config, "yarn:8", 0)[1], {})
    ids = make_ids(1301)
    with torch.no_grad():
        want = student(ids).shares
    got = quality_branches.branch_shares(str(folder), ids[0].tolist(), dtype="float32")
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert want.min() > 0.01


def test_an_adapter_that_is_too_large_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="lower --rank"):
        export.write_adapter(make_student(base), tmp_path, {}, {})


def test_the_teacher_is_a_student_that_selects_everything(base: Path) -> None:
    """With gates (0, 1, 0), without updates or new rope, up to 1024 tokens NSA is dense."""
    opened = open_base(str(base), CPU, torch.float32)
    config, _ = student_config(opened.config, "none", opened.config.max_position_embeddings)
    student = Student(opened, config, rank=2, gates=(0.5, 0.5, 0.5))
    with torch.no_grad():
        for layer in student.layers:
            layer.gate_bias.copy_(torch.tensor([-1e4, 1e4, -1e4]).repeat(6))
    ids = make_ids(256)
    hidden, attention = student.teacher(ids, keep_attention=True)
    output = student(ids, attention)
    torch.testing.assert_close(output.hidden, hidden, atol=1e-4, rtol=1e-4)
    assert output.mse < 1e-9
    with pytest.raises(ValueError, match="256 tokens at most"):
        student.teacher(make_ids(257))


def test_recomputing_layers_changes_no_gradient(base: Path) -> None:
    ids, results = make_ids(300), []
    for use_checkpoints in (False, True):
        student = make_student(base)
        student.use_checkpoints = use_checkpoints
        output = student(ids)
        (output.hidden.square().mean() + output.shares.square().sum()).backward()
        results.append([p.grad for p in student.parameters()])
        assert all(g is not None and g.abs().sum() > 0 for g in results[-1])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shares_are_of_norms_after_the_projection() -> None:
    """A branch that o_proj maps to nothing has no share."""
    o_proj = torch.zeros(4, 4)
    o_proj[0, 0] = 1.0
    gated = [torch.zeros(1, 9, 2, 2) for _ in range(3)]
    gated[0][..., 0, 0], gated[1][..., 0, 0], gated[2][..., 1, 1] = 3.0, 1.0, 100.0
    assert branch_shares(gated, o_proj).tolist() == [0.75, 0.25, 0.0]


@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_head_loss_and_its_gradient(
    kl_weight: float, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through all logits in fp64, in chunks of five tokens."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * 37)
    hidden = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    teacher, head = torch.randn(2, 13, 8).double(), torch.randn(37, 8).double()
    ids = torch.randint(37, (2, 13))
    weight = torch.rand(2, 13) * (torch.rand(2, 13) > 0.3)
    ours = losses.head_loss(
        hidden, head, ids, weight,
        teacher_hidden=teacher, kl_weight=kl_weight, ce_weight=ce_weight,
    )  # fmt: skip
    log_p = (hidden @ head.T).log_softmax(-1)[:, :-1]
    log_t = (teacher @ head.T).log_softmax(-1)[:, :-1]
    w = weight[:, 1:].double() / weight[:, 1:].double().sum()
    kl = (w * F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)).sum()
    ce = -(w * log_p.gather(2, ids[:, 1:, None])[..., 0]).sum()
    total = kl_weight * kl + ce_weight * ce
    torch.testing.assert_close(ours.total, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.ce, ce, rtol=1e-6, atol=1e-6)
    if kl_weight:
        torch.testing.assert_close(ours.kl, kl, rtol=1e-6, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(3 * ours.total, hidden),
        torch.autograd.grad(3 * total, hidden),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_trained_is_refused(base: Path, tmp_path: Path) -> None:
    hidden = torch.zeros(1, 4, 8)
    ids, none = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="no token"):
        losses.head_loss(
            hidden, torch.zeros(9, 8), ids, none, teacher_hidden=None, kl_weight=0, ce_weight=1
        )
    with pytest.raises(SystemExit, match="--base nothing"):
        open_base("nothing", CPU, torch.float32)
    with pytest.raises(SystemExit, match="--rope"):
        student_config(CONFIG, "yarn:x", 1)
    with pytest.raises(ModelError):
        open_base(str(tmp_path), CPU, torch.float32)


def test_the_floor_counts_what_is_missing() -> None:
    shares = torch.tensor([[0.0, 0.95, 0.05], [0.1, 0.8, 0.1]])
    assert losses.share_floor(shares, 0.1).item() == pytest.approx(1.5 / 6)


def test_the_selection_loss_can_be_trained_away(base: Path) -> None:
    """Through the updates of q and k, on one batch."""
    student, ids = make_student(base), make_ids(480)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    values = []
    for _ in range(12):
        loss = student(ids, probes=torch.arange(200, 480, 5)).selection
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.9 * values[0]


def test_the_teacher_and_the_text_share_the_predictions() -> None:
    """No prediction is both's, and none of a retrieval row's haystack is the text's."""
    rng = np.random.default_rng(0)
    books = np.ones((2, 12), dtype=np.float32)
    taught, own = losses.split_weight("books", books, 8, rng)
    assert taught[:, :8].all() and own[:, 8:].all() and (taught + own == books).all()
    chat = np.zeros((1, 8), dtype=np.float32)
    chat[0, 3:] = 1.0
    taught, own = losses.split_weight("chat", chat, 8, rng)
    assert (taught == chat).all() and not own.any()
    answers = np.zeros((1, 20_000), dtype=np.float32)
    answers[0, 4], answers[0, -3:] = 0.1, 1.0
    taught, own = losses.split_weight("retrieval", answers, 16_000, rng)
    assert (own == answers).all() and taught.sum() == losses.NUM_ANCHORS
    assert not taught[answers > 0].any() and not taught[:, 16_000:].any()
