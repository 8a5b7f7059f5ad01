"""The trainer's attention: outputs as the reference's, gradients as a naive implementation's.

The Triton way runs in the interpreter where there is no GPU.
"""

import attention
import attention_sdpa
import pytest
import torch
from attention import nsa_branches
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.spec import NSASpec
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401
from tests.kernels.gpu_util import DEVICE


def place(backend: str) -> str:
    """Where a way to attend is tested; "sdpa" is for CPUs."""
    return "cpu" if backend == "sdpa" else DEVICE


# Sums of up to 300 products in fp32, in another order.
TOLERANCE = 2e-5
# Small, with several blocks to choose from; and the default model's, of 16 blocks.
SMALL = NSASpec(num_selected_blocks=4, window_size=70)
DEFAULT = NSASpec()
HEADS = (6, 2)


def make(num_rows: int, num_tokens: int, seed: int = 0, *, dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, num_tokens, heads, dim) for heads in (HEADS[0], HEADS[1], HEADS[1])]
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def want(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> tuple[list[Tensor], Tensor]:
    """The reference's branches of one row, and its selection [T, H, S]."""
    scale, positions = q.shape[-1] ** -0.5, torch.arange(len(q))
    k_cmp, v_cmp = reference.compress_mean(k, spec), reference.compress_mean(v, spec)
    o_cmp, lse = reference.cmp_attention(q, k_cmp, v_cmp, positions, spec, softmax_scale=scale)
    num_blocks = -(-len(q) // spec.block_size)
    scores = reference.block_scores(
        q, k_cmp, lse, positions, spec, softmax_scale=scale, num_blocks=num_blocks
    )
    indices = reference.select_blocks(scores, positions, spec)
    o_slc, _ = reference.slc_attention(q, k, v, indices, positions, spec, softmax_scale=scale)
    o_swa, _ = reference.swa_attention(q, k, v, positions, spec, softmax_scale=scale)
    return [o_cmp, o_slc, o_swa], indices


@pytest.mark.parametrize("backend", ["plain", "sdpa", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 15, 31, 32, 33, 63, 64, 65, 127, 129, 257, 331, 449])
def test_branches_are_the_references(num_tokens: int, backend: attention.Backend) -> None:
    q, k, v = make(2, num_tokens, num_tokens)
    got = nsa_branches(
        *(x.to(place(backend)) for x in (q, k, v)),
        SMALL,
        scale=q.shape[-1] ** -0.5,
        backend=backend,
    )
    for row in range(2):
        for name, theirs, ours in zip(
            ("cmp", "slc", "swa"), want(q[row], k[row], v[row], SMALL)[0], got, strict=True
        ):
            torch.testing.assert_close(
                ours[row].cpu(), theirs, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: n + m
            )


def test_ties_go_to_the_lower_block() -> None:
    """Scores of few values, so that most are equal to others."""
    scores = torch.randint(4, (1, 2, 1201, 19), generator=torch.Generator().manual_seed(0)) / 4
    t = torch.arange(1201)
    got = attention._top_blocks(scores, t, DEFAULT)[0]
    theirs = reference.select_blocks(scores[0].transpose(0, 1), t, DEFAULT)
    assert torch.equal(got.permute(2, 0, 1), as_mask(theirs, 19))


@pytest.mark.parametrize("backend", ["plain", "sdpa", "triton"])
def test_the_best_blocks_are_chosen(backend: attention.Backend) -> None:
    """Of 19 blocks 16; compared by score, since sums in another order decide near ties."""
    q, k, _ = make(1, 1201, 5)
    k_cmp = attention.compress_mean(k, DEFAULT)
    q, k_cmp = q.to(place(backend)), k_cmp.to(place(backend))
    rule = attention.Rule("cmp", DEFAULT)
    _, lse = attention.attend(q, k_cmp, k_cmp, rule, scale=0.25, backend=backend)
    got = attention.select(q, k_cmp, lse, DEFAULT, scale=0.25, backend=backend)[0].cpu()
    got = got.permute(2, 0, 1)
    t = torch.arange(1201)
    scores = reference.block_scores(
        q[0].cpu(), k_cmp[0].cpu(), lse[0].T.cpu(), t, DEFAULT, softmax_scale=0.25, num_blocks=19
    )
    theirs = as_mask(reference.select_blocks(scores, t, DEFAULT), 19)
    assert torch.equal(got.sum(-1), theirs.sum(-1))
    assert not got[~(torch.arange(19) <= t[:, None] // 64)[:, None].expand_as(got)].any()
    assert got[..., 0].all() and got.gather(2, (t // 64)[:, None, None].expand(-1, 2, 1)).all()
    torch.testing.assert_close((scores * got).sum(-1), (scores * theirs).sum(-1))


@pytest.mark.parametrize("num_chunks", [1, 5])
@pytest.mark.parametrize("num_tokens", [1, 40, 65, 300])
def test_plain_gradients_are_exact(
    num_tokens: int, num_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, against autograd through one [T, T] softmax a branch."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", num_tokens**2 * 12 // num_chunks)
    inputs = [x.double().requires_grad_() for x in make(2, num_tokens)]
    outputs = nsa_branches(*inputs, SMALL, scale=0.25, backend="plain")
    theirs = naive(inputs, selection(inputs))
    weights = [torch.randn_like(x) for x in outputs]
    for ours, other in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-12)
    check_gradients(inputs, outputs, theirs, weights, 1e-11)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 40, 65, 211, 300])
def test_fused_gradients_are_the_naive_ones(
    num_tokens: int, backend: attention.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that there are several chunks.
    monkeypatch.setattr(attention_sdpa, "CHUNK", 128)
    monkeypatch.setattr(attention_sdpa, "WINDOW_CHUNK", 48)
    inputs = [x.to(place(backend)).requires_grad_() for x in make(2, num_tokens)]
    outputs = nsa_branches(*inputs, SMALL, scale=0.25, backend=backend)
    theirs = naive(inputs, selection(inputs))
    weights = [torch.randn_like(x) for x in outputs]
    check_gradients(inputs, outputs, theirs, weights, 1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_bf16_is_near_fp32(backend: attention.Backend) -> None:
    """As training runs them, values and gradients."""
    inputs = [x.to(place(backend), torch.bfloat16).requires_grad_() for x in make(1, 200, dim=64)]
    chosen = selection(inputs)
    rules = [attention.Rule("slc", SMALL, chosen), attention.Rule("swa", SMALL)]
    for rule in rules:
        o, _ = attention.attend(*inputs, rule, scale=0.125, backend=backend)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        other, _ = attention.attend(*wide, rule, scale=0.125, backend="plain")
        weight = torch.randn_like(other)
        ours = torch.autograd.grad(o, inputs, weight.bfloat16())
        theirs = torch.autograd.grad(other, wide, weight)
        for a, b in zip((o, *ours), (other, *theirs), strict=True):
            # bf16 has 8 bits: 0.4 % a rounding, of numbers that are summed.
            assert (a.float() - b).norm() < 0.02 * b.norm()


def test_what_is_not_trained_is_refused() -> None:
    q, k, v = make(1, 8)
    with pytest.raises(ValueError, match="max_pool"):
        nsa_branches(q, k, v, NSASpec(score_map="max_pool"), scale=1.0, backend="plain")
    with pytest.raises(ValueError, match="divide"):
        nsa_branches(q[:, :, :5], k, v, SMALL, scale=1.0, backend="plain")
    with pytest.raises(ValueError, match="power of two"):
        nsa_branches(*make(1, 8, dim=24), SMALL, scale=1.0, backend="triton")


def selection(inputs: list[Tensor]) -> Tensor:
    """What is selected, by the reference: bool [B, H, NB, T]."""
    q, k, v = (x.detach().float().cpu() for x in inputs)
    num_blocks = -(-q.shape[1] // 64)
    rows = [
        as_mask(want(q[row], k[row], v[row], SMALL)[1], num_blocks).permute(1, 2, 0)
        for row in range(len(q))
    ]
    return torch.stack(rows).contiguous().to(inputs[0].device)


def as_mask(indices: Tensor, num_blocks: int) -> Tensor:
    """[T, H, S] with -1 for none -> bool [T, H, num_blocks]."""
    chosen = torch.zeros(*indices.shape[:2], num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, torch.where(indices < 0, num_blocks, indices.long()), True)
    return chosen[..., :-1]


def naive(inputs: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """One softmax over [T, T] or [T, N] scores a branch, every head on its own."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    num_tokens = q.shape[2]
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    t = torch.arange(num_tokens, device=q.device)
    causal = t <= t[:, None]
    windows = [slice(j * 16, j * 16 + 32) for j in range(SMALL.num_windows(num_tokens))]
    outputs = []
    for branch in ("cmp", "slc", "swa"):
        keys, values = k, v
        if branch == "cmp":
            if not windows:
                outputs.append((q * 0).transpose(1, 2))
                continue
            keys, values = (torch.stack([x[:, :, w].mean(2) for w in windows], 2) for x in (k, v))
            last = torch.tensor([w.stop - 1 for w in windows], device=q.device)
            mask = last <= t[:, None]
        elif branch == "slc":
            mask = chosen.transpose(2, 3).repeat_interleave(64, 3)[..., :num_tokens] & causal
            mask = mask.repeat_interleave(3, dim=1)
        else:
            mask = causal & (t[:, None] - t < SMALL.window_size)
        logits = q @ keys.transpose(2, 3) * 0.25
        weights = torch.exp(logits - logits.detach().amax()) * mask
        total = weights.sum(-1, keepdim=True)
        p = weights / torch.where(total > 0, total, 1.0)
        outputs.append((p @ values).transpose(1, 2))
    return outputs


def check_gradients(
    inputs: list[Tensor],
    ours: tuple[Tensor, ...],
    theirs: list[Tensor],
    weights: list[Tensor],
    tolerance: float,
) -> None:
    for a, b, weight in zip(ours, theirs, weights, strict=True):
        got = torch.autograd.grad(a, inputs, weight, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(b, inputs, weight, retain_graph=True, allow_unused=True)
        for x, y, like in zip(got, want, inputs, strict=True):
            x, y = (torch.zeros_like(like) if g is None else g for g in (x, y))
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def test_the_selection_loss_is_the_divergence_from_full_attention() -> None:
    """By loops over the queries and groups of one row, with the reference's block scores."""
    q, k, _ = make(1, 449, 3)
    scale, positions, size = q.shape[-1] ** -0.5, torch.arange(449), SMALL.block_size
    probes = torch.tensor([5, 130, 257, 448])
    k_cmp = reference.compress_mean(k[0], SMALL)
    _, lse = reference.cmp_attention(q[0], k_cmp, k_cmp, positions, SMALL, softmax_scale=scale)
    scores = reference.block_scores(
        q[0], k_cmp, lse, positions, SMALL, softmax_scale=scale, num_blocks=8
    )
    total = 0.0
    for t in probes.tolist():
        first, last = SMALL.num_init_blocks, t // size - SMALL.num_local_blocks
        if last < first:
            continue
        for head in range(HEADS[1]):
            heads = q[0, t, 3 * head : 3 * head + 3]
            p = ((heads @ k[0, : t + 1, head].T) * scale).softmax(dim=-1).mean(dim=0)
            mass = torch.stack([p[b * size : (b + 1) * size].sum() for b in range(first, last + 1)])
            found = scores[t, head, first : last + 1]
            share, predicted = mass / mass.sum(), found / found.sum()
            total += float(mass.sum() * (share * (share / predicted).log()).sum())
    got = attention.selection_loss(q, k, SMALL, probes, scale=scale)
    assert float(got) == pytest.approx(total / (len(probes) * HEADS[1]), rel=1e-4)
    assert float(got) > 0.01


def test_the_selection_loss_moves_the_scores_towards_full_attention() -> None:
    """Its gradient reaches queries and keys, is finite, and makes it smaller."""
    q, k, _ = (x.requires_grad_() for x in make(2, 449, 4))
    probes = torch.arange(0, 449, 7)
    before = attention.selection_loss(q, k, SMALL, probes, scale=0.25)
    dq, dk = torch.autograd.grad(before, (q, k))
    assert dq.isfinite().all() and dk.isfinite().all() and dq.abs().sum() > 0
    with torch.no_grad():
        after = attention.selection_loss(q - 20.0 * dq, k - 20.0 * dk, SMALL, probes, scale=0.25)
    assert after < before
