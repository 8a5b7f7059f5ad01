"""The tensors of a `WeightLayout` on a device, and weights on their way into them."""

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor

from nsa_serve.models.fp8 import E4M3, quantize_rows
from nsa_serve.models.weight_layout import WeightLayout

Weights = MutableMapping[str, Tensor]

SCALE_SUFFIX = "_scale"
"""What the name of a quantized tensor's scales ends with."""

# The most elements that are converted at once, so that converting needs little memory.
MAX_ELEMENTS = 16 << 20


class DeviceWeights:
    """Preallocated final tensors; rows are converted, and quantized, as they are written.

    tensors: by the layout's names: of the run dtype, or e4m3 with `name + "_scale"` [rows] fp32
    beside it.
    """

    def __init__(self, layout: WeightLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.dtype = dtype
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        for name, shape in layout.shapes.items():
            if name in layout.quantized:
                self.tensors[name] = torch.empty(shape, dtype=E4M3, device=device)
                scales = torch.empty(shape[0], dtype=torch.float32, device=device)
                self.tensors[name + SCALE_SUFFIX] = scales
            elif name.endswith(".bias"):
                # A fused bias has zeros for the parts that have none.
                self.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype, device=device)

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write rows of the weight `name` (canonical) from `first_row` on.

        rows: whole rows, on the device, of any floating dtype. Work is queued on the current
        stream.
        """
        slot = self.layout.slots[name]
        begin = slot.first_row + first_row
        tensor = self.tensors[slot.name]
        if tensor.dim() == 3:
            tensor = tensor.flatten(0, 1)
        target = tensor[begin : begin + len(rows)]
        if slot.name not in self.layout.quantized:
            target.copy_(rows)
            return
        scales = self.tensors[slot.name + SCALE_SUFFIX]
        # As the weight would be without quantization, so that the checkpoint's dtype is no matter.
        quantize_rows(rows.to(self.dtype), out=target, scales=scales[begin : begin + len(rows)])

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """Write a whole weight from whatever device it is on, a part at a time."""
        step = max(1, MAX_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
        for first in range(0, len(tensor), step):
            self.write(name, first, tensor[first : first + step].to(self.device))

    def finish(self) -> dict[str, Tensor]:
        """Wait for the device, give back the memory that writing used, and return the tensors."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        return self.tensors
