"""Weights of a checkpoint under canonical names: all of them, of the right shape, or an error.

Canonical names are Llama's, and those of the native format (docs/models.md). Legend: HQ/H query
and KV heads, D head_dim, Dv v_head_dim, l cmp_len.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.adapter import Adapter
from nsa_serve.models.dequantize import dequantize
from nsa_serve.models.device_weights import DeviceWeights
from nsa_serve.models.dummy_weights import dummy_weights, fill_with_dummies
from nsa_serve.models.families import checkpoint_name
from nsa_serve.models.fp8 import check_fp8
from nsa_serve.models.gguf_tensors import GGUFTensor, read_gguf_tensors
from nsa_serve.models.safetensors_files import StoredWeight, read_weight_index
from nsa_serve.models.weight_layout import Quantization, layout_bytes, weight_layout
from nsa_serve.models.weight_shapes import EMBEDDING, LM_HEAD
from nsa_serve.models.weight_shapes import expected_weights as expected_weights
from nsa_serve.models.weight_stream import stream_weights

MAX_NAMES = 10
"""Names of one kind of problem that an error lists before it only counts."""

OnProgress = Callable[[int, int], None]


def load_weights(
    source: ModelSource,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    is_dummy: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, torch.Tensor]:
    """Load every weight of `expected_weights`, converted to `dtype`, on the CPU.

    Headers are compared before any tensor is read. `on_progress(done, total)` counts bytes of the
    checkpoint. Memory beyond the result is about one tensor. is_dummy: random weights instead, and
    no file is read.

    Raises ModelError that names the missing, unexpected and mis-shaped weights (the first ten of
    each kind), or the file that is missing or damaged.
    """
    if is_dummy:
        return dummy_weights(config, dtype)
    with _one_thread() if source.gguf is not None else nullcontext():
        return _collect(_open_stream(source, config, dtype), on_progress)


def stream_checkpoint(
    source: ModelSource, config: ModelConfig, on_progress: OnProgress | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of `expected_weights` by canonical name, on the CPU, one at a time.

    Safetensors keep the dtype that they are stored in; a GGUF's are in the config's
    `checkpoint_dtype`. Raises what `load_weights` raises, before anything is read.
    """
    dtype: torch.dtype | None = None
    if source.gguf is not None:
        dtype = getattr(torch, config.checkpoint_dtype)
    for item in _open_stream(source, config, dtype):
        yield item.name, item.tensor
        if on_progress is not None:
            on_progress(item.done, item.total)


def _open_stream(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype | None
) -> Iterator["_Loaded"]:
    """Check a checkpoint, and return its weights as they are read, the adapter's merged.

    dtype: None is that of the checkpoint, and float32 for what an adapter changes.
    """
    adapter = None if source.adapter is None else Adapter(source.adapter, config)
    if source.gguf is not None:
        tensors, names = _checked_gguf(source.gguf, source, config)
        base_dtype = dtype or torch.float32
        stream = _gguf_stream(source.gguf, config, tensors, names, base_dtype, adapter)
    else:
        index, names = _checked_index(source, config)
        stream = _safetensors_stream(index, names, None if adapter else dtype)
    return stream if adapter is None else _merged(stream, adapter, dtype)


def _merged(
    stream: Iterator["_Loaded"], adapter: Adapter, dtype: torch.dtype | None
) -> Iterator["_Loaded"]:
    total = 0
    for item in stream:
        total = item.total
        tensor = adapter.merge(item.name, item.tensor)
        yield replace(item, tensor=tensor if dtype is None else tensor.to(dtype))
    for name, tensor in adapter.own_weights():
        yield _Loaded(name, tensor if dtype is None else tensor.to(dtype), total, total)


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Return the bytes that the weights of a model take on a device, as they lie there."""
    return layout_bytes(weight_layout(config, quantization), dtype.itemsize)


def load_device_weights(
    source: ModelSource,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    device: torch.device,
    quantization: Quantization | None = None,
    is_dummy: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, torch.Tensor]:
    """Load every weight into the tensors of `weight_layout` on a device, converted to `dtype`.

    Safetensors are read by several threads straight into the final tensors; host memory is a few
    staging buffers. is_dummy: random weights, and no file is read.

    Raises what `load_weights` raises, and ConfigError where `quantization` cannot work.
    """
    if quantization == "fp8":
        check_fp8(device, dtype)
    target = DeviceWeights(weight_layout(config, quantization), dtype, device)
    if is_dummy:
        fill_with_dummies(target, config, on_progress)
    elif source.gguf is not None or source.adapter is not None:
        with _one_thread():
            for item in _open_stream(source, config, dtype):
                target.write_whole(item.name, item.tensor)
                if on_progress is not None:
                    on_progress(item.done, item.total)
    else:
        index, names = _checked_index(source, config)
        wanted = {names[name]: item for name, item in index.items() if name in names}
        stream_weights(wanted, target, on_progress)
    return target.finish()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to the calling thread while it dequantizes.

    A piece takes a fraction of a millisecond, so that more threads mostly wait for each other, the
    more so when the cores have other work, as they have at start.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _checked_gguf(
    path: Path, source: ModelSource, config: ModelConfig
) -> tuple[dict[str, GGUFTensor], dict[str, str]]:
    """Return a GGUF's tensors by its names, and canonical names by those; all are as expected."""
    names = _canonical_names(source, config)
    tensors = read_gguf_tensors(path)
    _check_names(config, names, {name: item.shape for name, item in tensors.items()})
    return tensors, names


def _checked_index(
    source: ModelSource, config: ModelConfig
) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """Return a folder's weights by its names, and canonical names by those; all are as expected."""
    assert source.folder is not None, "a source has a folder or a GGUF file"
    names = _canonical_names(source, config)
    index = read_weight_index(source.folder)
    _check_names(config, names, {name: item.shape for name, item in index.items()})
    _check_tied(config, names, index)
    return index, names


def _canonical_names(source: ModelSource, config: ModelConfig) -> dict[str, str]:
    """Canonical names by the checkpoint's; gates that an adapter brings are not expected in it."""
    names = expected_weights(config)
    return {
        checkpoint_name(source, config, name): name
        for name in names
        if source.adapter is None or ".g_proj." not in name
    }


def _check_names(
    config: ModelConfig, names: Mapping[str, str], found: Mapping[str, tuple[int, ...]]
) -> None:
    expected = expected_weights(config)
    missing = [name for name in names if name not in found]
    unexpected = [name for name in found if name not in names and not _is_known(name, config)]
    misshaped = [
        f"{name} (expected {list(expected[names[name]])}, found {list(shape)})"
        for name, shape in found.items()
        if name in names and shape != expected[names[name]]
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshaped))
    problems = [f"{len(items)} {kind}: {_listed(items)}" for kind, items in kinds if items]
    if problems:
        raise ModelError(
            f"the weights do not fit the config of this {config.family} model; "
            + "; ".join(problems)
        )


def _listed(items: list[str]) -> str:
    rest = len(items) - MAX_NAMES
    return ", ".join(items[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _is_known(name: str, config: ModelConfig) -> bool:
    """Weights that change nothing: rotary tables follow from the config; a tied lm_head is checked
    by `_check_tied`."""
    if name.endswith(("rotary_emb.inv_freq", "rotary.inv_freq")):
        return True
    return name == LM_HEAD and config.tie_word_embeddings


def _check_tied(
    config: ModelConfig, names: Mapping[str, str], index: Mapping[str, StoredWeight]
) -> None:
    """A stored lm_head of a tied model must be the embedding, or one of the two is wrong."""
    if not config.tie_word_embeddings or LM_HEAD not in index:
        return
    stored = next(name for name, canonical in names.items() if canonical == EMBEDDING)
    pair = []
    for name in (stored, LM_HEAD):
        with safe_open(index[name].path, framework="pt") as file:
            pair.append(file.get_tensor(name))
    if not torch.equal(*pair):
        raise ModelError(
            f"{LM_HEAD} differs from {stored}, but tie_word_embeddings is true; set it to false "
            f"in config.json, or remove {LM_HEAD}"
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    name: str
    tensor: torch.Tensor
    done: int
    total: int


def _collect(stream: Iterator[_Loaded], on_progress: OnProgress | None) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for item in stream:
        weights[item.name] = item.tensor
        if on_progress is not None:
            on_progress(item.done, item.total)
    return weights


def _safetensors_stream(
    index: Mapping[str, StoredWeight], names: Mapping[str, str], dtype: torch.dtype | None
) -> Iterator[_Loaded]:
    wanted = {name: item for name, item in index.items() if name in names}
    done, total = 0, sum(item.num_bytes for item in wanted.values())
    by_path: dict[Path, list[str]] = {}
    for name, item in wanted.items():
        by_path.setdefault(item.path, []).append(name)
    for path, stored_names in by_path.items():
        with safe_open(path, framework="pt") as file:
            for name in stored_names:
                # A copy, so that the model does not read from a file that may change under it.
                tensor = file.get_tensor(name).to(dtype, copy=True)
                done += wanted[name].num_bytes
                yield _Loaded(names[name], tensor, done, total)


def _gguf_stream(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, GGUFTensor],
    names: Mapping[str, str],
    dtype: torch.dtype,
    adapter: Adapter | None = None,
) -> Iterator[_Loaded]:
    wanted = sorted((name for name in tensors if name in names), key=lambda n: tensors[n].offset)
    done, total = 0, sum(tensors[name].num_bytes for name in wanted)
    with path.open("rb") as file:
        for name in wanted:
            item = tensors[name]
            file.seek(item.offset)
            raw = torch.from_numpy(np.fromfile(file, dtype=np.uint8, count=item.num_bytes))
            if raw.numel() != item.num_bytes:
                raise ModelError(f"{path} ends inside {name}")
            raw = _half_rotation_rows(raw, names[name], config)
            # What an adapter changes is rounded once, after it.
            is_merged = adapter is not None and adapter.has_update(names[name])
            kept = torch.float32 if is_merged else dtype
            tensor = dequantize(raw, item.type, item.shape, kept)
            done += item.num_bytes
            yield _Loaded(names[name], tensor, done, total)


def _half_rotation_rows(raw: torch.Tensor, name: str, config: ModelConfig) -> torch.Tensor:
    """Undo the row order of q and k in GGUF, on the bytes as they are (a row is whole blocks).

    GGUF interleaves the pairs that RoPE rotates (0, D/2, 1, D/2 + 1, ...); the models here rotate
    halves (0, 1, ..., D/2, D/2 + 1, ...).
    """
    if ".q_proj." in name:
        num_heads = config.num_q_heads
    elif ".k_proj." in name:
        num_heads = config.num_kv_heads
    else:
        return raw
    rows = raw.view(num_heads, config.head_dim // 2, 2, -1)
    return rows.transpose(1, 2).reshape(-1)
