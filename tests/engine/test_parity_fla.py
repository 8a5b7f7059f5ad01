"""Random `nsa` and `llama-nsa` checkpoints give fla's logits, at every position, in fp32.

The oracle is a forward pass written here from the checkpoint's own names, with the attention of
fla's `naive` functions: no line of it is ours. `llama-nsa` selects as the published kernel does,
which fla no longer has; its running top-k is simulated chunk by chunk.

One pass over NUM_TOKENS tokens is a test of every shorter length too, since position t depends on
the tokens up to t only. It crosses blocks of 8 and 16, windows of 24, selections of 64 tokens.
"""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from nsa_kernels.metadata import build_metadata
from nsa_serve.engine import Engine
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.weights import expected_weights
from tests.engine.engine_runs import make_engine, make_prompt
from tests.util import write_checkpoint

with warnings.catch_warnings():
    # On import fla warns that there is no GPU and no flash-attn; its naive functions need neither.
    warnings.simplefilter("ignore")
    from fla.models.nsa import NSAConfig as FlaConfig
    from fla.models.nsa import NSAForCausalLM
    from fla.ops.nsa import naive

NUM_TOKENS = 211
# Logits are of size 10. Both sides sum in fp32 in orders of their own, and sharp attention makes
# 1e-6 of a score 1e-5 of a logit: 2e-5 is seen, and a wrong block or window costs 1e-1 and more.
TOLERANCE = 5e-5
# fla's kernels, and its naive whole, want groups of 16 query heads or more.
SHAPE = {"num_q_heads": 32, "num_kv_heads": 2, "head_dim": 16, "num_layers": 2}


@pytest.fixture(scope="module", params=["nsa", "llama-nsa"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(root, request.param, seed=11, **SHAPE)


def pool(x: Tensor, block_size: int) -> Tensor:
    """Average chunks of [T, H, D] as fla's mean_pooling does: the last, incomplete one too."""
    return torch.stack([chunk.mean(dim=0) for chunk in torch.split(x, block_size)])


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """Stand in for flash-attn, which needs a GPU: [1, T, heads, D]."""
    assert causal and window_size[1] == 0
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    mask = (distance >= 0) & (distance <= window_size[0])
    group_size = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group_size, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def fla_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, config: Any) -> Tensor:
    """fla's whole: [T, heads, D] and gates [T, HQ, 3] -> [T, HQ, D]."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive, "mean_pooling", lambda x, size, _: pool(x[0], size)[None])
        patch.setattr(naive, "flash_attn_func", window_attention)
        result: Tensor = naive.naive_nsa(
            q[None],
            k[None],
            v[None],
            g_cmp=gates[None, ..., 0],
            g_slc=gates[None, ..., 1],
            g_swa=gates[None, ..., 2],
            block_counts=config["block_counts"],
            block_size=config["block_size"],
            window_size=config["window_size"],
        )
    return result.reshape(q.shape)


def published_blocks(probs: Tensor, position: int, block_size: int) -> list[int]:
    """The published kernel's choice for one query and KV head; probs: of each complete block.

    Candidates come in chunks of block_size blocks. The first chunk is kept as it is; each further
    one is merged with what was kept, half of the places for either.
    """
    current, half = position // block_size, block_size // 2
    score = {block: float(probs[block]) for block in range(current)}
    score[current] = float("inf")

    def best(blocks: Sequence[int], count: int) -> list[int]:
        return sorted(blocks, key=lambda block: -score[block])[:count]

    blocks = range(current + 1)
    chunks = [blocks[i : i + block_size] for i in range(0, len(blocks), block_size)]
    kept = list(chunks[0])
    for chunk in chunks[1:]:
        kept = best(kept, half) + best(chunk, half)
    return kept


def published_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, config: Any) -> Tensor:
    """The attention of zen-E/NSA-1B's code, from fla's branches and the choice above."""
    size, scale = config["block_size"], q.shape[-1] ** -0.5
    num_tokens, num_q_heads, num_kv_heads = q.shape[0], q.shape[1], k.shape[1]
    pooled_k, pooled_v = pool(k, size), pool(v, size)
    o_cmp, _ = naive.naive_nsa_compression(q[None], pooled_k[None], pooled_v[None], size, scale)
    block_indices = torch.full((num_tokens, num_kv_heads, config["block_counts"]), -1)
    grouped = q.unflatten(1, (num_kv_heads, num_q_heads // num_kv_heads))
    for position, head in itertools.product(range(num_tokens), range(num_kv_heads)):
        num_complete = (position + 1) // size
        scores = grouped[position, head] @ pooled_k[:num_complete, head].T * scale
        blocks = published_blocks(scores.softmax(-1).sum(0), position, size)
        block_indices[position, head, : len(blocks)] = torch.tensor(blocks)
    o_slc = naive.naive_nsa_selection(q[None], k[None], v[None], block_indices[None], size, scale)
    o_swa = window_attention(
        q[None], k[None], v[None], causal=True, window_size=(config["window_size"] - 1, 0)
    )
    o = gates[..., :1] * o_cmp[0] + gates[..., 1:2] * o_slc[0] + gates[..., 2:] * o_swa[0]
    return o.reshape(q.shape)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply the half-rotation rotary embedding to [T, heads, D]."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[0])[:, None, None] * frequency
    left, right = x[..., :half], x[..., half:]
    turned = (left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin())
    return torch.cat(turned, dim=-1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def oracle_logits(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """Run the checkpoint's tokens through the oracle: [T, vocab_size]."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    is_fla = config["model_type"] == "nsa"
    attend = fla_attention if is_fla else published_attention
    embed, attn = ("embeddings", "attn") if is_fla else ("embed_tokens", "self_attn")
    norms = ("attn_norm", "mlp_norm") if is_fla else ("input_layernorm", "post_attention_layernorm")
    x = weights[f"model.{embed}.weight"][torch.tensor(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        h = rms_norm(x, w[norms[0]])
        q, k, v = (
            (h @ w[f"{attn}.{part}_proj"].T).unflatten(-1, (-1, config["head_dim"]))
            for part in "qkv"
        )
        gates = (h @ w[f"{attn}.g_proj"].T).unflatten(-1, (-1, 3)).sigmoid()
        theta = config["rope_theta"]
        o = attend(rotate(q, theta), rotate(k, theta), v, gates, config)
        x = x + o.flatten(1) @ w[f"{attn}.o_proj"].T
        h = rms_norm(x, w[norms[1]])
        h = F.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)
        x = x + h @ w["mlp.down_proj"].T
    return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@torch.inference_mode()
def engine_logits(engine: Engine, token_ids: Sequence[int], pieces: Sequence[int]) -> Tensor:
    """Run tokens in pieces through the engine's model and cache; a piece of one is a decode row."""
    runner, start, logits = engine.runner, 0, []
    page_size = engine.info.page_size
    # Not in order, so that page ids are not mistaken for positions.
    pages = list(range(1, 1 + -(-len(token_ids) // page_size)))[::-1]
    for num_tokens in pieces:
        stop = start + num_tokens
        meta = build_metadata(
            [pages[: -(-stop // page_size)]],
            [start],
            [num_tokens],
            runner.model.config.nsa,
            num_decode_rows=int(num_tokens == 1),
        )
        plan = runner.model.plan(meta)
        ids = torch.tensor(token_ids[start:stop])
        hidden = runner.model(ids, meta.positions, plan, runner.cache.layers)
        logits.append(runner.model.logits(hidden))
        start = stop
    assert start == len(token_ids)
    return torch.cat(logits)


PIECES: Mapping[str, Sequence[int]] = {
    "whole": [NUM_TOKENS],
    "chunks": [3, 5, 8, 1, 16, 47, 64, 2, 65],
    "pages": [*[16] * 13, 3],
    "decode": [1] * NUM_TOKENS,
    "prefill-decode": [100, *[1] * 60, 51],
}


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Tensor:
    return oracle_logits(folder, make_prompt(NUM_TOKENS))


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_logits_equal_fla(folder: Path, wanted: Tensor, pieces: Sequence[int]) -> None:
    assert sum(pieces) == NUM_TOKENS
    got = engine_logits(make_engine(folder), make_prompt(NUM_TOKENS), pieces)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def test_checkpoint_names_and_shapes_are_those_of_fla(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "nsa", seed=3, **SHAPE)
    raw = json.loads((folder / "config.json").read_text())
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NSAForCausalLM(FlaConfig(**raw))
    source = ModelSource(name="m", folder=folder)
    config = load_model_config(source)
    ours = {
        checkpoint_name(source, config, name): shape
        for name, shape in expected_weights(config).items()
    }
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == theirs
