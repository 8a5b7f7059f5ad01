"""Weights straight into their fused tensors: the same numbers as `load_weights`, or an error."""

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ConfigError, ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.device_weights import SCALE_SUFFIX, DeviceWeights
from nsa_serve.models.families import load_model_config
from nsa_serve.models.fp8 import E4M3, check_fp8, quantize_rows
from nsa_serve.models.safetensors_files import StoredWeight, read_weight_index
from nsa_serve.models.weight_layout import WeightLayout, weight_layout
from nsa_serve.models.weight_shapes import expected_weights, num_parameters
from nsa_serve.models.weight_stream import stream_weights
from nsa_serve.models.weights import load_device_weights, load_weights, weight_bytes
from tests.util import write_checkpoint, write_gguf

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EVERY_BIAS = {"attention_bias": True, "mlp_bias": True}


def unfuse(
    layout: WeightLayout, tensors: Mapping[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """The canonical weights, cut out of a layout's tensors."""
    return {
        name: tensors[slot.name][
            slot.first_row : slot.first_row + expected_weights(config)[name][0]
        ]
        for name, slot in layout.slots.items()
    }


def make_source(folder: Path) -> tuple[ModelSource, ModelConfig]:
    source = ModelSource(name="tiny", folder=folder)
    return source, load_model_config(source)


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """Every weight of a native checkpoint, whose names are the canonical ones."""
    return read_weight_index(folder)


@DTYPES
@pytest.mark.parametrize("name", ["nsa", "llama-nsa", "llama", "llama-mlp"])
def test_fused_tensors_hold_the_weights(
    checkpoints: Mapping[str, Path], name: str, dtype: torch.dtype
) -> None:
    source, config = make_source(checkpoints[name])
    layout = weight_layout(config)
    tensors = load_device_weights(source, config, dtype, device=CPU)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.shapes
    weights = unfuse(layout, tensors, config)
    expected = load_weights(source, config, dtype)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == weights[name].dtype and torch.equal(weights[name], tensor), name


@DTYPES
@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("staging_bytes", [1, 1000, 1 << 20])
def test_pieces_of_any_size_from_any_dtype(
    tmp_path: Path, dtype: torch.dtype, num_readers: int, staging_bytes: int
) -> None:
    folder = write_checkpoint(
        tmp_path / "half", config=EVERY_BIAS, dtype=torch.float16, sharded=True, seed=5
    )
    source, config = make_source(folder)
    layout = weight_layout(config)
    target = DeviceWeights(layout, dtype, CPU)
    stored = stored_weights(folder)
    calls: list[tuple[int, int]] = []
    stream_weights(
        stored,
        target,
        lambda done, total: calls.append((done, total)),
        num_readers=num_readers,
        staging_bytes=staging_bytes,
    )
    weights = unfuse(layout, target.finish(), config)
    for name, tensor in load_weights(source, config, dtype).items():
        assert torch.equal(weights[name], tensor), name
    size = sum(item.num_bytes for item in stored.values())
    assert {total for _, total in calls} == {size} and calls[-1][0] == size
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_the_parts_of_a_bias_that_are_missing_are_zero(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", nsa={"gate_bias": True}, num_layers=1)
    source, config = make_source(folder)
    tensors = load_device_weights(source, config, torch.float32, device=CPU)
    bias = tensors["model.layers.0.self_attn.qkvg.bias"]
    num_gates = 3 * config.num_q_heads
    assert bias.shape == tensors["model.layers.0.self_attn.qkvg.weight"].shape[:1]
    assert not bias[:-num_gates].any() and bias[-num_gates:].all()


def test_a_tied_head_is_not_loaded_twice(tmp_path: Path) -> None:
    source, config = make_source(write_checkpoint(tmp_path / "a", tie_word_embeddings=True))
    assert "lm_head.weight" not in load_device_weights(source, config, torch.float32, device=CPU)


def test_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", quant_type="Q8_0")
    source = ModelSource(name="a", gguf=path, nsa_section={"gate": "constant"})
    config = load_model_config(source)
    tensors = load_device_weights(source, config, torch.bfloat16, device=CPU)
    weights = unfuse(weight_layout(config), tensors, config)
    for name, tensor in load_weights(source, config, torch.bfloat16).items():
        assert torch.equal(weights[name], tensor), name


def test_wrong_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "a", num_layers=1)
    _, config = make_source(write_checkpoint(tmp_path / "b", num_layers=2))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1"):
        load_device_weights(ModelSource(name="a", folder=small), config, torch.float32, device=CPU)


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, damage: str) -> None:
    folder = write_checkpoint(tmp_path / "a", sharded=True)
    _, config = make_source(folder)
    stored = stored_weights(folder)
    path = folder / "model-00002-of-00003.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    target = DeviceWeights(weight_layout(config), torch.float32, CPU)
    expected = "cannot read" if damage == "gone" else "ends inside model"
    with pytest.raises(ModelError, match=rf"{expected}|{expected}.*model-00002"):
        stream_weights(stored, target, staging_bytes=512)
    assert not any(thread.name.startswith("weights-") for thread in threading.enumerate())


def test_an_interrupted_load_leaves_no_thread_behind(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    _, config = make_source(folder)
    target = DeviceWeights(weight_layout(config), torch.float32, CPU)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_weights(stored_weights(folder), target, interrupt, staging_bytes=512)
    assert not any(thread.name.startswith("weights-") for thread in threading.enumerate())


@DTYPES
def test_dummies_need_only_a_config(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "a", config=EVERY_BIAS)
    (folder / "model.safetensors").unlink()
    source, config = make_source(folder)
    first, second = (
        load_device_weights(source, config, dtype, device=CPU, is_dummy=True) for _ in range(2)
    )
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == weight_layout(
        config
    ).shapes
    for name, tensor in first.items():
        assert tensor.isfinite().all() and torch.equal(tensor, second[name]), name
    assert (first["model.norm.weight"] == 1).all()
    embedding = first["model.embed_tokens.weight"].float()
    assert 0.019 < embedding.std() < 0.021
    canonical = load_weights(source, config, dtype, is_dummy=True)
    assert {name: tuple(tensor.shape) for name, tensor in canonical.items()} == expected_weights(
        config
    )


@DTYPES
@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("name", ["nsa", "llama", "llama-mlp"])
def test_weight_bytes_are_those_of_the_tensors(
    checkpoints: Mapping[str, Path], name: str, quantization: str | None, dtype: torch.dtype
) -> None:
    _, config = make_source(checkpoints[name])
    target = DeviceWeights(weight_layout(config, quantization), dtype, CPU)
    allocated = sum(tensor.nbytes for tensor in target.tensors.values())
    assert allocated == weight_bytes(config, dtype, quantization)


def test_number_of_parameters(checkpoints: Mapping[str, Path]) -> None:
    source, config = make_source(checkpoints["llama"])
    weights = load_weights(source, config, torch.float32)
    assert num_parameters(config) == sum(tensor.numel() for tensor in weights.values())


def test_what_is_quantized(checkpoints: Mapping[str, Path]) -> None:
    """Matrices of a layer, except those with a side that is no multiple of 16."""
    _, config = make_source(checkpoints["llama"])
    quantized = weight_layout(config, "fp8").quantized
    layer = "model.layers.1."
    # q 64, k 32, v 32 and 3 * 4 gates: 140 rows.
    assert layer + "self_attn.qkvg.weight" not in quantized
    assert {name for name in quantized if name.startswith(layer)} == {
        layer + "self_attn.o_proj.weight",
        layer + "mlp.gate_up.weight",
        layer + "mlp.down_proj.weight",
    }
    assert all(name.startswith("model.layers.") for name in quantized)


def test_weights_are_quantized_as_they_arrive(checkpoints: Mapping[str, Path]) -> None:
    source, config = make_source(checkpoints["llama"])
    layout = weight_layout(config, "fp8")
    target = DeviceWeights(layout, torch.bfloat16, CPU)
    stream_weights(stored_weights(checkpoints["llama"]), target, staging_bytes=1000)
    tensors = target.finish()
    plain = load_device_weights(source, config, torch.bfloat16, device=CPU)
    for name, expected in plain.items():
        if name in layout.quantized:
            assert tensors[name].dtype == E4M3
            values = tensors[name].float() * tensors[name + SCALE_SUFFIX][:, None]
            assert_quantized(values, expected.float(), tensors[name + SCALE_SUFFIX])
        else:
            assert torch.equal(tensors[name], expected), name


def assert_quantized(values: Tensor, expected: Tensor, scales: Tensor) -> None:
    """Half a step of e4m3: 1/16 of the number, or of the even spacing around zero."""
    bound = torch.maximum(expected.abs() / 16, scales[:, None] * 2.0**-10)
    # And an fp32 rounding of the quotient.
    assert ((values - expected).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 63), (65, 111), (2, 4097)])
def test_the_quantizer_keeps_its_bound(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    # Rows of very different sizes, and numbers from nothing to outliers in each.
    values = torch.randn(rows, columns, generator=generator).pow(5)
    values *= torch.logspace(-5, 9, rows)[:, None]
    values[-1, columns // 2 :] = 0.0
    out = torch.empty(rows, columns, dtype=E4M3)
    scales = torch.empty(rows)
    quantize_rows(values, out=out, scales=scales)
    assert out.float().isfinite().all()
    assert_quantized(out.float() * scales[:, None], values, scales)
    largest = out.float().abs().amax(dim=1)
    assert (largest[values.abs().amax(dim=1) > 1e-12] == 448).all()
    assert not out.float()[values == 0].any()


def test_zero_rows_stay_zero() -> None:
    out, scales = torch.empty(2, 16, dtype=E4M3), torch.empty(2)
    quantize_rows(torch.zeros(2, 16, dtype=torch.bfloat16), out=out, scales=scales)
    assert not out.float().any() and scales.isfinite().all() and math.prod(scales) > 0


def test_fp8_is_refused_where_it_cannot_work(
    checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_source(checkpoints["llama"])
    with pytest.raises(ConfigError, match="the device is cpu"):
        load_device_weights(source, config, torch.bfloat16, device=CPU, quantization="fp8")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"an A100 has 8\.0"):
        check_fp8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="got float32"):
        check_fp8(cuda, torch.float32)
    check_fp8(cuda, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_streams_to_a_gpu_give_the_same_bytes(tmp_path: Path, quantization: str | None) -> None:
    """Buffers are not refilled before their copies are over, and converting is that of the CPU."""
    folder = write_checkpoint(
        tmp_path / "a", hidden_size=512, intermediate_size=2048, dtype=torch.float16, sharded=True
    )
    _, config = make_source(folder)
    layout = weight_layout(config, quantization)
    on_cpu, on_gpu = (
        DeviceWeights(layout, torch.bfloat16, torch.device(name)) for name in ("cpu", "cuda")
    )
    for target in (on_cpu, on_gpu):
        stream_weights(stored_weights(folder), target, num_readers=3, staging_bytes=40_000)
    tensors = on_gpu.finish()
    for name, expected in on_cpu.finish().items():
        # As bytes: e4m3 numbers cannot be compared.
        assert torch.equal(tensors[name].cpu().view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.gpu
def test_loading_and_dummies_on_a_gpu(checkpoints: Mapping[str, Path]) -> None:
    source, config = make_source(checkpoints["llama-mlp"])
    device = torch.device("cuda")
    expected = load_device_weights(source, config, torch.bfloat16, device=CPU)
    tensors = load_device_weights(source, config, torch.bfloat16, device=device)
    for name, tensor in expected.items():
        assert tensors[name].is_cuda and torch.equal(tensors[name].cpu(), tensor), name
    for quantization in (None, "fp8"):
        dummies = load_device_weights(
            source, config, torch.bfloat16, device=device, quantization=quantization, is_dummy=True
        )
        assert all(
            tensor.is_cuda and tensor.float().isfinite().all() for tensor in dummies.values()
        )
