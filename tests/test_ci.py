"""`.ci/run` sees to a browser where it can, and says so where it cannot."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(tmp_path: Path, *tools: str, root: bool = True, apt_fails: bool = False) -> list[str]:
    """What the script called, on a machine that has `tools` and nothing else."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "make": f'echo "make $* CI=$CI browser=${{FXOPT_BROWSER:-}}" >> {log}',
        "id": f"echo {0 if root else 1000}",
        "apt-get": f'echo "apt-get $*" >> {log}; exit {int(apt_fails)}',
        "chromium": "exit 0",
    }
    for name in ("make", "id", *tools):
        tool = folder / name
        tool.write_text(f"#!/bin/sh\n{bodies[name]}\n", encoding="utf-8")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for name in ("bash", "dirname", "sh"):
        (folder / name).symlink_to(str(shutil.which(name)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FXOPT_", "CI"))}
    done = subprocess.run(
        [str(folder / "bash"), str(SCRIPT)],
        env={**environment, "PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text("utf-8").splitlines()
    goals = [line.split()[1] for line in lines if line.startswith("make")]
    assert goals == ["lint", "docs", "test"]
    assert ("tests of pages are skipped" in done.stderr) == ("browser=skip" in lines[-1])
    return lines


def test_nothing_is_installed_where_there_is_one(tmp_path: Path) -> None:
    lines = run(tmp_path, "chromium", "apt-get")
    assert lines == [f"make {goal} CI=true browser=" for goal in ("lint", "docs", "test SLOW=1")]


def test_it_is_installed_as_root(tmp_path: Path) -> None:
    lines = run(tmp_path, "apt-get")
    assert lines[:2] == [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends chromium",
    ]
    assert lines[-1].endswith("browser=")


@pytest.mark.parametrize(
    ("tools", "root", "fails"),
    [((), True, False), (("apt-get",), False, False), (("apt-get",), True, True)],
)
def test_a_machine_that_can_have_none_does_not_fail(
    tmp_path: Path, tools: tuple[str, ...], root: bool, fails: bool
) -> None:
    lines = run(tmp_path, *tools, root=root, apt_fails=fails)
    assert lines[-1].endswith("browser=skip")
    assert not any("install" in line for line in lines)
