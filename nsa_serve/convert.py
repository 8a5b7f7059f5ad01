"""Rewrites a checkpoint in the documented layout: canonical weight names, an `nsa` section.

    another family (fla, llama-nsa, GGUF)   renamed, and K/V in half-rotation order
    a dense Llama, with --nsa-config         gets gates: zero weights and the biases that were asked
                                             for, so that every token starts with these gates

A tensor is read, renamed and written as it is; a shard is all that is in memory.
"""

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.gguf_tokenizer import read_gguf_tokenizer
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.native_config import native_config
from nsa_serve.models.safetensors_files import has_safetensors, read_weight_index
from nsa_serve.models.weight_shapes import expected_weights
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
_GATE = "g_proj"

Gates = tuple[float, float, float]


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
    gates: Gates | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Write `source` into the folder `target`, new or empty, in the native layout.

    gates: of (cmp, slc, swa), each in (0, 1), for a source that has no gate weights.

    Raises ModelError when the source is not complete, has something that the layout cannot say, or
    lacks gates and none are given (or has gates, and some are); and when `target` has files.
    """
    config = load_model_config(source)
    before = _without_gates(source, config, gates)
    after = _with_gates(config) if before is not config else config
    after = dataclasses.replace(after, family="llama")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty folder; name a new one")
    target.mkdir(parents=True, exist_ok=True)
    _write_config(target, after)
    _write_tokenizer(source, target)
    shards = _Shards(target, shard_bytes)
    for name, tensor in stream_checkpoint(source, before, on_progress):
        shards.add(name, tensor)
    new = _new_gates(after, gates) if before is not config and gates is not None else {}
    for name, tensor in new.items():
        shards.add(name, tensor)
    shards.finish()
    missing = expected_weights(after).keys() - shards.weight_map.keys()
    assert not missing, f"weights were not written: {sorted(missing)[:3]}"
    return Conversion(after, shards.num_bytes, shards.num_shards, tuple(new))


def _without_gates(source: ModelSource, config: ModelConfig, gates: Gates | None) -> ModelConfig:
    """Return the config that the source's weights fit: without learned gates if it has none."""
    has_gates = _has_weight(source, config, f"model.layers.0.self_attn.{_GATE}.weight")
    if config.nsa.gate != "linear" or has_gates:
        if gates is not None:
            raise ModelError(
                "gates are for a checkpoint without gate weights whose `nsa` section says "
                f'"gate": "linear"; here the gate is {config.nsa.gate!r} and the checkpoint '
                f"{'has' if has_gates else 'has no'} {_GATE}"
            )
        return config
    if gates is None:
        raise ModelError(
            f'the checkpoint has no {_GATE} weights, and the `nsa` section says "gate": "linear": '
            "say with --gates which values they start with, such as --gates 0.5 0.5 0.9 (cmp, slc, "
            'swa), or use "gate": "constant"'
        )
    if not all(0 < gate < 1 for gate in gates):
        raise ModelError(f"gates must lie between 0 and 1, both excluded, got {gates}")
    return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, gate="constant"))


def _with_gates(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, gate_bias=True))


def _new_gates(config: ModelConfig, gates: Gates) -> dict[str, Tensor]:
    """Return gate projections that give every token the same gates: sigmoid of the bias."""
    dtype = getattr(torch, config.checkpoint_dtype)
    logits = torch.tensor([math.log(gate / (1 - gate)) for gate in gates], dtype=dtype)
    rows = 3 * config.num_q_heads
    found: dict[str, Tensor] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn.{_GATE}."
        found[prefix + "weight"] = torch.zeros(rows, config.hidden_size, dtype=dtype)
        # Rows are (head, branch), branch fastest.
        found[prefix + "bias"] = logits.repeat(config.num_q_heads)
    return found


def _has_weight(source: ModelSource, config: ModelConfig, canonical: str) -> bool:
    if source.folder is None or not has_safetensors(source.folder):
        return False
    return checkpoint_name(source, config, canonical) in read_weight_index(source.folder)


def _write_config(target: Path, config: ModelConfig) -> None:
    path = target / "config.json"
    path.write_text(json.dumps(native_config(config), indent=2) + "\n")
    read = load_model_config(ModelSource(name=target.name, folder=target))
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        path.unlink()
        raise ModelError(
            "the native layout cannot say what this checkpoint has in "
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
