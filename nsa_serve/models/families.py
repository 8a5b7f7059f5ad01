"""The families of checkpoints: which config file means which, and what its weights are called.

model_type "nsa"            fla              fla.py
model_type "llama-nsa"      zen-E/NSA-1B     llama_nsa.py
model_type "llama" + `nsa`  native           native.py
model_type "nsa_moe"        the paper's      nsa_moe.py
model_type "minicpm"        MiniCPM4, 4.1    minicpm.py
GGUF architecture "llama"   native           gguf_llama.py
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.config_file import read_json, read_nsa_section, read_token_ids
from nsa_serve.models.fla import fla_name, read_fla
from nsa_serve.models.gguf_llama import gguf_name, read_gguf_llama
from nsa_serve.models.llama_nsa import read_llama_nsa
from nsa_serve.models.minicpm import read_minicpm, read_sparse_config
from nsa_serve.models.native import read_native
from nsa_serve.models.nsa_moe import read_nsa_moe
from nsa_serve.models.rope_fields import read_rope_scaling
from nsa_serve.models.safetensors_files import has_safetensors, read_weight_index

SUPPORTED_MODEL_TYPES = ("nsa", "llama-nsa", "llama", "nsa_moe", "minicpm")
"""Values of `model_type` in config.json that can be served."""


def load_model_config(source: ModelSource) -> ModelConfig:
    """Read what a checkpoint says about itself.

    Raises ModelError when the family is not supported, when a field is missing or wrong, and when
    a Llama checkpoint does not say how its attention is sparse.
    """
    if source.gguf is not None:
        _refuse_dialect(source, "a GGUF file")
        section = source.nsa_section
        nsa = None if section is None else read_nsa_section(section)
        config = read_gguf_llama(source.gguf, nsa=nsa, has_adapter=source.adapter is not None)
    else:
        assert source.folder is not None, "a source has a folder or a GGUF file"
        config = _add_generation_config(_read_folder(source, source.folder), source.folder)
    if source.overrides is not None:
        config = _overridden(config, source.overrides)
    if source.adapter is not None and config.nsa.gate != "linear":
        raise ModelError(
            f'{source.name} has an adapter with gates, and its nsa section says "gate": '
            f"{config.nsa.gate!r}; to serve the base without the adapter, name its own file: "
            f"{source.gguf or source.folder}"
        )
    return config


def _overridden(config: ModelConfig, section: Mapping[str, Any]) -> ModelConfig:
    """Replace the fields that the section "model" of an adapter's config may change."""
    known = {"rope_theta", "rope_scaling", "max_position_embeddings"}
    if unknown := sorted(section.keys() - known):
        raise ModelError(f"model.{unknown[0]} cannot be changed by an adapter; {sorted(known)} can")
    changes: dict[str, Any] = {}
    positions = section.get("max_position_embeddings", config.max_position_embeddings)
    theta = section.get("rope_theta", config.rope_theta)
    if type(positions) is not int or positions < 1:
        raise ModelError(f"model.max_position_embeddings must be a count, got {positions!r}")
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise ModelError(f"model.rope_theta must be a number above 0, got {theta!r}")
    changes = {"max_position_embeddings": positions, "rope_theta": float(theta)}
    if section.get("rope_scaling") is not None:
        changes["rope_scaling"] = read_rope_scaling(section["rope_scaling"], positions)
    return dataclasses.replace(config, **changes)


def checkpoint_name(source: ModelSource, config: ModelConfig, canonical: str) -> str:
    """Return what the checkpoint calls the weight that is `canonical` here."""
    if source.gguf is not None:
        return gguf_name(canonical)
    return fla_name(canonical) if config.family == "nsa" else canonical


def _read_folder(source: ModelSource, folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json")
    model_type, section = raw.get("model_type"), source.nsa_section
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (llama with an `nsa` section), and GGUF files of "
            "the llama architecture"
        )
    if model_type != "llama-nsa":
        _refuse_dialect(source, f"model_type {model_type!r}")
    if model_type == "minicpm" and section is not None and "sparse_config" in section:
        return read_minicpm(raw, nsa=None, sparse=read_sparse_config(section))
    nsa = None if section is None else read_nsa_section(section)
    if model_type == "nsa":
        return read_fla(raw, nsa=nsa, weight_shapes=_weight_shapes(folder))
    if model_type == "llama-nsa":
        return read_llama_nsa(raw, nsa=nsa, dialect=source.nsa_dialect)
    if model_type == "nsa_moe":
        return read_nsa_moe(raw, nsa=nsa)
    if model_type == "minicpm":
        return read_minicpm(raw, nsa=nsa, sparse=None)
    return read_native(raw, nsa=nsa)


def _refuse_dialect(source: ModelSource, what: str) -> None:
    if source.nsa_dialect is not None:
        raise ModelError(
            f"--nsa-dialect {source.nsa_dialect} is for model_type 'llama-nsa' only, and this is "
            f"{what}: leave it out; --nsa-config describes the attention of any family"
        )


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
