"""Kernels compiled for a GPU that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


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


def build(
    kernel: Any, types: Mapping[str, str], aligned: Collection[str] = (), capability: int = 90,
    options: Mapping[str, Any] | None = None, **constants: Any,
) -> Any:  # fmt: skip
    """For scripts that `compiled` runs: `kernel` compiled for a device of `capability`, 90 being
    Hopper. Its arguments are `constants`, of the `types` named, or int32; those `aligned` are
    multiples of 16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)
