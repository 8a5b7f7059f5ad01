"""The specification against the naive functions of flash-linear-attention, an oracle of its own.

fla's geometry is l = d = l' = block_size with blocks 0, IC - 1 and IC forced. Both sides compute
in fp32 from the same inputs, so they differ by the rounding of sums of at most 200 terms of size
1 with weights that sum to 1; TOLERANCE is some five times what is seen. Selections are compared by
the scores of the chosen sets, because fla breaks ties in no stated order.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference as ref
from nsa_kernels.spec import NSASpec

with warnings.catch_warnings():
    # On import fla warns that there is no GPU and no flash-attn; its naive functions need neither.
    warnings.simplefilter("ignore")
    from fla.ops.nsa import naive

TOLERANCE = 2e-5
# (T, block_size, num_selected_blocks, H, G, D, Dv)
SIZES = [
    (1, 16, 4, 1, 16, 16, 16),
    (15, 16, 4, 2, 16, 32, 32),
    (16, 16, 4, 2, 16, 32, 32),
    (17, 16, 4, 1, 32, 60, 60),
    (63, 16, 3, 2, 16, 16, 24),
    (64, 16, 3, 2, 16, 16, 24),
    (65, 32, 4, 1, 16, 64, 64),
    (111, 8, 5, 2, 16, 20, 20),
    (200, 8, 8, 2, 16, 64, 64),
    (150, 8, 16, 1, 64, 192, 128),
]
SIZE_IDS = ["T{}-block{}-n{}-H{}-G{}-D{}-Dv{}".format(*size) for size in SIZES]
# fla's compression, top-k and selection take any group; only its whole insists on 16 or more.
SMALL_GROUPS = [(111, 8, 5, 2, 1, 16, 16), (111, 16, 4, 1, 3, 20, 20), (200, 16, 4, 2, 8, 16, 16)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run small matrices on one thread: on a busy machine a second one multiplies the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass
class Inputs:
    """Random tensors of one case, without the batch axis of fla."""

    spec: NSASpec
    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    positions: Tensor
    scale: float

    @property
    def k_cmp(self) -> Tensor:
        return ref.compress_mean(self.k, self.spec)

    @property
    def v_cmp(self) -> Tensor:
        return ref.compress_mean(self.v, self.spec)


def pool(x: Tensor, block_size: int) -> Tensor:
    """Average chunks as fla's mean_pooling does: the last, incomplete one too."""
    return torch.stack([chunk.mean(dim=0) for chunk in torch.split(x, block_size)])


def make_inputs(size: tuple[int, ...], window_size: int = 0) -> Inputs:
    num_tokens, block_size, num_selected_blocks, num_kv_heads, group_size, dim, v_dim = size
    gen = torch.Generator().manual_seed(num_tokens * 31 + dim)
    k = torch.randn(num_tokens, num_kv_heads, dim, generator=gen)
    v = torch.randn(num_tokens, num_kv_heads, v_dim, generator=gen)
    return Inputs(
        spec=NSASpec(
            cmp_len=block_size,
            cmp_stride=block_size,
            block_size=block_size,
            num_selected_blocks=num_selected_blocks,
            num_init_blocks=1,
            num_local_blocks=2,
            window_size=window_size,
        ),
        q=2 * torch.randn(num_tokens, num_kv_heads * group_size, dim, generator=gen),
        k=k,
        v=v,
        pooled_k=pool(k, block_size),
        pooled_v=pool(v, block_size),
        positions=torch.arange(num_tokens),
        scale=dim**-0.5,
    )


def fla_topk(x: Inputs) -> Tensor:
    indices: Tensor = naive.naive_nsa_topk(
        x.q[None], x.pooled_k[None], x.spec.num_selected_blocks, x.spec.block_size, x.scale
    )
    return indices[0]


def our_scores(x: Inputs) -> Tensor:
    _, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, x.spec, softmax_scale=x.scale)
    return ref.block_scores(
        x.q,
        x.k_cmp,
        lse,
        x.positions,
        x.spec,
        softmax_scale=x.scale,
        num_blocks=len(x.pooled_k),
    )


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("size", [*SIZES, *SMALL_GROUPS], ids=str)
def test_cmp_attention_equals_fla(size: tuple[int, ...]) -> None:
    x = make_inputs(size)
    want, want_lse = naive.naive_nsa_compression(
        x.q[None], x.pooled_k[None], x.pooled_v[None], x.spec.block_size, x.scale
    )
    o, lse = ref.cmp_attention(x.q, x.k_cmp, x.v_cmp, x.positions, x.spec, softmax_scale=x.scale)
    assert_near(o, want[0])
    assert_near(lse, want_lse[0])


@pytest.mark.parametrize("size", [*SIZES, *SMALL_GROUPS], ids=str)
def test_selection_equals_fla_in_score(size: tuple[int, ...]) -> None:
    x = make_inputs(size)
    scores = our_scores(x)
    ours, theirs = ref.select_blocks(scores, x.positions, x.spec), fla_topk(x)
    assert torch.equal((ours >= 0).sum(dim=-1), (theirs >= 0).sum(dim=-1))
    for i, position in enumerate(x.positions.tolist()):
        current = position // x.spec.block_size
        for h in range(scores.shape[1]):
            chosen = [{j for j in row[i, h].tolist() if j >= 0} for row in (ours, theirs)]
            forced = {0, max(0, current - 1), current}
            assert forced <= chosen[0] and forced <= chosen[1]
            totals = [scores[i, h, sorted(blocks - forced)].sum() for blocks in chosen]
            assert_near(totals[0], totals[1])


@pytest.mark.parametrize("size", [*SIZES, *SMALL_GROUPS], ids=str)
def test_slc_attention_equals_fla(size: tuple[int, ...]) -> None:
    x = make_inputs(size)
    block_indices = fla_topk(x)
    want = naive.naive_nsa_selection(
        x.q[None], x.k[None], x.v[None], block_indices[None], x.spec.block_size, x.scale
    )
    o, _ = ref.slc_attention(
        x.q, x.k, x.v, block_indices, x.positions, x.spec, softmax_scale=x.scale
    )
    assert_near(o, want[0])


def dense_window(q: Tensor, k: Tensor, v: Tensor, *, window_size: tuple[int, int]) -> Tensor:
    """Causal attention to the last window_size[0] tokens and the own one, as flash-attn counts."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    mask = (distance >= 0) & (distance <= window_size[0])
    group_size = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group_size, dim=1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
    return o.transpose(1, 2)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("window_size", [0, 17])
def test_nsa_attention_equals_fla(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], window_size: int
) -> None:
    x = make_inputs(size, window_size)

    def mean_pooling(states: Tensor, block_size: int, cu_seqlens: None) -> Tensor:
        assert cu_seqlens is None
        return pool(states[0], block_size)[None]

    def flash_attn(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
    ) -> Tensor:
        assert causal and window_size[1] == 0
        return dense_window(q, k, v, window_size=window_size)

    # These two need a GPU; all else of naive_nsa is plain PyTorch.
    monkeypatch.setattr(naive, "mean_pooling", mean_pooling)
    monkeypatch.setattr(naive, "flash_attn_func", flash_attn)
    gen = torch.Generator().manual_seed(7)
    gates = torch.rand(*x.q.shape[:2], 3, generator=gen)
    want, block_indices = naive.naive_nsa(
        x.q[None],
        x.k[None],
        x.v[None],
        g_cmp=gates[None, ..., 0],
        g_slc=gates[None, ..., 1],
        g_swa=gates[None, ..., 2],
        block_counts=x.spec.num_selected_blocks,
        block_size=x.spec.block_size,
        window_size=window_size,
        return_block_indices=True,
    )
    o = ref.nsa_attention(
        x.q,
        x.k,
        x.v,
        x.k_cmp,
        x.v_cmp,
        gates,
        x.positions,
        x.spec,
        softmax_scale=x.scale,
        block_indices=block_indices[0],
    )
    assert_near(o, want[0])
