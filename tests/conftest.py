"""Puts tests/ on sys.path, so that every test may say ``from oracle.forward import logits``."""

import os
import sys
from pathlib import Path

# The models of the tests are tiny: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
