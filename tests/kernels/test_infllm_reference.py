"""InfLLM-v2 of the specification against a direct transcription of the published algorithm.

The transcription goes query by query in float64: dense below `dense_len`; else mean keys of fine
and of coarse windows, exp(score - LSE of the coarse), summed over the group, `max_pool1d` with
kernel 5, stride 4 and padding 1, infinite scores for initial and local blocks, the best blocks, one
attention over them. TOLERANCE is that of `test_reference`.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference as ref
from nsa_kernels.spec import NSASpec

TOLERANCE = 2e-5
MINICPM = NSASpec(
    num_selected_blocks=96,
    num_local_blocks=32,
    window_size=0,
    score_map="max_pool",
    dense_len=8192,
    lse_len=128,
    lse_stride=64,
)
SMALL = replace(MINICPM, num_selected_blocks=4, num_local_blocks=2, dense_len=300)


def published(q: Tensor, k: Tensor, v: Tensor, position: int, spec: NSASpec) -> Tensor:
    """Attend from one query [HQ, D] at `position` of a sequence k, v [T, H, D]: -> [HQ, D]."""
    kv_len = position + 1
    q, k, v = q.double(), k[:kv_len].double(), v[:kv_len].double()
    num_kv_heads, scale = k.shape[1], q.shape[1] ** -0.5
    grouped = q.view(num_kv_heads, -1, q.shape[1])
    visible = torch.ones(num_kv_heads, kv_len, dtype=torch.bool)
    if kv_len >= spec.dense_len:
        num_fine, num_coarse = (kv_len - 32) // 16 + 1, (kv_len - 128) // 64 + 1
        fine = torch.stack([k[16 * j : 16 * j + 32].mean(0) for j in range(num_fine)])
        coarse = torch.stack([k[64 * j : 64 * j + 128].mean(0) for j in range(num_coarse)])
        lse = torch.logsumexp(torch.einsum("hgd,nhd->hgn", grouped, coarse) * scale, -1)
        score = torch.exp(torch.einsum("hgd,nhd->hgn", grouped, fine) * scale - lse[..., None])
        current = position // 64
        # A window that is not complete yet counts as 0, the least that a score can be.
        padded = torch.zeros(num_kv_heads, 4 * (current + 1), dtype=torch.float64)
        padded[:, :num_fine] = score.sum(1)
        pooled = torch.nn.functional.max_pool1d(padded, kernel_size=5, stride=4, padding=1)
        pooled[:, : spec.num_init_blocks] = torch.inf
        pooled[:, max(0, current + 1 - spec.num_local_blocks) :] = torch.inf
        order = torch.sort(pooled, dim=1, descending=True, stable=True).indices
        chosen = torch.zeros(pooled.shape, dtype=torch.bool)
        chosen.scatter_(1, order[:, : spec.num_selected_blocks], True)
        visible = chosen.repeat_interleave(64, dim=1)[:, :kv_len]
    scores = torch.einsum("hgd,thd->hgt", grouped, k) * scale
    weights = torch.softmax(scores.masked_fill(~visible[:, None], -torch.inf), dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)


def specified(q: Tensor, k: Tensor, v: Tensor, positions: list[int], spec: NSASpec) -> Tensor:
    """The specification's attention from q [Tq, HQ, D]; keys after the last query stay unseen."""
    length = max(positions) + 1
    k, v = k[:length], v[:length]
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(*q.shape[:2], 3)
    return ref.nsa_attention(
        q,
        k,
        v,
        ref.compress_mean(k, spec),
        ref.compress_mean(v, spec),
        gates,
        torch.tensor(positions),
        spec,
        softmax_scale=q.shape[2] ** -0.5,
        k_lse=ref.compress_mean(k, spec.coarse) if spec.lse_len else None,
    )


def tokens(length: int, heads: int, group: int, dim: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((length, heads * group, dim), (length, heads, dim), (length, heads, dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return 2 * q, k, v


BOUNDARIES = sorted(
    {edge + i for edge in (32, 64, 128, 256, 300, 320, 384, 448) for i in (-2, -1, 0, 1)} | {0}
)


@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 1, 24), (1, 8, 16), (2, 16, 32)])
@pytest.mark.parametrize("dense_len", [0, 129, 300, 321, 1000])
def test_every_boundary(heads: int, group: int, dim: int, dense_len: int) -> None:
    # Where nothing is dense, the transcription still needs a coarse window: position 127 is the
    # first with one. The specification selects all blocks before that.
    spec = replace(SMALL, dense_len=dense_len)
    q, k, v = tokens(450, heads, group, dim, seed=group)
    positions = [t for t in BOUNDARIES if t >= 127 or dense_len]
    actual = specified(q[positions], k, v, positions, spec)
    for row, position in enumerate(positions):
        expected = published(q[position], k, v, position, spec)
        error = (actual[row] - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"position {position}: {error:.2g}"


def test_the_published_sizes() -> None:
    q, k, v = tokens(8400, 1, 16, 16, seed=0)
    for position in (6000, 8190, 8191, 8192, 8399):
        actual = specified(q[[position]], k, v, [position], MINICPM)[0]
        expected = published(q[position], k, v, position, MINICPM)
        assert (actual - expected).norm() / expected.norm() < TOLERANCE
        blocks_read = 96 if position + 1 >= 8192 else position // 64 + 1
        scores = torch.rand(1, 1, 132)
        chosen = ref.select_blocks(scores, torch.tensor([position]), MINICPM)
        assert chosen.shape[2] == 128
        assert int((chosen >= 0).sum()) == blocks_read


def test_scores_are_relative_to_coarse_windows() -> None:
    """The log-sum-exp is that of the coarse windows alone: scores are no probabilities."""
    q, k, _ = tokens(400, 1, 2, 16, seed=3)
    positions = torch.tensor([399])
    k_cmp, k_lse = (ref.compress_mean(k, spec) for spec in (SMALL, SMALL.coarse))
    assert (len(k_cmp), len(k_lse)) == (24, 5)
    lse = ref.selection_lse(q[[399]], k_lse, positions, SMALL, softmax_scale=0.25)
    logits = torch.einsum("gd,nd->gn", q[399], k[:, 0].unfold(0, 128, 64).mean(-1)) * 0.25
    torch.testing.assert_close(lse[0], torch.logsumexp(logits, dim=-1))


def test_a_coarse_key_goes_with_coarse_windows() -> None:
    q, k, v = tokens(64, 1, 1, 16, seed=0)
    arguments = (q, k, v, k[:3], v[:3], torch.ones(64, 1, 3), torch.arange(64))
    with pytest.raises(ValueError, match="lse_len 128 and no k_lse"):
        ref.nsa_attention(*arguments, SMALL, softmax_scale=1.0)
    with pytest.raises(ValueError, match="lse_len 0 and k_lse"):
        ref.nsa_attention(*arguments, NSASpec(), softmax_scale=1.0, k_lse=k[:1])
    with pytest.raises(ValueError, match="no coarse windows"):
        _ = NSASpec().coarse
