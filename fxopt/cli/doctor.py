"""`fxopt doctor`: what this machine has, and what that means for fxopt."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .command import OK, Output, command

PACKAGES = ("torch", "transformers", "triton", "onnx", "onnxscript", "onnxruntime", "safetensors")


@command
def doctor(output: Output) -> int:
    """Show versions and devices, and what is missing for what.

    fxopt doctor
    """
    facts = examine()
    output.show(text(facts), facts)
    return OK


def examine() -> dict[str, Any]:
    """Versions, devices and, in sentences, the effect of what is missing."""
    import torch

    versions = {name: _version(name) for name in PACKAGES}
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cuda": cuda,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "effects": effects(versions, bool(cuda)),
    }


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed, version unknown"


def effects(versions: dict[str, str | None], cuda: bool) -> list[str]:
    """What works here and what does not, a sentence each."""
    found: list[str] = []
    if cuda and versions["triton"]:
        found.append("rewritten models run Triton kernels on the GPU")
    elif cuda:
        found.append("no triton: on the GPU rewritten models run the slower reference kernels")
    else:
        found.append("no CUDA device: rewritten models run on the CPU through reference kernels")
    if not versions["transformers"]:
        found.append("no transformers: only plain modules work (pip install 'fxopt[hf]')")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not versions[name]]
    if missing:
        found.append(f"no {', '.join(missing)}: no ONNX export (pip install 'fxopt[onnx]')")
    return found


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    packages = {name: found or "not installed" for name, found in facts["packages"].items()}
    rows = {
        "python": f"{facts['python']} on {facts['platform']}",
        **packages,
        "cpu": f"{facts['cores']} cores, {facts['threads']} threads in use",
        "cuda": ", ".join(facts["cuda"]) or "none",
    }
    size = max(map(len, rows))
    lines = [f"{name.ljust(size)}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", *(f"- {effect}" for effect in facts["effects"])])
