"""Puts this folder on sys.path, for the helpers beside the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
