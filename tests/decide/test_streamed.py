"""Statistics recorded in passes: the same to the bit, within a bound, and nothing needlessly."""

from __future__ import annotations

import weakref
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt import subject
from fxopt.compiler import Compiler
from fxopt.decide.priors import Priors
from fxopt.decide.propose import Proposal
from fxopt.decide.search import Search, measure_swaps
from fxopt.decide.statistics import Recorded, Statistics
from fxopt.decide.streamed import Footprint, Streamed, footprints
from fxopt.decide.verify import Watch, held_bytes
from fxopt.ir.site import GroupInfo, LinearInfo, Site
from fxopt.request import resolve

transformers: Any = pytest.importorskip("transformers")

LINEAR = [
    "linear.quantized", "linear.low_rank", "linear.low_rank_shared", "linear.channel_pruned",
    "linear.quantized_tied", "linear.quantized_experts",
]  # fmt: skip
ATTENTION = ["attention.window", "kv_cache.rotated"]
SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
NEVER, ALWAYS = 2**50, 2
"""Bounds that nothing exceeds, and that everything does."""


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=96, num_hidden_layers=2, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def mixture() -> nn.Module:
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=64, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


class Stack(nn.Module):
    """Layers whose grams are most of what is recorded of them."""

    def __init__(self, layers: int = 6, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def tokens(padded: bool = False) -> list[dict[str, Tensor]]:
    data = [{"input_ids": torch.randint(96, (1, length))} for length in (600, 570, 640, 600)]
    for batch in data if padded else ():
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, : len(batch["attention_mask"][0]) // 7] = 0
    return data


def compiler(model: nn.Module, data: list[Any], rewrites: list[str], workload: Any) -> Compiler:
    request = resolve(
        model, fxopt.Budget(weights="50%"), data[0], workload=workload, calibration=data,
        keep=(), rewrites=rewrites, at=None, seed=0, time_limit=None,
    )  # fmt: skip
    return Compiler(request)


CASES: dict[str, Any] = {
    "llama": (llama, fxopt.Generate(1, 560, 40), [*LINEAR[:5], *ATTENTION]),
    "mixture": (mixture, fxopt.Forward(1, 600), LINEAR),
}


@pytest.fixture(params=["mixture", "padded", pytest.param("llama", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """A model, data and what else `compiler` takes."""
    padded = request.param == "padded"
    make, workload, rewrites = CASES["llama" if padded else request.param]
    return make(), tokens(padded), rewrites, workload


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The nodes of each pass over the data."""
    seen: list[set[str]] = []
    collect = subject.collect

    def counted(*args: Any, **options: Any) -> Statistics:
        seen.append(set(options["wanted"]))
        return collect(*args, **options)

    monkeypatch.setattr(subject, "collect", counted)
    return seen


def bound(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(subject, "BEYOND", size)


def lossy(made: Compiler) -> list[Proposal]:
    return [p for found in made.proposals.by_site.values() for p in found if not p.rewrite.exact]


def priors(made: Compiler) -> dict[tuple[str, ...], float]:
    table, order = Priors(made.preparer), lossy(made)
    passes = made.statistics.passes({p.where: p.site for p in order}.values())
    place = {(s.family, s.key): i for i, s in enumerate(s for one in passes for s in one)}
    with torch.no_grad():
        return {
            (*p.where, p.rewrite.name, p.candidate.label): table(p)
            for p in sorted(order, key=lambda p: place[p.where])
        }


def tensors(recorded: Recorded) -> dict[str, Tensor]:
    found = {f"inputs.{name}": value for name, value in recorded.inputs.items()}
    found |= {n: getattr(recorded, n) for n in ("weight", "outputs", "gradients", "gram_sum")}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def test_a_site_recorded_alone_is_as_in_the_whole(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]]
) -> None:
    whole = compiler(*case).statistics
    bound(monkeypatch, ALWAYS)
    made = compiler(*case)
    parts = made.statistics
    sites = {m.node: m for site in made.captured.sites for m in site.members}
    sites = {n: s for n, s in sites.items() if s.family in ("linear", "attention")}
    for site in reversed(sites.values()):
        here, there = whole.at(site), parts.at(site)
        assert here.gram_rows == there.gram_rows
        found = tensors(there)
        assert found.keys() == tensors(here).keys()
        assert {"gradients"} < found.keys()
        for name, value in tensors(here).items():
            assert torch.equal(value, found[name]), (site.key, name)
    assert len(recorded) == 1 + len(sites)


def test_scores_do_not_depend_on_passes(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]]
) -> None:
    one = priors(compiler(*case))
    assert len(recorded) == 1
    bound(monkeypatch, ALWAYS)
    made = compiler(*case)
    several = priors(made)
    assert several == one
    assert sum(value > 0 for value in one.values()) > 20
    passes = recorded[1:]
    assert len(passes) == len(made.statistics.passes(p.site for p in lossy(made))) > 5
    # nothing twice, and nothing that no rewrite is scored on
    assert sum(map(len, passes)) == len(set[str]().union(*passes))
    assert set[str]().union(*passes) == {m.node for p in lossy(made) for m in p.site.members}


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_plans_do_not_depend_on_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]]
) -> None:
    model, data = llama(), tokens()

    def planned(name: str, size: int) -> fxopt.Plan:
        monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / name))
        bound(monkeypatch, size)
        recorded.clear()
        return fxopt.plan(
            model, fxopt.Budget(weights="60%"), data[0], calibration=data,
            rewrites=["linear.low_rank", "linear.low_rank_shared", "attention.window"],
            workload=fxopt.Forward(1, 600),
        )  # fmt: skip

    one = planned("one", NEVER)
    assert len(recorded) == 1  # however often tensors are asked for
    several = planned("several", ALWAYS)
    assert len(recorded) > 5
    assert not one.diff(several)
    errors, others = (
        [(o.label, o.error, o.error_within, o.kept_mass) for d in plan.decisions
         for o in (d, *d.alternatives)]
        for plan in (one, several)
    )  # fmt: skip
    assert errors == others
    assert any(mass is not None for *_, mass in errors)
    assert one.tensors.keys() == several.tensors.keys()
    assert all(torch.equal(t, several.tensors[name]) for name, t in one.tensors.items())


def test_what_is_held_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, limit = 8 * 512**2, 9 * 2**20
    data = [torch.randn(1, 64, 512) for _ in range(18)]

    def peak(size: int) -> tuple[int, int]:
        bound(monkeypatch, size)
        made = compiler(Stack(width=512), data, ["linear.low_rank"], fxopt.Forward(1, 64))
        statistics = made.statistics
        assert isinstance(statistics, Streamed)
        with Watch(torch.device("cpu")) as watch:
            passes = statistics.passes(p.site for p in lossy(made))
            for sites in passes:
                statistics.at(sites[0])
                # what is estimated beforehand is enough, and not by far too much
                estimated = statistics.bytes_of(statistics.nodes)
                taken = [held_bytes(tensors(r)) - 4 * 512**2 for r in statistics.nodes.values()]
                assert sum(taken) <= estimated <= 2 * sum(taken)
        return watch.peak, len(passes)

    whole, once = peak(NEVER)
    most, count = peak(2 * limit)
    assert (once, count) == (1, 3)
    # beside records: the mean of one gram and its squares, while rows get its moments
    assert most <= limit + 2 * gram
    assert whole > most + 2 * gram


def test_nothing_of_a_pass_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.randn(1, 32, 256) for _ in range(6)]
    bound(monkeypatch, ALWAYS)
    made = compiler(Stack(3), data, ["linear.low_rank", "linear.quantized"], fxopt.Forward(1, 32))
    held: list[list[weakref.ref[Any]]] = []
    once = Recorded.once

    def watched(self: Recorded, name: str, make: Any) -> Any:
        found = once(self, name, make)
        parts = found if isinstance(found, tuple) else vars(found).values()
        assert self.gram_sum is not None
        held[-1] += [weakref.ref(t) for t in (*parts, self.gram_sum) if isinstance(t, Tensor)]
        return found

    collect = subject.collect

    def recording(*args: Any, **options: Any) -> Statistics:
        # the records and decompositions of the pass before are gone when the next one begins
        assert all(ref() is None for one in held for ref in one)
        held.append([])
        return collect(*args, **options)

    monkeypatch.setattr(Recorded, "once", watched)
    monkeypatch.setattr(subject, "collect", recording)
    made.table()
    assert len(held) == 3
    assert all(held)


def test_an_interrupted_scoring_records_only_what_is_left(
    monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]], tmp_path: Path
) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    bound(monkeypatch, ALWAYS)
    model, data = Stack(4), [torch.randn(1, 32, 256) for _ in range(6)]
    given: Any = (model, data, ["linear.low_rank"], fxopt.Forward(1, 32))
    estimate, seen = Priors.__call__, list[Proposal]()

    def interrupted(self: Priors, proposal: Proposal) -> float:
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(proposal)
        return estimate(self, proposal)

    monkeypatch.setattr(Priors, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiler(*given).table()
    done = {p.site.node for p in seen}
    monkeypatch.setattr(Priors, "__call__", estimate)
    first = list(recorded)
    assert len(first) == 2  # four candidates a site
    recorded.clear()
    table = compiler(*given).table()
    assert [nodes & first[0] for nodes in recorded] == [set[str]()] * 3
    assert first[1] == recorded[0] < done
    recorded.clear()
    again = compiler(*given).table()
    assert not recorded
    assert [[c.prior for c in found] for found in again.columns] == [
        [c.prior for c in found] for found in table.columns
    ]


@pytest.mark.usefixtures("clock")
def test_progress_shows_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    bound(monkeypatch, 5 * 2**20)
    data = [torch.randn(1, 32, 256) for _ in range(6)]
    budget = fxopt.Budget(weights="60%")
    fxopt.plan(Stack(), budget, data[0], calibration=data, rewrites=["linear.low_rank"],
               progress=True)  # fmt: skip
    stages = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert [s for s in stages if " of " in s] == [
        "recording 1 of 2", "scoring 1 of 2", "recording 2 of 2", "scoring 2 of 2",
    ]  # fmt: skip


def test_a_choice_is_prepared_in_passes_and_kept(
    monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]]
) -> None:
    data = [torch.randn(1, 32, 256) for _ in range(6)]
    bound(monkeypatch, 4 * 2**20)
    made = compiler(Stack(), data, ["linear.low_rank", "linear.quantized"], fxopt.Forward(1, 32))
    by_site = list(made.proposals.by_site.values())
    # of two rewrites, which are applied one after the other
    choice = [found[0 if i % 2 else -1] for i, found in enumerate(by_site[:5])]
    made.preparer._limit = 0  # pyright: ignore[reportPrivateUsage]
    passes = len(made.statistics.passes(p.site for p in choice))
    graph = made.realise(choice).graph
    assert len(recorded) == passes > 1
    assert set[str]().union(*recorded) == {p.site.node for p in choice}
    recorded.clear()
    twin = made.realise([*choice[:4], by_site[5][0]]).graph
    assert recorded == [{by_site[5][0].site.node}]
    x = data[0]
    assert not torch.equal(graph(x)[0], twin(x)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_single_sites_to_be_measured_are_recorded_several_at_a_time(
    monkeypatch: pytest.MonkeyPatch, recorded: list[set[str]], tmp_path: Path
) -> None:
    model, data = Stack(), [torch.randn(1, 32, 256) for _ in range(6)]
    bound(monkeypatch, 4 * 2**20)

    def planned(name: str) -> int:
        monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / name))
        made = compiler(model, data, ["linear.low_rank"], fxopt.Forward(1, 32))
        made.preparer._limit = 0  # pyright: ignore[reportPrivateUsage]
        table = made.table()
        search = Search(table, made.limits({"weights": 4 * 6 * 256**2, "kv_cache_now": 0}, table))
        recorded.clear()
        swaps = measure_swaps(search, made.measure_column, deadline=inf, expect=made._expect)  # pyright: ignore[reportPrivateUsage]
        assert swaps >= 6
        return len(recorded)

    informed = planned("informed")
    monkeypatch.setattr(Compiler, "_expect", lambda *_: None)
    assert informed < planned("asked one by one")


def site(name: str) -> Site:
    info = LinearInfo(f"{name}.weight", None, 8, 8, torch.float32)
    return Site("linear", name, name, info, name)


def streamed(graph: str, limit: int) -> tuple[Streamed, list[list[str]]]:
    """Statistics of nodes "a1 b2 c2": each name reads the source of its number, each takes 10 bytes
    and each source 100."""
    seen: list[list[str]] = []

    def record(nodes: Any, of: str) -> Statistics:
        seen.append([of, *sorted(nodes)])
        return Statistics({node: Recorded() for node in nodes}, 1, 1)

    found = {node: Footprint(node[1], 10, 100) for node in graph.split()}
    return Streamed(found, record, limit), seen


def names(passes: list[list[Site]]) -> list[str]:
    return [" ".join(one.key for one in sites) for sites in passes]


def test_sites_of_one_input_or_group_are_recorded_together() -> None:
    graph = "a1 b2 c3 d2 e4 f5 g6"
    statistics, _ = streamed(graph, 250)
    alone = [site(name) for name in graph.split()]
    assert names(statistics.passes(alone)) == ["a1 b2 d2", "c3 e4", "f5 g6"]
    members = tuple(alone[i] for i in (2, 4, 5))
    group = Site("linear", "c3+e4+f5", "f5", GroupInfo("channels", members), "group")
    # larger than the bound: a pass of its own
    assert names(statistics.passes([*alone, group])) == ["a1 b2 d2", "c3 c3+e4+f5 e4 f5", "g6"]
    assert names(statistics.passes([alone[6], alone[0]])) == ["a1 g6"]


def test_a_pass_records_what_is_planned_with_a_site_and_no_more() -> None:
    statistics, seen = streamed("a1 b2 c3 d4 e5", 250)
    a, b, c, d, e = (site(f"{name}{i}") for i, name in enumerate("abcde", 1))
    statistics.at(b)
    assert seen == [["", "b2"]]
    statistics.at(d)  # fits beside it
    statistics.at(b)
    assert seen[1:] == [["", "d4"]]
    statistics.passes([a, c, d, e])
    statistics.at(a)
    assert seen[2:] == [["1 of 2", "a1", "c3"]]
    statistics.at(c)
    statistics.at(e)
    assert seen[3:] == [["2 of 2", "d4", "e5"]]
    # the first that are expected, in that order; one that is asked for alone changes nothing
    statistics.expect([e, b, a, c])
    statistics.passes([b])
    statistics.at(b)
    assert seen[4:] == [["1 of 2", "b2"]]
    assert set(statistics.nodes) == {"b2", "e5"}


def test_what_fits_is_recorded_once() -> None:
    statistics, seen = streamed("a1 b2 c3", 330)
    for name in ("b2", "a1", "c3"):
        statistics.at(site(name))
    assert seen == [["", "a1", "b2", "c3"]]


def test_estimates_follow_the_longest_sequence() -> None:
    def whole(node: fx.Node) -> int:
        return node.meta["val"].nbytes

    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    graph = torch.export.export(model, (torch.randn(2, 8),)).module()
    assert isinstance(graph, fx.GraphModule)
    nodes = [n.name for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    infos = [
        LinearInfo(f"{i}.weight", None, *sizes, torch.float32)
        for i, sizes in enumerate([(8, 16), (16, 4)])
    ]
    sites = [Site("linear", n, n, info, n) for n, info in zip(nodes, infos, strict=True)]
    first, second = footprints(graph, sites, whole, 3).values()
    # two rows a sequence
    assert first.own == 4 * 3 * 2 * (8 + 16) + 2 * 4 * 2 * 16
    assert first.shared == 8 * 8**2 + 4 * 2 * 8
    assert second.own == 4 * 3 * 2 * (16 + 4) + 2 * 4 * 2 * 4
    # a sample of them, of each sequence one at least
    for sequences, rows in ((900, 1024), (5000, 5000)):
        (first, _) = footprints(graph, sites, whole, sequences).values()
        assert first.own == 4 * rows * (8 + 16) + 2 * 4 * 2 * 16
