"""What ops of a step take beside their results while they run.

A sum over the rows of a matrix, as the gradient of a bias is, takes twice that matrix on a GPU.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..decide.verify import peak_live_bytes
from ..ir.cost import OpCall
from .pricing import op_call
from .step import Step

LEAST = 1 << 16
"""Bytes below which a workspace is rounding of the allocator's."""


def workspaces(step: Step, device: torch.device) -> dict[fx.Node, int]:
    """Bytes by node, of the nodes that take any: each distinct call is run on `device`, with inputs
    of its own, as it is to be timed."""
    found: dict[str, int] = {}
    taken: dict[fx.Node, int] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for node in (*step.forward, *step.backward):
            if not _allocates(step, node):
                continue
            call = op_call(node)
            if call.key not in found:
                found[call.key] = _measured(call, device)
            if found[call.key]:
                taken[node] = found[call.key]
    return taken


def _allocates(step: Step, node: fx.Node) -> bool:
    """Whether a node may take memory of which nothing is known; not one with other effects."""
    known = node.target is operator.getitem or step.is_view(node) or step.workspace(node)
    return not known and isinstance(node.target, OpOverload) and step.blocked(node) is None


def _measured(call: OpCall, device: torch.device) -> int:
    assert call.run is not None
    made: list[object] = []
    try:
        run = call.run(device)
        run()  # what only the first call allocates stays, and is none
        peak = peak_live_bytes(lambda: made.append(run()), device)
    except torch.OutOfMemoryError:  # then its step has no room either
        return 0
    results = (leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor))
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in results)}
    held = peak - sum(storages.values())
    return held if held >= LEAST else 0
