"""Random weights of a config's shapes, to measure speed with: no checkpoint is read."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nsa_serve.config import ModelConfig
from nsa_serve.models.device_weights import MAX_ELEMENTS, DeviceWeights
from nsa_serve.models.weight_shapes import expected_weights

_SEED = 0
_STD = 0.02
# Gates near one half, so that every branch takes part.
_GATE_STD = 0.002
_GATES = (".g_proj.", ".gate.fc2.")


def fill_with_dummies(
    target: DeviceWeights,
    config: ModelConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw every weight on the device: norms 1, biases 0, the rest normal.

    The same device and config give the same numbers. `on_progress(done, total)` counts bytes in
    the run dtype.
    """
    generator = torch.Generator(target.device).manual_seed(_SEED)
    expected = expected_weights(config)
    done = 0
    total = sum(math.prod(shape) for shape in expected.values()) * target.dtype.itemsize
    for name, shape in expected.items():
        step = max(1, MAX_ELEMENTS // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            part = (min(step, shape[0] - first), *shape[1:])
            rows = torch.empty(part, dtype=target.dtype, device=target.device)
            target.write(name, first, draw(name, rows, generator))
        done += math.prod(shape) * target.dtype.itemsize
        if on_progress is not None:
            on_progress(done, total)


def dummy_weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random weights by canonical name, on the CPU."""
    generator = torch.Generator().manual_seed(_SEED)
    return {
        name: draw(name, torch.empty(shape, dtype=dtype), generator)
        for name, shape in expected_weights(config).items()
    }


def draw(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a weight, or rows of it, in place and return it."""
    if name.endswith("norm.weight"):
        return values.fill_(1.0)
    if name.endswith(".bias"):
        return values.zero_()
    std = _GATE_STD if any(part in name for part in _GATES) else _STD
    return values.normal_(0.0, std, generator=generator)
