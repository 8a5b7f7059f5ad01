"""Weight loading: names, shapes, values, and an error that names what is wrong."""

import json
import pickle  # noqa: TID251 - to write a file that must be refused
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_serve.config import EngineConfig, ModelConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource, resolve_model
from nsa_serve.models import dequantize as dequantize_module
from nsa_serve.models.dequantize import dequantize
from nsa_serve.models.families import load_model_config
from nsa_serve.models.gguf_tensors import read_gguf_tensors
from nsa_serve.models.weights import expected_weights, load_weights
from tests.util import Family, random_weights, write_checkpoint, write_gguf

FAMILIES: tuple[Family, ...] = ("nsa", "llama-nsa", "llama")
CONSTANT_GATE = {"gate": "constant"}
FLOAT32 = torch.float32


def load(source: Path | ModelSource, dtype: torch.dtype = FLOAT32) -> dict[str, torch.Tensor]:
    if isinstance(source, Path):
        source = ModelSource(name="test", folder=source)
    return load_weights(source, load_model_config(source), dtype)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_comes_back_under_its_canonical_name(
    tmp_path: Path, family: Family, sharded: bool, tied: bool
) -> None:
    folder = write_checkpoint(
        tmp_path / "tiny", family, seed=3, sharded=sharded, tie_word_embeddings=tied
    )
    config = load_model_config(ModelSource(name="tiny", folder=folder))
    expected = random_weights(config, seed=3)
    weights = load(folder)
    assert weights.keys() == expected.keys()
    assert ("lm_head.weight" in weights) is not tied
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_fla_names_on_disk_are_those_of_fla(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "fla", "nsa", num_layers=1)
    attention = {f"model.layers.0.attn.{letter}_proj.weight" for letter in "qkvog"}
    mlp = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {"model.layers.0.attn_norm.weight", "model.layers.0.mlp_norm.weight"}
    top = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    assert set(load_file(folder / "model.safetensors")) == attention | mlp | norms | top


def test_expected_shapes_of_every_optional_weight() -> None:
    nsa = NSAConfig(cmp_len=8, cmp_stride=4, compression="mlp", cmp_hidden_size=20, gate_bias=True)
    config = ModelConfig(
        family="llama",
        vocab_size=31,
        hidden_size=36,
        num_layers=1,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=10,
        v_head_dim=7,
        intermediate_size=50,
        nsa=nsa,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    attention = {
        "q_proj.weight": (60, 36),
        "q_proj.bias": (60,),
        "k_proj.weight": (20, 36),
        "k_proj.bias": (20,),
        "v_proj.weight": (14, 36),
        "v_proj.bias": (14,),
        "o_proj.weight": (36, 42),
        "o_proj.bias": (36,),
        "g_proj.weight": (18, 36),
        "g_proj.bias": (18,),
        "cmp_k.pos": (8, 10),
        "cmp_k.fc1.weight": (20, 80),
        "cmp_k.fc1.bias": (20,),
        "cmp_k.fc2.weight": (10, 20),
        "cmp_k.fc2.bias": (10,),
        "cmp_v.pos": (8, 7),
        "cmp_v.fc1.weight": (20, 56),
        "cmp_v.fc1.bias": (20,),
        "cmp_v.fc2.weight": (7, 20),
        "cmp_v.fc2.bias": (7,),
    }
    mlp = {
        "gate_proj.weight": (50, 36),
        "gate_proj.bias": (50,),
        "up_proj.weight": (50, 36),
        "up_proj.bias": (50,),
        "down_proj.weight": (36, 50),
        "down_proj.bias": (36,),
    }
    assert expected_weights(config) == {
        "model.embed_tokens.weight": (31, 36),
        "model.layers.0.input_layernorm.weight": (36,),
        **{f"model.layers.0.self_attn.{name}": shape for name, shape in attention.items()},
        "model.layers.0.post_attention_layernorm.weight": (36,),
        **{f"model.layers.0.mlp.{name}": shape for name, shape in mlp.items()},
        "model.norm.weight": (36,),
        "lm_head.weight": (31, 36),
    }


def test_native_checkpoint_with_every_option_loads(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "full",
        nsa={"compression": "mlp", "cmp_hidden_size": 12, "gate_bias": True},
        config={"v_head_dim": 24, "attention_bias": True, "mlp_bias": True},
        head_dim=16,
    )
    weights = load(folder)
    assert weights["model.layers.1.self_attn.cmp_v.fc1.weight"].shape == (12, 8 * 24)
    assert weights["model.layers.1.self_attn.o_proj.weight"].shape == (64, 4 * 24)


def test_constant_gate_has_no_gate_weights(tmp_path: Path) -> None:
    weights = load(write_checkpoint(tmp_path / "a", nsa=CONSTANT_GATE))
    assert not any("g_proj" in name for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_run_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "half", dtype=torch.float16, seed=5)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in load(folder, dtype).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, stored[name].to(dtype)), name


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    path = folder / "model.safetensors"
    before = load(folder)
    copies = {name: tensor.clone() for name, tensor in before.items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 4))
    assert all(torch.equal(before[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_named_as_the_checkpoint_names_them(tmp_path: Path, family: Family) -> None:
    folder = write_checkpoint(tmp_path / "a", family)
    attn = "attn" if family == "nsa" else "self_attn"

    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"model.layers.1.{attn}.g_proj.weight"]
        weights[f"model.layers.0.{attn}.q_norm.weight"] = torch.ones(16)
        weights["model.norm.weight"] = torch.ones(63)

    edit(folder, damage)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert f"1 missing: model.layers.1.{attn}.g_proj.weight" in message
    assert f"1 unexpected: model.layers.0.{attn}.q_norm.weight" in message
    assert "of the wrong shape: model.norm.weight (expected [64], found [63])" in message


def test_long_lists_of_problems_are_counted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", num_layers=3)
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"20 missing: .* and 10 more") as caught:
        load(folder)
    assert str(caught.value).count("model.layers.") == 10


def test_dense_llama_with_linear_gate_misses_its_gates(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", nsa=CONSTANT_GATE)
    edit_config(folder, nsa={})
    with pytest.raises(ModelError, match=r"2 missing: model\.layers\.0\.self_attn\.g_proj\.weight"):
        load(folder)


def test_rotary_tables_are_skipped(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda weights: weights.update({name: torch.ones(8)}))
    assert name not in load(folder)


def test_tied_lm_head_must_equal_the_embedding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", tie_word_embeddings=True)
    edit(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in load(folder)

    def change_one(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][3, 5] += 1.0

    edit(folder, change_one)
    with pytest.raises(ModelError, match=r"differs from model\.embed_tokens\.weight"):
        load(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", sharded=True)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 3 weight files: model-00002-of-00003"):
        load(folder)


def test_index_must_stay_in_its_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", sharded=True)
    outside = write_checkpoint(tmp_path / "b") / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    for name in ("../b/model.safetensors", str(outside), "evil.bin", "sub/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ModelError, match="no safetensors file beside it"):
            load(folder)


def test_a_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", sharded=True)
    first, second = (folder / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    weights = {name: tensor.clone() for name, tensor in load_file(first).items()}
    name, tensor = next(iter(load_file(second).items()))
    save_file({**weights, name: tensor.clone()}, first)
    with pytest.raises(ModelError, match=r"is in model-00001-of-00003\.safetensors and in"):
        load(folder)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (canary.touch, ())

    folder = write_checkpoint(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*convert the checkpoint"):
        load(folder)
    assert not canary.exists()


def test_safetensors_without_index_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="complete the download"):
        load(folder)


def test_damaged_and_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    edit(folder, lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight .* has dtype I8"):
        load(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("as_gguf", [False, True])
def test_progress_counts_all_bytes(tmp_path: Path, as_gguf: bool) -> None:
    if as_gguf:
        path = write_gguf(tmp_path / "a.gguf", quant_type="Q8_0")
        source = ModelSource(name="a", gguf=path, nsa_section=CONSTANT_GATE)
        size = sum(item.num_bytes for item in read_gguf_tensors(path).values())
    else:
        folder = write_checkpoint(tmp_path / "a", sharded=True)
        source = ModelSource(name="a", folder=folder)
        size = sum(4 * tensor.numel() for tensor in load(folder).values())
    calls: list[tuple[int, int]] = []
    config = load_model_config(source)
    weights = load_weights(
        source, config, FLOAT32, on_progress=lambda done, total: calls.append((done, total))
    )
    assert len(calls) == len(weights)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {size}
    assert calls[-1][0] == size


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a GGUF file, through the package's own reader."""
    return {
        item.name: torch.from_numpy(
            np.array(gguf.dequantize(item.data, item.tensor_type), dtype=np.float32)
        ).view(*(int(size) for size in item.shape[::-1]))
        for item in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("quant_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_equals_the_package_bit_for_bit(
    tmp_path: Path, quant_type: Any, dtype: torch.dtype
) -> None:
    path = write_gguf(tmp_path / "a.gguf", quant_type=quant_type, tie_word_embeddings=False)
    stored = dequantized(path)
    weights = load(ModelSource(name="a", gguf=path, nsa_section=CONSTANT_GATE), dtype)
    assert len(weights) == len(stored)
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(weights[ours], stored[theirs].to(dtype)), ours


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbours (0, 1), (2, 3), ... as GGUF orders q and k. x [heads, D]."""
    a, b = x[:, 0::2], x[:, 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(1)


def rotate_halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE on halves (0, D/2), (1, D/2 + 1), ... x [heads, D]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def test_gguf_rotary_order_is_undone(tmp_path: Path) -> None:
    """Scores of rotated q and k are the same in the order of the file and in ours."""
    path = write_gguf(tmp_path / "a.gguf", num_q_heads=6, num_kv_heads=2, head_dim=12)
    stored = dequantized(path)
    weights = load(ModelSource(name="a", gguf=path, nsa_section=CONSTANT_GATE))
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, 64, generator=generator)
    angle_x, angle_y = torch.rand(2, 6, generator=generator)
    scores = []
    for rotate, q, k in (
        (rotate_pairs, stored["blk.0.attn_q.weight"], stored["blk.0.attn_k.weight"]),
        (
            rotate_halves,
            weights["model.layers.0.self_attn.q_proj.weight"],
            weights["model.layers.0.self_attn.k_proj.weight"],
        ),
    ):
        rotated_q = rotate((q @ x).view(6, 12), angle_x)
        rotated_k = rotate((k @ y).view(2, 12), angle_y)
        scores.append(rotated_q @ rotated_k.T)
    # Sums of twelve products of order 1 in another order: a few fp32 roundings.
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(
        stored["blk.0.attn_q.weight"], weights["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL"])
@pytest.mark.parametrize("chunk_blocks", [1, 3, 8192])
def test_dequantize_equals_the_package_on_any_bytes(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk_blocks: int
) -> None:
    monkeypatch.setattr(dequantize_module, "CHUNK_BLOCKS", chunk_blocks)
    quant_type = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    rng = np.random.default_rng(11)
    raw = rng.integers(0, 256, size=(7, 3 * block_bytes), dtype=np.uint8)
    # Random bytes make some scales infinite or NaN; where the package gives NaN so must we.
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw, quant_type))
        values = dequantize(torch.from_numpy(raw).view(-1), quant_type, (7, 3 * block), FLOAT32)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    assert expected.isfinite().float().mean() > 0.5


def test_loading_leaves_the_number_of_threads_alone(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    source = ModelSource(name="a", gguf=path, nsa_section=CONSTANT_GATE)
    config = load_model_config(source)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load_weights(source, config, FLOAT32)
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            load_weights(source, config, FLOAT32, on_progress=interrupt)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)


def test_unknown_tensor_types_are_refused(tmp_path: Path) -> None:
    quant_type = gguf.GGMLQuantizationType.Q8_1
    raw = torch.zeros(gguf.GGML_QUANT_SIZES[quant_type][1], dtype=torch.uint8)
    with pytest.raises(ModelError, match="Q8_1 is not supported"):
        dequantize(raw, quant_type, (1, 32), FLOAT32)
    path = write_gguf(tmp_path / "a.gguf")
    data = path.read_bytes()
    # The type follows the name and the two dimensions of the entry.
    entry = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(data[:entry] + b"\xfe\x00\x00\x00" + data[entry + 4 :])
    with pytest.raises(ModelError, match=r"token_embd\.weight has the unknown tensor type 254"):
        read_gguf_tensors(path)


def test_gguf_problems_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={})
    source = ModelSource(name="a", gguf=path, nsa_section=CONSTANT_GATE)
    config = load_model_config(source)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_v.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(ModelError) as caught:
        load_weights(source, config, FLOAT32)
    assert "1 missing: blk.1.attn_v.weight" in str(caught.value)
    assert "1 unexpected: blk.1.attn_x.weight" in str(caught.value)


def test_default_model_loads_completely() -> None:
    source = resolve_model(EngineConfig())
    config = load_model_config(source)
    weights = load_weights(source, config, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected_weights(
        config
    )
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert all(tensor.sum(dtype=FLOAT32).isfinite() for tensor in weights.values())
    # Spot check against the package on the raw bytes: one Q4_1 matrix and the Q8_0 embedding.
    assert source.gguf is not None
    tensors = read_gguf_tensors(source.gguf)
    for ours, theirs in (
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        item = tensors[theirs]
        with source.gguf.open("rb") as file:
            file.seek(item.offset)
            raw = np.fromfile(file, dtype=np.uint8, count=item.num_bytes)
        rows = raw.reshape(item.shape[0], -1)[:64]
        expected = torch.from_numpy(gguf.dequantize(rows, item.type)).to(torch.bfloat16)
        assert torch.equal(weights[ours][:64], expected), ours
