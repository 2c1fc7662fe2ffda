"""Imports go one way, and triton stays where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part may import beside itself and third parties.
ALLOWED: dict[str, set[str]] = {
    "ir": set(),
    "kernels": {"ir"},
    "cost_models": {"ir"},
    "passes": {"ir", "kernels", "cost_models"},
    "capture": {"ir"},
    "decide": {"ir"},
    # Generated modules call the ops.
    "emit": {"ir", "kernels"},
    "show": {"ir"},
    # The training compiler is put together here, beside that for inference.
    "training": {"ir", "decide", "cost_models", "passes", "show"},
}
# These compose all the others: the two entrances, and the modules that `api` is made of.
TOP = {"__init__", "__main__", "api", "cli"}
TOP |= {
    "compiler",
    "pace",
    "evidence",
    "fingerprint",
    "host",
    "hosted",
    "inputs",
    "measure",
    "progress",
}
TOP |= {"backend", "coverage", "frontiers", "hf", "replay", "request", "scores", "session", "state"}
TOP |= {"distilled", "subject", "weightless"}
PARTS = {*ALLOWED, *TOP}


def sources() -> list[Path]:
    """Python files of the library, each once (the links inside fxopt/ are not followed)."""
    own = (path for path in (ROOT / "fxopt").iterdir() if not path.is_symlink())
    folders = [*own, *(ROOT / name for name in ("passes", "kernels", "cost_models"))]
    files = (folder.rglob("*.py") if folder.is_dir() else [folder] for folder in folders)
    return sorted(file for group in files for file in group if file.suffix == ".py")


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "fxopt":
        parts.insert(0, "fxopt")
    return ".".join(parts)


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all that a module imports, at any depth of its code.

    `from a import b` yields `a.b`: b may be a module. `module` ends in `__init__` for a package.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            argument = node.args[0] if node.args else None
            if (
                called in {"import_module", "__import__"}
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
            ):
                yield node.lineno, argument.value


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module of the library, one line each."""
    part = module.split(".")[1]
    may_import_triton = module.startswith("fxopt.kernels.") and (
        module.endswith(".triton") or module.startswith("fxopt.kernels._triton.")
    )
    found: list[str] = []
    for line, name in imported(module, ast.parse(source)):
        root, _, rest = name.partition(".")
        if root == "triton" and not may_import_triton:
            found.append(f"{module}:{line} imports triton")
        if root in {"passes", "kernels", "cost_models"}:
            found.append(f"{module}:{line} imports {name} by its bare name, not from fxopt")
        if root != "fxopt" or part in TOP:
            continue
        target = rest.split(".")[0]
        if target in TOP or target not in PARTS:
            found.append(f"{module}:{line} imports {name}, the composed package")
        elif target != part and target not in ALLOWED.get(part, set()):
            found.append(f"{module}:{line} imports {name}, but {part} may not know {target}")
    return found


def test_every_part_has_a_rule() -> None:
    parts = {module_of(path).split(".")[1] for path in sources()}
    assert parts <= PARTS, f"add {sorted(parts - PARTS)} to the table in {Path(__file__).name}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("fxopt.ir.plan", "from fxopt.ir.budget import Budget", False),
        ("fxopt.ir.plan", "from .budget import Budget", False),
        ("fxopt.ir.plan", "from ..passes import linear", True),
        ("fxopt.ir.plan", "from fxopt import passes", True),
        ("fxopt.ir.__init__", "from .. import show", True),
        ("fxopt.ir.plan", "from fxopt import Plan", True),
        ("fxopt.passes.linear.monarch", "import fxopt.kernels.monarch.op", False),
        ("fxopt.passes.linear.monarch", "from passes.linear import low_rank", True),
        ("fxopt.passes.linear.monarch", "from .low_rank import LowRank", False),
        ("fxopt.passes.linear.monarch", "from fxopt.emit.editor import GraphEditor", True),
        ("fxopt.kernels.monarch.op", "from fxopt.passes.linear import monarch", True),
        ("fxopt.decide.solve", "def f():\n    import fxopt.cost_models.roofline", True),
        ("fxopt.show.html", "importlib.import_module('fxopt.api')", True),
        ("fxopt.emit.module", "from fxopt.kernels.attention import op", False),
        ("fxopt.api", "from fxopt import passes, kernels, decide", False),
        ("fxopt.kernels.monarch.op", "import triton", True),
        ("fxopt.kernels.monarch.triton", "import triton.language as tl", False),
        ("fxopt.kernels._triton.packing", "import triton", False),
        ("fxopt.capture.export", "from triton.testing import do_bench", True),
    ],
)
def test_rules(module: str, source: str, wrong: bool) -> None:
    assert bool(violations(module, source)) is wrong
