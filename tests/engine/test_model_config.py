"""config.json and GGUF metadata to ModelConfig, family by family, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_serve.config import EngineConfig, ModelConfig, RopeScaling
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource, resolve_model
from nsa_serve.models.families import load_model_config
from tests.util import write_checkpoint, write_gguf

FLA_340M: dict[str, Any] = {
    "model_type": "nsa",
    "architectures": ["NSAForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_heads": 32,
    "num_kv_heads": 2,
    "head_dim": 64,
    "block_size": 64,
    "block_counts": 16,
    "window_size": 512,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "qkv_bias": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_norm": True,
    "attnres_block_size": None,
}
NSA_1B: dict[str, Any] = {
    "model_type": "llama-nsa",
    "architectures": ["LlamaNSAForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llama_nsa.LlamaNSAForCausalLM"},
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_scaling": None,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "block_size": 16,
    "block_counts": 16,
    "window_size": 128,
}
NATIVE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "vocab_size": 301,
    "nsa": {"gate": "constant", "gate_constant": [0, 1, 0]},
}


def load(
    folder: Path, raw: dict[str, Any], *, nsa: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    fields = {**raw, **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return load_model_config(ModelSource(name="test", folder=folder, nsa_section=nsa))


def test_fla_preset(tmp_path: Path) -> None:
    config = load(tmp_path, FLA_340M)
    assert (config.family, config.num_layers, config.num_q_heads, config.num_kv_heads) == (
        "nsa",
        24,
        32,
        2,
    )
    # 256 * ceil(int(1024 * 4 * 2 / 3) / 256)
    assert config.intermediate_size == 2816
    nsa = config.nsa
    assert (nsa.cmp_len, nsa.cmp_stride, nsa.block_size) == (64, 64, 64)
    assert (nsa.num_selected_blocks, nsa.num_init_blocks, nsa.num_local_blocks) == (16, 1, 2)
    assert (nsa.window_size, nsa.selection, nsa.gate, nsa.gate_bias) == (
        512,
        "exact",
        "linear",
        False,
    )
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize(("hidden_size", "width"), [(2048, 5632), (768, 2048), (64, 256)])
def test_fla_width_formula(tmp_path: Path, hidden_size: int, width: int) -> None:
    assert load(tmp_path, FLA_340M, hidden_size=hidden_size).intermediate_size == width
    assert load(tmp_path, FLA_340M, intermediate_size=999).intermediate_size == 999


@pytest.mark.parametrize(("counts", "selected"), [(3, 4), (4, 4), (5, 8), (17, 32), (32, 32)])
def test_fla_counts_round_up_to_a_power_of_two(tmp_path: Path, counts: int, selected: int) -> None:
    assert load(tmp_path, FLA_340M, block_counts=counts).nsa.num_selected_blocks == selected


def test_fla_bias_is_on_qkv_only(tmp_path: Path) -> None:
    config = load(tmp_path, FLA_340M, qkv_bias=True)
    assert (config.attention_bias, config.attention_out_bias) == (True, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attnres_block_size": 4}, "attnres_block_size 4"),
        ({"elementwise_affine": False}, "elementwise_affine"),
        ({"block_counts": 33}, "block_counts 33 with block_size 64 .* --nsa-config"),
        ({"block_counts": 2}, "num_selected_blocks"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"hidden_act": "gelu"}, "hidden_act .*'gelu'"),
        ({"hidden_size": "1024"}, "hidden_size: .*'1024'"),
        ({"window_size": -1}, "window_size: "),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_fla_refusals(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(tmp_path, FLA_340M, **changes)


def test_head_dim_that_old_code_ignored_is_inferred(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "old", "nsa", head_dim=24)
    raw = json.loads((folder / "config.json").read_text())
    with caplog.at_level(logging.WARNING):
        config = load(folder, raw, head_dim=32)
    assert (config.head_dim, config.v_head_dim) == (24, 24)
    assert "says head_dim 32" in caplog.text
    caplog.clear()
    load(folder, raw)
    assert not caplog.records


def test_head_dim_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", "nsa", num_q_heads=4, num_kv_heads=2, head_dim=16)
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"head_dim 32 .* q_proj has 64 rows and k_proj 32"):
        load(folder, raw, head_dim=32, num_heads=8, num_kv_heads=2)


def test_nsa_1b_has_the_legacy_selection(tmp_path: Path) -> None:
    config = load(tmp_path, NSA_1B)
    nsa = config.nsa
    assert (nsa.selection, nsa.num_init_blocks, nsa.num_local_blocks) == ("fla_legacy", 0, 1)
    assert (nsa.cmp_len, nsa.cmp_stride, nsa.block_size, nsa.window_size) == (16, 16, 16, 128)
    assert (config.rope_theta, config.tie_word_embeddings) == (500000.0, True)
    assert (config.checkpoint_dtype, config.eos_token_ids) == ("bfloat16", (128001,))
    assert config.intermediate_size == 8192


def test_legacy_merge_is_exact_up_to_half_a_chunk(tmp_path: Path) -> None:
    assert load(tmp_path, NSA_1B, block_counts=8).nsa.selection == "exact"
    assert load(tmp_path, NSA_1B, block_counts=9).nsa.selection == "fla_legacy"
    with pytest.raises(ModelError, match="block_counts 17"):
        load(tmp_path, NSA_1B, block_counts=17)


@pytest.mark.parametrize("changes", [{"window_size": 0}, {"inference_mode": "sparse"}])
def test_siblings_with_other_attention_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="SSA-1B, MoBA-1B"):
        load(tmp_path, NSA_1B, **changes)
    section = {"block_size": 16, "cmp_len": 16, "window_size": 0}
    assert load(tmp_path, NSA_1B, nsa=section, **changes).nsa.window_size == 0


def test_native_defaults_are_those_of_llama(tmp_path: Path) -> None:
    config = load(tmp_path, NATIVE)
    assert (config.family, config.num_kv_heads, config.head_dim, config.v_head_dim) == (
        "llama",
        3,
        16,
        16,
    )
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (
        1e-6,
        10000.0,
        False,
    )
    assert config.nsa.gate_constant == (0.0, 1.0, 0.0)
    assert config.eos_token_ids == ()


def test_native_reads_every_nsa_field(tmp_path: Path) -> None:
    section = {
        "cmp_len": 24,
        "cmp_stride": 8,
        "block_size": 48,
        "num_selected_blocks": 7,
        "num_init_blocks": 2,
        "num_local_blocks": 3,
        "window_size": 100,
        "score_map": "max_pool",
        "selection": "exact",
        "compression": "mlp",
        "cmp_hidden_size": 40,
        "gate": "linear",
        "gate_hidden_size": 20,
        "gate_bias": True,
        "gate_constant": [1.0, 0.5, 0.25],
        "branches": ["cmp", "slc"],
        "window_gate": "swa",
        "dense_len": 90,
        "lse_len": 32,
        "lse_stride": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps({**NATIVE, "v_head_dim": 8, "nsa": section}))
    config = load_model_config(ModelSource(name="test", folder=tmp_path))
    nsa = config.nsa
    assert set(section) == set(type(nsa).__dataclass_fields__)
    for name, value in section.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(nsa, name) == expected, name
    assert config.v_head_dim == 8


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (3, "must be an object"),
        ({"block_len": 3}, "unknown fields: block_len"),
        ({"block_size": "64"}, "nsa.block_size must be of type int, got '64'"),
        ({"block_size": 64.0}, "nsa.block_size must be of type int, got 64.0"),
        ({"gate_bias": 1}, "nsa.gate_bias must be of type bool"),
        ({"num_selected_blocks": True}, "nsa.num_selected_blocks must be of type int, got True"),
        ({"gate_constant": 1}, "nsa.gate_constant must be a list"),
        ({"gate_constant": [0, 1, "1"]}, "nsa.gate_constant must be a list of three"),
        ({"gate_constant": [0, 1]}, r"list of three finite numbers.*got \[0, 1\]"),
        ({"gate_constant": [0, 1, float("nan")]}, "nsa.gate_constant must be a list of three"),
        ({"cmp_stride": 5}, "cmp_stride must divide cmp_len"),
        ({"gate": "softmax"}, "gate must be"),
        ({"branches": "slc"}, "nsa.branches must be a list"),
        ({"branches": []}, "branches must name at least one"),
        ({"branches": ["slc", "cmp"]}, "branches must name at least one of .* in this order"),
        ({"branches": ["win"]}, "branches must name at least one of cmp, slc, swa"),
        ({"branches": ["swa"], "window_size": 0}, "window_size must be at least 1"),
        ({"window_gate": "cmp"}, "window_gate must be"),
        ({"window_gate": "slc"}, "window_gate 'slc' needs"),
    ],
)
def test_wrong_nsa_sections_are_refused(tmp_path: Path, section: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NATIVE, "nsa": section}))
    with pytest.raises(ModelError, match=said):
        load_model_config(ModelSource(name="test", folder=tmp_path))


def test_llama_without_section_needs_nsa_config(tmp_path: Path) -> None:
    dense = {name: value for name, value in NATIVE.items() if name != "nsa"}
    with pytest.raises(ModelError, match=r"no `nsa` section.*--nsa-config"):
        load(tmp_path, dense)
    assert load(tmp_path, dense, nsa={"gate": "constant"}).nsa.gate == "constant"


def test_nsa_config_replaces_the_section_of_every_family(tmp_path: Path) -> None:
    section = {"block_size": 128, "num_selected_blocks": 5}
    for raw in (NATIVE, FLA_340M, NSA_1B):
        nsa = load(tmp_path, raw, nsa=section).nsa
        assert (nsa.block_size, nsa.num_selected_blocks, nsa.cmp_len) == (128, 5, 32)


def test_missing_fields_are_all_named(tmp_path: Path) -> None:
    for raw, names in (
        (FLA_340M, ("hidden_size", "num_heads", "block_counts")),
        (NSA_1B, ("vocab_size", "num_attention_heads", "window_size")),
        (NATIVE, ("num_hidden_layers", "intermediate_size")),
    ):
        rest = {name: value for name, value in raw.items() if name not in names}
        with pytest.raises(ModelError) as caught:
            load(tmp_path, rest)
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("model_type", ["mixtral", None, "minicpm3"])
def test_other_model_types_are_refused(tmp_path: Path, model_type: str | None) -> None:
    with pytest.raises(ModelError, match="supported are nsa, llama-nsa, llama, nsa_moe, minicpm"):
        load(tmp_path, NATIVE, model_type=model_type)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("section", "scaling"),
    [
        (None, RopeScaling()),
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 2}, RopeScaling(rope_type="linear", factor=2.0)),
        (LLAMA3, RopeScaling(**LLAMA3)),  # type: ignore[arg-type]
    ],
)
def test_both_spellings_of_transformers_agree(
    tmp_path: Path, section: dict[str, Any] | None, scaling: RopeScaling
) -> None:
    old = load(tmp_path, NATIVE, rope_theta=5000.0, rope_scaling=section, torch_dtype="bfloat16")
    new = load(
        tmp_path,
        NATIVE,
        rope_parameters={**(section or {}), "rope_theta": 5000.0},
        dtype="bfloat16",
    )
    assert old == new
    assert (old.rope_theta, old.rope_scaling, old.checkpoint_dtype) == (5000.0, scaling, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number above 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_size": 50}, "state head_dim"),
    ],
)
def test_native_refusals(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(tmp_path, NATIVE, **changes)


def test_eos_ids_are_merged_in_order(tmp_path: Path) -> None:
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 5], "temperature": 0.6}))
    assert load(tmp_path, NATIVE, eos_token_id=5).eos_token_ids == (5, 7)
    assert load(tmp_path, NATIVE, eos_token_id=[9, 5]).eos_token_ids == (9, 5, 7)
    assert load(tmp_path, NATIVE).eos_token_ids == (7, 5)
    generation.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        load(tmp_path, NATIVE)


def test_code_in_the_checkpoint_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write_checkpoint(tmp_path / "evil", config={"auto_map": {"AutoConfig": "evil.Config"}})
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "__init__.py").write_text(f"open({str(canary)!r}, 'w')")
    load_model_config(resolve_model(EngineConfig(model=str(folder))))
    assert not canary.exists()


def test_damaged_config_is_an_error(tmp_path: Path) -> None:
    source = ModelSource(name="test", folder=tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            load_model_config(source)


def test_default_model_is_smollm2_with_slc_alone() -> None:
    config = load_model_config(resolve_model(EngineConfig()))
    shape = (config.num_layers, config.hidden_size, config.num_q_heads, config.num_kv_heads)
    assert shape == (30, 576, 9, 3)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (64, 49152, 8192)
    assert (config.rope_theta, config.tie_word_embeddings) == (100000.0, True)
    assert config.rms_norm_eps == pytest.approx(1e-5, rel=1e-6)
    nsa = config.nsa
    assert (nsa.cmp_len, nsa.cmp_stride, nsa.block_size, nsa.window_size) == (32, 16, 64, 512)
    assert nsa.num_selected_blocks * nsa.block_size == 1024
    assert (nsa.gate, nsa.gate_constant) == ("constant", (0.0, 1.0, 0.0))
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def gguf_config(path: Path, nsa: dict[str, Any] | None) -> ModelConfig:
    return load_model_config(ModelSource(name="test", gguf=path, nsa_section=nsa))


def test_gguf_metadata(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf",
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    )
    config = gguf_config(path, {"gate": "constant"})
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (6, 2, 32)
    assert (config.vocab_size, config.tie_word_embeddings) == (300, False)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (2,))


@pytest.mark.parametrize(
    ("metadata", "nsa", "said"),
    [
        ({}, None, "--nsa-config"),
        ({}, {"gate": "linear"}, "holds no gate"),
        ({}, {"gate": "constant", "compression": "mlp"}, "holds no gate or compression"),
        ({"llama.expert_count": 8}, {"gate": "constant"}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, {"gate": "constant"}, "'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, {"gate": "constant"}, "lacks factor"),
    ],
)
def test_gguf_refusals(
    tmp_path: Path, metadata: dict[str, Any], nsa: dict[str, Any] | None, said: str
) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=said):
        gguf_config(path, nsa)


def test_truncated_gguf_is_an_error_at_every_length(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 23, 24, 100, 1000, 5000, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            gguf_config(cut, {"gate": "constant"})


def test_config_needs_no_torch_dtype_of_its_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    source = ModelSource(name="half", folder=folder)
    assert load_model_config(source).checkpoint_dtype == "bfloat16"
