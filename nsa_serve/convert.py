"""Rewrites a checkpoint in a documented layout: canonical weight names, an `nsa` section.

    another family (fla, llama-nsa, GGUF)   renamed, and K/V in half-rotation order
    a dense Llama, with --nsa-config         gets gates: zero weights and the biases that were asked
                                             for, so that every token starts with these gates
    to `nsa_moe`                             beside that, K/V that the branches shared are written
                                             once for each: the same tokens, until it is trained on

A tensor is read, renamed and written as it is; a shard is all that is in memory.
"""

import dataclasses
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.gguf_tokenizer import read_gguf_tokenizer
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.native_config import native_config, nsa_moe_config
from nsa_serve.models.safetensors_files import has_safetensors, read_weight_index
from nsa_serve.models.weight_shapes import KV_BRANCHES, expected_weights
from nsa_serve.models.weights import OnProgress, stream_checkpoint

DEFAULT_SHARD_BYTES = 4 << 30

# What a folder has beside config.json and weights.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What a checkpoint with gates has, by the kind of gate.
_GATE_WEIGHTS = {"linear": "g_proj.weight", "mlp": "gate.fc1.weight"}
_SHARED_KV = re.compile(r"(model\.layers\.\d+\.self_attn\.[kv])(_proj\.(?:weight|bias))")
_SEED = 0

Gates = tuple[float, float, float]
Layout = Literal["native", "nsa_moe"]
LAYOUTS: tuple[Layout, ...] = ("native", "nsa_moe")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written. new_weights: names that the source did not have."""

    config: ModelConfig
    num_bytes: int
    num_shards: int
    new_weights: tuple[str, ...]


def convert(
    source: ModelSource,
    target: Path,
    *,
    layout: Layout = "native",
    gates: Gates | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Write `source` into the folder `target`, new or empty.

    layout: "native" (`llama` with an `nsa` section), or "nsa_moe", where every branch has keys and
    values of its own: copies of those that the source's branches share.
    gates: of (cmp, slc, swa), each in (0, 1), for a source that has no gate weights.

    Raises ModelError when the source is not complete, has something that the layout cannot say, or
    lacks gates and none are given (or has gates, and some are); and when `target` has files.
    """
    config = load_model_config(source)
    before = _without_gates(source, config, gates)
    after = _with_gates(config) if before is not config else config
    after = _in_layout(after, layout)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty folder; name a new one")
    target.mkdir(parents=True, exist_ok=True)
    _write_config(target, after, layout)
    _write_tokenizer(source, target)
    shards = _Shards(target, shard_bytes)
    for name, tensor in stream_checkpoint(source, before, on_progress):
        for number, own_name in enumerate(_own_names(name, after)):
            # A file holds no tensor twice.
            shards.add(own_name, tensor.clone() if number else tensor)
    new = _new_gates(after, gates) if before is not config and gates is not None else {}
    for name, tensor in new.items():
        shards.add(name, tensor)
    shards.finish()
    missing = expected_weights(after).keys() - shards.weight_map.keys()
    assert not missing, f"weights were not written: {sorted(missing)[:3]}"
    return Conversion(after, shards.num_bytes, shards.num_shards, tuple(new))


def _in_layout(config: ModelConfig, layout: Layout) -> ModelConfig:
    if layout == "native":
        return dataclasses.replace(config, family="llama")
    if config.nsa.lse_len:
        raise ModelError(
            f"the source has coarse windows (nsa.lse_len {config.nsa.lse_len}), whose keys are "
            "those that the branches share: nsa_moe, with keys of its own for every branch, cannot "
            "have them"
        )
    return dataclasses.replace(config, family="nsa_moe", kv_per_branch=True)


def _own_names(name: str, config: ModelConfig) -> list[str]:
    """Return the names under which a source's weight is written: one for each branch of K/V."""
    shared = _SHARED_KV.fullmatch(name)
    if shared is None or not config.kv_per_branch:
        return [name]
    return [f"{shared[1]}_{branch}{shared[2]}" for branch in KV_BRANCHES]


def _without_gates(source: ModelSource, config: ModelConfig, gates: Gates | None) -> ModelConfig:
    """Return the config that the source's weights fit: without learned gates if it has none."""
    gate = _GATE_WEIGHTS.get(config.nsa.gate)
    # An adapter is refused unless it brings them.
    has_gates = gate is not None and (
        source.adapter is not None
        or _has_weight(source, config, f"model.layers.0.self_attn.{gate}")
    )
    if gate is None or has_gates:
        if gates is not None:
            raise ModelError(
                "gates are for a checkpoint without gate weights whose `nsa` section says "
                f'"gate": "linear" or "mlp"; here the gate is {config.nsa.gate!r} and the '
                f"checkpoint {f'has {gate}' if has_gates else 'needs none'}"
            )
        return config
    if gates is None:
        raise ModelError(
            f"the checkpoint has no {gate}, and the `nsa` section says "
            f'"gate": "{config.nsa.gate}": '
            "say with --gates which values they start with, such as --gates 0.5 0.5 0.9 (cmp, slc, "
            'swa), or use "gate": "constant"'
        )
    if not all(0 < gate < 1 for gate in gates):
        raise ModelError(f"gates must lie between 0 and 1, both excluded, got {gates}")
    return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, gate="constant"))


def _with_gates(config: ModelConfig) -> ModelConfig:
    if config.nsa.gate != "linear":
        return config
    return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, gate_bias=True))


def _new_gates(config: ModelConfig, gates: Gates) -> dict[str, Tensor]:
    """Return gate projections that give every token the same gates: sigmoid of the bias.

    The hidden layer of an MLP is drawn: with zeros on both sides of it nothing could be learned.
    """
    dtype = getattr(torch, config.checkpoint_dtype)
    generator = torch.Generator().manual_seed(_SEED)
    logits = torch.tensor([math.log(gate / (1 - gate)) for gate in gates], dtype=dtype)
    rows = 3 * config.num_q_heads
    found: dict[str, Tensor] = {}
    for layer in range(config.num_layers):
        prefix, width = f"model.layers.{layer}.self_attn.g_proj.", config.hidden_size
        if config.nsa.gate == "mlp":
            width, prefix = config.nsa.gate_hidden_size, f"model.layers.{layer}.self_attn.gate."
            drawn = torch.randn(width, config.hidden_size, generator=generator)
            found[prefix + "fc1.weight"] = (drawn * config.hidden_size**-0.5).to(dtype)
            found[prefix + "fc1.bias"] = torch.zeros(width, dtype=dtype)
            prefix += "fc2."
        found[prefix + "weight"] = torch.zeros(rows, width, dtype=dtype)
        # Rows are (head, branch), branch fastest.
        found[prefix + "bias"] = logits.repeat(config.num_q_heads)
    return found


def _has_weight(source: ModelSource, config: ModelConfig, canonical: str) -> bool:
    if source.folder is None or not has_safetensors(source.folder):
        return False
    return checkpoint_name(source, config, canonical) in read_weight_index(source.folder)


def _write_config(target: Path, config: ModelConfig, layout: Layout) -> None:
    path = target / "config.json"
    fields = native_config(config) if layout == "native" else nsa_moe_config(config)
    path.write_text(json.dumps(fields, indent=2) + "\n")
    read = load_model_config(ModelSource(name=target.name, folder=target))
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        path.unlink()
        raise ModelError(
            f"the {layout} layout cannot say what this checkpoint has in "
            f"{', '.join(f'{name} ({getattr(config, name)!r})' for name in lost)}"
        )


def _write_tokenizer(source: ModelSource, target: Path) -> None:
    if source.folder is not None:
        for name in _COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, target / name)
        return
    assert source.gguf is not None, "a source has a folder or a GGUF file"
    parts = read_gguf_tokenizer(source.gguf)
    parts.backend.save(str(target / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **parts.special_tokens,
        "add_bos_token": parts.add_bos,
        "add_eos_token": parts.add_eos,
    }
    if parts.chat_template is not None:
        settings["chat_template"] = parts.chat_template
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class _Shards:
    """Safetensors files of about `shard_bytes` each, and their index."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.num_bytes = 0
        self.weight_map: dict[str, int] = {}
        self.num_shards = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight; a full shard is written."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard, give the files the names that say how many there are, and index."""
        if self._pending:
            self._write()
        names = [
            f"model-{number:05d}-of-{self.num_shards:05d}.safetensors"
            for number in range(1, self.num_shards + 1)
        ]
        if self.num_shards == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._path(number).rename(self.folder / name)
        if self.num_shards > 1:
            index = {
                "metadata": {"total_size": self.num_bytes},
                "weight_map": {name: names[shard] for name, shard in self.weight_map.items()},
            }
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _write(self) -> None:
        save_file(self._pending, self._path(self.num_shards), metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self._pending, self.num_shards)
        self.num_shards += 1
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        # Not a name that a loader takes for a whole shard, should the conversion break off.
        return self.folder / f"shard-{number:05d}.partial"
