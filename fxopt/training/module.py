"""The module that trains: the original's parameters, names and signature, a planned step inside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir.errors import FxoptError
from .capture import scalar_loss
from .huggingface import without_cache, without_idle_mask
from .parallel import check_whole

Inputs = dict[str, Any]
Run = Callable[[Mapping[str, Tensor], Inputs], Any]
Plan = Callable[[nn.Module, Inputs], Run]


class TrainingModule(nn.Module):
    """A model whose training step keeps a byte budget.

    Parameters, buffers and submodule names are the original's own (the same objects), so any
    optimiser, checkpoint and wrapper that took the original takes this. Under `no_grad` the
    original's forward runs. Otherwise a planned step does: one for each combination of shapes,
    dtypes, training modes, frozen parameters and autocast, planned when it is first met, under
    the byte limit of the first. `plan` and `report` are of the example inputs.
    """

    plan: Any
    report: Any

    def __init__(self, model: nn.Module, planned: Plan) -> None:
        super().__init__()
        inner = clone(model)
        # One set of dictionaries: what is loaded, moved or frozen here is so in `inner`.
        self._parameters, self._buffers = inner._parameters, inner._buffers
        self._modules = inner._modules
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self.__dict__["_inner"] = inner
        self.training = inner.training
        self.plan = self.report = None
        self._planned = planned
        self._runs: dict[Any, Run] = {}

    def adopt(self, inputs: Inputs, run: Run) -> None:
        """Take `run` for the step of inputs like these, in the present modes."""
        inner: nn.Module = self.__dict__["_inner"]
        self._runs[_key(inner, without_idle_mask(inner, inputs))] = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the original forward.

        FxoptError in the backward when gradients reach another output than the scalar `loss` of
        a model that returns one: the planned step starts from the loss alone.
        """
        return _eager(self._step, args, kwargs)  # pyright: ignore[reportCallIssue]

    def _step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inner: nn.Module = self.__dict__["_inner"]
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        inputs = without_idle_mask(inner, bound(inner, args, kwargs))
        tensors = _tensors_by_name(inner)
        check_whole(tensors)
        key = _key(inner, inputs)
        if key not in self._runs:
            self._runs[key] = self._planned(inner, inputs)
        output = self._runs[key](tensors, inputs)
        loss = scalar_loss(output)
        if loss is None:
            return output

        def guard(leaf: Tensor) -> Tensor:
            floats = leaf is not loss and leaf.is_floating_point()
            return _LossOnly.apply(leaf, loss) if floats else leaf  # pyright: ignore

        return pytree.tree_map_only(Tensor, guard, output)

    def train(self, mode: bool = True) -> TrainingModule:
        super().train(mode)
        self.__dict__["_inner"].training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_inner" not in self.__dict__:
                raise
            return getattr(self.__dict__["_inner"], name)

    def __getstate__(self) -> dict[str, Any]:
        # Planned steps hold code that is made from the model: a copy plans its own.
        return {**self.__dict__, "_runs": {}}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__dict__["_inner"].forward)

    def save(self, path: Any) -> None:
        """Not offered: weights are saved as the original's are, the decision with `plan.save`."""
        raise FxoptError(
            f"save({str(path)!r}): a training module holds nothing but the original's weights and "
            "a plan; save opt.state_dict() and opt.plan.save(path), and put them together with "
            "fxopt.apply(model, plan, example_inputs=batch)"
        )


@torch.compiler.disable
def _eager(function: Callable[..., Any], *args: Any) -> Any:
    """Under `torch.compile` the planned step runs between two compiled graphs."""
    return function(*args)


class _LossOnly(torch.autograd.Function):
    """Another output than the loss: it may be looked at, not differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:  # pyright: ignore
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        raise FxoptError(
            "backward: a gradient reached an output beside `loss`, and the planned step starts "
            "from `loss` alone (gradients of the others would have to be stored whole); compute "
            "your loss outside of a model that is called without labels, or detach() that output"
        )


def clone(model: nn.Module) -> nn.Module:
    """The module tree again over the same parameters and buffers."""
    check_whole(dict(model.named_parameters()))
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as error:
        raise FxoptError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); fxopt "
            "trains a copy of the module tree over the same parameters, so that the original is "
            "not changed. Remove hooks or attributes that refuse copying"
        ) from error


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Arguments by name, those left at a default of None out; a step makes no KV cache."""
    signature = inspect.signature(model.forward)
    found: Inputs = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise FxoptError(
                f"{type(model).__name__}.forward takes {name!r} by position only; fxopt calls it "
                "by name: wrap it in a module whose forward names its arguments"
            )
        else:
            found[name] = value
    given = {name: value for name, value in found.items() if value is not None}
    return without_cache(model, given, signature.parameters)


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    named = (model.named_parameters, model.named_buffers)
    return {name: t for each in named for name, t in each(remove_duplicate=False)}


def _key(model: nn.Module, inputs: Inputs) -> Any:
    """What a traced step depends on, beside the values of tensors."""
    leaves, tree = pytree.tree_flatten(inputs)
    return (
        str(tree),
        tuple(_leaf(leaf) for leaf in leaves),
        tuple(module.training for module in model.modules()),
        tuple((p.requires_grad, p.dtype, p.device) for p in model.parameters()),
        tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        tuple(str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return repr(leaf)
