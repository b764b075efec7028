"""Puts the repository's root on the path, so that the tests import its modules."""
import os
import signal
import sys
from pathlib import Path

# Before torch, and for the programs that tests start: on tensors as small as these
# threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
