"""The rewrite of CONTRIBUTING.md, added as it says, is chosen, realised and exported."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 9: the file in its folder, its line in REWRITES."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
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
