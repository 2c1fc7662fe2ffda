"""The budget is a contract: random budgets on the trained model, measured again from outside."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.search import Choice, Search
from fxopt.decide.table import Table
from fxopt.measure import Measurer
from fxopt.request import resolve

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("captured_once")]

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTH, PROMPT, NEW = 288, 256, 32
BUDGETS, QUICK = 30, (1, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    path = EXAMPLES / "tiny_lm"
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    sys.path.insert(0, str(EXAMPLES))
    from tiny_lm_data import heldout_windows

    return [{"input_ids": row[None]} for row in heldout_windows(LENGTH)[40:46]]


def random_budget(seed: int) -> fxopt.Budget:
    rng = random.Random(seed)
    rows: dict[str, Any] = {}
    if rng.random() < 0.7:
        rows["weights"] = f"{rng.randint(20, 95)}%"
    if rng.random() < 0.7:
        rows["kv_cache"] = f"{rng.randint(25, 190)}%"
    if rng.random() < 0.6 or not rows:
        rows["kl"] = 10 ** rng.uniform(-4, -0.5)
    return fxopt.Budget(**rows)


def options(data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {
        "example_inputs": data[0],
        "workload": fxopt.Generate(batch=1, prompt=PROMPT, new_tokens=NEW),
        "calibration": data,
        # structure and quantisation of linears, caches: what the byte rows can be met with
        "rewrites": ["kv_cache.blocks", "linear.quantized", "linear.low_rank"],
    }


def decoded_logits(module: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits from position `prompt` on, token by token through the module's own cache."""
    with torch.no_grad():
        output = module(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
        logits = []
        for i in range(prompt, ids.shape[1]):
            output = module(
                input_ids=ids[:, i : i + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


def measured_rows(opt: Any, model: Any, data: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Bytes and KL on the verify part, with none of fxopt's own measuring code."""
    tensors = {t.data_ptr(): t.nbytes for t in (*opt.parameters(), *opt.buffers())}
    cache = opt.make_cache(1, PROMPT + NEW)
    held = sum(t.nbytes for state in cache.states for t in state)
    divergences = []
    for batch in data[-2:]:
        ids = batch["input_ids"]
        prompt = min(PROMPT, LENGTH - NEW)
        p = model(**batch).logits[0, prompt:].double().log_softmax(-1)
        q = decoded_logits(opt, ids, prompt).double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return {
        "weights": float(sum(tensors.values())),
        "kv_cache": float(held),
        "kl": torch.cat(divergences).mean().item(),
    }


def limits(budget: fxopt.Budget, model: Any) -> dict[str, float]:
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    config = model.config
    sixteen_bit = (
        2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    ) * (PROMPT + NEW)
    return budget.absolute({"weights": weights, "kv_cache": sixteen_bit})


def excess(rows: dict[str, float], limit: dict[str, float]) -> float:
    return max(rows[name] / value - 1 for name, value in limit.items())


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[] if seed in QUICK else [pytest.mark.exhaustive])
        for seed in range(BUDGETS)
    ],
)
def test_every_returned_module_keeps_its_budget(model, data, uniforms, seed: int) -> None:
    budget = random_budget(seed)
    limit = limits(budget, model)
    outcome = optimised(model, budget, data)
    if isinstance(outcome, fxopt.BudgetError):
        assert outcome.binding in limit
        ours = excess(measured_rows(outcome.best, model, data), limit)
        assert ours > 0
        for rows in (identity_rows(model), *uniforms()):
            assert ours <= excess(rows, limit) + 1e-3
        return
    rows = measured_rows(outcome, model, data)
    for name, value in limit.items():
        assert rows[name] <= value * (1 + 1e-3), (name, rows, budget)


def optimised(model: Any, budget: fxopt.Budget, data: Any) -> Any:
    """The module, or the refusal: both have to keep their word."""
    try:
        return fxopt.optimize(model, budget, **options(data))
    except fxopt.BudgetError as error:
        return error


def identity_rows(model: Any) -> dict[str, float]:
    weights = float(sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values()))
    config = model.config
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"weights": weights, "kv_cache": float(cache * (PROMPT + NEW)), "kl": 0.0}


@pytest.fixture(scope="module")
def uniforms(model: Any, data: Any) -> Callable[[], list[dict[str, float]]]:
    """Their rows, measured when a refusal first asks."""
    return functools.cache(lambda: uniform_rows(model, data))


def uniform(table: Table, label: str) -> Choice:
    """The choice that takes the option `label` wherever a group has it."""
    labels = [[c.label for c in columns] for columns in table.columns]
    return tuple(names.index(label) if label in names else 0 for names in labels)


def uniform_rows(model: Any, data: Any) -> list[dict[str, float]]:
    """Five plans that do the same everywhere, measured on the verify part."""
    given = options(data)
    request = resolve(
        model, fxopt.Budget(weights="50%"), given["example_inputs"],
        workload=given["workload"], calibration=data,
        keep=(), rewrites=given["rewrites"], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    compiler = Compiler(request)
    measurer = Measurer(compiler)
    table = compiler.table()
    search = Search(table, compiler.limits(measurer.baseline, table))
    found: list[dict[str, float]] = []
    plans = [
        ("int8-g128",), ("int4-g64",), ("k8v8g128r64s4",), ("int8-g128", "k4v4g64r64s4"),
        ("int4-g64", "k2v2g64r64s4"),
    ]  # fmt: skip
    for labels in plans:
        picks = [uniform(table, label) for label in labels]
        choice = tuple(max(options) for options in zip(*picks, strict=True))
        module = compiler.emit(compiler.realise(compiler.chosen(search, choice)))
        found.append(measured_rows(module, model, data))
    return found
