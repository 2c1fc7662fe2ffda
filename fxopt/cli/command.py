"""What every command shares: its options as dataclasses, its output, its exit code."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

OK, ERROR, DIFFERENT, INFEASIBLE, USAGE, INTERRUPTED = 0, 1, 2, 3, 64, 130
CODES = (
    "Exit codes: 0 fine, 1 error, 2 plans differ, 3 budget infeasible or no longer kept, 64 usage, "
    "130 interrupted."
)

# typer carries its own copy of click or imports it, depending on its version.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # pyright: ignore[reportAssignmentType]

app = typer.Typer(
    help="Optimise PyTorch models under a budget, and show what was decided and why.",
    epilog=CODES,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Output:
    """Where results go, and how much is said beside them."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FXOPT_DEBUG", help="Show tracebacks of errors.")
    ] = False

    @property
    def progress(self) -> bool | None:
        """For `progress=`: bars go to standard error, so JSON on standard output stays whole."""
        return False if self.quiet else None

    def show(self, text: object, document: Any) -> None:
        """Print a result for people, or for a machine."""
        if self.as_json:
            self.show_json(document)
        elif not self.quiet:
            print(text)

    def wrote(self, *paths: Path | None) -> None:
        """Say which files were written; those that were not asked for are None."""
        if not self.as_json and not self.quiet:
            print("".join(f"wrote {path}\n" for path in paths if path), end="")

    def show_json(self, document: Any) -> None:
        """Print for a machine only."""
        if self.as_json and not self.quiet:
            print(json.dumps(document, indent=2))

    @contextmanager
    def session(self) -> Generator[None]:
        """Around a command: silence what is no error, show where errors came from."""
        logger = logging.getLogger("fxopt")
        level = logger.level
        if self.quiet:
            logger.setLevel(logging.ERROR)
        try:
            yield
        except KeyboardInterrupt:
            raise typer.Abort from None
        except Exception as error:
            if self.debug and not isinstance(error, USAGE_ERROR):
                traceback.print_exc(file=sys.stderr)
            raise
        finally:
            logger.setLevel(level)


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a command that returns its exit code.

    Parameters whose type is a dataclass stand for one option a field; one is `output: Output`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {n: hint for n, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            options += _options(groups[name])
        else:
            options.append(_keyword(name, hints[name], parameter.default))

    @functools.wraps(function)
    def flat(**given: Any) -> int:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        with made["output"].session():
            return function(**given, **made)

    flat.__annotations__ = {option.name: option.annotation for option in options}
    vars(flat)["__signature__"] = inspect.Signature(options)
    app.command(epilog=CODES)(flat)
    return function


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_keyword(field.name, hints[field.name], field.default) for field in fields(group)]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
