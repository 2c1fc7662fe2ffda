"""Norms of a step whose output the backward reads as well: of it their input can be made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ir.site import NormInfo

if TYPE_CHECKING:
    from .step import Step

aten = torch.ops.aten
CAST = aten._to_copy.default
VIEW = aten.view.default


class Sources(NamedTuple):
    """What a norm's input, or what it normalised, is made of: the output and the weight and bias
    [D] that it was given, and the statistics [..., 1] that lie between."""

    output: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    rstd: fx.Node | None = None
    mean: fx.Node | None = None


def sources(step: Step) -> dict[fx.Node, Sources]:
    """By owner, for the saved tensors that norms read or normalise."""
    found: dict[fx.Node, Sources] = {}
    for node in step.forward:
        every = _layer_norm(node) if node.target is aten.native_layer_norm.default else ()
        every = _rms_norm(node) if node.target is aten.rsqrt.default else every
        for value, made in every:
            output, owner = _saved_output(step, made.output), step.owner[value]
            known = all(n is None or n in step.kept for n in (made.rstd, made.mean))
            if output is None or owner is output or not known:
                continue
            if _fits(step, owner, value, output):
                found.setdefault(owner, made._replace(output=output))
    # nothing is made of what is itself made
    return {o: made for o, made in found.items() if made.output not in found}


def _layer_norm(norm: fx.Node) -> Iterator[tuple[fx.Node, Sources]]:
    x, shape, weight, bias, _ = norm.args
    parts = {part.args[1]: part for part in norm.users}
    if len(shape) == 1 and len(parts) == 3 and _given(weight) and _given(bias):  # pyright: ignore
        yield x, Sources(parts[0], weight, bias, parts[2], parts[1])  # pyright: ignore


def _rms_norm(rstd: fx.Node) -> Iterator[tuple[fx.Node, Sources]]:
    """x * rsqrt(mean(x * x) + eps) * weight, written out, with casts between."""
    x = _mean_square(rstd.args[0])
    scaled = [u for u in rstd.users if x and u.target is aten.mul.Tensor and x in u.args]
    if x is None or len(scaled) != 1:
        return
    (normalized,) = scaled
    for value in (normalized, *_casts(normalized)):
        for product in value.users:
            if product.target is not aten.mul.Tensor:
                continue
            weight = next((a for a in product.args if a is not value), None)
            if isinstance(weight, fx.Node) and _given(weight) and _width(weight) == _width(value):
                made = Sources(product, weight)
                yield from ((each, made) for each in dict.fromkeys((normalized, value)))
                yield x, made._replace(rstd=rstd)


def _mean_square(node: Any) -> fx.Node | None:
    """x of mean(x ** 2, -1) + eps."""
    if not isinstance(node, fx.Node) or node.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    mean = node.args[0]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    power: Any = mean.args[0]
    last = power.meta["val"].dim() - 1
    if tuple(mean.args[1]) not in ((-1,), (last,)) or tuple(mean.args[2:]) != (True,):  # pyright: ignore
        return None
    square = power.target is aten.pow.Tensor_Scalar and power.args[1] == 2
    return power.args[0] if square else None


def _given(node: Any) -> bool:
    """Whether a node is alive anyway: a parameter, or nothing."""
    return node is None or (isinstance(node, fx.Node) and node.op == "placeholder")


def _width(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return (value.shape[-1],) if node.op != "placeholder" else tuple(value.shape)


def _casts(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is CAST]


def _saved_output(step: Step, output: fx.Node) -> fx.Node | None:
    """The output or a cast of it, as it is saved; rows may lie in one dimension."""
    saved, width = set(step.saved), _width(output)
    views = [n for n in output.users if n.target is VIEW and _width(n) == width]
    made = (output, *(cast for n in (output, *views) for cast in _casts(n)))
    return next((n for n in made if n in saved), None)


def _fits(step: Step, *nodes: fx.Node) -> bool:
    """Whether the owner of a value, it and the norm's output lie in memory alike."""
    tensors: list[Tensor] = [n.meta["val"] for n in nodes]
    alike = len({t.numel() for t in tensors}) == 1 and nodes[0] in step.inside
    return alike and all(t.is_contiguous() and t.is_floating_point() for t in tensors)


def norms_of(step: Step, weights: Mapping[str, Tensor]) -> dict[fx.Node, NormInfo]:
    """What is to be known of the norms whose weights are known, by owner."""
    from .derivatives import derivative_of

    found: dict[fx.Node, NormInfo] = {}
    for owner, made in step.shared.items():
        weight, bias = (_magnitudes(node, weights) for node in (made.weight, made.bias))
        # an output that is read for a derivative alone may itself not come back
        if weight is None or bias is None or derivative_of(step, made.output):
            continue
        least, most = weight if made.weight else (1.0, 1.0)
        dtype = made.output.meta["val"].dtype
        _, *given = (part is not None for part in made)
        has = dict(zip(("weight", "bias", "rstd", "mean"), given, strict=True))
        found[owner] = NormInfo(dtype, **has, least=least, most=most + bias[1])
    return found


def _magnitudes(node: fx.Node | None, weights: Mapping[str, Tensor]) -> tuple[float, float] | None:
    """The least and the largest of a parameter; 0 where there is none, None for unknown ones."""
    if node is None:
        return 0.0, 0.0
    name = str(getattr(node.meta.get("desc"), "target", "")).removeprefix("model.")
    values = weights.get(name)
    if values is None or values.is_meta or not values.numel():
        return None
    low, high = values.detach().abs().aminmax()
    return float(low), float(high)
