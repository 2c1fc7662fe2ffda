"""From the arguments of a call to the inputs of the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import FxoptError
from ..ir.recording import is_recorded
from ..ir.units import so_many
from .facts import facts
from .program import Program

POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


class Binding:
    """Binds calls by the original signature; errors name the argument."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.placeholders = program.placeholders
        self.positional = [a.name for a in program.arguments if a.kind in POSITIONAL]
        self.variadic = next((a.name for a in program.arguments if a.kind == "VAR_POSITIONAL"), "")
        self.open = any(a.kind == "VAR_KEYWORD" for a in program.arguments)
        self.defaults = {a.name: a.default for a in program.arguments}
        self.slices = _takes_slices(program.graph)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The given inputs by the name of their placeholder."""
        given = dict(zip(self.positional, args, strict=False))
        extra = args[len(self.positional) :]
        if extra and not self.variadic:
            takes = so_many(len(self.positional), "positional argument")
            raise TypeError(f"forward() takes {takes}, got {len(args)}")
        if extra:
            given[self.variadic] = extra
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"forward() got multiple values for argument {name!r}")
            given[name] = value
        return self._inputs(given)

    def values(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The inputs in the order of the placeholders; a missing one is an error."""
        for name in self.program.inputs:
            if inputs.get(name) is None and name not in self.program.optional:
                raise TypeError(f"forward() missing argument {name!r}, which the graph reads")
        keep = inputs.get("logits_to_keep")
        if isinstance(keep, slice) and not self.slices:
            ids = inputs["input_ids"]
            inputs = {
                **inputs,
                "logits_to_keep": torch.arange(ids.shape[1], device=ids.device)[keep],
            }
        return [inputs.get(name) for name in self.placeholders]

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for name, value in given.items():
            if name in self.program.inputs:
                inputs[name] = value
            elif self._is_nested(name, value):
                items = value.items() if isinstance(value, Mapping) else enumerate(value)
                inputs.update({f"{name}_{key}": item for key, item in items})
            else:
                self._check(name, value)
        return inputs

    def _is_nested(self, name: str, value: Any) -> bool:
        return isinstance(value, (tuple, list, Mapping)) and any(
            known.startswith(f"{name}_") for known in self.program.inputs
        )

    def _check(self, name: str, value: Any) -> None:
        """An argument that the graph does not take may only say what was captured."""
        if name not in self.defaults and not self.open:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if not isinstance(value, Tensor):
            if value is None or value is False or value == self.defaults.get(name):
                return
            if name in self.program.constants and value == self.program.constants[name]:
                return
        raise FxoptError(
            f"forward: the model was captured without {name!r}, so the optimised module cannot "
            f"take it; optimise again with {name} among example_inputs, or call without it"
        )


def _takes_slices(graph: fx.Graph) -> bool:
    """Whether `logits_to_keep` only picks positions, so that a view serves instead of a copy."""
    kept = [n for n in graph.find_nodes(op="placeholder") if n.target == "logits_to_keep"]
    users = [user for node in kept for user in node.users]
    symbols = [str(size) for node in kept for size in getattr(facts(node), "shape", ())]
    sizes = [size for size in map(facts, graph.nodes) if isinstance(size, str)]
    picks = all(user.target is torch.ops.aten.index.Tensor for user in users)
    return picks and not any(symbol in size for symbol in symbols for size in sizes)


def without_idle_masks(inputs: dict[str, Any], masks: Collection[str]) -> dict[str, Any]:
    """`inputs` less those of `masks` that hide nothing: attention without a mask is the library's.

    Asking waits for a device: it happens once a forward, and for a decoding step not at all.
    """
    ids = inputs.get("input_ids")
    decoding = ids is not None and ids.shape[1] == 1
    idle = [name for name in masks if _hides_nothing(inputs.get(name), decoding)]
    return {name: None if name in idle else value for name, value in inputs.items()}


def _hides_nothing(mask: Any, decoding: bool) -> bool:
    if type(mask) is not Tensor or is_recorded(mask) or (decoding and mask.device.type != "cpu"):
        return False
    return bool(mask.all())


def fill_text_inputs(
    inputs: dict[str, Any], positions: str | None, past: int, start: Tensor | None
) -> None:
    """Positions and kept logits of a text decoder (or its body) that the caller did not give.

    `past` tokens are cached and `start` is the same number as a tensor; both are 0 and None
    without a cache.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    ids = inputs["inputs_embeds"] if ids is None else ids
    batch, length = ids.shape[0], ids.shape[1]
    found = inputs.get("position_ids")
    if found is None and positions == "mask" and mask is not None:
        found = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    elif found is None and start is not None and is_recorded(start):
        found = torch.arange(length, device=ids.device) + start
    elif found is None:
        found = torch.arange(past, past + length, device=ids.device)
    inputs["position_ids"] = found.expand(batch, length)
    keep = inputs.get("logits_to_keep")
    if not isinstance(keep, Tensor):
        inputs["logits_to_keep"] = slice(-keep if keep else None, None)
    if mask is not None and mask.shape[1] != past + length:
        raise FxoptError(
            f"attention_mask: it has {mask.shape[1]} columns, and {past} cached plus {length} new "
            f"tokens need {past + length}"
        )
