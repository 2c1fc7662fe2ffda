"""Finding rewrites: by name, family and pattern, own and of other packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fxopt import passes
from fxopt.ir.errors import PlanError
from fxopt.passes.linear.low_rank import LowRank


def test_every_rewrite_loads_under_its_name() -> None:
    loaded = passes.load()
    asked = set(passes.available()) - passes.ON_REQUEST
    assert [r.name for r in loaded] == [n for n in passes.available() if n in asked]
    assert set(passes.available()) > passes.ON_REQUEST
    assert {r.name for r in passes.load(["linear", "activation"])} > passes.ON_REQUEST
    families = [r.name.partition(".")[0] for r in loaded]
    assert families == [r.family for r in loaded]
    assert families == sorted(families, key=("attention", "kv_cache", "linear", "activation").index)
    names = [r.name for r in loaded]
    assert names.index("linear.low_rank") < names.index("linear.quantized")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["linear.quantized", "linear.low_rank"], ["linear.low_rank", "linear.quantized"]),
        (["linear.monarch", "linear.low_rank"], ["linear.low_rank", "linear.monarch"]),
        (["re:linear\\..*ran.*"], [n for n in passes.available() if "_rank" in n]),
        ([], []),
    ],
)
def test_selection_keeps_the_order_of_application(names: list[str], found: list[str]) -> None:
    assert [r.name for r in passes.load(names)] == found


def test_a_name_that_selects_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(PlanError, match=r"linear\.quantised.*linear\.quantized"):
        passes.load(["linear.quantised"])


def test_only_what_is_selected_is_imported() -> None:
    code = (
        "import sys; from fxopt import passes; passes.load(['linear.low_rank']);"
        "assert 'fxopt.passes.linear.low_rank' in sys.modules;"
        "assert 'fxopt.passes.linear.quantized' not in sys.modules;"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rewrites_of_other_packages_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("linear.toeplitz", f"{LowRank.__module__}:LowRank", passes.ENTRY_POINTS),
        EntryPoint("linear.absent", "no_such_package:Absent", passes.ENTRY_POINTS),
    ]
    monkeypatch.setattr(passes, "entry_points", lambda group: points)
    assert list(passes.available())[-2:] == ["linear.toeplitz", "linear.absent"]
    assert isinstance(passes.load(["linear.toeplitz"])[0], LowRank)
    with pytest.raises(PlanError, match=r"linear\.absent.*no_such_package.*repair or uninstall"):
        passes.load(["linear.absent"])
