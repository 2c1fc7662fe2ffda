"""The pages of docs/: their code runs, their tables and messages are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fxopt import passes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COLUMNS = ["rewrite", "what it does", "parameters", "cost", "error", "refused when", "paper"]
FAMILIES = {
    "attention": "attention.md",
    "kv_cache": "kv-cache.md",
    "linear": "linear.md",
    "activation": "activation-memory.md",
}
# More than three seconds, and what the others need.
SLOW = {"budgets.md", "kv-cache.md", "activation-memory.md", "onnx.md", "refusals.md"}
NEEDS = {
    "index.md": ["transformers"],
    "kv-cache.md": ["transformers"],
    "onnx.md": ["transformers", "onnx", "onnxscript", "onnxruntime"],
}
# tests/test_huggingface.py makes the model that this page begins with.
ELSEWHERE = {"huggingface.md"}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def pages() -> Iterator[Any]:
    for path in sorted(DOCS.glob("*.md")):
        if path.name not in ELSEWHERE and blocks(path.name):
            marks = [pytest.mark.slow] if path.name in SLOW else []
            # its example is that of the README with fewer rewrites
            marks = [pytest.mark.exhaustive] if path.name == "index.md" else marks
            yield pytest.param(path.name, marks=marks, id=path.stem)


@pytest.mark.parametrize("page", [*pages()])
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NEEDS.get(page, []):
        pytest.importorskip(name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page}
    for i, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page}, block {i}", "exec"), names)


def rows(page: str) -> dict[str, dict[str, str]]:
    """The page's table of rewrites, by name and column."""
    text = (DOCS / page).read_text()
    head = "| " + " | ".join(COLUMNS) + " |\n"
    assert head in text, f"{page} has no table of rewrites"
    table = text.partition(head)[2].partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]
    return {row[0].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in cells}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rewrite_is_documented_with_its_options_and_paper(family: str) -> None:
    table = rows(FAMILIES[family])
    own = [n for n, path in passes.available().items() if path in passes.REWRITES]
    assert sorted(table) == sorted(n for n in own if n.startswith(f"{family}."))
    for rewrite in passes.load(list(table)):
        row = table[rewrite.name]
        for option in fields(rewrite):  # pyright: ignore[reportArgumentType]
            assert f"`{option.name}`" in row["parameters"], (rewrite.name, option.name)
        assert rewrite.paper.rpartition("/")[2] in row["paper"], rewrite.name
        assert all(row[c] for c in COLUMNS if c != "paper"), rewrite.name


def test_every_family_has_a_page() -> None:
    assert {path.split(".")[2] for path in passes.REWRITES} == set(FAMILIES)


@cache
def sources() -> str:
    """All code of the library with adjacent pieces of a text joined."""
    files = [p for f in ("fxopt", "passes", "kernels") for p in sorted((ROOT / f).rglob("*.py"))]
    return re.sub(r'"\s*\n?\s*f?"', "", "\n".join(p.read_text() for p in files))


def test_every_message_of_the_faq_is_one_of_the_code() -> None:
    titles = re.findall(r"^### (.*)$", (DOCS / "refusals.md").read_text(), re.MULTILINE)
    assert len(titles) > 30
    assert [title for title in titles if title not in sources()] == []


def test_every_row_of_a_budget_is_documented() -> None:
    from fxopt import Budget

    text = (DOCS / "budgets.md").read_text()
    for name in Budget.model_fields:
        assert f"`{name}`" in text or f"`{name}=" in text, name


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.name for path in DOCS.glob("*.md")}


def test_every_public_name_is_in_the_reference() -> None:
    import fxopt

    text = (DOCS / "api.md").read_text()
    for name in fxopt.__all__:
        value = getattr(fxopt, name)
        assert f"::: {value.__module__}.{value.__qualname__}\n" in text, name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None, reason="needs the extra `docs`")
def test_the_site_builds(tmp_path: Path) -> None:
    """Links, anchors and names of the reference are checked by mkdocs itself."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "optimize" in (tmp_path / "site/api/index.html").read_text()
