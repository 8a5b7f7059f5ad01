"""Weights of a checkpoint under canonical names: all of them, of the right shape, or an error.

Canonical names are Llama's, and those of the native format (docs/models.md). Legend: HQ/H query
and KV heads, D head_dim, Dv v_head_dim, l cmp_len.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource
from nsa_serve.models.dequantize import dequantize
from nsa_serve.models.families import checkpoint_name
from nsa_serve.models.gguf_tensors import GGUFTensor, read_gguf_tensors
from nsa_serve.models.safetensors_files import StoredWeight, read_weight_index

MAX_NAMES = 10
"""Names of one kind of problem that an error lists before it only counts."""

OnProgress = Callable[[int, int], None]

_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


def expected_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the canonical name and shape of every weight that a model of this config has."""
    hidden = config.hidden_size
    weights: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = (hidden,)
        for name, shape in _attention_weights(config).items():
            weights[f"{prefix}self_attn.{name}"] = shape
        weights[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in _mlp_weights(config).items():
            weights[f"{prefix}mlp.{name}"] = shape
    weights["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        weights[_LM_HEAD] = (config.vocab_size, hidden)
    return weights


def load_weights(
    source: ModelSource,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, torch.Tensor]:
    """Load every weight of `expected_weights`, converted to `dtype`, on the CPU.

    Headers are compared before any tensor is read. `on_progress(done, total)` counts bytes of the
    checkpoint. Memory beyond the result is about one tensor.

    Raises ModelError that names the missing, unexpected and mis-shaped weights (the first ten of
    each kind), or the file that is missing or damaged.
    """
    names = {checkpoint_name(source, config, name): name for name in expected_weights(config)}
    if source.gguf is not None:
        tensors = read_gguf_tensors(source.gguf)
        _check_names(config, names, {name: item.shape for name, item in tensors.items()})
        with _one_thread():
            return _collect(_gguf_stream(source.gguf, config, tensors, names, dtype), on_progress)
    assert source.folder is not None, "a source has a folder or a GGUF file"
    index = read_weight_index(source.folder)
    _check_names(config, names, {name: item.shape for name, item in index.items()})
    _check_tied(config, names, index)
    return _collect(_safetensors_stream(index, names, dtype), on_progress)


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


def _attention_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, nsa = config.hidden_size, config.nsa
    q_size, o_size = (config.num_q_heads * dim for dim in (config.head_dim, config.v_head_dim))
    k_size, v_size = (config.num_kv_heads * dim for dim in (config.head_dim, config.v_head_dim))
    projections = [
        ("q_proj", q_size, hidden, config.attention_bias),
        ("k_proj", k_size, hidden, config.attention_bias),
        ("v_proj", v_size, hidden, config.attention_bias),
        ("o_proj", hidden, o_size, config.attention_out_bias),
    ]
    if nsa.gate == "linear":
        # Rows are (head, branch), branch fastest, in the order cmp, slc, swa.
        projections.append(("g_proj", 3 * config.num_q_heads, hidden, nsa.gate_bias))
    weights = _linears(projections)
    if nsa.compression == "mlp":
        for name, dim in (("cmp_k", config.head_dim), ("cmp_v", config.v_head_dim)):
            weights[f"{name}.pos"] = (nsa.cmp_len, dim)
            layers = (
                (f"{name}.fc1", nsa.cmp_hidden_size, nsa.cmp_len * dim, True),
                (f"{name}.fc2", dim, nsa.cmp_hidden_size, True),
            )
            weights.update(_linears(layers))
    return weights


def _mlp_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    return _linears(
        (
            ("gate_proj", width, hidden, bias),
            ("up_proj", width, hidden, bias),
            ("down_proj", hidden, width, bias),
        )
    )


def _linears(layers: Iterable[tuple[str, int, int, bool]]) -> dict[str, tuple[int, ...]]:
    weights: dict[str, tuple[int, ...]] = {}
    for name, rows, columns, has_bias in layers:
        weights[f"{name}.weight"] = (rows, columns)
        if has_bias:
            weights[f"{name}.bias"] = (rows,)
    return weights


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
    return name == _LM_HEAD and config.tie_word_embeddings


def _check_tied(
    config: ModelConfig, names: Mapping[str, str], index: Mapping[str, StoredWeight]
) -> None:
    """A stored lm_head of a tied model must be the embedding, or one of the two is wrong."""
    if not config.tie_word_embeddings or _LM_HEAD not in index:
        return
    stored = next(name for name, canonical in names.items() if canonical == _EMBEDDING)
    pair = []
    for name in (stored, _LM_HEAD):
        with safe_open(index[name].path, framework="pt") as file:
            pair.append(file.get_tensor(name))
    if not torch.equal(*pair):
        raise ModelError(
            f"{_LM_HEAD} differs from {stored}, but tie_word_embeddings is true; set it to false "
            f"in config.json, or remove {_LM_HEAD}"
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
    index: Mapping[str, StoredWeight], names: Mapping[str, str], dtype: torch.dtype
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
            tensor = dequantize(raw, item.type, item.shape, dtype)
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
