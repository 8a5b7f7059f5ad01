"""The decoder on a GPU: a layer is four fused linears, or two and experts, and the operator.

T tokens of the step, M rows, K inputs and N outputs of a matrix, E experts of width I.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_kernels.gpu import moe
from nsa_kernels.gpu.linear import linear
from nsa_kernels.gpu.linear_fp8 import linear_fp8
from nsa_kernels.gpu.linear_tile import Rotary
from nsa_kernels.gpu.plan import GpuPlan
from nsa_kernels.ops import AttnPlan, CompressionMLP, LayerCache
from nsa_serve.config import ModelConfig
from nsa_serve.models.device_weights import SCALE_SUFFIX, Weights
from nsa_serve.models.layers import RotaryEmbedding
from nsa_serve.models.nsa_attention import NSAOperator
from nsa_serve.models.residual_stream import stream_scales
from nsa_serve.models.weight_shapes import EMBEDDING, FINAL_NORM, LM_HEAD

Norm = tuple[Tensor, float]


class FusedLinear(nn.Module):
    """x W^T + b with what surrounds it: `nsa_kernels.gpu.linear.linear`, or that of `linear_fp8`.

    weight: [N, K]. Takes `name + ".weight"`, `".bias"` and, if it is quantized, its scales out of
    `weights`.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight = weights.pop(name + ".weight")
        self.bias = weights.pop(name + ".bias", None)
        self.scale = weights.pop(name + ".weight" + SCALE_SUFFIX, None)

    def forward(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """[M, K] -> [M, N], or [M, N / 2] when gated: silu of the first half times the second.

        The residual may be overwritten.
        """
        if self.scale is None:
            return linear(
                x,
                self.weight,
                self.bias,
                norm=norm,
                residual=residual,
                swiglu=gated,
                rotary=rotary,
                out=residual,
            )
        return linear_fp8(
            x,
            self.weight,
            self.scale,
            self.bias,
            norm=norm,
            residual=residual,
            swiglu=gated,
            rotary=rotary,
        )


class TritonMLP(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, weights: Weights, prefix: str, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.gate_up = FusedLinear(weights, prefix + "gate_up")
        self.down = FusedLinear(weights, prefix + "down_proj")

    def forward(self, x: Tensor, plan: AttnPlan) -> Tensor:
        """[T, hidden] -> [T, hidden]; x may be overwritten."""
        hidden = self.gate_up(x, norm=self.norm, gated=True)
        result: Tensor = self.down(hidden, residual=x)
        return result


class TritonMoE(nn.Module):
    """x + shared(norm(x)) + the weighted sum of the experts that each token is routed to.

    prefix: of router.weight [E, hidden], experts.gate_up.weight [E, 2I, hidden],
    experts.down.weight [E, hidden, I] and, if there are any, shared_experts. counters: of
    `moe.make_counters`; layers share them, as one runs after the other.
    """

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        norm: Norm,
        *,
        num_experts_per_token: int,
        has_shared: bool,
        counters: Tensor,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.router = weights.pop(prefix + "router.weight")
        self.gate_up = weights.pop(prefix + "experts.gate_up.weight")
        self.down = weights.pop(prefix + "experts.down.weight")
        self.num_experts_per_token = num_experts_per_token
        self.shared_gate_up = self.shared_down = None
        if has_shared:
            self.shared_gate_up = FusedLinear(weights, prefix + "shared_experts.gate_up")
            self.shared_down = FusedLinear(weights, prefix + "shared_experts.down_proj")
        self.counters = counters

    def forward(self, x: Tensor, plan: AttnPlan) -> Tensor:
        """[T, hidden] -> [T, hidden]; x may be overwritten."""
        row_lens = None
        if isinstance(plan, GpuPlan) and plan.prefill is None:
            # A row of a decode step that is padding would only have more experts read.
            row_lens = plan.seq_lens
        routing = moe.route(
            x,
            self.norm,
            self.router,
            self.num_experts_per_token,
            counters=self.counters,
            row_lens=row_lens,
        )
        if self.shared_gate_up is not None and self.shared_down is not None:
            hidden = self.shared_gate_up(routing.hidden, gated=True)
            x = self.shared_down(hidden, residual=x)
        return moe.routed_experts(routing, self.gate_up, self.down, residual=x, out=x)


class _GateOutput(nn.Module):
    """The second layer of a gate MLP, with the activation before it."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.linear = FusedLinear(weights, name)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, gate_hidden_size] -> logits [T, 3 * HQ]."""
        result: Tensor = self.linear(F.silu(hidden))
        return result


class TritonLayer(nn.Module):
    """Pre-norm attention and feed-forward around a plain residual stream.

    layer: its number; its names in `weights`, which are those of a `WeightLayout`, are taken out.
    counters: see `TritonMoE`.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, counters: Tensor) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}."
        attn = prefix + "self_attn."
        _, eps = stream_scales(config)
        compression = gate_output = None
        if config.nsa.compression == "mlp":
            compression = (_make_mlp(weights, attn + "cmp_k."), _make_mlp(weights, attn + "cmp_v."))
        if config.nsa.gate == "mlp":
            gate_output = _GateOutput(weights, attn + "gate.fc2")
        self.head_dim = config.head_dim
        self.attn_norm = (weights.pop(prefix + "input_layernorm.weight"), eps)
        self.qkvg = FusedLinear(weights, attn + "qkvg")
        self.attend = NSAOperator(config, compression, gate_output)
        self.out = FusedLinear(weights, attn + "o_proj")
        norm = (weights.pop(prefix + "post_attention_layernorm.weight"), eps)
        self.feed_forward: TritonMLP | TritonMoE
        if config.moe is None or layer < config.moe.num_dense_layers:
            self.feed_forward = TritonMLP(weights, prefix + "mlp.", norm)
        else:
            self.feed_forward = TritonMoE(
                weights,
                prefix + "mlp.",
                norm,
                num_experts_per_token=config.moe.num_experts_per_token,
                has_shared=config.moe.num_shared_experts > 0,
                counters=counters,
            )

    def forward(self, x: Tensor, rotary: Rotary, cache: LayerCache, plan: AttnPlan) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        fused = self.qkvg(x, norm=self.attn_norm, rotary=rotary)
        qk = fused[:, : self.attend.qk_width].unflatten(-1, (-1, self.head_dim))
        x = self.out(self.attend(qk, fused, cache, plan), residual=x)
        result: Tensor = self.feed_forward(x, plan)
        return result


class TritonDecoder(nn.Module):
    """Embedding, layers, final norm and head.

    weights: by the names of a `WeightLayout`, all on one device; taken out.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, max_positions: int) -> None:
        super().__init__()
        self.embedding = weights.pop(EMBEDDING)
        counters = moe.make_counters(self.embedding.device)
        self.layers = nn.ModuleList(
            TritonLayer(config, weights, layer, counters) for layer in range(config.num_layers)
        )
        self.embedding_scale, eps = stream_scales(config)
        self.logit_scale = config.logit_scale
        self.norm = (weights.pop(FINAL_NORM), eps)
        self.head = self.embedding if config.tie_word_embeddings else weights.pop(LM_HEAD)
        num_kv_sets = 3 if config.kv_per_branch else 1
        self.num_rotated_heads = config.num_q_heads + num_kv_sets * config.num_kv_heads
        self.rotary = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            max_positions,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
        )

    def forward(
        self, input_ids: Tensor, positions: Tensor, plan: AttnPlan, caches: list[LayerCache]
    ) -> Tensor:
        """Return hidden states [T, hidden] before the final norm."""
        x = F.embedding(input_ids, self.embedding)
        if self.embedding_scale != 1.0:
            x *= self.embedding_scale
        tables = self.rotary
        # Settled: the lookup above begins after whatever wrote the positions has ended.
        rotary = Rotary(
            tables.cos,
            tables.sin,
            positions,
            self.num_rotated_heads,
            tables.cos.shape[1],
            is_settled=True,
        )
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, cache, plan)
        return x

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[R, hidden] -> [R, vocab_size] fp32, not rounded to the run dtype in between."""
        result = linear(hidden, self.head, norm=self.norm, out_dtype=torch.float32, out=out)
        return result if self.logit_scale == 1.0 else result.mul_(self.logit_scale)


def _make_mlp(weights: Weights, prefix: str) -> CompressionMLP:
    names = ("pos", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return CompressionMLP(*(weights.pop(prefix + name) for name in names))
