"""Puts the repository's root on the path, so that the tests import its modules."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
