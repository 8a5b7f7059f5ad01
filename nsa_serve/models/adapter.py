"""A base checkpoint and an adapter: low-rank updates of projections, and the gates of NSA.

The adapter is one safetensors file (docs/models.md). Merged while the base is read, so that the
engine sees a model as any other.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ModelError
from nsa_serve.models.weight_shapes import expected_weights

_UPDATE = re.compile(r"(model\.layers\.\d+\.self_attn\.[qkvo]_proj)\.lora_(a|b)")
_GATES = re.compile(r"model\.layers\.\d+\.self_attn\.g_proj\.(weight|bias)")
MAX_NAMES = 5
"""Problems that an error lists before it only counts."""


class Adapter:
    """The tensors of an adapter, checked against the model that they are for.

    Raises ModelError when the file cannot be read or a tensor is missing, unknown or mis-shaped.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the adapter {path} cannot be read: {error}") from error
        shapes = expected_weights(config)
        self.gates = {name for name in shapes if _GATES.fullmatch(name)}
        problems = [*self._wrong_gates(shapes), *self._wrong_updates(shapes)]
        if problems:
            more = len(problems) - MAX_NAMES
            listed = "; ".join(problems[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
            raise ModelError(f"the adapter {path} does not fit its base and nsa section: {listed}")

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Return weight + lora_b @ lora_a, fp32, of the weight `name`; as it is without an update.

        weight: [out, in], of any floating dtype.
        """
        stem = name.removesuffix(".weight")
        low = self._tensors.get(stem + ".lora_a")
        if low is None:
            return weight
        high = self._tensors[stem + ".lora_b"]
        return torch.addmm(weight.float(), high.float(), low.float())

    def has_update(self, name: str) -> bool:
        """Whether `merge` changes the weight `name`."""
        return name.removesuffix(".weight") + ".lora_a" in self._tensors

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that the base does not have: its gates."""
        for name in sorted(self.gates):
            yield name, self._tensors[name]

    def _wrong_gates(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
        for name in sorted(self.gates):
            tensor = self._tensors.get(name)
            if tensor is None:
                yield f"{name} is missing"
            elif tuple(tensor.shape) != shapes[name]:
                yield f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}"

    def _wrong_updates(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
        for name, tensor in self._tensors.items():
            match = _UPDATE.fullmatch(name)
            if match is None:
                if name not in self.gates:
                    yield f"{name} is not known"
                continue
            stem, side = match.groups()
            shape = shapes.get(stem + ".weight")
            other = self._tensors.get(f"{stem}.lora_{'b' if side == 'a' else 'a'}")
            if shape is None:
                yield f"{name} updates what the base does not have"
            elif other is None or tensor.dim() != 2 or other.dim() != 2:
                yield f"{name} needs lora_a [rank, in] and lora_b [out, rank]"
            else:
                rank = tensor.shape[0] if side == "a" else tensor.shape[1]
                wanted = (rank, shape[1]) if side == "a" else (shape[0], rank)
                other_rank = other.shape[1] if side == "a" else other.shape[0]
                if tuple(tensor.shape) != wanted or rank != other_rank:
                    yield f"{name} is {list(tensor.shape)}, expected {list(wanted)} of one rank"
