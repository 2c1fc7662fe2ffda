"""Files of plans, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.ir.errors import PlanError
from fxopt.ir.plan import Plan
from fxopt.ir.store import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_save_and_load_without_tensors(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "new" / "plan.json")
    assert names(path.parent) == ["plan.json"]
    read = Plan.load(path)
    assert read == plan
    assert not plan.diff(read)


def test_tensors_come_back_to_the_bit(plan: Plan, tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "strided": base.t(),
        "shared": base,
        "slice": base[1:3, ::2],
        "bf16": torch.randn(3).bfloat16(),
        "packed": torch.randint(0, 256, (5,), dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    plan.tensors = tensors
    path = plan.save(tmp_path / "plan.json")
    assert names(tmp_path) == ["plan.json", "plan.safetensors"]
    read = Plan.load(path)
    assert read == plan
    assert set(read.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_tensors_may_be_left_behind(plan: Plan, tmp_path: Path) -> None:
    plan.tensors = {"a": torch.ones(2)}
    path = plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    read = Plan.load(path)
    assert read.tensors == {}
    read.save(path)
    assert Plan.load(path).prepared is None


def test_tensors_of_another_plan_are_refused_or_ignored(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.tensors = {"a": torch.ones(2)}
    plan.save(path)
    written = path.read_text(encoding="utf-8")
    plan.tensors = {"a": torch.zeros(2)}
    plan.save(path)
    path.write_text(written, encoding="utf-8")
    with pytest.raises(PlanError, match="does not belong to the plan beside it"):
        Plan.load(path)
    plan.tensors = {}
    plan.save(path)
    assert Plan.load(path).tensors == {}


@pytest.mark.parametrize("broken", ["save_file", "write_text"])
def test_a_failed_save_leaves_the_pair_that_was_there(
    plan: Plan, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.tensors = {"a": torch.ones(2)}
    path = plan.save(tmp_path / "plan.json")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan.tensors = {"a": torch.zeros(3)}
    monkeypatch.setattr(f"fxopt.ir.store.{broken}", full)
    with pytest.raises(OSError, match="No space"):
        plan.save(path)
    assert names(tmp_path) == ["plan.json", "plan.safetensors"]
    assert torch.equal(Plan.load(path).tensors["a"], torch.ones(2))


def test_editing_the_json_keeps_the_tensors(plan: Plan, tmp_path: Path) -> None:
    plan.tensors = {"a": torch.ones(2)}
    path = plan.save(tmp_path / "plan.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["decisions"][0]["locked"] = True
    path.write_text(json.dumps(data), encoding="utf-8")
    read = Plan.load(path)
    assert read.decisions[0].locked
    assert torch.equal(read.tensors["a"], torch.ones(2))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edited


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "is not JSON, or cut short"),
        (lambda text: "PK\x03\x04", "is not JSON"),
        (lambda text: "[1, 2]", "no schema_version"),
        (lambda text: "{}", "no schema_version"),
        (edit(lambda d: d.update(schema_version=2)), "schema version 2; this fxopt reads 1"),
        (edit(lambda d: d["decisions"][0].update(rewrite="quant")), r"decisions\.0\.rewrite"),
        (edit(lambda d: d["decisions"][0].pop("key")), r"decisions\.0\.key: Field required"),
        (edit(lambda d: d["decisions"][0].update(loked=True)), r"decisions\.0\.loked"),
        (edit(lambda d: d["budget"].update(kl=-1)), "Budget.kl=-1: is negative"),
        (edit(lambda d: d["budget"].update(speed=1)), "no row 'speed'"),
        (edit(lambda d: d["workload"].update(kind="serve")), "workload"),
        (edit(lambda d: d["workload"].update(batch=0)), "at least 1"),
        (edit(lambda d: d["workload"].update(promt=1)), "promt"),
        (edit(lambda d: d.update(decisions=[{}] * 9)), "and 13 more"),
    ],
)
def test_a_damaged_plan_is_one_clear_error(
    plan: Plan, tmp_path: Path, damage: Callable[[str], str], says: str
) -> None:
    path = plan.save(tmp_path / "plan.json")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "pydantic" not in message
    assert len(message.splitlines()) <= 7


def test_wrong_files_are_one_clear_error(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"is a folder.*plan\.json"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match=r"is a folder.*plan\.json"):
        plan.save(tmp_path)
    with pytest.raises(PlanError, match=r"cannot read .*No such file"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PlanError, match="not a text file"):
        Plan.load(tmp_path / "binary.json")
    with pytest.raises(PlanError, match="name the plan itself"):
        plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="cannot write"):
        plan.save(tmp_path / "binary.json" / "plan.json")


def test_absent_rewrites_are_refused_while_loading(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path, {"linear.quantized": 3}) == plan
    with pytest.raises(PlanError, match=r"Did you mean 'linear.quantised'"):
        Plan.load(path, {"linear.quantised": 3})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old", encoding="utf-8")

    def fail(file: Path) -> None:
        file.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["plan.json"]


def test_files_get_the_usual_permissions(plan: Plan, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    path = plan.save(tmp_path / "plan.json")
    assert path.stat().st_mode == usual.stat().st_mode
