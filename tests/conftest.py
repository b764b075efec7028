"""Puts the repository's root on the path, so that the tests import its modules."""
import os
import sys
from pathlib import Path

# Before torch: on tensors as small as these threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
