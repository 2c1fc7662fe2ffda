from __future__ import annotations

import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
from fxopt.ir.workload import Generate


@pytest.fixture
def plan() -> Plan:
    """Two layers: their linears quantized, their attention kept."""

    def quantized(key: str) -> Decision:
        return Decision(
            key=key,
            family="linear",
            rewrite="linear.quantized",
            version=3,
            label="int4",
            parameters={"bits": 4, "scale": 1.0, "symmetric": True, "kind": "group"},
            kernel={"block": [64, 64]},
            cost=Cost(1e-5, 100),
            error=0.001,
            reason="best",
            alternatives=[
                Alternative(rewrite=KEEP, cost=Cost(2e-5, 400), error=0.0),
                Alternative(rewrite="linear.low_rank", label="r8", version=2, cost=Cost(3e-6, 50)),
                Alternative(rewrite="linear.low_rank", label="r16", feasible=False),
            ],
        )

    return Plan(
        budget=Budget(kl=0.02, weights="40%"),
        workload=Generate(2, 64, 16),
        hardware={"name": "CPU", "threads": 2},
        fingerprint_structure="abc",
        fingerprint_weights="def",
        decisions=[
            *(quantized(f"layers.{i}.fc") for i in range(2)),
            *(
                Decision(key=f"layers.{i}.attn/kv={h}", family=family)
                for i in range(2)
                for h in range(2)
                for family in ("attention", "kv_cache")
            ),
        ],
        refusals=[Refused(family="linear", key="experts", reason="expert groups")],
        totals=[RowResult("kl", 0.02, 0.01, 0.015, "nats", 0.0)],
        notes=["a note"],
    )
