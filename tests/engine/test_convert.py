"""Converted checkpoints: the same tokens and log-probabilities as their sources."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_http.cli import main
from nsa_serve.convert import convert
from nsa_serve.errors import ModelError
from nsa_serve.llm import LLM
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weight_shapes import expected_weights
from nsa_serve.request import SamplingParams
from tests.engine.engine_runs import make_prompt
from tests.models.configs import NSA_MOE
from tests.util import NATIVE_NSA, write_checkpoint, write_gguf

PROMPTS = [make_prompt(5), make_prompt(150, seed=1)]


def outputs(model: Path) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities."""
    llm = LLM(str(model), device="cpu", dtype="float32", page_memory="4MiB", max_num_seqs=2)
    try:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
        results = llm.generate(PROMPTS, params)
        found = []
        for result in results:
            assert result.logprobs is not None
            found.append((result.token_ids, [entry.logprob for entry in result.logprobs]))
        return found
    finally:
        llm.close()


def assert_same_outputs(model: Path, source: Path) -> None:
    """The same tokens, and log-probabilities within what another order of sums does in fp32."""
    for (tokens, logprobs), (before, before_logprobs) in zip(
        outputs(model), outputs(source), strict=True
    ):
        assert tokens == before
        assert logprobs == pytest.approx(before_logprobs, abs=1e-4)


def folder(path: Path) -> ModelSource:
    return ModelSource(name=path.name, folder=path)


@pytest.mark.parametrize("family", ["nsa", "llama-nsa", "llama"])
def test_a_family_is_the_same_model_in_the_native_layout(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "source", family, sharded=True)  # type: ignore[arg-type]
    result = convert(folder(source), tmp_path / "target", shard_bytes=60_000)
    assert result.num_shards > 1
    assert json.loads((tmp_path / "target/config.json").read_text())["model_type"] == "llama"
    assert outputs(tmp_path / "target") == outputs(source)


@pytest.mark.parametrize("family", ["nsa", "llama-nsa", "llama"])
def test_a_family_is_the_same_model_in_the_layout_of_the_paper(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "source", family, sharded=True)  # type: ignore[arg-type]
    convert(folder(source), tmp_path / "target", layout="nsa_moe", shard_bytes=60_000)
    config = load_model_config(folder(tmp_path / "target"))
    assert (config.family, config.kv_per_branch) == ("nsa_moe", True)
    assert_same_outputs(tmp_path / "target", source)


def test_every_branch_gets_a_copy_of_the_shared_keys(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    convert(folder(source), tmp_path / "target", layout="nsa_moe")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "target/model.safetensors")
    for kind in "kv":
        shared = before[f"model.layers.1.self_attn.{kind}_proj.weight"]
        for branch in ("slc", "cmp", "swa"):
            copy = after[f"model.layers.1.self_attn.{kind}_{branch}_proj.weight"]
            assert torch.equal(copy, shared)
    assert not [name for name in after if name.endswith(("k_proj.weight", "v_proj.weight"))]


@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_a_dense_llama_gets_gates_in_the_layout_of_the_paper(tmp_path: Path, gate: str) -> None:
    values = (0.25, 0.5, 0.75)
    dense = write_checkpoint(
        tmp_path / "dense", "llama", nsa={"gate": "constant", "gate_constant": list(values)}
    )
    section = {**NATIVE_NSA, "gate": gate, "gate_hidden_size": 24}
    source = ModelSource(name="dense", folder=dense, nsa_section=section)
    result = convert(source, tmp_path / "gated", layout="nsa_moe", gates=values)
    assert len(result.new_weights) == {"linear": 4, "mlp": 8}[gate]
    assert_same_outputs(tmp_path / "gated", dense)


def test_a_model_with_experts_stays_what_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(NSA_MOE))
    config = load_model_config(folder(source))
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in expected_weights(config).items()
    }
    save_file(weights, source / "model.safetensors")
    convert(folder(source), tmp_path / "target", layout="nsa_moe")
    assert load_model_config(folder(tmp_path / "target")) == config
    after = load_file(tmp_path / "target/model.safetensors")
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_coarse_windows_cannot_have_keys_for_every_branch(tmp_path: Path) -> None:
    nsa = {"score_map": "max_pool", "lse_len": 32, "lse_stride": 16}
    source = write_checkpoint(tmp_path / "source", "llama", nsa=nsa)
    with pytest.raises(ModelError, match="lse_len 32"):
        convert(folder(source), tmp_path / "target", layout="nsa_moe")
    assert not (tmp_path / "target").exists()


def test_a_gguf_is_the_same_model_in_the_native_layout(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    section = {**NATIVE_NSA, "gate": "constant"}
    convert(ModelSource(name="model", gguf=path, nsa_section=section), tmp_path / "target")
    nsa = tmp_path / "nsa.json"
    nsa.write_text(json.dumps(section))
    llm = LLM(str(path), device="cpu", dtype="float32", page_memory="4MiB", nsa_config=str(nsa))
    try:
        params = SamplingParams(max_tokens=8, temperature=0.0)
        texts = ["The capital", "of France is " * 20]
        before = [item.token_ids for item in llm.generate(texts, params)]
    finally:
        llm.close()
    llm = LLM(str(tmp_path / "target"), device="cpu", dtype="float32", page_memory="4MiB")
    try:
        after = [item.token_ids for item in llm.generate(texts, params)]
    finally:
        llm.close()
    assert after == before


def test_a_dense_llama_gets_the_gates_it_is_asked_to(tmp_path: Path) -> None:
    dense = write_checkpoint(
        tmp_path / "dense", "llama", nsa={"gate": "constant", "gate_constant": [0.25, 0.5, 0.75]}
    )
    section = {**NATIVE_NSA, "gate": "linear"}
    source = ModelSource(name="dense", folder=dense, nsa_section=section)
    with pytest.raises(ModelError, match="--gates"):
        convert(source, tmp_path / "none")
    result = convert(source, tmp_path / "gated", gates=(0.25, 0.5, 0.75))
    assert len(result.new_weights) == 4
    weights = load_file(tmp_path / "gated/model.safetensors")
    bias = weights["model.layers.1.self_attn.g_proj.bias"].view(-1, 3)
    torch.testing.assert_close(
        bias.sigmoid(), torch.tensor([[0.25, 0.5, 0.75]]).expand_as(bias), rtol=1e-6, atol=0
    )
    assert_same_outputs(tmp_path / "gated", dense)


def test_gates_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "gated", "llama")
    with pytest.raises(ModelError, match="without gate weights"):
        convert(folder(source), tmp_path / "target", gates=(0.5, 0.5, 0.5))
    dense = write_checkpoint(tmp_path / "dense", "llama", nsa={"gate": "constant"})
    section = {**NATIVE_NSA, "gate": "linear"}
    for gate in (0.0, 1.0, math.nan):
        with pytest.raises(ModelError, match="between 0 and 1"):
            convert(
                ModelSource(name="dense", folder=dense, nsa_section=section),
                tmp_path / "target",
                gates=(0.5, gate, 0.5),
            )
    assert not (tmp_path / "target").exists()


def test_what_the_layout_cannot_say_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "nsa", config={"qkv_bias": True})
    assert load_model_config(folder(source)).attention_bias
    with pytest.raises(ModelError, match="attention_out_bias"):
        convert(folder(source), tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors"))


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "nsa")
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(ModelError, match="not an empty folder"):
        convert(folder(source), source)
    assert sorted(path.name for path in source.iterdir()) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", "nsa")
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    assert "nsa-serve serve" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "target")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "new"), "--shard-size", "0"]) == 2
    assert main(["convert", str(source), str(tmp_path / "new"), "--gatse", "1"]) == 2
    assert "--gates" in capsys.readouterr().err
