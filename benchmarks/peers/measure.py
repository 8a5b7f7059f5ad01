"""The measurement that all engines share. Standard library only: peers run in other environments.

Wall time of a scenario with one token a prompt (t1) and with all its tokens (tn), repeated. From
them: prefill = t1, decode tokens/s = prompts * (output_len - 1) / (tn - t1).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

Wall = Callable[[list[list[int]], int], float]


def measure(workload: dict, wall: Wall) -> dict[str, dict[str, list[float]]]:
    """Run every scenario; `wall(prompts, output_len)` returns seconds."""
    results = {}
    wall(workload["scenarios"][0]["prompts"], 4)  # first-use costs
    for scenario in workload["scenarios"]:
        prompts, output_len = scenario["prompts"], scenario["output_len"]
        times: dict[str, list[float]] = {"t1": [], "tn": []}
        for _ in range(workload["repeats"]):
            times["t1"].append(wall(prompts, 1))
            if output_len > 1:
                times["tn"].append(wall(prompts, output_len))
        results[scenario["name"]] = times
        print(scenario["name"], times, file=sys.stderr, flush=True)
    return results


def read_workload(path: str) -> dict:
    """Read what `workload.write_workload` wrote."""
    return json.loads(Path(path).read_text())
