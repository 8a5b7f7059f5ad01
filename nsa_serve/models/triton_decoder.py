"""The decoder on a GPU: a layer is four fused linears and the operator.

T tokens of the step, M rows, K inputs and N outputs of a matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_kernels.gpu.linear import Rotary, linear
from nsa_kernels.gpu.linear_fp8 import linear_fp8
from nsa_kernels.ops import AttnPlan, CompressionMLP, LayerCache
from nsa_serve.config import ModelConfig
from nsa_serve.models.device_weights import SCALE_SUFFIX, Weights
from nsa_serve.models.layers import RotaryEmbedding
from nsa_serve.models.nsa_attention import NSAOperator
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


class TritonLayer(nn.Module):
    """Pre-norm attention and MLP around a plain residual stream.

    prefix: of the layer's names in `weights`, which are those of a `WeightLayout`; taken out.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        super().__init__()
        eps, attn, mlp = config.rms_norm_eps, prefix + "self_attn.", prefix + "mlp."
        compression = None
        if config.nsa.compression == "mlp":
            compression = (_make_mlp(weights, attn + "cmp_k."), _make_mlp(weights, attn + "cmp_v."))
        self.head_dim = config.head_dim
        self.attn_norm = (weights.pop(prefix + "input_layernorm.weight"), eps)
        self.qkvg = FusedLinear(weights, attn + "qkvg")
        self.attend = NSAOperator(config, compression)
        self.out = FusedLinear(weights, attn + "o_proj")
        self.mlp_norm = (weights.pop(prefix + "post_attention_layernorm.weight"), eps)
        self.gate_up = FusedLinear(weights, mlp + "gate_up")
        self.down = FusedLinear(weights, mlp + "down_proj")

    def forward(self, x: Tensor, rotary: Rotary, cache: LayerCache, plan: AttnPlan) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        fused = self.qkvg(x, norm=self.attn_norm, rotary=rotary)
        qk = fused[:, : self.attend.qk_width].unflatten(-1, (-1, self.head_dim))
        x = self.out(self.attend(qk, fused, cache, plan), residual=x)
        hidden = self.gate_up(x, norm=self.mlp_norm, gated=True)
        result: Tensor = self.down(hidden, residual=x)
        return result


class TritonDecoder(nn.Module):
    """Embedding, layers, final norm and head.

    weights: by the names of a `WeightLayout`, all on one device; taken out.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, max_positions: int) -> None:
        super().__init__()
        self.embedding = weights.pop(EMBEDDING)
        self.layers = nn.ModuleList(
            TritonLayer(config, weights, f"model.layers.{i}.") for i in range(config.num_layers)
        )
        self.norm = (weights.pop(FINAL_NORM), config.rms_norm_eps)
        self.head = self.embedding if config.tie_word_embeddings else weights.pop(LM_HEAD)
        self.num_rotated_heads = config.num_q_heads + config.num_kv_heads
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
        return linear(hidden, self.head, norm=self.norm, out_dtype=torch.float32, out=out)


def _make_mlp(weights: Weights, prefix: str) -> CompressionMLP:
    names = ("pos", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return CompressionMLP(*(weights.pop(prefix + name) for name in names))
