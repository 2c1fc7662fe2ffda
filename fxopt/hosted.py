"""What `at=` gives: a copy of the model with a rewritten submodule in its place."""
# Copies of modules are made of the same parts as modules are.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .capture.submodule import submodule, twin
from .emit.editor import GraphEditor
from .emit.module import OptimizedModule
from .ir.errors import FxoptError

ATTRIBUTES = ("plan", "report", "source", "classes", "editor")
CACHES = {"past_key_values", "past_key_value", "use_cache"}


class OptimizedHost(nn.Module):
    """A model one of whose submodules was rewritten: a copy of the model, of its own class.

    It is called like the original, generates where that does, and shares every Parameter that no
    rewrite replaced. `plan`, `source`, `save` and `export_onnx` are of the rewritten submodule,
    an `OptimizedModule`; `report` is of the whole.
    """

    _fxopt_at: str
    config: Any
    generation_config: Any
    generate: Any

    @property
    def _rewritten(self) -> OptimizedModule:
        return cast(OptimizedPart, self.get_submodule(self._fxopt_at)).fxopt

    @property
    def plan(self) -> Any:
        """What was decided; `plan.at` names the submodule."""
        return self._rewritten.plan

    @plan.setter
    def plan(self, plan: Any) -> None:
        self._rewritten.plan = plan

    @property
    def report(self) -> Any:
        """What was measured, of the whole model."""
        return self._rewritten.report

    @report.setter
    def report(self, report: Any) -> None:
        self._rewritten.report = report

    @property
    def editor(self) -> GraphEditor | None:
        return self._rewritten.editor

    @property
    def source(self) -> str:
        """The generated Python source of the submodule's classes."""
        return self._rewritten.source

    @property
    def classes(self) -> Mapping[str, str]:
        """The generated class of each module of the submodule that has one."""
        return self._rewritten.classes

    def save(self, path: str | Path) -> None:
        """Write the rewritten submodule: loading runs no code, so the class of the model around
        it cannot be in the folder. `fxopt.load(path, model)` puts it into a model again."""
        self._rewritten.save(path)

    def export_onnx(self, path: str | Path, **options: Any) -> Any:
        """Write the rewritten submodule as ONNX; see `emit.onnx.export_onnx`."""
        return self._rewritten.export_onnx(path, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedHost:
        # The submodule refuses another dtype: ask it before anything else is converted.
        self._rewritten._apply(fn, recurse)
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol))


class OptimizedPart(nn.Module):
    """What stands in the place of a rewritten submodule: of the original's class, with its
    attributes, submodules and the parameters that were not replaced, for models that read them.
    Its forward is that of `fxopt`, the rewritten module."""

    fxopt: OptimizedModule

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol))


Optimized = OptimizedModule | OptimizedHost


@lru_cache
def _mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[Any]:
    """`cls` with what `mixin` adds."""
    names: dict[str, Any] = {"__module__": cls.__module__, "__doc__": mixin.__doc__}
    if mixin is OptimizedPart:

        @wraps(cls.forward)
        def forward(self: OptimizedPart, *args: Any, **kwargs: Any) -> Any:
            return tree_map_only(Tensor, _writable, self.fxopt(*args, **kwargs))

        names["forward"] = forward
    return type(f"Optimized{cls.__name__}", (mixin, cls), names)


def _writable(output: Tensor) -> Tensor:
    """autograd lets nobody write to the views that custom ops return; a model around may."""
    return output.clone() if output.requires_grad and output._is_view() else output


def _reduced(module: nn.Module, reduced: Any) -> Any:
    """How to copy and pickle a module of a mixed class, which no import finds."""
    mixin, cls = type(module).__mro__[1:3]
    return (_blank, (mixin, cls), *reduced[2:])


def _blank(mixin: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    return object.__new__(_mixed(mixin, cls))


def around(model: nn.Module, at: str, module: OptimizedModule) -> OptimizedHost:
    """A copy of `model` that runs `module` in the place of its submodule `at`."""
    part = submodule(model, at)
    shell: Any = twin(part)
    for name, inner in shell.named_modules():
        held = module.get_submodule(name)
        for local in inner._parameters:
            inner._parameters[local] = held._parameters.get(local)
        for local in inner._buffers:
            inner._buffers[local] = held._buffers.get(local, inner._buffers[local])
    vars(shell).pop("forward", None)
    shell.__class__ = _mixed(OptimizedPart, type(part))
    shell.fxopt = module
    whole: Any = twin(model, {id(part): shell})
    whole.__class__ = _mixed(OptimizedHost, type(model))
    whole._fxopt_at = at
    if takes_cache(part):
        _without_cache(whole)
    return whole.eval()


def load_into(model: nn.Module, module: OptimizedModule) -> OptimizedHost:
    """`around`, for a module that was loaded; FxoptError when it is not of that model."""
    at = getattr(module.plan, "at", None)
    if not at:
        raise FxoptError(
            "load: the folder holds a whole model, which was not rewritten with at=; load it "
            "without a model"
        )
    part = submodule(model, at)
    if type(part).__name__ != module.program.name:
        raise FxoptError(
            f"load: the folder holds a rewritten {module.program.name}, but {at!r} is a "
            f"{type(part).__name__} in {type(model).__name__}"
        )
    return around(model, at, module)


def takes_cache(part: nn.Module) -> bool:
    """Whether a module takes part in a KV cache, which a rewritten submodule cannot."""
    return not CACHES.isdisjoint(inspect.signature(part.forward).parameters)


def _without_cache(whole: nn.Module) -> None:
    """Turn the KV cache off in the configs of `whole`, in copies of them."""
    copies: dict[int, Any] = {}
    for owner in (m for m in whole.modules() if not isinstance(m, OptimizedModule)):
        for name in ("config", "generation_config"):
            config: Any = vars(owner).get(name)
            if hasattr(config, "use_cache"):
                copied = copy.deepcopy(config, copies)
                copied.use_cache = False
                setattr(owner, name, copied)
