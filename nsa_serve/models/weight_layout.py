"""How the weights of a model lie on a device: fused matrices, and where each weight goes in them.

No torch. Canonical names as in `weight_shapes`; a fused matrix stacks the rows of several weights:
`self_attn.qkvg` is q, k, v and (when learned) the gates, `mlp.gate_up` is gate and up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nsa_serve.config import ModelConfig
from nsa_serve.models.weight_shapes import expected_weights

Quantization = Literal["fp8"]

SCALE_BYTES = 4
"""Of the fp32 scale that each row of a quantized matrix has."""

_FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkvg": tuple(f"self_attn.{letter}_proj" for letter in "qkvg"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
# Where a token's time goes. Embedding and head stay as they are: the one is looked up, not
# multiplied, and errors of the other reach the logits unaveraged. Norms, biases and compression
# MLPs are small.
_QUANTIZED = (
    "self_attn.qkvg.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_up.weight",
    "mlp.down_proj.weight",
)
# Of both sides of a matrix that is multiplied in 8 bits.
_FP8_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a canonical weight goes: its rows begin at `first_row` of the tensor `name`."""

    name: str
    first_row: int


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The tensors of a model on a device.

    shapes: of every tensor, by name. slots: by canonical name. quantized: tensors in e4m3, each
    with a scale by row.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Slot]
    quantized: frozenset[str]


def weight_layout(config: ModelConfig, quantization: Quantization | None = None) -> WeightLayout:
    """Lay out every weight of `expected_weights`.

    With "fp8" the matrices of attention and MLP are quantized, those whose sides are multiples of
    16; the others stay in the run dtype.
    """
    expected = expected_weights(config)
    shapes: dict[str, tuple[int, ...]] = {}
    slots: dict[str, Slot] = {}
    for name, shape in expected.items():
        prefix, part, kind = _split(name)
        fused = next((fused for fused, parts in _FUSED.items() if part in parts), None)
        if fused is None:
            shapes[name], slots[name] = shape, Slot(name, 0)
            continue
        # Where only some of the parts have a bias, the others have zeros.
        first_row = 0
        for before in _FUSED[fused]:
            if before == part:
                break
            first_row += expected[f"{prefix}{before}.weight"][0]
        fused_name = f"{prefix}{fused}.{kind}"
        parts = [f"{prefix}{item}.weight" for item in _FUSED[fused]]
        num_rows = sum(expected[item][0] for item in parts if item in expected)
        shapes[fused_name] = (num_rows, *shape[1:])
        slots[name] = Slot(fused_name, first_row)
    quantized = frozenset[str]()
    if quantization == "fp8":
        quantized = frozenset(
            name
            for name, shape in shapes.items()
            if name.endswith(_QUANTIZED) and not any(size % _FP8_MULTIPLE for size in shape)
        )
    return WeightLayout(shapes, slots, quantized)


def layout_bytes(layout: WeightLayout, element_size: int) -> int:
    """Return the bytes of a layout's tensors, with `element_size` bytes an unquantized number."""
    return sum(
        math.prod(shape) + SCALE_BYTES * shape[0]
        if name in layout.quantized
        else math.prod(shape) * element_size
        for name, shape in layout.shapes.items()
    )


def _split(name: str) -> tuple[str, str, str]:
    """Return ("model.layers.0.", "mlp.up_proj", "weight"); prefix and part are empty elsewhere."""
    pieces = name.split(".")
    if pieces[:2] != ["model", "layers"]:
        return "", "", ""
    return ".".join(pieces[:3]) + ".", ".".join(pieces[3:-1]), pieces[-1]
