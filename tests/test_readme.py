"""The documents' snippets run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = "\n".join(blocks("README.md", "python"))
    for name in ("examples", "fxopt"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a run that does not end says where it stands
    watch = "import faulthandler; faulthandler.dump_traceback_later(1500, exit=True)\n"
    done = subprocess.run(
        [sys.executable, "-c", watch + code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for row in ("weights", "kl", "holds"):
        assert row in done.stdout
    assert (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("plan.json", "plan.safetensors", "plan.html", "model.onnx"):
        assert (tmp_path / name).stat().st_size > 0
    for text in ("kv_cache.blocks", "before:", "after:", "onnxruntime differs"):
        assert text in done.stdout


def test_every_rewrite_of_the_table_exists_and_none_is_missing() -> None:
    from fxopt import passes

    table = re.findall(r"^\| `(\w+\.\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    own = [name for name, path in passes.available().items() if path in passes.REWRITES]
    assert sorted(table) == sorted(own)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target
