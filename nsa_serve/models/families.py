"""The families of checkpoints: which config file means which, and what its weights are called.

model_type "nsa"            fla              fla.py
model_type "llama-nsa"      zen-E/NSA-1B     llama_nsa.py
model_type "llama" + `nsa`  native           native.py
GGUF architecture "llama"   native           gguf_llama.py
"""

import dataclasses
from pathlib import Path

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.config_file import read_json, read_nsa_section, read_token_ids
from nsa_serve.models.fla import fla_name, read_fla
from nsa_serve.models.gguf_llama import gguf_name, read_gguf_llama
from nsa_serve.models.llama_nsa import read_llama_nsa
from nsa_serve.models.native import read_native
from nsa_serve.models.safetensors_files import has_safetensors, read_weight_index

SUPPORTED_MODEL_TYPES = ("nsa", "llama-nsa", "llama")
"""Values of `model_type` in config.json that can be served."""


def load_model_config(source: ModelSource) -> ModelConfig:
    """Read what a checkpoint says about itself.

    Raises ModelError when the family is not supported, when a field is missing or wrong, and when
    a Llama checkpoint does not say how its attention is sparse.
    """
    nsa = None if source.nsa_section is None else read_nsa_section(source.nsa_section)
    if source.gguf is not None:
        return read_gguf_llama(source.gguf, nsa=nsa)
    assert source.folder is not None, "a source has a folder or a GGUF file"
    config = _read_folder(source.folder, nsa)
    return _add_generation_config(config, source.folder)


def checkpoint_name(source: ModelSource, config: ModelConfig, canonical: str) -> str:
    """Return what the checkpoint calls the weight that is `canonical` here."""
    if source.gguf is not None:
        return gguf_name(canonical)
    return fla_name(canonical) if config.family == "nsa" else canonical


def _read_folder(folder: Path, nsa: NSAConfig | None) -> ModelConfig:
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type == "nsa":
        return read_fla(raw, nsa=nsa, weight_shapes=_weight_shapes(folder))
    if model_type == "llama-nsa":
        return read_llama_nsa(raw, nsa=nsa)
    if model_type == "llama":
        return read_native(raw, nsa=nsa)
    message = (
        f"model_type {model_type!r} is not supported; supported are "
        f"{', '.join(SUPPORTED_MODEL_TYPES)} (llama with an `nsa` section), and GGUF files of the "
        "llama architecture"
    )
    if model_type == "minicpm":
        message += "; MiniCPM4 (InfLLM-v2) is not supported yet"
    raise ModelError(message)


def _weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by the checkpoint's names; empty where only a config.json lies."""
    if not has_safetensors(folder):
        return {}
    return {name: stored.shape for name, stored in read_weight_index(folder).items()}


def _add_generation_config(config: ModelConfig, folder: Path) -> ModelConfig:
    """Add the end-of-sequence ids that only generation_config.json names."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    added = read_token_ids(read_json(path).get("eos_token_id"), path.name)
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *added)))
    )
