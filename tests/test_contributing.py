"""The rewrite and the kernel of CONTRIBUTING.md, added as it says, do what it says."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes

ROOT = Path(__file__).parents[1]


def blocks(section: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2]
    return re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 9: the file in its folder, its line in REWRITES."""
    (code,) = blocks("Adding a rewrite")
    folder = tmp_path / "contributed" / "linear"
    folder.mkdir(parents=True)
    (folder / "narrow.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    added = (*passes.REWRITES, "contributed.linear.narrow:Narrow")
    monkeypatch.setattr(passes, "REWRITES", added)
    yield
    for name in [n for n in sys.modules if n.startswith("contributed")]:
        del sys.modules[name]


def test_the_documented_rewrite_works(narrow: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).eval()
    data = [torch.randn(1, 9, 64) for _ in range(4)]
    budget = fxopt.Budget(relative_error=0.02, weights="60%")
    opt = fxopt.optimize(model, budget, data[0], calibration=data, rewrites=["linear.narrow"])
    assert {d.rewrite for d in opt.plan.rewritten} == {"linear.narrow"}
    assert all(row.excess <= 0 for row in opt.report.rows)
    expected = nn.functional.linear(data[0], model[0].weight.bfloat16().float(), model[0].bias)
    expected = nn.functional.linear(expected.relu(), model[2].weight.bfloat16().float())
    torch.testing.assert_close(opt(data[0]), expected)
    assert opt.export_onnx(tmp_path / "narrow.onnx").difference < 1e-4


def test_its_refusal_has_a_reason(narrow: None) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    made = fxopt.plan(model, fxopt.Budget(weights="100%"), x, rewrites=["linear.narrow"])
    assert "not float32" in str(made)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The kernel's folder, its files as they stand in the document."""
    root = tmp_path_factory.mktemp("kernel")
    folder = root / "contributed_kernels" / "gated_silu"
    folder.mkdir(parents=True)
    for code in blocks("Adding a kernel"):
        name = code.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(code)
    assert {path.name for path in folder.iterdir()} == {
        "__init__.py", "op.py", "reference.py", "triton.py",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield importlib.import_module("contributed_kernels.gated_silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1025), (0, 4)])
def test_the_documented_kernel_equals_float64(
    gated: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    kernel = importlib.import_module("contributed_kernels.gated_silu.triton")
    for made in (
        gated.gated_silu(gate, up),
        gated.REFERENCE(gate, up),
        kernel.gated_silu(gate, up),
    ):
        assert made.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_documented_kernel_is_an_op_and_compiles(gated: Any) -> None:
    gate, up = torch.randn(4, 9), torch.randn(4, 9)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(gated.gated_silu, (gate, up), test_utils=checks)
    block = torch.compile(lambda g, u: gated.gated_silu(g, u) + 1, fullgraph=True)
    torch.testing.assert_close(block(gate, up), gated.gated_silu(gate, up) + 1)


AHEAD = """
import sys
sys.path.insert(0, sys.argv[1])
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from contributed_kernels.gated_silu.triton import BLOCK, _gated_silu_kernel as kernel
signature = {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "size": "i32", "BLOCK": "constexpr"}
source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": BLOCK})
print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_the_documented_kernel_compiles_for_hopper(gated: Any) -> None:
    folder = Path(gated.__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, str(folder)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 1000
