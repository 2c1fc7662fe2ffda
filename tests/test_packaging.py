"""What an installation, a checkout and an import of fxopt may and may not do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels", "cost_models")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code as a REPL in `cwd` would: with that folder first on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", LINKED)
def test_top_level_folders_are_linked(name: str) -> None:
    link = ROOT / "fxopt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_kernels_stays_a_namespace() -> None:
    # With an __init__.py, `import kernels` in the root would find ours instead of Hugging Face's.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_in_the_root_does_not_take_our_kernels() -> None:
    code = f"""
import sys
import transformers.models.llama.modeling_llama
import fxopt.kernels
# Without the package of Hugging Face the probe of transformers leaves an empty namespace behind.
loaded = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "kernels"]
assert not any(file and file.startswith({str(ROOT)!r}) for file in loaded), loaded
assert set(sys.modules["fxopt.kernels"].__path__) == {{{str(ROOT / "fxopt" / "kernels")!r}}}
"""
    result = python(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_import_is_silent_and_light() -> None:
    code = """
import sys
import fxopt
dir(fxopt), fxopt.__version__
heavy = {"triton", "transformers", "onnx", "onnxruntime", "onnxscript"} & set(sys.modules)
assert not heavy, heavy
"""
    result = python(code, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", fxopt.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(fxopt, name).__name__ == name
    assert name in dir(fxopt)


def test_no_submodule_takes_the_place_of_a_public_name() -> None:
    # Importing a module `fxopt.plan` would set the package's attribute `plan`, a function before.
    modules = {path.stem for path in Path(fxopt.__file__).parent.iterdir()}
    assert modules.isdisjoint(fxopt.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = fxopt.optimise


def test_clone_without_links_says_so(tmp_path: Path) -> None:
    package = tmp_path / "fxopt"
    package.mkdir()
    shutil.copy(ROOT / "fxopt" / "__init__.py", package)
    for name in LINKED:
        # What git checks out where core.symlinks is false.
        (package / name).write_text(f"../{name}")
    result = python("import fxopt", cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fxopt/passes is not a folder")
    assert "core.symlinks" in last


@pytest.mark.slow
def test_wheel_holds_the_linked_folders_and_no_top_level_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fxopt", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.name in {"pyproject.toml", "LICENSE", "NOTICE", "README.md"}:
            shutil.copy(path, source)
    # setuptools and build are in the `dev` extra: no isolated environment, no download.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    roots = {name.split("/")[0] for name in names}
    assert roots == {"fxopt", f"fxopt-{fxopt.__version__}.dist-info"}
    assert "fxopt/py.typed" in names
    for folder in ("web", "vendor"):
        files = (ROOT / "fxopt" / "show" / folder).iterdir()
        assert {f"fxopt/show/{folder}/{file.name}" for file in files} <= names
    for folder in LINKED:
        expected = {
            f"fxopt/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / folder).rglob("*.py")
        }
        assert expected <= names
