"""The attention layer: projections, rotary embedding, gates, and the NSA operator.

T tokens of the step, HQ/H query and KV heads, D and Dv dimensions of keys and values.
"""

from torch import Tensor, nn

from nsa_kernels.ops import AttnPlan, CompressionMLP, LayerCache, nsa_attention
from nsa_serve.config import ModelConfig
from nsa_serve.models.layers import Linear, apply_rotary

Compression = tuple[CompressionMLP, CompressionMLP]


class NSAOperator:
    """The operator between a layer's projections; K/V are shared by the three branches.

    compression: MLPs of keys and values, None for mean pooling.
    """

    def __init__(self, config: ModelConfig, compression: Compression | None) -> None:
        self.spec = config.nsa
        self.softmax_scale = config.softmax_scale
        self.heads = (config.num_q_heads, config.num_kv_heads)
        self.v_head_dim = config.v_head_dim
        self.qk_width = (config.num_q_heads + config.num_kv_heads) * config.head_dim
        self.v_width = config.num_kv_heads * config.v_head_dim
        self.compression = compression
        self.gate_constant = config.nsa.gate_constant if config.nsa.gate == "constant" else None

    def __call__(self, qk: Tensor, fused: Tensor, cache: LayerCache, plan: AttnPlan) -> Tensor:
        """Attend, and append the step's tokens to the cache: [T, HQ * Dv].

        qk: [T, HQ + H, D], rotated. fused: [T, q | k | v | gates], of which v and the gates are
        read.
        """
        num_q_heads, num_kv_heads = self.heads
        gates_from = self.qk_width + self.v_width
        v = fused[:, self.qk_width : gates_from].unflatten(-1, (num_kv_heads, self.v_head_dim))
        gates: Tensor | tuple[float, float, float]
        if self.gate_constant is not None:
            gates = self.gate_constant
        else:
            gates = fused[:, gates_from:].unflatten(-1, (num_q_heads, 3))
        o = nsa_attention(
            qk[:, :num_q_heads],
            qk[:, num_q_heads:],
            v,
            gates,
            cache,
            plan,
            self.spec,
            softmax_scale=self.softmax_scale,
            compression=self.compression,
            sigmoid_gates=self.gate_constant is None,
        )
        return o.reshape(len(fused), num_q_heads * self.v_head_dim)


class NSAAttention(nn.Module):
    """Self-attention by PyTorch's operators.

    qkvg: one matrix for queries, keys, values and (when learned) gates, in that order.
    """

    def __init__(
        self, config: ModelConfig, qkvg: Linear, out: Linear, compression: Compression | None
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkvg = qkvg
        self.out = out
        self.attend = NSAOperator(config, compression)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttnPlan,
    ) -> Tensor:
        """Return residual + attention(x), [T, hidden]; appends the step's tokens to the cache."""
        fused = self.qkvg(x)
        qk = fused[:, : self.attend.qk_width].unflatten(-1, (-1, self.head_dim))
        o = self.attend(apply_rotary(qk, rotary), fused, cache, plan)
        return self.out.plus(o, residual)
