"""The command line: `fxopt optimize | plan | apply | export | bench | verify | diff | report |
explain | doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import fxopt
from fxopt.ir.errors import BudgetError, FxoptError

from . import search, realised, plans, doctor  # isort: skip  # in the order of `fxopt --help`
from .command import CODES, ERROR, INFEASIBLE, INTERRUPTED, OK, USAGE, USAGE_ERROR, app
from .words import as_options

__all__ = ["CODES", "app", "doctor", "main", "plans", "realised", "run", "search"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """The exit code of one command; every error is one message on standard error."""
    try:
        return app(arguments, standalone_mode=False) or OK
    except USAGE_ERROR as error:
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return USAGE
    except BudgetError as error:
        from fxopt.show.report import Report

        return _failed(f"{as_options(str(error))}\n{Report(error.rows)}", INFEASIBLE)
    except (FxoptError, OSError) as error:
        return _failed(as_options(str(error)), ERROR)
    except typer.Abort:
        return _failed("interrupted", INTERRUPTED)
    except Exception as error:
        name = type(error).__name__
        return _failed(f"{name}: {error} (run it again with --debug to see where)", ERROR)


def _failed(message: str, code: int) -> int:
    print(f"fxopt: {message}", file=sys.stderr)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        print(fxopt.__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    del version
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(USAGE)
