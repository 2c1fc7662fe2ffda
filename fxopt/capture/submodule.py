"""`at=`: a submodule in its model: copies that share tensors, what it is called with, where to cut.

A model around a submodule is only ever run, so it need not be a graph: its forward may branch on
values and call what no tracer knows.
"""
# Copies of modules are made of the same parts as modules are.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import CaptureError
from ..ir.site import GroupInfo, LinearInfo, Site
from .huggingface import generates, is_huggingface, requests_for
from .names import attribute
from .request import Request, bind, check_devices

SUGGESTIONS = 3


def submodule(model: nn.Module, at: str) -> nn.Module:
    """The module named `at`; an unknown name is an error with near ones."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if at not in modules:
        near = difflib.get_close_matches(at, modules, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise CaptureError(f"{type(model).__name__} has no submodule {at!r}.{hint}")
    return modules[at]


def twin(model: nn.Module, instead: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A copy of `model`'s modules over the same Parameters, buffers and everything else.

    `instead` maps the id of a module to what stands in its place, under each of its names. Modes,
    hooks and attributes of the copy are its own: changing them does not change the model.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    made: dict[int, Any] = {id(m): object.__new__(type(m)) for m in modules} | dict(instead or {})
    for module in modules:
        if id(module) not in (instead or {}):
            attributes = {name: _follow(value, made) for name, value in vars(module).items()}
            vars(made[id(module)]).update(attributes)
    return made[id(model)]


def _follow(value: Any, made: Mapping[int, Any]) -> Any:
    """`value` with modules replaced by those made of them, also inside containers."""
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _follow(value.__self__, made))
    if isinstance(value, dict):
        copied: Any = copy.copy(value)
        copied.update({key: _follow(item, made) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(_follow(item, made) for item in value)
    return set(value) if type(value) is set else value


def scratch(model: nn.Module) -> nn.Module:
    """A twin to run freely: in evaluation mode, with buffers of its own and without gradients."""
    copied = twin(model)
    own: dict[int, Any] = {}
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in module._parameters.items():
            if value is not None:
                held = own.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=False))
                module._parameters[name] = held
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = own.setdefault(id(value), value.detach().clone())
    return copied.eval()


def inputs_of(model: nn.Module, example: Any, at: str) -> tuple[nn.Module, dict[str, Any]]:
    """(submodule, the arguments of its first call) from one run of the whole model."""
    part = submodule(model, at)
    request = host_request(model, example, at)
    check_devices(model, request)
    whole = scratch(model)
    calls: list[dict[str, Any]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = bind(inspect.signature(part.forward), args, type(part).__name__).kwargs
        calls.append({n: _own(v) for n, v in {**bound, **kwargs}.items() if v is not None})

    whole.get_submodule(at).register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        whole(*request.args, **request.kwargs)
    if not calls:
        raise CaptureError(
            f"{at!r} is not called when {type(model).__name__} runs on example_inputs."
        )
    return part, calls[0]


def host_request(model: nn.Module, example: Any, at: str) -> Request:
    """How the whole model is called to see what its submodule `at` is called with."""
    signature, owner = inspect.signature(model.forward), type(model).__name__
    if is_huggingface(model):
        request = requests_for(model, signature, example, decoder=False)[-1]
        ids = request.kwargs.get("input_ids")
        if generates(model) and "position_ids" in signature.parameters and ids is not None:
            # generate() gives them, and a graph that was traced without cannot take them
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            request.kwargs.setdefault("position_ids", positions)
        return request
    if example is None:
        raise CaptureError(f"{owner} needs example_inputs to see what {at!r} is called with.")
    return bind(signature, example, owner)


def outside(model: nn.Module, part: nn.Module) -> dict[int, str]:
    """id -> name of each Parameter that the rest of `model` holds beside `part`."""
    inside = {id(m) for m in part.modules()}
    return {
        id(tensor): _join(name, local)
        for name, module in model.named_modules()
        if id(module) not in inside
        for local, tensor in module.named_parameters(recurse=False)
    }


def untied(
    sites: Iterable[Site], graph: fx.GraphModule, tied: Mapping[int, str]
) -> tuple[Site, ...]:
    """The sites, those blocked whose weight is `tied` to one outside, without groups of those."""

    def other(site: Site) -> str | None:
        if isinstance(site.info, GroupInfo) and site.info.kind == "tied":
            return other(site.info.members[-1])
        weight = site.info.weight if isinstance(site.info, LinearInfo) else ""
        return tied.get(id(attribute(graph, weight))) if weight else None

    def checked(site: Site) -> Site:
        name = None if site.blocked else other(site)
        why = f"tied weight: also read as {name}, which stays as it is"
        return replace(site, blocked=why) if name else site

    return tuple(
        checked(site)
        for site in sites
        if not isinstance(site.info, GroupInfo)
        or site.info.kind == "tied"
        or not any(map(other, site.info.members))
    )


def islands(model: nn.Module, request: Request, error: BaseException, prefix: str = "") -> str:
    """For a model that cannot be captured: where it fails, and submodules to name with `at=`.

    Suggested are the largest modules that one call of the model calls once and that do not hold
    the place that fails; `prefix` is the model's own name. Empty where nothing is known.
    """
    where, said = _place(model, error, prefix)
    sizes = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters() if p.dim() > 1)
        for name in _outermost(model, "", _calls(model, request), where)
    }
    found = sorted((name for name, size in sizes.items() if size), key=lambda name: -sizes[name])
    if found:
        choice = " or ".join(f"at={_join(prefix, name)!r}" for name in found[:SUGGESTIONS])
        said += f" Parts that stand apart from it: try {choice}."
    return said


def check_inputs(model: nn.Module, request: Request, prefix: str = "") -> None:
    """CaptureError where the model itself fails on the inputs of a request, which no other way of
    writing it would mend; `prefix` is the model's own name."""
    whole = scratch(model)
    try:
        with torch.no_grad():
            whole(*request.args, **request.kwargs)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = " ".join(lines[:2])[:400] or "it says no more"
        given = (*request.args, *request.kwargs.values())
        shapes = ", ".join(
            f"{list(v.shape)} {str(v.dtype).removeprefix('torch.')}"
            for v in given
            if isinstance(v, Tensor)
        )
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs ({shapes}): "
            f"{type(error).__name__}: {why.rstrip('.')}.{_place(whole, error, prefix)[1]} "
            "Pass example_inputs that the model takes."
        ) from error


def _place(model: nn.Module, error: BaseException, prefix: str) -> tuple[str, str]:
    """The name of the innermost module that an exception came through, and a sentence that says
    so; both empty where that is the model."""
    failing = _failing(model, error)
    where = next((name for name, module in model.named_modules() if module is failing), "")
    said = f" It fails in {_join(prefix, where)} ({type(failing).__name__})." if where else ""
    return where, said


def _failing(model: nn.Module, error: BaseException) -> nn.Module | None:
    """The innermost module of `model` whose forward an exception came through."""
    known = {id(module) for module in model.modules()}
    cause: BaseException | None = error
    found: nn.Module | None = None
    while cause is not None and found is None:
        trace = cause.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            found = owner if id(owner) in known else found
            trace = trace.tb_next
        cause = cause.__cause__ or cause.__context__
    return found


def _calls(model: nn.Module, request: Request) -> dict[str, int]:
    """How often each submodule is called in one call of the model; empty when that fails."""
    calls: dict[str, int] = {}
    whole = scratch(model)
    for name, module in whole.named_modules():
        module.register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    try:
        with torch.no_grad():
            whole(*request.args, **request.kwargs)
    except Exception:  # the model's own failure on these inputs has been told before
        return {}
    return calls


def _outermost(
    module: nn.Module, name: str, calls: Mapping[str, int], failing: str
) -> Iterator[str]:
    """The outermost modules under `name` that are called once, outside of `failing`."""
    holds = not name or f"{failing}.".startswith(f"{name}.")
    if calls.get(name) == 1 and not holds:
        yield name
        return
    if name and name == failing:
        return
    for local, child in module.named_children():
        yield from _outermost(child, _join(name, local), calls, failing)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
