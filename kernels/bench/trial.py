"""Trials of the benches without a GPU: Triton's interpreter, made to take loop bounds from memory.

What is computed there is right in fp32 only: the interpreter multiplies bf16 as integers.
"""

import os
from typing import Any

import torch


def start_trial() -> None:
    """Prepare for small sizes on the CPU.

    Raises SystemExit where there is a GPU, or kernels were not imported to be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        raise SystemExit("--tiny is for a machine without a GPU, with TRITON_INTERPRET=1")
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # A loaded value is an array of one, which numpy 2.4 does not take for an index.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
