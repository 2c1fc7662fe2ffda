"""Kernels compiled for a GPU that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiled(script: str) -> list[list[str]]:
    """The words of each line that `script` prints, which compiles kernels. It runs in a process of
    its own, since here they may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
