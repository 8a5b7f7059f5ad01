"""Steps of a warmed-up server compile no kernel: what varies with the batch is not specialised."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Every kernel of the attention, but those of some dialects.
KERNELS = {
    "_append_kernel",
    "_decode_cmp_kernel",
    "_decode_select_kernel",
    "_decode_slc_kernel",
    "_prefill_cmp_kernel",
    "_prefill_swa_kernel",
    "_prefill_short_kernel",
    "_forced_attention_kernel",
    "_count_kernel",
    "_allocate_kernel",
    "_scatter_kernel",
    "_free_attention_kernel",
    "_merge_kernel",
}
# Rows of the step's own tensors: loads of 16 bytes need to know that they are aligned. Torch gives
# a tensor of one row another stride than one of several, that is all that varies.
ROW_STRIDE = re.compile(r".*\.(stride_[qkvg]\w*|[kv](ey|alue)?_strides\[\d\])")


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """In a process of its own: Triton's interpreter knows no variants."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.variants"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_kernel_is_looked_at(reports: dict[str, Any]) -> None:
    # Groups of 16 heads have their blocks scored in a pass of its own, those of 8 have not.
    for name, others in (
        ("shared", {"_prefill_scores_kernel", "_select_groups_kernel"}),
        ("mlp-fp8", {"_hidden_kernel", "_entry_kernel", "_prefill_select_kernel"}),
    ):
        assert (KERNELS | others) - set(reports[name]["kernels"]) == set()
    assert {"_decode_lse_kernel", "_file_kernel"} <= set(reports["infllm"]["kernels"])
    for name in ("branches", "branches-mlp"):
        assert "_tail_kernel" in reports[name]["kernels"]


def test_no_step_after_the_warm_up_compiles(reports: dict[str, Any]) -> None:
    assert {name: report["late"] for name, report in reports.items() if report["late"]} == {}


def test_integers_that_vary_are_not_specialised(reports: dict[str, Any]) -> None:
    """As a kernel compiled for 1, or for a multiple of 16, would be compiled again for others."""
    for report in reports.values():
        assert "_append_kernel.num_tokens" in report["varying"]
        assert [name for name in report["specialised"] if not ROW_STRIDE.fullmatch(name)] == []
