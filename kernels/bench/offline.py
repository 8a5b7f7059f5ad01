"""Compile Triton kernels for sm_90 without a GPU, and report what they cost.

Inside `capture()` Triton believes that a Hopper device is active, and a kernel launch compiles and
records instead of running. Any wrapper can then be called with tensors that hold nothing:

    import offline                      # kernels/bench on sys.path, TRITON_INTERPRET not set
    with offline.capture() as report:
        my_wrapper(offline.fake(8, 64, 128), offline.fake(8, 4, 128))
    offline.print_table(report)

`fake` makes meta tensors: they take no memory, are "aligned to 16 bytes" as Triton's
specialisation sees it, and every torch op on them works that does not read a value. A value that a
wrapper reads on the host (a list, `plan.num_tiles`) has to be real. Launches with the same
specialisation are reported once. Run as a script it prints the whole decode and prefill operator at
the geometry of the paper, and one JSON line:

    python kernels/bench/offline.py [--only NAME] [--dtype bf16] [--out FILE.json]

Columns: registers a thread, bytes spilled to and reloaded from local memory, shared memory of a
program in bytes, programs that fit on one SM at once, and instructions of the two matrix units.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCH = 90
NUM_SMS = 132
# Limits of one Hopper SM: registers, shared memory bytes (1 KB more for each program), warps.
SM_REGISTERS, SM_SHARED, SM_WARPS, MAX_SHARED = 65536, 233472, 64, 232448


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What one compiled kernel needs; `grid` is that of its first launch."""

    name: str
    num_warps: int
    num_stages: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    programs_per_sm: int
    wgmma: int
    mma: int
    grid: tuple[int, ...]
    compile_s: float
    constants: dict[str, Any]


class _FakeDriver:
    """Answers what Triton asks of its driver before a launch."""

    def __init__(self) -> None:
        properties = {
            "multiprocessor_count": NUM_SMS,
            "max_shared_mem": MAX_SHARED,
            "max_num_regs": SM_REGISTERS,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(ARCH, 10)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor with a shape, a dtype and strides, and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def capture() -> Iterator[list[KernelReport]]:
    """Compile instead of launch; the list fills with one report per distinct kernel."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("unset TRITON_INTERPRET before importing the kernels to compile them")
    reports: list[KernelReport] = []
    seen: set[str] = set()
    real_run = JITFunction.run
    real_driver = driver._active
    real_properties = torch.cuda.get_device_properties

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
            shape = tuple(grid(bound)) if callable(grid) else tuple(grid)
            constants = {p.name: bound[p.name] for p in self.params if _is_shown(p, bound)}
            reports.append(_inspect(kernel, shape, constants, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_FakeDriver())
    # A wrapper may ask torch how many SMs there are.
    properties: Any = SimpleNamespace(multi_processor_count=NUM_SMS, major=9, minor=0)
    torch.cuda.get_device_properties = lambda device=None: properties
    try:
        yield reports
    finally:
        JITFunction.run = real_run
        driver._active = real_driver
        torch.cuda.get_device_properties = real_properties


def print_table(reports: Sequence[KernelReport]) -> None:
    """Print one line a kernel."""
    print(
        f"{'kernel':34} {'warps':>5} {'stages':>6} {'regs':>5} {'spill st':>8} {'spill ld':>8} "
        f"{'smem':>7} {'/SM':>4} {'wgmma':>6} {'mma':>5} {'grid':>16} {'s':>5}"
    )
    for r in reports:
        print(
            f"{r.name[:34]:34} {r.num_warps:5} {r.num_stages:6} {r.registers:5} "
            f"{r.spill_store_bytes:8} {r.spill_load_bytes:8} {r.shared_bytes:7} "
            f"{r.programs_per_sm:4} {r.wgmma:6} {r.mma:5} {'x'.join(map(str, r.grid)):>16} "
            f"{r.compile_s:5.1f}"
        )


def _is_shown(param: Any, bound: dict[str, Any]) -> bool:
    value = bound.get(param.name)
    return param.is_constexpr and isinstance(value, bool | int | float | str)


def _inspect(
    kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], compile_s: float
) -> KernelReport:
    """Assemble the kernel's PTX once more for ptxas's account of it."""
    ptx: str = kernel.asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name=sm_{ARCH}a", str(source), "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    registers, shared = number(r"Used (\d+) registers"), int(kernel.metadata.shared)
    num_warps = int(kernel.metadata.num_warps)
    # Registers are handed out to warps in units of 256, that is 8 a thread.
    warps_by_registers = SM_REGISTERS // (max(-(-registers // 8) * 8, 8) * 32)
    programs = min(
        warps_by_registers // num_warps,
        SM_SHARED // (shared + 1024),
        SM_WARPS // num_warps,
        32,
    )
    return KernelReport(
        name=kernel.metadata.name,
        num_warps=num_warps,
        num_stages=int(kernel.metadata.num_stages),
        registers=registers,
        spill_store_bytes=number(r"(\d+) bytes spill stores"),
        spill_load_bytes=number(r"(\d+) bytes spill loads"),
        shared_bytes=shared,
        programs_per_sm=programs,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        grid=grid,
        compile_s=round(compile_s, 2),
        constants=constants,
    )


def main() -> None:
    """Compile the whole operator for decode and prefill, and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--geometry", default="paper", choices=["paper", "fla"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--head-dims", type=int, nargs=2, default=[128, 128], metavar=("D", "DV"))
    parser.add_argument("--num-heads", type=int, nargs=2, default=[64, 4], metavar=("HQ", "H"))
    parser.add_argument("--kv-per-branch", action="store_true", help="of its own for every branch")
    parser.add_argument("--mlp-hidden", type=int, default=0, help="learned compression; 0: mean")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    args = parser.parse_args()
    from problem import CACHE_DTYPES, DTYPES, GEOMETRIES, Heads, make_problem

    heads = Heads(
        num_q_heads=args.num_heads[0],
        num_kv_heads=args.num_heads[1],
        head_dim=args.head_dims[0],
        v_head_dim=args.head_dims[1],
        dtype=DTYPES[args.dtype],
        cache_dtype=CACHE_DTYPES[args.cache_dtype],
        kv_per_branch=args.kv_per_branch,
        mlp_hidden_size=args.mlp_hidden,
    )
    # Starts in the cache and number of new tokens, of each row.
    steps = {
        "decode": ([args.context - 1] * args.batch, [1] * args.batch),
        "prefill": ([0], [args.context]),
    }
    results: dict[str, list[dict[str, Any]]] = {}
    failures: list[str] = []
    for name, (starts, query_lens) in steps.items():
        if args.only in (None, name):
            spec = GEOMETRIES[args.geometry]
            problem = make_problem(spec, heads, starts=starts, query_lens=query_lens, device="meta")
            error = None
            with capture() as reports:
                try:
                    problem.run(problem.sets[0])
                except Exception as raised:  # show the kernels before it, and the other step
                    error = raised
                    failures.append(f"{name}: {type(raised).__name__}: {raised}")
            print(name)
            print_table(reports)
            if error is not None:
                traceback.print_exception(error)
            results[name] = [asdict(report) for report in reports]
    versions = {"arch": f"sm_{ARCH}", "triton": triton.__version__}
    text = json.dumps({**versions, "kernels": results, "failures": failures})
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
