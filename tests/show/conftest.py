"""A plan with all that a page has to show."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
from fxopt.ir.workload import Generate
from tests.show.browser import Tab, chromium
from tests.show.synthetic import llama

DATA = Path(__file__).resolve().parents[1] / "data"
MIB = 1 << 20


def linear(layer: int, name: str) -> Decision:
    return Decision(
        key=f"model.layers.{layer}.mlp.{name}",
        family="linear",
        rewrite="linear.quantized",
        label="int4 g64",
        parameters={"bits": 4, "group_size": 64},
        cost=Cost(2e-5, 300_000),
        error=0.0005 + layer * 1e-4,
        reason=f"saves {1.1 + layer / 10:.1f} MiB for {0.0005 + layer * 1e-4:.4f} nats",
        alternatives=[
            Alternative(rewrite=KEEP, cost=Cost(3e-5, 2 * MIB), error=0.0),
            Alternative(
                rewrite="linear.low_rank",
                label="r64",
                cost=Cost(1e-5, 200_000),
                error=0.4,
                feasible=False,
                reason="adds 0.4 nats, more than the whole budget",
            ),
        ],
    )


def cache(layer: int, head: int) -> Decision:
    quarter = layer != 2 or head == 1
    return Decision(
        key=f"model.layers.{layer}.self_attn/kv={head}",
        family="kv_cache",
        rewrite="kv_cache.blocks" if quarter else KEEP,
        label="K4 V4" if quarter else "",
        parameters={"key_bits": 4, "value_bits": 4} if quarter else {},
        cost=Cost(1e-6, 0, 40_000 if quarter else 130_000),
        error=0.001 if quarter else 0.0,
        reason="" if not quarter else "the cache row binds",
        locked=layer == 3,
        alternatives=[Alternative(rewrite=KEEP, cost=Cost(2e-6, 0, 130_000))]
        if quarter
        else [
            Alternative(
                rewrite="kv_cache.blocks", label="K2 V2", reason="adds 0.9 nats", feasible=False
            )
        ],
    )


@pytest.fixture
def plan() -> Plan:
    decisions = [
        *(cache(layer, head) for layer in range(4) for head in range(2)),
        *(linear(layer, name) for layer in range(4) for name in ("gate_proj", "up_proj")),
        Decision(key="lm_head", family="linear", reason="tied to model.embed_tokens"),
        Decision(key="model.embed", family="linear"),
    ]
    return Plan(
        created_by="fxopt test",
        budget=Budget(kl=0.02, kv_cache="40%", latency="0.9x"),
        workload=Generate(1, 2048, 64),
        hardware={"name": "a CPU with 2 threads", "threads": 2},
        decisions=decisions,
        refusals=[
            Refused(
                family="linear",
                key=f"model.layers.{layer}.mlp.down_proj",
                rewrite="linear.monarch",
                reason="500 input features have no square factor",
            )
            for layer in range(3)
        ],
        totals=[
            RowResult("latency", 1.08, 0.95, 0.97, "s", before=1.2),
            RowResult("kv_cache", 0.4 * MIB, 0.35 * MIB, 0.41 * MIB, "bytes", before=MIB),
            RowResult("weights", None, 5.5 * MIB, 5.5 * MIB, "bytes", before=20 * MIB),
        ],
        notes=["calibrated on the example inputs alone"],
    )


@pytest.fixture(scope="session")
def browser() -> Generator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Any, tmp_path: Path) -> Generator[Callable[..., Tab]]:
    """Write a plan (or a diff) as a page and open it; after the test nothing may have gone
    wrong in it, and nothing may have been loaded but the page itself."""
    opened: list[Tab] = []

    def show(plan: Any, width: int = 1440, **options: Any) -> Tab:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        path = plan.to_html(tmp_path / f"{len(opened)}.html")
        opened.append(Tab(page).open(path))
        return opened[-1]

    yield show
    for one in opened:
        assert one.problems == []
        assert len(one.requests) == 1, one.requests
        one.page.close()


@pytest.fixture(scope="session")
def small() -> Plan:
    return llama(3, 2)


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with `tests/data/<name>`; FXOPT_UPDATE_GOLDEN=1 writes it instead."""

    def check(name: str, text: str) -> None:
        path = DATA / name
        if os.environ.get("FXOPT_UPDATE_GOLDEN"):
            path.write_text(text + "\n", encoding="utf-8")
        assert text + "\n" == path.read_text(encoding="utf-8")

    return check
