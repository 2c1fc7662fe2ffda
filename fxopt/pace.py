"""What whole calls of a plan take, from prices alone: nothing of the plan is run.

A call's seconds are those of its sites and of the rest. The rest is measured on the module that
keeps every site, with stand-ins in their places (`emit/hollow.py`): its Python, its glue, what a
step of `generate` copies. Peaks come from a dry run of the same kind, in which each site allocates
its output and the workspace that its op was seen to take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cost_models.calls import Parts, Realised
from .cost_models.timing import time_call, time_calls
from .decide.options import calls_of, joint
from .decide.propose import Proposal, total_cost
from .decide.runs import DECODE_STEPS, calls, peak_temporaries
from .decide.table import Column, Table
from .emit.hollow import fresh, hollow, zeros_made_once
from .emit.module import OptimizedModule
from .ir.cost import Cost
from .ir.site import AttentionInfo, GroupInfo, LinearInfo, Site
from .ir.workload import Generate, Scenario
from .passes.baseline import baseline_calls

if TYPE_CHECKING:
    from .compiler import Compiler

SECONDS = 0.3
"""For timing the rest of one kind of call."""
ROOM = 256
"""Tokens beyond the prompt for which a plain call makes room in its cache."""
Choice = Sequence[int]


class Pace:
    """The calls of one model's workload, and what its plans make of them."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self.replayed: set[str] = set()

    @cached_property
    def _module(self) -> OptimizedModule:
        """The module that keeps every site."""
        made = self._compiler.emit(self._compiler.realise([]))
        assert isinstance(made, OptimizedModule)
        return made

    @cached_property
    def rest(self) -> dict[str, Parts]:
        """Seconds of one call of each kind beside its sites."""
        request, device = self._compiler.request, self._compiler.device
        module = hollow(self._module, zeros_made_once())
        found: dict[str, Parts] = {}
        for name, call in calls(module, request.workload, request.example):
            steps = DECODE_STEPS if name == "decode" else 1
            if device.type != "cuda":
                timing = time_call(call, device, seconds=SECONDS)
                found[name] = Parts(timing.seconds / steps)
                continue
            call()
            call()
            replayed = _replays(module)
            timing = time_calls([call], seconds=SECONDS, record=not replayed)
            found[name] = Parts(timing.seconds / steps, timing.host / steps)
            self.replayed |= {name} if replayed else set()
        return found

    @cached_property
    def sites(self) -> dict[str, Parts]:
        """Seconds of all sites as they are, those included that no rewrite serves."""
        found: dict[str, Parts] = {}
        apart = [s for s in self._compiler.sites if not isinstance(s.info, GroupInfo)]
        for scenario in self._compiler.scenarios:
            total = Cost()
            for group in joint(apart):
                made = calls_of(group, {}, scenario, baseline_calls)
                total += total_cost(made, self._compiler.costs)
            found[scenario.name] = Parts(total.seconds, total.host)
        return found

    def calls(self, table: Table, choice: Choice) -> dict[str, Parts]:
        """Seconds of one call of each kind under a choice, by what the device and the host do."""
        picked = [(c[o], c[0]) for c, o in zip(table.columns, choice, strict=True)]
        found: dict[str, Parts] = {}
        for scenario in self._compiler.scenarios:
            name = scenario.name
            more = Parts(
                sum(c.seconds[name] - k.seconds[name] for c, k in picked),
                sum(c.host[name] - k.host[name] for c, k in picked),
            )
            found[name] = self._call(scenario, more + self._apart(table, choice, scenario))
        return found

    def _apart(self, table: Table, choice: Choice, scenario: Scenario) -> Parts:
        """What the heads of one attention take more where they are not all alike.

        Heads are priced as a share of one call of them all. Each kind of them is a call of its
        own, whose time is taken to be affine in the heads: through all of them and through one.
        """
        kinds: dict[tuple[str, str], list[tuple[tuple[Site, ...], Column]]] = {}
        for sites, columns, option in zip(table.keys, table.columns, choice, strict=True):
            if isinstance(sites[0].info, AttentionInfo):
                column = columns[option]
                kinds.setdefault((sites[0].op, column.label), []).append((sites, column))
        total, name = Parts(), scenario.name
        for members in kinds.values():
            sites, column = members[0]
            assert isinstance(sites[0].info, AttentionInfo)
            heads = sites[0].info.num_kv_heads
            if len(members) < heads:
                shared = Parts(column.seconds[name], column.host[name])
                start = (self._alone(sites, column, scenario) + shared * -1) * (heads / (heads - 1))
                total += start * (1 - len(members) / heads)
        return total

    def _alone(self, sites: tuple[Site, ...], column: Column, scenario: Scenario) -> Parts:
        """Seconds of one KV head in a call of its own."""
        apart = tuple(map(_one_head, sites))
        by_family = {p.site.family: p for p in column.proposals}
        cost = total_cost(
            calls_of(apart, by_family, scenario, baseline_calls), self._compiler.costs
        )
        return Parts(cost.seconds, cost.host)

    def seconds(self, table: Table, choice: Choice) -> dict[str, float]:
        """Seconds of one call of each kind, calibrated by plans of other models that were realised
        on this device."""
        known, structure = Realised(self._compiler.hardware), self._compiler.structure
        return {
            name: known.fit(name, structure)(parts.bound)
            for name, parts in self.calls(table, choice).items()
        }

    def note(self, table: Table, choice: Choice, measured: Mapping[str, float]) -> None:
        """Keep what the calls of a realised plan measured, for predictions of other models."""
        known, structure = Realised(self._compiler.hardware), self._compiler.structure
        for name, parts in self.calls(table, choice).items():
            known.note(structure, name, parts.bound, measured[name])

    def _call(self, scenario: Scenario, more: Parts) -> Parts:
        rest, sites = self.rest[scenario.name], self.sites[scenario.name] + more
        # the host of a replayed step launches one graph, whatever is in it
        host = 0.0 if scenario.name in self.replayed else sites.host
        return rest + Parts(sites.device, host)

    def memory(self, table: Table, choice: Choice, room: int = ROOM) -> float:
        """Peak bytes of a prompt and of steps after it: weights, a cache with `room` for more
        tokens, and what the prompt takes beside both."""
        picked = [(c[o], c[0]) for c, o in zip(table.columns, choice, strict=True)]
        weights = sum(c.cost.weight_bytes - k.cost.weight_bytes for c, k in picked)
        proposals = [p for column, _ in picked for p in column.proposals]
        cache = self._cache(proposals, room)
        return self._compiler.kept_weights + weights + cache + self.temporaries(proposals)

    def _cache(self, proposals: Sequence[Proposal], room: int) -> int:
        work = self._compiler.request.workload
        if not isinstance(work, Generate):
            return 0
        asked = Scenario("", work.batch, 1, work.prompt + room - 1)
        chosen = {p.where: p for p in proposals}
        found = 0
        for site in self._compiler.sites:
            seen = site.at(asked)
            if site.family != "kv_cache" or seen is None:
                continue
            families = [f for f in ("attention", "kv_cache") if (f, site.key) in chosen]
            mine = {family: chosen[family, site.key] for family in families}
            found += sum(c.state_bytes for c in calls_of((site,), mine, asked, baseline_calls))
        return found

    def temporaries(self, proposals: Sequence[Proposal] = ()) -> float:
        """Peak bytes of one call of the workload beyond weights and cache."""
        request, device = self._compiler.request, self._compiler.device
        dry = _Dry(self._compiler, proposals)
        module = hollow(self._module, fresh, linear=dry.linear, attention=dry.attention)
        return float(peak_temporaries(module, request.workload, request.example, device))


class _Dry:
    """Allocates the workspaces of sites in a dry run of the workload's largest call."""

    def __init__(self, compiler: Compiler, proposals: Sequence[Proposal]) -> None:
        self._device = compiler.device
        self._scenario = compiler.scenarios[0]
        self._costs = compiler.costs
        self._chosen: dict[tuple[str, str], Proposal] = {p.where: p for p in proposals}
        tensors = dict(compiler.request.model.named_parameters(remove_duplicate=False))
        self._linear: dict[int, int] = {}
        self._attention: list[int] = []
        apart = [s for s in compiler.sites if not isinstance(s.info, GroupInfo)]
        ops: dict[str, int] = {}
        for group in joint(apart):
            size = self._workspace(group)
            info = group[0].info
            if isinstance(info, LinearInfo) and info.weight in tensors:
                self._linear[id(tensors[info.weight])] = size
            elif group[0].family == "attention":
                ops[group[0].op] = max(ops.get(group[0].op, 0), size)
        self._attention = list(ops.values())
        self._turn = 0

    def linear(self, weight: Tensor) -> Any:
        return self._held(self._linear.get(id(weight), 0))

    def attention(self) -> Any:
        self._turn += 1
        return self._held(self._attention[(self._turn - 1) % len(self._attention)])

    def _held(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _workspace(self, group: tuple[Site, ...]) -> int:
        chosen = {
            s.family: self._chosen[s.family, s.key]
            for s in group
            if (s.family, s.key) in self._chosen
        }
        made = calls_of(group, chosen, self._scenario, baseline_calls)
        return max((self._costs(call).temporary_bytes for call in made), default=0)


def _one_head(site: Site) -> Site:
    info = site.info
    assert isinstance(info, AttentionInfo)
    group = info.num_heads // info.num_kv_heads
    return replace(site, info=replace(info, num_heads=group, num_kv_heads=1))


def _replays(module: Any) -> bool:
    """Whether the steps of a module have become CUDA graphs."""
    steps = vars(module).get("_steps")
    return steps is not None and any(
        step.graph is not None for _, kinds in steps.known.values() for step in kinds.values()
    )
