"""Weights of the nsa_moe family in their fused and stacked tensors, and back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ConfigError, ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.device_weights import DeviceWeights
from nsa_serve.models.dummy_weights import dummy_weights
from nsa_serve.models.families import load_model_config
from nsa_serve.models.safetensors_files import read_weight_index
from nsa_serve.models.weight_layout import weight_layout
from nsa_serve.models.weight_shapes import expected_weights
from nsa_serve.models.weight_stream import stream_weights
from nsa_serve.models.weights import load_device_weights, load_weights, weight_bytes
from tests.util import write_checkpoint

from .configs import MINICPM4_8B, NSA_MOE, load

CPU = torch.device("cpu")
SECTION = {"compression": "mlp", "cmp_hidden_size": 20, "gate": "mlp", "gate_hidden_size": 12}
EXPERTS = {
    "v_head_dim": 12,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("moe") / "tiny"
    write_checkpoint(
        folder, "nsa_moe", nsa=SECTION, config=EXPERTS, sharded=True, dtype=torch.bfloat16
    )
    return ModelSource(name="tiny", folder=folder)


def unfuse(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The canonical weights, cut out of a layout's tensors."""
    found = {}
    for name, slot in weight_layout(config).slots.items():
        tensor = tensors[slot.name]
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() == 3 else tensor
        found[name] = rows[slot.first_row : slot.first_row + expected_weights(config)[name][0]]
    return found


@pytest.mark.parametrize("staging_bytes", [1, 1000, 1 << 20])
def test_every_weight_comes_back(source: ModelSource, staging_bytes: int) -> None:
    config = load_model_config(source)
    target = DeviceWeights(weight_layout(config), torch.float32, CPU)
    assert source.folder is not None
    stream_weights(
        read_weight_index(source.folder), target, num_readers=3, staging_bytes=staging_bytes
    )
    found = unfuse(config, target.finish())
    expected = load_weights(source, config, torch.float32)
    assert found.keys() == expected.keys() == expected_weights(config).keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_order_of_rows(source: ModelSource) -> None:
    """Rotated heads first, so that one kernel can rotate them; experts gate first, then up."""
    config = load_model_config(source)
    tensors = load_device_weights(source, config, torch.float32, device=CPU)
    weights = load_weights(source, config, torch.float32)
    attn = "model.layers.0.self_attn."
    parts = ("k_slc", "k_cmp", "k_swa", "v_slc", "v_cmp", "v_swa")
    names = ["q_proj", *(f"{part}_proj" for part in parts), "gate.fc1"]
    fused = torch.cat([weights[f"{attn}{name}.weight"] for name in names])
    assert torch.equal(tensors[attn + "qkvg.weight"], fused)
    bias = tensors[attn + "qkvg.bias"]
    assert torch.equal(bias[-12:], weights[attn + "gate.fc1.bias"]) and not bias[:-12].any()
    assert torch.equal(tensors[attn + "gate.fc2.weight"], weights[attn + "gate.fc2.weight"])
    mlp = "model.layers.1.mlp."
    gate_up, down = tensors[mlp + "experts.gate_up.weight"], tensors[mlp + "experts.down.weight"]
    assert (gate_up.shape, down.shape) == ((5, 48, 64), (5, 64, 24))
    for expert in range(5):
        gate, up, out = (
            weights[f"{mlp}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        assert torch.equal(gate_up[expert], torch.cat((gate, up)))
        assert torch.equal(down[expert], out)
    shared = [weights[f"{mlp}shared_experts.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(tensors[mlp + "shared_experts.gate_up.weight"], torch.cat(shared))
    assert tensors[mlp + "router.weight"].shape == (5, 64)
    assert "model.layers.0.mlp.gate_up.weight" in tensors


@pytest.mark.parametrize("kv_per_branch", [True, False])
@pytest.mark.parametrize("gate", ["mlp", "linear", "constant"])
def test_slots_tile_their_tensors(tmp_path: Path, kv_per_branch: bool, gate: str) -> None:
    """Every row of every matrix belongs to one weight."""
    section = {"compression": "mlp", "gate": gate}
    config = load(tmp_path, {**NSA_MOE, "nsa": section}, kv_per_branch=kv_per_branch)
    layout, expected = weight_layout(config), expected_weights(config)
    assert layout.slots.keys() == expected.keys()
    rows: dict[str, list[tuple[int, int]]] = {}
    for name, slot in layout.slots.items():
        if not slot.name.endswith("qkvg.bias"):
            rows.setdefault(slot.name, []).append((slot.first_row, expected[name][0]))
    for name, pieces in rows.items():
        shape = layout.shapes[name]
        end = 0
        for first, count in sorted(pieces):
            assert first == end, name
            end += count
        assert end == (shape[0] * shape[1] if len(shape) == 3 else shape[0]), name
    assert weight_bytes(config, torch.bfloat16) >= 2 * sum(
        torch.Size(shape).numel() for shape in expected.values()
    )


def test_missing_and_surplus_experts_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", "nsa_moe", nsa=SECTION, config=EXPERTS)
    config_file = folder / "config.json"
    text = config_file.read_text()
    for count, said in ((6, "missing: .*experts.5.gate_proj"), (4, "unexpected: .*experts.4")):
        config_file.write_text(
            text.replace('"n_routed_experts": 5', f'"n_routed_experts": {count}')
        )
        source = ModelSource(name="a", folder=folder)
        with pytest.raises(ModelError, match=said):
            load_weights(source, load_model_config(source), torch.float32)


def test_eight_bits_are_refused_for_experts_and_not_for_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp8 .*mixture of experts.*--quantization"):
        weight_layout(load(tmp_path, NSA_MOE), "fp8")
    for raw in ({**NSA_MOE, "n_routed_experts": 0}, MINICPM4_8B):
        layout = weight_layout(load(tmp_path, raw), "fp8")
        prefix = "model.layers.1."
        assert prefix + "self_attn.o_proj.weight" in layout.quantized
        assert prefix + "mlp.gate_up.weight" in layout.quantized
        assert not any("cmp_" in name or "gate.fc" in name for name in layout.quantized)


def test_dummies_are_of_sensible_scale(tmp_path: Path) -> None:
    """Gates near one half, several experts in use, biases zero."""
    config = load(tmp_path, {**NSA_MOE, "hidden_size": 512, "n_routed_experts": 64})
    weights = dummy_weights(config, torch.float32)
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(3))
    attn = "model.layers.1.self_attn.gate."
    hidden = torch.nn.functional.silu(x @ weights[attn + "fc1.weight"].T)
    gates = (hidden @ weights[attn + "fc2.weight"].T).sigmoid()
    assert (gates - 0.5).abs().max() < 0.1
    probabilities = (x @ weights["model.layers.1.mlp.router.weight"].T).softmax(-1)
    used = probabilities.topk(2).indices.unique()
    assert len(used) > 56
    assert not weights[attn + "fc1.bias"].any()
