"""The proofs once more, on a GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_proofs_hold_on_cuda():
    """test_ddpm_min.py passes with all its tensors there."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", root / "test_ddpm_min.py"]

    subprocess.run(command, cwd=root, env={**os.environ, "DEVICE": "cuda"}, check=True)
