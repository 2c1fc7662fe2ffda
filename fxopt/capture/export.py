"""Model in, canonical graph out."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ir.errors import CaptureError
from ..ir.ops import attend
from .canonical import canonicalize
from .captured import Captured, Dimension
from .generation import numbered, serve_generation, with_positions
from .huggingface import CAUSAL_INPUTS, generates, is_huggingface, requests_for
from .interface import semantic_attention
from .output import output_spec
from .refuse import refuse_changed_models
from .request import Request, bind, check_devices, enlarge, flattened, input_names
from .seq2seq import IDS, serve_decoding
from .shapes import placeholders, static_dims, symbol_sources
from .sites import find_sites
from .submodule import check_inputs, inputs_of, islands, outside, untied

log = logging.getLogger("fxopt")

LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""Loggers to which torch writes tracebacks and graphs of what cannot be traced."""


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    generate: bool = True,
    at: str | None = None,
    weights: bool = True,
) -> Captured:
    """Capture `model`, or its submodule `at`, as a canonical graph with its sites.

    example_inputs: a tensor, a tuple in the order of the forward's arguments, or a dict by name;
    it may be left out for Hugging Face models. `generate` asks for one graph that serves prefill
    and decoding; where that cannot be, `Captured.reason` says why. `weights=False` takes a model
    on the meta device, whose graph is for planning alone. The model, its config and all global
    state are as before afterwards, also when this raises `CaptureError`.
    """
    refuse_changed_models(model, weights=weights)
    tied: dict[int, str] = {}
    decoder = at is not None and generates(model)
    with _preserved(model), torch.no_grad():
        if at is not None:
            part, example_inputs = inputs_of(model, example_inputs, at)
            tied, model = outside(model, part), part
        signature = inspect.signature(model.forward)
        requests = _requests(model, signature, example_inputs)
        for request in requests:
            check_devices(model, request)
        given = replace(requests[-1], kwargs=dict(requests[-1].kwargs))
        for request in requests:
            if not request.decoder:
                enlarge(request)
        try:
            captured, request = _first(model, signature, requests)
        except CaptureError as error:
            if weights and error.__cause__ is not None and not given.decoder:
                check_inputs(model, given, at or "")
            hint = islands(model, requests[-1], error, at or "")
            raise CaptureError(f"{error}{hint}") from error.__cause__
        if request.decoder:
            captured = serve_generation(captured) if generate else captured
            captured = with_positions(captured, model) if weights else captured
        elif generate and at is None and IDS in captured.inputs:
            captured = serve_decoding(captured) if weights else _unserved(captured)
        elif decoder and "position_ids" in captured.inputs:
            captured = numbered(captured, model)
    return captured.with_sites(untied(find_sites(captured), captured.graph, tied))


def _unserved(captured: Captured) -> Captured:
    reason = "that its decoder keeps a cache is found by running it, and it has no weights"
    return replace(captured, reason=reason)


def _requests(model: nn.Module, signature: inspect.Signature, example: Any) -> list[Request]:
    if is_huggingface(model):
        requests = requests_for(model, signature, example)
    elif example is None:
        raise CaptureError(
            f"{type(model).__name__} needs example_inputs: only Hugging Face models say in their "
            "config what they take."
        )
    else:
        requests = [bind(signature, example, type(model).__name__)]
    return requests


def _first(
    model: nn.Module, signature: inspect.Signature, requests: list[Request]
) -> tuple[Captured, Request]:
    """The first request whose trace succeeds; the error is that of the last."""
    for request in requests[:-1]:
        try:
            return _capture(model, signature, request), request
        except CaptureError as error:
            log.info("%s; trying another way", error)
    return _capture(model, signature, requests[-1]), requests[-1]


def _capture(model: nn.Module, signature: inspect.Signature, request: Request) -> Captured:
    given = flattened("", dict(request.kwargs))
    exported = _export(model, signature, request)
    gm: Any = exported.module(check_guards=False)
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
    values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    output = output_spec(gm._out_spec, values)
    graph = canonicalize(gm, model, input_names(gm._in_spec, signature))
    names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    order = CAUSAL_INPUTS if request.decoder else _in_order(signature, names)
    symbols = {
        symbol: Dimension(name, dim, _role(request, name, dim))
        for symbol, (name, dim) in symbol_sources(graph.graph).items()
    }
    return Captured(
        graph=graph,
        inputs=tuple(name for name in order if name in names),
        output=output,
        signature=signature,
        reason=request.reason,
        symbols=symbols,
        static_dims=static_dims(graph.graph),
        optional=_optional(graph.graph),
        constants={n: v for n, v in given.items() if not isinstance(v, Tensor)},
    )


def _export(
    model: nn.Module, signature: inspect.Signature, request: Request
) -> torch.export.ExportedProgram:
    constants = request.split_further(signature)
    shapes = request.dynamic_shapes(signature)
    around = semantic_attention(model) if request.interface else nullcontext()
    try:
        with around, _fixed(model, constants), _silent():
            return torch.export.export(
                model, request.args, request.kwargs, dynamic_shapes=shapes, strict=False
            )
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


@contextmanager
def _silent() -> Generator[None, None, None]:
    """While inside, torch does not log what the exception that it raises says as well, unless more
    of it was asked for (`TORCH_LOGS`)."""
    loggers = [logging.getLogger(name) for name in LOUD]
    loggers = [logger for logger in loggers if not logger.isEnabledFor(logging.INFO)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _fixed(model: nn.Module, constants: dict[str, Any]) -> Generator[None, None, None]:
    """While inside, the forward gets `constants` beside its arguments."""
    if not constants:
        yield
        return
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = functools.partial(model.forward, **constants)
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _explain(model: nn.Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = " ".join(lines[:2])[:400] or type(error).__name__
    return (
        f"{type(model).__name__} cannot be captured as a graph: {type(error).__name__}: {why} "
        "Python control flow that depends on tensor values, and calls that torch.export does not "
        "know, stand in the way. Rewrite that place with torch.where or torch.cond, or name the "
        "part that matters with at=: the rest then stays as it is."
    )


def _in_order(signature: inspect.Signature, names: list[str]) -> list[str]:
    order = {name: i for i, name in enumerate(signature.parameters)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _role(request: Request, name: str, dim: int) -> str:
    known = request.roles.get(name)
    if known is None:
        return "batch" if dim == 0 else ""
    return known[dim] if dim < len(known) else ""


def _optional(graph: fx.Graph) -> frozenset[str]:
    """Inputs that nothing but attention masks read: they may be None."""
    return frozenset(
        str(node.target)
        for node in placeholders(graph)
        if node.users
        and all(u.target is attend and u.kwargs.get("mask") is node for u in node.users)
        and all(u.args.count(node) == 0 for u in node.users)
    )


@contextmanager
def _preserved(model: nn.Module) -> Generator[None, None, None]:
    """Capture in evaluation mode; training modes and random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes])
        model.eval()
        yield
