"""The decoder by PyTorch's operators, with oneDNN's linears: the CPU path.

T tokens of the step, R rows whose logits are wanted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_kernels.ops import AttnPlan, CompressionMLP, LayerCache
from nsa_serve.config import ModelConfig
from nsa_serve.models.device_weights import Weights
from nsa_serve.models.layers import GatedMLP, Linear, RMSNorm, RotaryEmbedding
from nsa_serve.models.moe import MoE
from nsa_serve.models.nsa_attention import NSAAttention
from nsa_serve.models.residual_stream import stream_scales
from nsa_serve.models.weight_shapes import EMBEDDING, FINAL_NORM, LM_HEAD


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP around a plain residual stream."""

    def __init__(
        self, attn_norm: RMSNorm, attn: NSAAttention, mlp_norm: RMSNorm, mlp: GatedMLP | MoE
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache, plan: AttnPlan
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        x = self.attn(self.attn_norm(x), x, rotary, cache, plan)
        result: Tensor = self.mlp(self.mlp_norm(x), x)
        return result


class TorchDecoder(nn.Module):
    """Embedding, layers, final norm and head.

    weights: by canonical name, emptied as they are taken, so that the unfused originals do not
    stay in memory beside the fused matrices.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, max_positions: int) -> None:
        super().__init__()
        self.embedding = weights.pop(EMBEDDING)
        self.layers = nn.ModuleList(
            _make_layer(config, weights, layer) for layer in range(config.num_layers)
        )
        self.embedding_scale, eps = stream_scales(config)
        self.logit_scale = config.logit_scale
        self.norm = RMSNorm(weights.pop(FINAL_NORM), eps)
        head = self.embedding if config.tie_word_embeddings else weights.pop(LM_HEAD)
        self.lm_head = Linear(head)
        self.rotary = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            max_positions,
            dtype=self.embedding.dtype,
        )

    def forward(
        self, input_ids: Tensor, positions: Tensor, plan: AttnPlan, caches: list[LayerCache]
    ) -> Tensor:
        """Return hidden states [T, hidden] before the final norm."""
        x = F.embedding(input_ids, self.embedding)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        rotary = self.rotary.at(positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, cache, plan)
        return x

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[R, hidden] -> [R, vocab_size] fp32, written to `out` if that is given."""
        result: Tensor = self.lm_head(self.norm(hidden)).float()
        if self.logit_scale != 1.0:
            result *= self.logit_scale
        return result if out is None else out.copy_(result)


def _make_layer(config: ModelConfig, weights: Weights, layer: int) -> DecoderLayer:
    prefix, (_, eps) = f"model.layers.{layer}.", stream_scales(config)
    return DecoderLayer(
        RMSNorm(weights.pop(prefix + "input_layernorm.weight"), eps),
        _make_attention(config, weights, prefix + "self_attn."),
        RMSNorm(weights.pop(prefix + "post_attention_layernorm.weight"), eps),
        _make_feed_forward(config, weights, prefix + "mlp.", layer),
    )


def _make_attention(config: ModelConfig, weights: Weights, prefix: str) -> NSAAttention:
    nsa = config.nsa
    if config.kv_per_branch:
        parts = [f"{kind}_{branch}_proj" for kind in "kv" for branch in ("slc", "cmp", "swa")]
    else:
        parts = ["k_proj", "v_proj"]
    parts = ["q_proj", *parts]
    gate_output = None
    if nsa.gate == "linear":
        parts.append("g_proj")
    elif nsa.gate == "mlp":
        parts.append("gate.fc1")
        gate_output = _GateOutput(_fused_linear(weights, [prefix + "gate.fc2"]))
    compression = None
    if nsa.compression == "mlp":
        compression = (
            _make_compression(weights, prefix + "cmp_k."),
            _make_compression(weights, prefix + "cmp_v."),
        )
    return NSAAttention(
        config,
        _fused_linear(weights, [prefix + part for part in parts]),
        _fused_linear(weights, [prefix + "o_proj"]),
        compression,
        gate_output,
    )


def _make_feed_forward(
    config: ModelConfig, weights: Weights, prefix: str, layer: int
) -> GatedMLP | MoE:
    moe = config.moe
    if moe is None or layer < moe.num_dense_layers:
        return _make_mlp(weights, prefix)
    return MoE(
        weights.pop(prefix + "router.weight"),
        [_make_mlp(weights, f"{prefix}experts.{i}.") for i in range(moe.num_experts)],
        _make_mlp(weights, prefix + "shared_experts.") if moe.num_shared_experts else None,
        moe.num_experts_per_token,
    )


def _make_mlp(weights: Weights, prefix: str) -> GatedMLP:
    return GatedMLP(
        *(_fused_linear(weights, [f"{prefix}{part}_proj"]) for part in ("gate", "up", "down"))
    )


class _GateOutput(nn.Module):
    """The second layer of a gate MLP, with the activation before it."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.linear(F.silu(hidden))
        return result


def _fused_linear(weights: Weights, names: list[str]) -> Linear:
    """Stack projections of one input; where only some have a bias, the others get zeros."""
    matrices = [weights.pop(name + ".weight") for name in names]
    biases = [weights.pop(name + ".bias", None) for name in names]
    bias = None
    if any(b is not None for b in biases):
        filled = [
            matrix.new_zeros(matrix.shape[0]) if b is None else b
            for matrix, b in zip(matrices, biases, strict=True)
        ]
        bias = torch.cat(filled)
    return Linear(matrices[0] if len(matrices) == 1 else torch.cat(matrices), bias)


def _make_compression(weights: Weights, prefix: str) -> CompressionMLP:
    names = ("pos", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return CompressionMLP(*(weights.pop(prefix + name) for name in names))
