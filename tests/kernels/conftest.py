"""What every kernel test needs: a repaired interpreter, and memory that starts out as garbage."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu_util import DEVICE


@pytest.fixture(autouse=True)
def _repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter take loop bounds from memory, multiply bf16 matrices and round FP8.

    It keeps a loaded value in an array of one, which numpy 2.4 does not take for an index, bf16
    as 16-bit integers, which it would multiply as such, and it truncates where a GPU rounds to the
    nearest FP8 number.
    """
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(self, a, b, *args)

    convert_float = interpreter._convert_float

    def patched_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Convert an array of `source` to the bits of `target`; through torch if one is FP8."""
        if tl.float8e4nv not in (source, target):
            return convert_float(x, source, target, rounding)
        dtypes = {
            tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
            tl.bfloat16: (torch.bfloat16, torch.int16),
            tl.float16: (torch.float16, torch.int16),
            tl.float32: (torch.float32, torch.int32),
        }
        bits = torch.from_numpy(x.reshape(-1).view(f"i{x.itemsize}").copy())
        values = bits.view(dtypes[source][0]).to(dtypes[target][0])
        return values.view(dtypes[target][1]).numpy().view(f"u{values.itemsize}").reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", patched_float)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", patched_dot)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new tensor on the device with NaN, or with a huge index, before it is used."""
    empty, new_empty, empty_like = torch.empty, Tensor.new_empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        if tensor.device.type == DEVICE.type:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 30)
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
