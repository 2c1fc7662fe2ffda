"""The arguments of `optimize`, checked and with what the caller left out filled in."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import weightless
from .decide.calibration import Batch, Calibration, bind, split
from .host import refuse_cache, uncached
from .inputs import default_calibration, default_inputs, default_workload, sizes_of
from .ir.budget import Budget
from .ir.distill import Distill
from .ir.errors import FxoptError
from .ir.names import hint
from .ir.workload import Forward, Generate, Several, Train, Workload, scenarios
from .progress import Progress

EXAMPLE = "fxopt.Generate(batch=1, prompt=1024, new_tokens=128)"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Request:
    """What one optimisation is asked for."""

    model: nn.Module
    budget: Budget
    workload: Workload
    example: Batch
    calibration: Calibration
    keep: tuple[str, ...]
    rewrites: tuple[str, ...] | None
    at: str | None
    seed: int
    time_limit: float | None
    deadline: float
    recover: Distill | None = None
    progress: Progress = field(default_factory=Progress)


def ends(time_limit: float | None) -> float:
    """When what begins now has to stop, of `time.monotonic`."""
    return time.monotonic() + (1e9 if time_limit is None else time_limit)


def resolve(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any,
    *,
    workload: Workload | Mapping[str, Forward | Generate] | None,
    calibration: Iterable[Any] | None,
    keep: Iterable[str],
    rewrites: Sequence[str] | None,
    at: str | None,
    seed: int,
    time_limit: float | None,
    recover: Distill | None = None,
    fits: bool = True,
) -> Request:
    """Fill in what the caller left out; errors name the argument. With `fits=False` calibration
    may turn out not to be needed, so that example inputs without a sequence do as well."""
    check(model, budget, workload)
    names = forward_names(model)
    example = _example(model, example_inputs, workload)
    chosen = together(workload) or default_workload(budget, example)
    if isinstance(chosen, Train):
        raise FxoptError(
            "workload: a module that trains is measured as fxopt.optimize makes it (its .report); "
            "verify and calibration are for fxopt.Forward and fxopt.Generate"
        )
    chosen = _sized(chosen, example)
    _check_latency(budget, chosen)
    kept = listed(keep)
    if at:
        if isinstance(chosen, Several):
            raise FxoptError("workload: at= takes one workload, not several by name")
        refuse_cache(at, budget, chosen)
        example = uncached(model, at, example)
        kept = tuple(name.removeprefix(f"{at}.") for name in kept)
    return Request(
        model=model,
        budget=budget,
        workload=chosen,
        example=example,
        calibration=_nothing_to_measure(calibration)
        if weightless(model)
        else _drawn_calibration(model, chosen, at)
        if calibration is None and example_inputs is None
        else _calibration(calibration, example, names, fits),
        keep=kept,
        rewrites=None if rewrites is None else listed(rewrites),
        at=at or None,
        seed=seed,
        time_limit=time_limit,
        deadline=ends(time_limit),
        recover=recover,
    )


def check(model: object, budget: object, workload: object) -> None:
    """FxoptError for arguments of another kind than `optimize` takes."""
    if not isinstance(model, nn.Module):
        raise FxoptError(f"model: takes a torch.nn.Module, not {_kind(model)}")
    inner = getattr(model, "_orig_mod", None)
    if inner is not None or isinstance(model, WRAPPERS):
        name = "._orig_mod" if inner is not None else ".module"
        raise FxoptError(
            f"model: {type(model).__name__} wraps the model itself: pass model{name}, and wrap "
            "what comes back"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise FxoptError("model: a ScriptModule cannot be captured; pass the module it was made of")
    if getattr(model, "plan", None) is not None and hasattr(model, "program"):
        raise FxoptError("model: it was optimised already; optimise the original under this budget")
    if not isinstance(budget, Budget):
        raise FxoptError(
            f'budget: takes fxopt.Budget(...), such as fxopt.Budget(kl=0.02, weights="60%"), not '
            f"{_kind(budget)}"
        )
    try:
        together(workload)
    except ValueError as error:
        raise FxoptError(str(error)) from None


def check_recovery(recover: object) -> None:
    """FxoptError for another kind of recovery than there is."""
    if recover is not None and not isinstance(recover, Distill):
        raise FxoptError(f"recover: takes fxopt.Distill(steps=200) or None, not {_kind(recover)}")


def together(workload: object) -> Workload | None:
    """The workload, a mapping of named ones as one. FxoptError for anything else."""
    if isinstance(workload, Mapping):
        wrong = [w for w in workload.values() if not isinstance(w, Forward | Generate)]
        if not wrong:
            return Several(tuple((str(name), part) for name, part in workload.items()))
        workload = wrong[0]
    elif workload is None or isinstance(workload, Forward | Generate | Train | Several):
        return workload
    raise FxoptError(
        f"workload: takes fxopt.Forward(), {EXAMPLE}, fxopt.Train(batch=, seq=) or several of the "
        f"first two by name, not {_kind(workload)}"
    )


def training_step(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any,
    workload: Workload | Mapping[str, Forward | Generate] | None,
    calibration: Any,
    at: str | None,
) -> tuple[Batch, Train] | None:
    """Example and workload where these arguments ask for a training step, None where not."""
    check(model, budget, workload)
    speaks_of_steps = workload is None and budget.cost_rows == ("activations",)
    if not isinstance(workload, Train) and (budget.quality or not speaks_of_steps):
        return None
    if at is not None or calibration is not None:
        name = "at" if at is not None else "calibration"
        raise FxoptError(f"{name}: fxopt.Train plans the whole step, exactly; leave {name} out")
    example = _example(model, example_inputs, workload)
    chosen = workload or default_workload(budget, example)
    assert isinstance(chosen, Train)
    return example, chosen


def _example(model: nn.Module, given: Any, workload: object) -> Batch:
    """The example by argument names. FxoptError for tokens that are no integers."""
    example = bind(default_inputs(model, given, workload), forward_names(model))
    for name, value in example.items():
        if name.endswith("input_ids") and isinstance(value, Tensor) and value.is_floating_point():
            raise FxoptError(
                f"example_inputs: {name} holds tokens, which are integers, not {value.dtype}: pass "
                f"{name}.long()"
            )
    return example


def forward_names(model: nn.Module) -> list[str]:
    """The named arguments of the forward, in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def listed(names: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple; one text is one name, not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:80] if value is not None else "None"


def _sized(workload: Workload, example: Batch) -> Workload:
    """The workload with the sizes of the example where it names none."""
    if isinstance(workload, Several):
        sized = [(name, _sized(part, example)) for name, part in workload.parts]
        return Several(tuple((n, p) for n, p in sized if isinstance(p, Forward | Generate)))
    if not isinstance(workload, Forward):
        return workload
    batch, length = sizes_of(example)
    return Forward(workload.batch or batch, workload.length or length)


def _check_latency(budget: Budget, workload: Workload) -> None:
    known = [scenario.name for scenario in scenarios(workload)]
    known += [name for name, _ in workload.parts] if isinstance(workload, Several) else []
    for name in budget.latency if isinstance(budget.latency, dict) else ():
        if name not in known:
            raise FxoptError(
                f"Budget.latency: the workload makes no call {name!r}.{hint(name, known)} Its "
                f"calls: {', '.join(known)}"
            )


def _nothing_to_measure(given: Any) -> Calibration:
    """The calibration of a model that has no weights."""
    if given is not None:
        raise FxoptError(
            "calibration: the model is on the meta device, so that nothing can be measured on it; "
            "leave calibration out"
        )
    return Calibration((), (), (), given=False)


def _drawn_calibration(model: nn.Module, workload: Workload, at: str | None) -> Calibration:
    """Random sequences, for a caller who gave neither these nor an example."""
    drawn = default_calibration(model, workload)
    drawn = uncached(model, at, drawn) if at else drawn
    made = split([drawn], forward_names(model), given=True)
    note = "calibration: none given, so its data was drawn at random: errors are of such data"
    return replace(made, notes=(note, *made.notes), given=False)


def _calibration(given: Any, example: Batch, names: Sequence[str], fits: bool) -> Calibration:
    """Calibration split in three; one tensor or dict is one batch of sequences."""
    if given is None:
        if not fits and any(isinstance(v, Tensor) and not v.numel() for v in example.values()):
            return Calibration((), (), (), given=False)
        return split([example], names, given=False)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise FxoptError(
            f"calibration: takes an iterable of inputs, such as [{{'input_ids': ids}}, ...], not "
            f"{_kind(given)}"
        )
    items = [given] if isinstance(given, Tensor | Mapping) else list(given)
    if not items:
        raise FxoptError("calibration: it is empty; pass inputs, or omit it to use example_inputs")
    for i, item in enumerate(items):
        _check_like(bind(item, names), example, names, i)
    return split(items, names, given=True)


def _check_like(item: Batch, example: Batch, names: Sequence[str], index: int) -> None:
    """FxoptError where an item is no input like the example."""
    where = f"calibration: item {index}"
    for name, value in item.items():
        like = example.get(name)
        if not isinstance(value, Tensor | bool | int | float | None) and like is None:
            raise FxoptError(f"{where}, argument {name!r} is {_kind(value)}, not a tensor")
        if isinstance(like, Tensor):
            _check_tensor(value, like, f"{where}, argument {name!r}")
    tensors = [name for name, value in item.items() if isinstance(value, Tensor)]
    unknown = [name for name in tensors if name not in names and name not in example]
    if unknown and names:
        raise FxoptError(
            f"{where} has an argument {unknown[0]!r} that the forward does not take."
            f"{hint(unknown[0], names)}"
        )


def _check_tensor(value: Any, like: Tensor, where: str) -> None:
    if not isinstance(value, Tensor):
        raise FxoptError(f"{where} is {_kind(value)}, where example_inputs has a tensor")
    if value.device.type == "meta":
        raise FxoptError(f"{where} is on the meta device: it has a shape but no values")
    mine, its = (t.dtype.is_floating_point or t.dtype.is_complex for t in (value, like))
    differs = (
        f"dtype {value.dtype}, where example_inputs has {like.dtype}"
        if mine != its or (mine and value.dtype != like.dtype)
        else f"{value.dim()} dimensions, where example_inputs has {like.dim()}"
        if value.dim() != like.dim()
        else f"device {value.device}, where example_inputs has {like.device}"
        if value.device != like.device
        else ""
    )
    if differs:
        raise FxoptError(f"{where} has {differs}")
