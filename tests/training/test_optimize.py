"""`fxopt.optimize` for a training step: budgets that hold as measured, plans, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.training import TrainingModule, measure

Example = tuple[nn.Module, dict[str, Any]]


def work(inputs: dict[str, Any]) -> fxopt.Train:
    first = next(iter(inputs.values()))
    return fxopt.Train(batch=first.shape[0], seq=first.shape[1])


def test_the_budget_holds_as_measured(example: Example) -> None:
    model, inputs = example
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    opt = fxopt.optimize(model, fxopt.Budget(activations="85%"), inputs, workload=work(inputs))
    rows = {row.name: row for row in opt.plan.totals}
    row = rows["activations"]
    assert opt.report.kept
    assert row.limit == pytest.approx(0.85 * row.before)
    assert row.predicted == pytest.approx(row.measured, rel=2e-3)
    weights = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert rows["memory"].measured == weights + measure.peak(opt, inputs)
    assert "bit-equal" in opt.plan.notes[-1]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_memory_and_activations_are_rows_of_one_peak(small: Example) -> None:
    model, inputs = small
    work_ = work(inputs)
    loose = fxopt.plan(model, fxopt.Budget(activations="85%"), inputs, workload=work_)
    rows = {row.name: row for row in loose.totals}
    same = fxopt.Budget(memory=int(rows["memory"].predicted))
    tight = fxopt.plan(model, same, inputs, workload=work_)
    assert [d.rewrite for d in tight.decisions] == [d.rewrite for d in loose.decisions]
    gradients = sum(p.nbytes for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    assert rows["memory"].predicted - rows["activations"].predicted == weights + gradients


def test_a_plan_says_what_happens_to_each_tensor(conv: Example) -> None:
    model, inputs = conv
    plan = fxopt.plan(model, fxopt.Budget(activations="72%"), inputs, workload=work(inputs))
    rewritten = plan.rewritten
    assert rewritten
    assert all(d.rewrite == "activation.recompute" for d in rewritten)
    relu = plan.find("first.2.relu").kept
    assert relu is not None
    assert relu.temporary_bytes == 4 * 8 * 16 * 16 * 4
    assert all(d.reason for d in plan.decisions)
    assert "less to save" in rewritten[0].reason
    text = str(plan)
    assert "activation.recompute" in text
    assert "batch_norm" in text
    everything = fxopt.plan(model, fxopt.Budget(activations="110%"), inputs, workload=work(inputs))
    assert not everything.rewritten
    assert {d.reason for d in everything.decisions} == {"the budget holds with everything saved"}


def test_a_plan_is_replayed_from_its_file(small: Example, tmp_path: Path) -> None:
    model, inputs = small
    opt = fxopt.optimize(model, fxopt.Budget(activations="80%"), inputs, workload=work(inputs))
    stored = fxopt.Plan.load(opt.plan.save(tmp_path / "plan.json"))
    again = fxopt.apply(model, stored, example_inputs=inputs)
    assert isinstance(again, TrainingModule)
    assert [d.key for d in again.plan.rewritten] == [d.key for d in opt.plan.rewritten]
    assert measure.peak(again, inputs) == measure.peak(opt, inputs)
    stored.lock(opt.plan.rewritten[0].key, "keep")
    assert len(fxopt.apply(model, stored, example_inputs=inputs).plan.rewritten) < len(
        opt.plan.rewritten
    )
    with pytest.raises(fxopt.FxoptError, match=r"made for (other|another)"):
        fxopt.apply(nn.Sequential(nn.Linear(24, 3)), stored, example_inputs=torch.randn(4, 24))


def test_what_is_kept_by_name_is_kept(conv: Example) -> None:
    model, inputs = conv
    budget = fxopt.Budget(activations="90%")
    made = fxopt.plan(model, budget, inputs, workload=work(inputs), keep=["second", "third"])
    assert {d.key.partition(".")[0] for d in made.rewritten} <= {"first", "add", "pool", "drop"}
    assert made.find("second.2.relu").locked
    assert "kept by the caller" in made.find("second.2.relu").reason
    with pytest.raises(fxopt.PlanError, match=r"secnd.*Did you mean"):
        fxopt.plan(model, budget, inputs, workload=work(inputs), keep=["secnd.2.relu"])
    none = fxopt.plan(model, budget, inputs, workload=work(inputs), rewrites=["linear"])
    assert not none.rewritten
    assert "smallest" in none.notes[-1]


def test_a_budget_that_cannot_hold_names_the_op_at_the_peak(small: Example) -> None:
    model, inputs = small
    with pytest.raises(
        fxopt.BudgetError, match=r"no plan keeps memory.*peak stands at \w+"
    ) as info:
        fxopt.optimize(model, fxopt.Budget(memory="100KiB"), inputs, workload=work(inputs))
    assert info.value.binding == "memory"
    assert isinstance(info.value.best, TrainingModule)
    assert not info.value.best.report.kept
    info.value.best(**inputs).sum().backward()


def test_larger_inputs_than_the_budget_allows_are_refused(small: Example) -> None:
    model, inputs = small
    opt = fxopt.optimize(model, fxopt.Budget(activations="80%"), inputs, workload=work(inputs))
    with pytest.raises(fxopt.BudgetError, match=r"\(16, 24\).*largest inputs"):
        opt(torch.randint(40, (16, 24)))


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"activations": "50%"}, {"workload": fxopt.Train(2, 24)}, r"\(4, 24\).*Train\(batch=2"),
        ({"latency": "0.5x"}, {}, "Budget.latency.*memory and activations"),
        ({"memory": "50%", "kl": 0.1}, {}, r"Budget.kl.*every plan is exact"),
        ({"memory": "50%"}, {"at": "mix"}, "at: fxopt.Train"),
        ({"memory": "50%"}, {"calibration": [1]}, "calibration: fxopt.Train"),
        ({"memory": "50%"}, {"example_inputs": {"ids": None}}, "no tensor"),
    ],
)
def test_mistakes_have_one_clear_error(
    small: Example, budget: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model, inputs = small
    arguments = {"example_inputs": inputs, "workload": work(inputs), **options}
    with pytest.raises(fxopt.FxoptError, match=message):
        fxopt.optimize(model, fxopt.Budget(**budget), **arguments)


class Clock(nn.Module):
    """Computes something else every time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_a_forward_that_cannot_be_frozen_is_found_out() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(fxopt.FxoptError, match="traced step is not the eager one"):
        fxopt.optimize(Clock(), fxopt.Budget(activations="100%"), x, workload=fxopt.Train(4, 8))


def test_saving_says_how(small: Example, tmp_path: Path) -> None:
    model, inputs = small
    opt = fxopt.optimize(model, fxopt.Budget(activations="100%"), inputs, workload=work(inputs))
    with pytest.raises(fxopt.FxoptError, match="state_dict"):
        opt.save(tmp_path / "opt")
    assert not (tmp_path / "opt").exists()


STRUCTURE = """
import torch
from torch import nn
import fxopt
model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
budget = fxopt.Budget(activations="100%")
plan = fxopt.plan(model, budget, torch.zeros(4, 8), workload=fxopt.Train(4, 8))
structure = plan.fingerprint_structure
print(structure)
"""


def test_a_structure_has_one_name_in_every_process() -> None:
    """Dropout on a CPU is a Python function in the graph."""
    other = subprocess.run([sys.executable, "-c", STRUCTURE], capture_output=True, text=True)
    here: dict[str, Any] = {}
    exec(STRUCTURE, here)
    assert other.stdout.strip() == here["structure"], other.stderr
