"""`fxopt doctor`: what this machine has, and what that means for fxopt."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxopt.ir.units import format_value

from .command import OK, Output, command

if TYPE_CHECKING:
    from fxopt.cost_models.hardware import Device

PACKAGES = ("torch", "transformers", "triton", "onnx", "onnxscript", "onnxruntime", "safetensors")


@command
def doctor(
    output: Output,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure the devices again, cached or not.")
    ] = False,
) -> int:
    """Show versions, what the devices can do, and what is missing for what.

    fxopt doctor
    """
    facts = examine(refresh) if refresh else examine()
    output.show(text(facts), facts)
    return OK


def examine(refresh: bool = False) -> dict[str, Any]:
    """Versions, the facts of each device, and, in sentences, the effect of what is missing."""
    import torch

    from fxopt.cost_models.hardware import probe

    versions = {name: _version(name) for name in PACKAGES}
    absent = no_gpu()
    count = 0 if absent else torch.cuda.device_count()
    gpus = [probe(torch.device("cuda", i), refresh=refresh) for i in range(count)]
    cpu = probe("cpu", refresh=refresh)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cuda": [gpu.name for gpu in gpus],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [asdict(facts) for facts in (cpu, *gpus)],
        "effects": effects(versions, absent, gpus),
    }


def no_gpu() -> str | None:
    """Why torch can use no GPU, in torch's words; None where it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one too old for this torch
        return str(error).split(". ")[0].rstrip(".")
    return None if torch.cuda.device_count() else "the driver shows no device"


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed, version unknown"


def effects(
    versions: Mapping[str, str | None], absent: str | None, gpus: Sequence[Device] = ()
) -> list[str]:
    """What works here and what does not, a sentence each; `absent` is why there is no GPU."""
    found: list[str] = []
    if absent:
        found.append(
            f"no GPU ({absent}): rewritten models run on the CPU through reference kernels"
        )
    elif versions["triton"]:
        found.append("rewritten models run Triton kernels on the GPU")
    else:
        found.append("no triton: on the GPU rewritten models run the slower reference kernels")
    for gpu in gpus:
        if "float8_e4m3fn" not in gpu.matmul_rate:
            found.append(f"no fp8 products on {gpu.name}: fp8 layers save bytes there, not time")
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
    parts = [aligned(rows)]
    for device in facts["devices"]:
        parts += ["", f"{device['name']}, measured {device['probed']}", aligned(abilities(device))]
    return "\n".join([*parts, "", *(f"- {effect}" for effect in facts["effects"])])


def abilities(device: Mapping[str, Any]) -> dict[str, str]:
    """What a device was measured to do, as people write it."""
    caches = [
        f"{level} {format_value(size, 'bytes')}" for level, size in device["cache_bytes"].items()
    ]
    memory, held = format_value(device["memory_bytes"], "bytes"), ", ".join(caches) or "not known"
    rows = {
        "memory": f"{memory} at {_rate(device['bandwidth'])}",
        "caches": f"{held}; the last at {_rate(device['cache_bandwidth'])}",
        "products": _products(device["matmul_rate"]),
        "of 16 rows": _products(device["few_rows_rate"]),
        "launch": format_value(device["launch_seconds"], "s"),
    }
    if device["kind"] == "cpu":
        return {**rows, "one thread": _rate(device["thread_bandwidth"])}
    rows["launch"] += f" eager, {format_value(device['graph_seconds'], 's')} in a CUDA graph"
    link = f"{_rate(device['to_host'])} to the host, {_rate(device['to_device'])} back"
    return {**rows, "link": link}


def aligned(rows: Mapping[str, str]) -> str:
    size = max(map(len, rows))
    return "\n".join(f"{name.ljust(size)}  {value}" for name, value in rows.items())


def _rate(value: float) -> str:
    return f"{value / 1e9:,.1f} GB/s" if value < 1e12 else f"{value / 1e12:.2f} TB/s"


def _products(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in rates.items()) + " TFLOP/s"
