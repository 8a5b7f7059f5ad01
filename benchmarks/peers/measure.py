"""The measurement that all engines share. Standard library only: peers run in other environments.

A run gives, for each prompt, the seconds to its first token and to its last. Both come from the
same run, so that the noise of a long prefill does not end up in the speed of decoding.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# run(prompts, output_len) -> [(seconds to first token, seconds to last token) of each prompt]
Run = Callable[[list[list[int]], int], list[tuple[float, float]]]


def measure(workload: dict[str, Any], run: Run) -> dict[str, list[list[tuple[float, float]]]]:
    """Run every scenario `repeats` times after a short warm-up."""
    results = {}
    run(workload["scenarios"][0]["prompts"], 4)
    for scenario in workload["scenarios"]:
        times = [
            run(scenario["prompts"], scenario["output_len"]) for _ in range(workload["repeats"])
        ]
        results[scenario["name"]] = times
        shown = [f"{max(f for f, _ in t):.2f}/{max(e for _, e in t):.2f}" for t in times]
        print(scenario["name"], *shown, file=sys.stderr, flush=True)
    return results


def read_workload(path: str) -> dict[str, Any]:
    """Read what `workload.write_workload` wrote."""
    workload: dict[str, Any] = json.loads(Path(path).read_text())
    return workload
