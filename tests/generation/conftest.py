"""Tiny models and images of the tests beside this folder."""

import sys
from pathlib import Path

for folder in ("data", "evaluation", "training"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
