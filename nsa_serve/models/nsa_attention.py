"""The attention layer: projections, rotary embedding, gates, and the NSA operator.

T tokens of the step, HQ/H query and KV heads, D and Dv dimensions of keys and values.
"""

from collections.abc import Callable

from torch import Tensor, nn

from nsa_kernels.ops import AttnPlan, BranchKV, CompressionMLP, LayerCache, nsa_attention
from nsa_serve.config import ModelConfig
from nsa_serve.models.layers import Linear, apply_rotary

Compression = tuple[CompressionMLP, CompressionMLP]

GateOutput = Callable[[Tensor], Tensor]
"""The second layer of a gate MLP: silu's input [T, gate_hidden_size] -> logits [T, 3 * HQ]."""


class NSAOperator:
    """The operator between a layer's projections.

    compression: MLPs of keys and values, None for mean pooling. gate_output: of gate "mlp", else
    None.

    A token's projections are one row of `fused`: q | k | v | gates where the branches share keys
    and values, else q | k_slc | k_cmp | k_swa | v_slc | v_cmp | v_swa | gates, where all that are
    rotated come first. gates: logits [3 * HQ] of gate "linear", the hidden layer of gate "mlp".
    """

    def __init__(
        self,
        config: ModelConfig,
        compression: Compression | None,
        gate_output: GateOutput | None = None,
    ) -> None:
        self.spec = config.nsa
        self.softmax_scale = config.softmax_scale
        self.heads = (config.num_q_heads, config.num_kv_heads)
        self.head_dims = (config.head_dim, config.v_head_dim)
        self.is_per_branch = config.kv_per_branch
        num_kv_sets = 3 if config.kv_per_branch else 1
        self.num_rotated_heads = config.num_q_heads + num_kv_sets * config.num_kv_heads
        self.qk_width = self.num_rotated_heads * config.head_dim
        self.v_width = num_kv_sets * config.num_kv_heads * config.v_head_dim
        self.compression = compression
        self.gate_output = gate_output
        self.gate_constant = config.nsa.gate_constant if config.nsa.gate == "constant" else None
        # Of gates (cmp, slc, swa) that begin one column early, the last is slc's.
        self.gate_shift = 1 if config.nsa.window_gate == "slc" else 0

    def __call__(self, qk: Tensor, fused: Tensor, cache: LayerCache, plan: AttnPlan) -> Tensor:
        """Attend, and append the step's tokens to the cache: [T, HQ * Dv].

        qk: [T, rotated heads, D], rotated. fused: the rows, of which v and the gates are read.
        """
        num_q_heads, num_kv_heads = self.heads
        v_head_dim = self.head_dims[1]
        gates_from = self.qk_width + self.v_width
        values = fused[:, self.qk_width : gates_from].unflatten(-1, (-1, v_head_dim))
        keys = qk[:, num_q_heads:]
        branch_kv = None
        if self.is_per_branch:
            keys, k_cmp, k_swa = keys.split(num_kv_heads, dim=1)
            values, v_cmp, v_swa = values.split(num_kv_heads, dim=1)
            branch_kv = BranchKV(k_cmp=k_cmp, v_cmp=v_cmp, k_swa=k_swa, v_swa=v_swa)
        o = nsa_attention(
            qk[:, :num_q_heads],
            keys,
            values,
            self._gates(self._gate_columns(fused, gates_from)),
            cache,
            plan,
            self.spec,
            softmax_scale=self.softmax_scale,
            compression=self.compression,
            branch_kv=branch_kv,
            sigmoid_gates=self.gate_constant is None,
        )
        return o.reshape(len(fused), num_q_heads * v_head_dim)

    def _gate_columns(self, fused: Tensor, gates_from: int) -> Tensor:
        if not self.gate_shift:
            return fused[:, gates_from:]
        return fused[:, gates_from - self.gate_shift : fused.shape[1] - self.gate_shift]

    def _gates(self, projected: Tensor) -> Tensor | tuple[float, float, float]:
        """Return the gates' logits, [T, HQ, 3], or the constants."""
        if self.gate_constant is not None:
            return self.gate_constant
        if self.gate_output is not None:
            projected = self.gate_output(projected)
        gates: Tensor = projected.unflatten(-1, (self.heads[0], 3))
        return gates


class NSAAttention(nn.Module):
    """Self-attention by PyTorch's operators.

    qkvg: one matrix for all projections, in the order of `NSAOperator`.
    """

    def __init__(
        self,
        config: ModelConfig,
        qkvg: Linear,
        out: Linear,
        compression: Compression | None,
        gate_output: GateOutput | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkvg = qkvg
        self.out = out
        self.attend = NSAOperator(config, compression, gate_output)

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
