"""Experiment scripts as modules."""

import importlib
import sys
from pathlib import Path

from absl import flags

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name):
    """Import a script and take its flags back: another script defines flags of the same name."""
    before = set(flags.FLAGS)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    return module
