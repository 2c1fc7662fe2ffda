"""Objects of the user's own code, by `package.module:name`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fxopt.ir.errors import FxoptError
from fxopt.ir.names import hint


def made_by(source: str, what: str) -> Any:
    """The object at `package.module:name`, called when it is a function or a class.

    The working folder is importable. `what` begins the message of every FxoptError.
    """
    found = find(source, what)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    _check_callable_without_arguments(found, source, what)
    try:
        return found()
    except Exception as error:
        raise FxoptError(f"{what}: {source}() raised {_said(error)}") from error


def find(source: str, what: str) -> Any:
    """The object itself."""
    module, mark, name = source.partition(":")
    if not mark or not module or not name:
        raise FxoptError(f"{what}: {source!r} is not of the form package.module:name")
    found: Any = _imported(module, source, what)
    where = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key in dir(found) if not key.startswith("_")]
            raise FxoptError(
                f"{what}: cannot find {source!r}: {where} has no {part!r}.{hint(part, known)}"
            )
        found, where = getattr(found, part), f"{where}.{part}"
    return found


def _imported(module: str, source: str, what: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise FxoptError(
                f"{what}: {module} cannot be imported: it needs {error.name!r}, which is not "
                "installed"
            ) from error
        raise FxoptError(
            f"{what}: cannot find {source!r}: there is no module {error.name!r}; start fxopt in "
            "the folder that holds it, or put that on PYTHONPATH"
        ) from error
    except Exception as error:
        raise FxoptError(f"{what}: importing {module} raised {_said(error)}") from error


def _check_callable_without_arguments(found: Any, source: str, what: str) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:
        return  # some builtins have none
    try:
        signature.bind()
    except TypeError as error:
        raise FxoptError(
            f"{what}: {source}{signature} cannot be called without arguments ({error}); name a "
            "function that takes none"
        ) from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
