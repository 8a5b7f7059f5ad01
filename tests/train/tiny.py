"""A random two-layer Llama and a corpus of patterns, for runs of the recipe on a CPU."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from data import write_kind
from safetensors.torch import save_file
from student import DIALECT

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.models.native_config import native_config
from nsa_serve.models.weight_shapes import expected_weights

VOCAB_SIZE = 320
CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=16,
    v_head_dim=16,
    intermediate_size=96,
    nsa=NSAConfig(gate="constant"),
    rope_theta=1000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    checkpoint_dtype="float32",
    eos_token_ids=(0,),
)


def write_base(folder: Path) -> Path:
    """Write the Llama as a safetensors folder that says nothing about NSA."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if name.endswith("norm.weight")
        # Large enough that attention is far from uniform.
        else torch.randn(shape, generator=generator) * 2 * shape[-1] ** -0.5
        for name, shape in expected_weights(CONFIG).items()
    }
    save_file(weights, folder / "model.safetensors")
    raw = native_config(CONFIG)
    del raw["nsa"]
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def write_corpus(folder: Path) -> Path:
    """Write random "text" whose second half repeats its first; no other kind."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    documents = []
    for length in (400, 900, 3000):
        half = rng.integers(1, VOCAB_SIZE, length // 2, dtype=np.uint16)
        documents.append((np.concatenate((half, half)), None))
    kinds = {"text": write_kind(folder, "text", documents)}
    meta = {"model": "none", "end_id": 0, "kinds": kinds}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def merged_checkpoint(folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor]) -> Path:
    """Write a native NSA checkpoint of these weights."""
    folder.mkdir(parents=True)
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors")
    config = dataclasses.replace(config, nsa=NSAConfig.from_dict(DIALECT))
    (folder / "config.json").write_text(json.dumps(native_config(config)))
    return folder
