"""Models that cannot be rewritten as they are: one message with the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ir.errors import CaptureError

WAYS_OUT = {
    "bitsandbytes": "Load it without quantization_config, for example in bfloat16: fxopt "
    "quantizes from the original weights.",
    "peft": "Merge the adapter first: model = model.merge_and_unload().",
    "torchao": "Load the weights in bfloat16: fxopt quantizes from the original weights.",
    "awq": "Load the unquantized checkpoint in bfloat16.",
    "gptq": "Load the unquantized checkpoint in bfloat16.",
    "accelerate": "Load the model on one device, without device_map (or device_map={'': 0}).",
}
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "torchao": "torchao",
    "awq": "awq",
    "auto_gptq": "gptq",
    "gptqmodel": "gptq",
    "optimum.gptq": "gptq",
}


def weightless(model: nn.Module) -> bool:
    """Whether the model is a shape alone: all its parameters, and it has some, are on "meta"."""
    parameters = list(model.parameters())
    return bool(parameters) and all(p.device.type == "meta" for p in parameters)


def refuse_changed_models(model: nn.Module, *, weights: bool = True) -> None:
    """Raise `CaptureError` for what another library changed and for weights that are not there,
    unless, with `weights=False`, none of them is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or getattr(model, "is_quantized", False):
        method = str(getattr(getattr(quantizer, "quantization_config", None), "quant_method", ""))
        raise CaptureError(
            f"{type(model).__name__} was loaded quantized ({method or 'quantization_config'}). "
            + WAYS_OUT["bitsandbytes"]
        )
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name!r}" if name else type(module).__name__
        library = _library(type(module)) or _parameter_library(module)
        if library is not None:
            raise CaptureError(f"{where} was changed by {library}. {WAYS_OUT[library]}")
        if getattr(module, "_hf_hook", None) is not None and _scattered(model, module):
            raise CaptureError(
                f"{where} is moved between devices by accelerate. {WAYS_OUT['accelerate']}"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            raise CaptureError(
                f"{name} is a {type(tensor).__name__}, not a plain tensor. Load the weights as "
                "plain tensors, on one device and not sharded."
            )
        if weights and tensor.device.type == "meta":
            raise CaptureError(
                f"{name} is on the meta device: it has a shape but no values. Load the weights "
                "first, for example with from_pretrained or to_empty and load_state_dict; "
                "fxopt.plan alone needs none."
            )
        if not weights and tensor.device.type != "meta":
            raise CaptureError(
                f"{name} is on {tensor.device}, the parameters are on the meta device. Make the "
                "whole model there: with torch.device('meta'): model = ..."
            )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise CaptureError(
            f"The parameters are on {', '.join(devices)}. Move the model to one device with .to()."
        )


def _library(kind: type) -> str | None:
    for base in kind.__mro__:
        for package, library in PACKAGES.items():
            if base.__module__ == package or base.__module__.startswith(f"{package}."):
                return library
    return None


def _parameter_library(module: nn.Module) -> str | None:
    for tensor in module.parameters(recurse=False):
        kinds = (type(tensor), type(getattr(tensor, "data", tensor)))
        for kind in kinds:
            if kind not in (nn.Parameter, torch.Tensor):
                library = _library(kind)
                if library is not None:
                    return library
    return None


def _scattered(model: Any, module: Any) -> bool:
    placed = getattr(model, "hf_device_map", None)
    if placed is not None and len(set(map(str, placed.values()))) > 1:
        return True
    return bool(getattr(module._hf_hook, "offload", False))
