"""Random ops of a step: eager's own dropout, and replaying an op with the state it first saw."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    if node.target is dropout_noise:
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def dropout_noise(x: Tensor, p: float) -> Tensor:
    """What eager dropout multiplies with on a CPU: 0 or 1 / (1 - p), shaped like `x`."""
    if p == 1.0:
        return torch.zeros_like(x)
    return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def eager_dropout(graph: fx.Graph) -> None:
    """Put eager's CPU dropout back where the tracer wrote `native_dropout`.

    On a CPU eager multiplies with float noise; `native_dropout` draws a boolean mask and scales,
    which rounds otherwise. On CUDA both are `native_dropout`.
    """
    for node in list(graph.nodes):
        if node.target is aten.native_dropout.default and node.args[2]:
            value = node.args[0].meta["val"]
            if value.device.type == "cpu":
                _put_back(graph, node)


def _put_back(graph: fx.Graph, node: fx.Node) -> None:
    x, p, _ = node.args
    assert isinstance(x, fx.Node)
    with graph.inserting_before(node):
        noise = _like(graph.call_function(dropout_noise, (x, p)), node, x)
        product = _like(graph.call_function(aten.mul.Tensor, (x, noise)), node, x)
    for output in list(node.users):
        if output.args[1] == 0:
            # views of it were traced over this value: they must be seen to share its memory
            product.meta["val"] = output.meta["val"]
            output.replace_all_uses_with(product)
            continue
        for user in list(output.users):
            _backward(graph, user, output, noise)
        output.replace_all_uses_with(noise)
    for output in list(node.users):
        graph.erase_node(output)
    graph.erase_node(node)


def _backward(graph: fx.Graph, user: fx.Node, mask: fx.Node, noise: fx.Node) -> None:
    if user.target is aten.native_dropout_backward.default and user.args[1] is mask:
        gradient = user.args[0]
        assert isinstance(gradient, fx.Node)
        with graph.inserting_before(user):
            new = _like(graph.call_function(aten.mul.Tensor, (gradient, noise)), user, user)
        new.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(new)
        graph.erase_node(user)


def _like(new: fx.Node, place: fx.Node, shape: fx.Node) -> fx.Node:
    """`new` with the metadata of `place` and a fresh value shaped like that of `shape`."""
    new.meta = dict(place.meta)
    new.meta.pop("tensor_meta", None)
    with torch.no_grad():
        new.meta["val"] = torch.empty_like(shape.meta["val"])
    return new


def rng_state(device: str) -> Tensor:
    """The state of the default generator of `device`, as bytes on the host."""
    if device == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state()


@cache
def replayed(target: Any) -> Callable[..., Any]:
    """A function (state, device, *args) that runs `target` as when the generator had `state`."""

    def replay(state: Tensor, device: str, *args: Any, **kwargs: Any) -> Any:
        now = rng_state(device)
        _set(device, state)
        try:
            return target(*args, **kwargs)
        finally:
            _set(device, now)

    return replay


def _set(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state)
