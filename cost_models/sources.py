"""What an op is computed by: a digest of its kernels' source, so that none is priced by another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

_OURS = re.compile(r"^fxopt(?:::|\.)(\w+)")
_FROM = re.compile(r"from (?:fxopt\.kernels|\.)\.(\w+)")
_PACKAGES = re.compile(r"from fxopt\.kernels import (.+)")


def kernels_folder() -> Path:
    """Where the folders of ops lie."""
    spec = find_spec("fxopt.kernels")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def digest(op: str, folder: Path | None = None) -> str:
    """What the seconds of `op` hold for: for an op of ours ("fxopt::attention") the source of its
    folder and of those that it imports, for any other the version of torch. Read once a process."""
    ours = _OURS.match(op)
    root = folder or kernels_folder()
    home = _home(root, ours[1]) if ours else None
    if home is None:
        return torch.__version__
    seen = hashlib.sha256()
    for name in sorted(_reached(root, home)):
        for path in sorted((root / name).glob("*.py")):
            seen.update(path.relative_to(root).as_posix().encode())
            seen.update(path.read_bytes())
    return seen.hexdigest()[:16]


def _home(root: Path, op: str) -> str | None:
    """The folder that registers `op`."""
    if (root / op).is_dir():
        return op
    registered = re.compile(rf'register\(\s*"{op}"')
    for path in sorted(root.glob("*/op.py")):
        if registered.search(path.read_text()):
            return path.parent.name
    return None


def _reached(root: Path, home: str) -> set[str]:
    """`home` and the folders that its source imports, and theirs."""
    found, waiting = set[str](), [home]
    while waiting:
        name = waiting.pop()
        if name in found or not (root / name).is_dir():
            continue
        found.add(name)
        waiting += [other for path in (root / name).glob("*.py") for other in _imports(path)]
    return found


def _imports(path: Path) -> Iterator[str]:
    text = path.read_text()
    yield from _FROM.findall(text)
    for names in _PACKAGES.findall(text):
        yield from re.findall(r"\w+", names)
