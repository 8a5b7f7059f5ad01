"""The attention layer: projections, rotary embedding, gates, and the NSA operator.

T tokens of the step, HQ/H query and KV heads, D and Dv dimensions of keys and values.
"""

from torch import Tensor, nn

from nsa_kernels.ops import AttnPlan, CompressionMLP, LayerCache, nsa_attention
from nsa_serve.config import ModelConfig
from nsa_serve.models.layers import Linear, apply_rotary


class NSAAttention(nn.Module):
    """Self-attention with K/V shared by the three branches.

    qkvg: one matrix for queries, keys, values and (when learned) gates, in that order.
    compression: MLPs of keys and values, None for mean pooling.
    """

    def __init__(
        self,
        config: ModelConfig,
        qkvg: Linear,
        out: Linear,
        compression: tuple[CompressionMLP, CompressionMLP] | None,
    ) -> None:
        super().__init__()
        self.spec = config.nsa
        self.softmax_scale = config.softmax_scale
        self.heads = (config.num_q_heads, config.num_kv_heads)
        self.dims = (config.head_dim, config.v_head_dim)
        self.qkvg = qkvg
        self.out = out
        self.compression = compression
        self.gate_constant = config.nsa.gate_constant if config.nsa.gate == "constant" else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttnPlan,
    ) -> Tensor:
        """Return residual + attention(x), [T, hidden]; appends the step's tokens to the cache."""
        num_tokens = x.shape[0]
        (num_q_heads, num_kv_heads), (head_dim, v_head_dim) = self.heads, self.dims
        fused = self.qkvg(x)
        qk_width = (num_q_heads + num_kv_heads) * head_dim
        v_width = num_kv_heads * v_head_dim
        qk = apply_rotary(fused[:, :qk_width].unflatten(-1, (-1, head_dim)), rotary)
        v = fused[:, qk_width : qk_width + v_width].unflatten(-1, (num_kv_heads, v_head_dim))
        gates: Tensor | tuple[float, float, float]
        if self.gate_constant is not None:
            gates = self.gate_constant
        else:
            gates = fused[:, qk_width + v_width :].unflatten(-1, (num_q_heads, 3))
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
        return self.out.plus(o.reshape(num_tokens, num_q_heads * v_head_dim), residual)
