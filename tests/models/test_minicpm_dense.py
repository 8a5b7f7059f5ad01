"""MiniCPM4 as published, without a sparse_config: dense attention at any length, exactly."""

import json
from pathlib import Path

import torch

from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_weights
from tests.engine.family_oracles import minicpm_logits
from tests.engine.test_triton_model import MAX_POSITIONS, Stepper, tokens
from tests.util import write_checkpoint

from .configs import SPARSE_CONFIG

# fp32 against fp64 over two layers.
TOLERANCE = 2e-4
FIELDS = {
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 4 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 512,
    },
}


def test_dense_attention_and_the_temperature(tmp_path: Path) -> None:
    """Served within the old context: short factors, and the temperature of the whole context."""
    folder = write_checkpoint(
        tmp_path / "model", "minicpm", config=FIELDS, max_position_embeddings=1024, seed=9
    )
    source = ModelSource(name="tiny", folder=folder)
    config = load_model_config(source)
    weights = load_weights(source, config, torch.float32)
    model = NSATransformer(config, weights, max_positions=MAX_POSITIONS)
    stepper, prompt = Stepper(config, model, 1), tokens(200, 4)
    prefill = stepper.step([prompt], [0])
    decode = stepper.step([[7]], [len(prompt)], num_decode_rows=1)
    # The transcription is told so by a dense_len that no prompt reaches.
    path = folder / "config.json"
    sparse = {**SPARSE_CONFIG, "dense_len": 10**6}
    path.write_text(json.dumps({**json.loads(path.read_text()), "sparse_config": sparse}))
    expected = minicpm_logits(folder, [*prompt, 7], is_long=False)
    error = (torch.cat((prefill, decode)) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE
