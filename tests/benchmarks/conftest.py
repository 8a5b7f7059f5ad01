"""The benchmarks are scripts that import each other by their plain names."""

import sys
from pathlib import Path

# Last, so that none of their names hides another module.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
