"""Model and inputs of a command, from its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer
from torch import nn

from fxopt.inputs import default_inputs
from fxopt.ir.errors import FxoptError
from fxopt.ir.workload import Workload

from . import options as o
from .calibration import LENGTH, load_calibration
from .models import Loaded, load_model, on_device


@dataclass(frozen=True)
class Inputs:
    """What `fxopt.optimize`, `plan`, `apply` and `verify` are called with."""

    model: nn.Module
    example_inputs: Any
    calibration: list[Any] | None

    def arguments(self) -> dict[str, Any]:
        return {"example_inputs": self.example_inputs, "calibration": self.calibration}


def _check_described(model: str, loaded: Loaded, source: o.Source) -> None:
    """Errors of a command without --calibration, in terms of its options."""
    if source.length is not None:
        raise typer.BadParameter(
            "--length is of the sequences of --calibration; --prompt says how long the calls of "
            "the workload are"
        )
    if loaded.example is None:
        try:
            default_inputs(loaded.module, None)
        except FxoptError:
            raise FxoptError(
                f"{model} has no config that says what it takes: give inputs by --calibration, or "
                "a factory of a pair (module, example_inputs)"
            ) from None


def load_inputs(model: str, source: o.Source, workload: Workload | None) -> Inputs:
    """The model, its calibration inputs, and an example: the factory's own, or the first of
    these; without either the model's config must describe one."""
    device = o.device(source.device)
    loaded = load_model(model, device, o.dtype(source.dtype))
    if source.calibration is None:
        _check_described(model, loaded, source)
        return Inputs(loaded.module, loaded.example, None)
    length = source.length or o.tokens_of(workload) or LENGTH
    items = load_calibration(source.calibration, model, loaded.module, length)
    items = [on_device(item, device) for item in items]
    example = items[0] if loaded.example is None else loaded.example
    return Inputs(loaded.module, example, items)
