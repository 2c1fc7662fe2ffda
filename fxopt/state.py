"""What a search must leave as it was: buffers that forwards update, and random numbers."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


class State:
    """The buffers of a model as they were, to begin every run of it with the same ones."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, dict(module._buffers)) for module in model.modules()]
        tensors = {id(t): t for _, held in self._held for t in held.values()
                   if t is not None and t.device.type != "meta"}  # fmt: skip
        self._kept = [(t, t.detach().clone()) for t in tensors.values()]

    def rewind(self) -> None:
        """Put back what was written since."""
        for module, held in self._held:
            if any(module._buffers.get(name) is not tensor for name, tensor in held.items()):
                module._buffers.update(held)
        # Values are compared, as batch norm writes its statistics without counting a version; what
        # did not change is not written, as it may be saved for a backward of the caller's.
        with torch.no_grad():
            for tensor, kept in self._kept:
                if not torch.equal(tensor, kept):
                    tensor.copy_(kept)


@contextmanager
def evaluated(model: nn.Module) -> Generator[None]:
    """`preserved`, and in evaluation mode inside, as what is rewritten is: dropout that ran in the
    original alone would count for it or against it."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved(model):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def preserved(model: nn.Module) -> Generator[None]:
    """Buffers and random generators are as before afterwards, whatever happens inside.

    Inference mode is off inside: its tensors could never be trained.
    """
    state = State(model)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.inference_mode(False), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            state.rewind()
