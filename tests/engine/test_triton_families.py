"""Paper models and muP on Triton kernels: against PyTorch's operators and against fp64 oracles.

On the GPU if there is one, else in Triton's interpreter on the CPU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_serve.models.triton_decoder import TritonDecoder, TritonMLP, TritonMoE
from tests.engine.family_oracles import minicpm_logits, paper_logits
from tests.engine.test_triton_model import FP32_TOLERANCE, compare, load_both, tokens
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401 (a fixture for all tests)
from tests.util import write_checkpoint

# Kernels may compute on memory that nobody wrote, and drop the result; numpy sees it in passing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

NSA = {"compression": "mlp", "cmp_hidden_size": 20, "gate": "mlp", "gate_hidden_size": 12}
EXPERTS = {
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Head dimensions as of the paper: no powers of two, and values narrower than keys.
HEADS = {"head_dim": 24, "num_q_heads": 6, "num_kv_heads": 2}
MUP = {
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "mup_denominator": 32,
    "sparse_config": {
        "kernel_size": 8,
        "kernel_stride": 4,
        "init_blocks": 1,
        "block_size": 16,
        "window_size": 32,
        "topk": 2,
        "use_nope": False,
        "dense_len": 20,
    },
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
        "long_factor": [1.5, 1.6, 1.9, 2.5, 3.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 1024,
    },
}
CASES: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "family": "nsa_moe",
        "nsa": NSA,
        "config": {**EXPERTS, "v_head_dim": 16, "rope_scaling": YARN},
        **HEADS,
    },
    "paper-mqa-dense": {"family": "nsa_moe", "nsa": NSA, "num_q_heads": 6, "num_kv_heads": 1},
    "shared-keys": {
        "family": "nsa_moe",
        "nsa": NSA,
        "config": {**EXPERTS, "kv_per_branch": False},
        "num_layers": 2,
    },
    "no-shared-experts": {
        "family": "nsa_moe",
        "nsa": {"gate": "linear"},
        "config": {**EXPERTS, "kv_per_branch": False, "n_shared_experts": 0},
    },
    "minicpm": {"family": "minicpm", "config": MUP},
    "minicpm-tied": {"family": "minicpm", "config": MUP, "tie_word_embeddings": True},
}


def write(tmp_path: Path, name: str, **others: Any) -> Path:
    arguments = {"num_layers": 2, "seed": 3, **CASES[name], **others}
    return write_checkpoint(tmp_path / name, arguments.pop("family"), **arguments)


@pytest.mark.parametrize("name", CASES)
def test_both_backends_give_the_same_logits(tmp_path: Path, name: str) -> None:
    plain, triton = load_both(write(tmp_path, name), torch.float32, 3)
    compare(plain, triton, FP32_TOLERANCE)


@pytest.mark.parametrize("name", ["paper", "paper-mqa-dense", "minicpm", "minicpm-tied"])
def test_a_prompt_is_as_written_down_once_more(tmp_path: Path, name: str) -> None:
    """More tokens than a step of few rows has: experts are multiplied in tiles."""
    folder = write(tmp_path, name)
    _, triton = load_both(folder, torch.float32, 1)
    prompt = tokens(70, 4)
    oracle = minicpm_logits if name.startswith("minicpm") else paper_logits
    expected = oracle(folder, prompt)
    actual = triton.step([prompt], [0])
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= FP32_TOLERANCE, f"{error:.3g}"


def test_the_first_layers_may_be_dense(tmp_path: Path) -> None:
    _, triton = load_both(write(tmp_path, "shared-keys", num_layers=3), torch.float32, 1)
    decoder = triton.model.decoder
    assert isinstance(decoder, TritonDecoder)
    kinds = [type(layer.feed_forward) for layer in decoder.layers]
    assert kinds == [TritonMLP, TritonMoE, TritonMoE]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_to_fp32(tmp_path: Path, name: str) -> None:
    """Rounding may change what a token selects; that of most tokens it does not."""
    folder = write(tmp_path, name)
    exact, _ = load_both(folder, torch.float32, 1)
    _, triton = load_both(folder, torch.bfloat16, 1)
    prompt = tokens(200, 5)
    expected, actual = (model.step([prompt], [0]) for model in (exact, triton))
    similarity = torch.cosine_similarity(expected, actual, dim=1)
    assert similarity.median() > 0.99
