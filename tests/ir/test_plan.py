from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.decision import BY_HAND
from fxopt.ir.errors import PlanError, RowResult
from fxopt.ir.plan import EDITED, KEEP, Alternative, Decision, Plan, Refused
from fxopt.ir.workload import Forward, Generate, Train

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "plan.schema.json"
INF = float("inf")


def test_round_trip_keeps_every_type(plan: Plan) -> None:
    read = Plan.model_validate_json(plan.model_dump_json())
    assert read == plan
    assert read.workload == Generate(2, 64, 16)
    parameters = read.decisions[0].parameters
    assert {name: type(value) for name, value in parameters.items()} == {
        "bits": int,
        "scale": float,
        "symmetric": bool,
        "kind": str,
    }


@pytest.mark.parametrize("workload", [Forward(), Forward(2, 3), Generate(1, 2), Train(4, 5)])
def test_every_workload_round_trips(workload: Any) -> None:
    plan = Plan(budget=Budget(kl=1), workload=workload)
    assert Plan.model_validate_json(plan.model_dump_json()).workload == workload


def test_infinite_numbers_stay_standard_json(plan: Plan) -> None:
    plan.decisions[0].error = INF
    plan.decisions[0].cost = Cost(INF)
    plan.totals = [RowResult("kl", 0.02, None, INF, "nats")]
    text = plan.model_dump_json()
    json.loads(text, parse_constant=pytest.fail)
    assert Plan.model_validate_json(text) == plan


def test_copies_are_independent_and_equal(plan: Plan) -> None:
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        other.decisions[0].locked = True
        assert other != plan
    assert plan != "plan"


def test_created_by_names_the_version(plan: Plan) -> None:
    assert plan.created_by.startswith("fxopt ")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rewrite": "low_rank"}, "'linear.low_rank'"),
        ({"rewrite": "linears.low_rank"}, "is not 'keep'"),
        ({"rewrite": "attention.window"}, "no rewrite of the family 'linear'"),
        ({"family": "linears"}, "linear"),
        ({"choice": "x"}, "choice"),
    ],
)
def test_nonsense_decisions_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Decision(**{"key": "a", "family": "linear", **fields})


def test_two_decisions_for_a_site_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="two decisions for the linear site 'a'"):
        Plan(
            budget=plan.budget,
            workload=plan.workload,
            decisions=[Decision(key="a", family="linear"), Decision(key="a", family="linear")],
        )


def test_a_choice_by_hand_takes_its_own_facts_and_drops_old_comparisons(plan: Plan) -> None:
    first = plan.decisions[0]
    keep, small, large = first.alternatives
    keep.reason, small.reason, large.reason = "slower", "errs more", "errs 0.3 nats alone"
    small.calls, small.timed, small.error_measured = {"decode": 1e-6}, ["decode"], True
    small.error_within, first.error_within = 1e-4, 2e-4
    first.choose("linear.low_rank", "r8")
    assert (first.reason, first.calls, first.timed) == (BY_HAND, {"decode": 1e-6}, ["decode"])
    assert first.error_measured is True
    assert first.error_within == 1e-4
    mine = first.alternatives[1]
    assert mine.error_within == 2e-4
    assert (mine.label, mine.reason, mine.calls) == ("int4", "replaced by hand", None)
    # what compares with the former choice is dropped, what holds of any choice stays
    assert [other.reason for other in (keep, large)] == ["", "errs 0.3 nats alone"]


def test_plans_without_the_facts_for_readers_load(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "plan.json")
    data = json.loads(path.read_text("utf-8"))
    for decision in data["decisions"]:
        for one in (decision, *decision["alternatives"]):
            for name in ("calls", "timed", "error_measured", "error_within", "already"):
                one.pop(name, None)
    for name in ("prices", "untried"):
        del data[name]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Plan.load(path) == plan


def test_edits_since_the_totals_were_counted_are_told_of(plan: Plan, tmp_path: Path) -> None:
    assert EDITED not in plan.said  # of a plan that is not known
    plan.settle()
    path = plan.save(tmp_path / "plan.json")
    assert EDITED not in Plan.load(path).said
    data = json.loads(path.read_text("utf-8"))
    data["decisions"][0]["rewrite"] = "keep"
    path.write_text(json.dumps(data), encoding="utf-8")
    edited = Plan.load(path)
    for text in (str(edited), str(edited.report()), edited.to_markdown()):
        assert "decisions were edited since" in " ".join(text.split())
    assert "decisions were edited since" in edited.explain(edited.decisions[0].key)
    plan.lock(plan.decisions[0].key)  # as it is
    assert EDITED not in plan.said
    plan.lock(plan.decisions[0].key, "keep")
    assert EDITED in plan.said
    assert EDITED not in plan.notes


def test_kept_cost(plan: Plan) -> None:
    first, attention = plan.decisions[0], plan.decisions[2]
    assert (first.rewritten, first.kept) == (True, Cost(2e-5, 400))
    assert (attention.rewritten, attention.kept) == (False, attention.cost)
    assert plan.rewritten == plan.decisions[:2]
    first.alternatives = []
    assert first.kept is None


def test_find(plan: Plan) -> None:
    assert plan.find("layers.1.fc") is plan.decisions[1]
    assert plan.find("layers.0.attn/kv=1", "kv_cache").family == "kv_cache"
    with pytest.raises(PlanError, match="site of attention and kv_cache"):
        plan.find("layers.0.attn/kv=1")
    with pytest.raises(PlanError, match=r"no site 'layer.1.fc'. Did you mean 'layers.1.fc'"):
        plan.find("layer.1.fc")


@pytest.mark.parametrize(
    ("pattern", "family", "count"),
    [
        ("layers.0.fc", None, 1),
        ("layers.0", None, 5),
        ("layers.0.attn", None, 4),
        ("layers.0.attn", "kv_cache", 2),
        ("layers.0.attn/kv=1", None, 2),
        (r"re:layers\.\d\.fc", None, 2),
        ("re:.*", None, 10),
    ],
)
def test_lock_as_it_is(plan: Plan, pattern: str, family: str | None, count: int) -> None:
    before = [d.rewrite for d in plan.decisions]
    locked = plan.lock(pattern, family=family)
    assert locked == [d for d in plan.decisions if d.locked]
    assert len(locked) == count
    assert [d.rewrite for d in plan.decisions] == before


def test_lock_to_an_alternative_swaps_it_in(plan: Plan) -> None:
    (decision,) = plan.lock("layers.0.fc", "linear.low_rank", "r8")
    assert (decision.rewrite, decision.label, decision.version) == ("linear.low_rank", "r8", 2)
    assert decision.cost == Cost(3e-6, 50)
    assert decision.locked
    assert not decision.kernel
    assert [a.label for a in decision.alternatives] == ["", "int4", "r16"]
    assert decision.alternatives[1].cost == Cost(1e-5, 100)
    plan.lock("layers.0.fc", "linear.quantized")
    assert decision.parameters["bits"] == 4
    plan.lock("layers.0.fc", KEEP)
    assert not decision.rewritten
    assert plan.lock("layers.0.fc", KEEP) == [decision]


def test_lock_means_the_sites_of_the_rewrite(plan: Plan) -> None:
    locked = plan.lock("layers.0", "linear.low_rank", "r8")
    assert [d.key for d in locked] == ["layers.0.fc"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("layers.2.fc",), r"no site matches 'layers.2.fc'. Did you mean 'layers"),
        (("layer",), "no site matches"),
        (("re:[",), "no regular expression"),
        (("layers.0.fc", "linear.low_rank"), "2 alternatives .* give a label of 'r8', 'r16'"),
        (("layers.0.fc", "linear.low_rank", "r9"), r"labelled 'r9', only \['r8', 'r16'\]"),
        (("layers.0.fc", "linear.monarch"), r"only \['keep', 'linear.low_rank'\]"),
        (("layers.0.fc", "linear.low_rnk"), "Did you mean 'linear.low_rank'"),
        (("layers.0.attn", "linear.low_rank"), "no site matches"),
    ],
    ids=str,
)
def test_lock_refuses_and_changes_nothing(
    plan: Plan, arguments: tuple[str, ...], says: str
) -> None:
    before = plan.model_copy(deep=True)
    with pytest.raises(PlanError, match=says):
        plan.lock(*arguments)
    assert plan == before


def test_lock_is_all_or_nothing(plan: Plan) -> None:
    plan.decisions[1].alternatives = []
    before = plan.model_copy(deep=True)
    with pytest.raises(PlanError, match=r"'layers.1.fc' has no alternative"):
        plan.lock("re:.*fc", KEEP)
    assert plan == before


def test_absent_rewrites_and_other_versions_are_refused_by_name(plan: Plan) -> None:
    plan.check_rewrites({"linear.quantized": 3})
    with pytest.raises(PlanError, match=r"'linear.quantized' at 'layers.0.fc'.*not installed"):
        plan.check_rewrites({})
    with pytest.raises(PlanError, match=r"Did you mean 'linear.quantised'"):
        plan.check_rewrites({"linear.quantised": 3})
    with pytest.raises(PlanError, match=r"version 3 of 'linear.quantized'.*version 4 is installed"):
        plan.check_rewrites({"linear.quantized": 4})


def test_published_schema_is_current() -> None:
    regenerate = "python -m fxopt.ir.schema"
    assert SCHEMA.read_text(encoding="utf-8") == Plan.schema_text(), f"run `{regenerate}`"


def test_schema_accepts_plans_and_refuses_nonsense(plan: Plan) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads(plan.model_dump_json())
    jsonschema.validate(data, schema)
    data["decisions"][0]["famly"] = "linear"
    with pytest.raises(jsonschema.ValidationError, match="famly"):
        jsonschema.validate(data, schema)


def test_alternatives_and_refusals_stand_alone() -> None:
    assert Alternative(rewrite=KEEP).feasible
    assert Refused(family="linear", key="a", reason="b").rewrite is None
