"""`fxopt apply`, `export`, `bench` and `verify`: the commands that realise a plan or run one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxopt
from fxopt.ir.errors import FxoptError

from . import options as o
from .command import INFEASIBLE, OK, Output, command
from .results import read_plan, report_of, show_result

if TYPE_CHECKING:
    from fxopt.ir.plan import Plan

Refit = Annotated[bool, typer.Option("--refit", help="Fit to other weights, as of a fine-tune.")]
File = Annotated[Path, typer.Argument(help="File to write, as model.onnx.", metavar="FILE")]
KindOption = Annotated[o.Kind, typer.Option(help="One pass, or a step with its cache.")]
TargetOption = Annotated[
    o.Target,
    typer.Option(help="portable: standard operators; ort: also onnxruntime's own where faster."),
]
Dtype = Annotated[str | None, typer.Option(help="float32 if omitted.", show_default=False)]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for each call of the workload.")]


@command
def apply(
    model: o.Model,
    plan: o.PlanFile,
    out: o.Out,
    source: o.Source,
    output: Output,
    refit: Refit = False,
) -> int:
    """Realise a plan without searching, and save the result.

    fxopt apply examples/tiny_lm plan.json --out applied
    """
    from .inputs import load_inputs

    read = read_plan(plan)
    given = load_inputs(model, source, read.workload)
    opt = fxopt.apply(given.model, read, **given.arguments(), refit=refit, progress=output.progress)
    opt.save(out)
    return show_result(opt, out, output)


@command
def export(
    saved: o.Saved,
    out: File,
    output: Output,
    kind: KindOption = o.Kind.forward,
    target: TargetOption = o.Target.portable,
    dtype: Dtype = None,
) -> int:
    """Write a saved result as ONNX, checked against onnxruntime.

    fxopt export small model.onnx --kind generate --target ort
    """
    from fxopt.progress import showing

    chosen = o.dtype(dtype)
    opt = _load(_folder(saved))
    with showing(output.progress) as progress, progress.stage("exporting"):
        exported: Any = opt.export_onnx(out, kind=kind.value, target=target.value, dtype=chosen)
    document: dict[str, Any] = exported.as_dict()
    document["out"] = document.pop("path")
    output.show(f"wrote {out}: {exported}", document)
    return OK


@command
def bench(
    model: o.Model,
    saved: o.Saved,
    source: o.Source,
    output: Output,
    seconds: Seconds = 3.0,
) -> int:
    """Time the original against a saved result, in the calls of its workload, and weigh both.

    The inputs are the first of the calibration, or random tokens as many as the workload has.
    Calls alternate, so that what disturbs one disturbs the other; medians with the 95 % interval.

    fxopt bench examples/tiny_lm small --seconds 1
    """
    from fxopt.progress import showing
    from fxopt.request import resolve

    from .inputs import load_inputs
    from .timing import measure

    made = _plan_of(saved)
    given = load_inputs(model, source, made.workload)
    opt = _load(saved, given.model if made.at else None, source.device)
    request = resolve(
        given.model, made.budget, given.example_inputs, workload=made.workload, calibration=None,
        keep=(), rewrites=None, at=made.at, seed=0, time_limit=None,
    )  # fmt: skip
    with showing(output.progress) as progress:
        found = measure(request, opt, seconds, progress)
    output.show(found, found.document())
    return OK


@command
def verify(model: o.Model, saved: o.Saved, source: o.Source, output: Output) -> int:
    """Measure a saved result's budget again, against the model; exit code 3 when a row is not kept.

    Of the calibration the last third is measured on: with the file that the plan was made with,
    the part that the search did not see.

    fxopt verify examples/tiny_lm small --calibration examples/tiny_lm/heldout.txt
    """
    from fxopt.show.rows import limit_texts

    from .inputs import load_inputs

    made = _plan_of(saved)
    given = load_inputs(model, source, made.workload)
    opt = _load(saved, given.model if made.at else None, source.device)
    report = fxopt.verify(opt, given.model, **given.arguments(), progress=output.progress)
    report.written = limit_texts(made.budget)
    document = {"kept": report.kept, **report_of(report)}
    output.show(report, document)
    return OK if report.kept else INFEASIBLE


def _plan_of(saved: Path) -> Plan:
    """The plan of a saved result."""
    if not (_folder(saved) / "plan.json").exists():
        raise FxoptError(f"{saved} holds no plan.json, which says what the module was made for")
    return read_plan(saved)


def _load(saved: Path, model: Any = None, device: str | None = None) -> Any:
    """A saved module; with `model` that, with the saved submodule in its place."""
    opt, found = fxopt.load(saved, model), o.device(device)
    return opt if found is None else opt.to(found)


def _folder(saved: Path) -> Path:
    if not saved.is_dir():
        raise FxoptError(f"{saved} is not a folder: pass what optimize or apply wrote with --out")
    return saved
