"""The decoder that all present families share: Llama's, with NSA in place of attention."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from nsa_kernels.ops import (
    AttnMetadata,
    AttnPlan,
    BlockTrace,
    Branches,
    LayerCache,
    plan_attention,
)
from nsa_serve.config import BRANCHES, ModelConfig
from nsa_serve.models.device_weights import Weights
from nsa_serve.models.torch_decoder import TorchDecoder
from nsa_serve.models.weight_shapes import EMBEDDING

if TYPE_CHECKING:
    from nsa_serve.models.triton_decoder import TritonDecoder

Backend = Literal["torch", "triton"]


class NSATransformer(nn.Module):
    """A decoder in the dtype of its weights, and the plan of its attention.

    weights: emptied as they are taken. Backend "torch" wants canonical names (docs/models.md), as
    `load_weights` gives them, "triton" those of a `WeightLayout`, as of `load_device_weights`.
    backend: None is triton where the weights are on a GPU, else torch. Triton on a CPU is its
    interpreter, which is for tests.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        max_positions: int,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        embedding = weights[EMBEDDING]
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.backend = backend or ("triton" if self.device.type == "cuda" else "torch")
        make_decoder = _triton_decoder if self.backend == "triton" else TorchDecoder
        self.decoder = make_decoder(config, weights, max_positions=max_positions)
        self.branches = used_branches(config)
        if weights:
            raise AssertionError(f"weights were checked but not used: {sorted(weights)[:3]}")

    def plan(self, meta: AttnMetadata, trace: BlockTrace | None = None) -> AttnPlan:
        """Plan one step's attention; the plan holds for every layer, and `trace` records."""
        if self.backend == "triton" and self.device.type == "cpu":
            from nsa_kernels.gpu import plan as gpu_plan

            return gpu_plan.plan_attention(
                meta,
                self.config.nsa,
                num_q_heads=self.config.num_q_heads,
                num_kv_heads=self.config.num_kv_heads,
                dtype=self.dtype,
                device=self.device,
                branches=self.branches,
            )
        return plan_attention(
            meta,
            self.config.nsa,
            num_q_heads=self.config.num_q_heads,
            num_kv_heads=self.config.num_kv_heads,
            dtype=self.dtype,
            device=self.device,
            branches=self.branches,
            trace=trace,
        )

    def forward(
        self, input_ids: Tensor, positions: Tensor, plan: AttnPlan, caches: list[LayerCache]
    ) -> Tensor:
        """Run T tokens through all layers: hidden states [T, hidden] before the final norm.

        input_ids, positions: [T] int64 on the model's device; on a GPU positions may be int32.
        Nothing here waits for a GPU, and a step of decode rows can be captured in a CUDA graph.
        """
        hidden: Tensor = self.decoder(input_ids, positions, plan, caches)
        return hidden

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[R, hidden] -> [R, vocab_size] fp32, written to `out` if that is given."""
        result: Tensor = self.decoder.logits(hidden, out=out)
        return result


def used_branches(config: ModelConfig) -> Branches:
    """Return the branches whose output reaches the model.

    The dialect may have some only, and constant gates may switch some off.
    """
    nsa = config.nsa
    gates = nsa.gate_constant if nsa.gate == "constant" else (1.0, 1.0, 1.0)
    used = {
        name for name, gate in zip(BRANCHES, gates, strict=True) if gate and name in nsa.branches
    }
    return Branches(cmp="cmp" in used, slc="slc" in used, swa="swa" in used and nsa.window_size > 0)


def _triton_decoder(
    config: ModelConfig, weights: Weights, *, max_positions: int
) -> "TritonDecoder":
    # Imported here, so that a machine without a GPU never needs Triton.
    from nsa_serve.models.triton_decoder import TritonDecoder

    return TritonDecoder(config, weights, max_positions=max_positions)
