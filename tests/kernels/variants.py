"""Lists what a server's steps would compile, without compiling: `python -m tests.kernels.variants`.

Runs the operator on tensors without memory, first what a start warms up, then steps of random
batches, and prints JSON:
late: kernels of which a step after the warm-up wants another variant.
varying: the integers of each kernel that differed between steps.
specialised: those of them that Triton would compile anew for (1 and multiples of 16 are special).
"""

import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nsa_kernels.gpu import attention
from nsa_kernels.gpu.plan import plan_attention
from nsa_kernels.metadata import BranchKV, LayerCache, build_metadata
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec

MAX_CONTEXT = 32768
ROWS = [1, 2, 4, *range(8, 65, 8)]
CONTEXTS = [2048 << i for i in range(5)]
GEOMETRIES = {
    # spec, query heads, KV heads, width of keys and values, learned compression
    "shared": (NSASpec(), 64, 4, 128, False),
    "legacy": (
        NSASpec(
            cmp_len=16,
            cmp_stride=16,
            block_size=16,
            num_init_blocks=0,
            num_local_blocks=1,
            window_size=128,
            selection="fla_legacy",
        ),
        32,
        2,
        64,
        False,
    ),
    "mlp": (NSASpec(), 16, 2, 64, True),
    "branches": (NSASpec(), 16, 2, 64, False),
    "branches-mlp": (NSASpec(), 16, 1, 64, True),
    "infllm": (
        NSASpec(
            num_selected_blocks=96,
            num_local_blocks=32,
            window_size=0,
            score_map="max_pool",
            dense_len=8192,
            lse_len=128,
            lse_stride=64,
        ),
        32,
        2,
        128,
        False,
    ),
}


class Recorder:
    """What kernels are launched with; Triton believes in a GPU that compiles nothing."""

    def __init__(self) -> None:
        self.variants: dict[tuple[str, str], str] = {}
        self.values: dict[tuple[str, str], set[int]] = {}
        self.unspecialised: set[tuple[str, str]] = set()
        self.phase = "warm-up"

    def install(self) -> None:
        sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/bench"))
        import offline

        driver.set_active(offline._FakeDriver())
        properties: Any = SimpleNamespace(multi_processor_count=offline.NUM_SMS)
        torch.cuda.get_device_properties = lambda device=None: properties
        knobs.runtime.jit_cache_hook = self._compile
        real_run = JITFunction.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            for parameter in kernel.params:
                if not parameter.is_constexpr and parameter.name in bound:
                    self._note(kernel, parameter, bound[parameter.name])
            return real_run(kernel, *args, grid=grid, warmup=True, **kwargs)

        JITFunction.run = run

    def _compile(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.variants.setdefault((fn.name.rpartition(".")[2], key), self.phase)
        return True

    def _note(self, kernel: Any, parameter: Any, value: Any) -> None:
        values = value if isinstance(value, tuple) else (value,)
        for place, item in enumerate(values):
            if isinstance(item, int):
                name = parameter.name if item is value else f"{parameter.name}[{place}]"
                at = (kernel.fn.__name__, name)
                self.values.setdefault(at, set()).add(item)
                if parameter.do_not_specialize and item is value:
                    self.unspecialised.add(at)

    def report(self) -> dict[str, Any]:
        varying = sorted(at for at, values in self.values.items() if len(values) > 1)
        return {
            "kernels": sorted({kernel for kernel, _ in self.variants}),
            "late": sorted(k for (k, _), phase in self.variants.items() if phase != "warm-up"),
            "varying": [".".join(at) for at in varying],
            "specialised": [".".join(at) for at in varying if at not in self.unspecialised],
        }


class Layer:
    """One attention layer on tensors without memory."""

    def __init__(
        self,
        spec: NSASpec,
        num_q_heads: int,
        num_kv_heads: int,
        dim: int,
        is_mlp: bool,
        *,
        is_fp8: bool,
        is_separate: bool,
    ) -> None:
        self.spec, self.heads, self.dim = spec, (num_q_heads, num_kv_heads), dim
        self.is_separate = is_separate
        dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16

        def pages(tokens: int) -> Tensor:
            return empty(1000, num_kv_heads, tokens, dim, dtype=dtype)

        scale = empty(num_kv_heads, dtype=torch.float32) if is_fp8 else None
        entries = spec.cmp_entries_per_page
        self.cache = LayerCache(
            pages(spec.block_size),
            pages(spec.block_size),
            pages(entries),
            pages(entries),
            k_scale=scale,
            v_scale=scale,
            k_lse=pages(spec.block_size // spec.lse_stride) if spec.lse_len else None,
        )
        if is_separate:
            tokens = {"k_swa": spec.block_size, "k_tail": spec.cmp_len}
            tokens |= {name.replace("k", "v"): count for name, count in tokens.items()}
            branch_pages = {name: pages(count) for name, count in tokens.items()}
            self.cache = dataclasses.replace(self.cache, **branch_pages)
        self.mlps = None
        if is_mlp:
            shapes = ((spec.cmp_len, dim), (128, spec.cmp_len * dim), (128,), (dim, 128), (dim,))
            mlp = CompressionMLP(*(empty(*shape) for shape in shapes))
            self.mlps = (mlp, mlp)

    def step(self, ends: Sequence[int], lens: Sequence[int], num_decode_rows: int = 0) -> None:
        """Add lens[b] tokens to row b, which then has ends[b], or lens[b] if that is more."""
        size, (num_q_heads, num_kv_heads) = self.spec.block_size, self.heads
        starts = [max(end - num, 0) for end, num in zip(ends, lens, strict=True)]
        pages = [[1] * -(-(a + n) // size) for a, n in zip(starts, lens, strict=True)]
        meta = build_metadata(
            pages,
            starts,
            lens,
            self.spec,
            num_decode_rows=num_decode_rows,
            swa_pages=pages if self.is_separate else None,
        )
        plan = plan_attention(
            meta,
            self.spec,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
        num_pages = meta.page_table.shape[1]
        shape = (
            min((rows for rows in ROWS if rows >= num_decode_rows), default=0),
            min(pages for c in CONTEXTS if (pages := -(-c // size)) >= num_pages),
        )
        plan = dataclasses.replace(plan, use_pdl=True, decode_shape=shape)
        num_kv = 6 if self.is_separate else 2
        widths = [num_q_heads * self.dim, *[num_kv_heads * self.dim] * num_kv, num_q_heads * 3]
        fused = empty(sum(lens), sum(widths))
        edges = [0, *(sum(widths[: i + 1]) for i in range(len(widths)))]
        q, k, v, *others, gates = (
            fused[:, a:b].unflatten(1, (-1, width))
            for (a, b), width in zip(pairwise(edges), (*[self.dim] * (num_kv + 1), 3), strict=True)
        )
        attention.nsa_attention(
            q,
            k,
            v,
            gates,
            self.cache,
            plan,
            self.spec,
            softmax_scale=0.1,
            compression=self.mlps,
            branch_kv=BranchKV(*others) if others else None,
            sigmoid_gates=True,
        )

    def warm_up(self) -> None:
        """Prompts that end in contexts of every power of two, and a decode step of every shape."""
        self.step([5], [5])
        self.step([300, 5], [300, 5])
        for end in (300, *CONTEXTS):
            self.step([end], [5])
            self.step([end], [min(end, 4096)])
        self.step([5, 5], [1, 5], 1)
        for rows in ROWS:
            for context in CONTEXTS:
                self.step([context] * rows, [1] * rows, rows)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def serve(layer: Layer, generator: random.Random, num_steps: int) -> None:
    """Run steps of random prompts, with and without decode rows in front."""
    for _ in range(num_steps):
        num_prompts = generator.choice([1, 1, 2, 3, 7])
        num_decode_rows = generator.choice([0, 1, 2, 3, generator.randrange(4, 64)])
        prompts = [
            generator.choice([1, 2, 15, 16, 17, generator.randrange(900)]) + 1
            for _ in range(num_prompts)
        ]
        ends = [
            generator.choice(
                [1, 3, 17, generator.randrange(2000), generator.randrange(MAX_CONTEXT)]
            )
            for _ in range(num_decode_rows + num_prompts)
        ]
        layer.step([end + 1 for end in ends], [1] * num_decode_rows + prompts, num_decode_rows)


def main() -> None:
    """Print the report of every geometry."""
    recorder = Recorder()
    recorder.install()
    reports = {}
    for name, geometry in GEOMETRIES.items():
        is_separate = name.startswith("branches")
        for is_fp8 in (False,) if is_separate else (False, True):
            recorder.variants.clear()
            recorder.values.clear()
            layer = Layer(*geometry, is_fp8=is_fp8, is_separate=is_separate)
            recorder.phase = "warm-up"
            layer.warm_up()
            recorder.phase = "serving"
            serve(layer, random.Random(0), 60)
            reports[f"{name}{'-fp8' if is_fp8 else ''}"] = recorder.report()
    print(json.dumps(reports))  # noqa: T201 (its parent reads it)


if __name__ == "__main__":
    main()
