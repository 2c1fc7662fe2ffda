"""`fxopt optimize` and `fxopt plan`: the commands that search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxopt
from fxopt.ir.errors import BudgetError

from . import options as o
from .command import Output, command
from .results import rows_of, show_plan, show_result

MaybeOut = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
PlanOut = Annotated[Path | None, typer.Option("--out", help="plan.json to write.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide as `plan` does; write nothing.")]


@command
def optimize(
    model: o.Model,
    source: o.Source,
    rows: o.Rows,
    sizes: o.Sizes,
    search: o.Search,
    output: Output,
    out: MaybeOut = None,
    dry_run: DryRun = False,
) -> int:
    """Optimise a model under a budget, measure that it keeps it, and save it.

    fxopt optimize examples/tiny_lm --weights 60% --prompt 512 --calibration
    examples/tiny_lm/heldout.txt --out small

    fxopt optimize examples/tiny_lm --kl 0.05 --kv-cache 40% --prompt 1024 --calibration
    examples/tiny_lm/heldout.txt --dry-run
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give --out FOLDER for the result, or --dry-run")
    given = _arguments(model, source, rows, sizes, search, output)
    if dry_run:
        return show_plan(fxopt.plan(**given), output)
    try:
        opt = fxopt.optimize(**given)
    except BudgetError as error:
        document = {"out": None, "binding": error.binding, "rows": rows_of(error.rows)}
        output.show_json(document)
        raise
    assert out is not None
    opt.save(out)
    return show_result(opt, out, output)


@command
def plan(
    model: o.Model,
    source: o.Source,
    rows: o.Rows,
    sizes: o.Sizes,
    search: o.Search,
    output: Output,
    out: PlanOut = None,
    html: o.Html = None,
) -> int:
    """Decide, without writing a model: what would be rewritten, kept and refused, and why.

    fxopt plan examples/tiny_lm --kl 0.02 --weights 60% --calibration
    examples/tiny_lm/heldout.txt --out plan.json
    """
    made = fxopt.plan(**_arguments(model, source, rows, sizes, search, output))
    if out:
        made.save(out)
    if html:
        made.to_html(html)
    code = show_plan(made, output)
    output.wrote(out, html)
    return code


def _arguments(
    model: str, source: o.Source, rows: o.Rows, sizes: o.Sizes, search: o.Search, output: Output
) -> dict[str, Any]:
    """Keyword arguments of `fxopt.optimize` and `fxopt.plan`."""
    budget, workload = rows.budget(), sizes.workload()
    # torch and transformers take seconds to import, which help and completion need not wait for
    from .inputs import load_inputs

    given = load_inputs(model, source, workload)
    return {
        **given.arguments(), **search.arguments(), "model": given.model, "budget": budget,
        "workload": workload, "progress": output.progress,
    }  # fmt: skip
