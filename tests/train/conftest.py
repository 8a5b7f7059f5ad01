"""The recipe and the benchmarks are scripts that import each other by their plain names."""

import sys
from pathlib import Path

# Last, so that none of their names hides another module.
for _folder in ("examples/train_nsa", "benchmarks"):
    sys.path.append(str(Path(__file__).parents[2] / _folder))
