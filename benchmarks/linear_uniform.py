"""Linear layers as the solver chooses them, against one choice for all of them at equal bytes.

    python benchmarks/linear_uniform.py [--windows 48] [--low-rank 75 50 35] [--all 35 27 22]
        [--svg docs/images/linear-quality.svg] [--device cuda]

The tiny model in bfloat16, as it was trained. At each share of the bytes of its linear layers, for
`low_rank` alone and for all rewrites together: the solver's plan, errors measured as a search
measures them, of single sites and about a plan; and every uniform plan that fits, of a rewrite with
sizes the largest. Loss increase and KL are on text that nothing was fitted to or chosen by; of the
uniform plans the best on that very text counts. Each plan is also a line of JSON. With `--svg` the
loss increase is drawn against the bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import curves_plot
import torch
from linear_quality import compiler, dense_bytes, share, weight_bytes, within

from fxopt import passes
from fxopt.decide.propose import Proposal, propose
from fxopt.decide.quality import Kind, Reference
from fxopt.decide.refine import refine
from fxopt.decide.search import Choice, Search, measure_swaps
from fxopt.decide.table import Table
from fxopt.ir.rewrite import Rewrite
from fxopt.passes.baseline import baseline_calls

FRACTIONS = [i / 200 for i in range(200, 9, -1)]
"""Sizes of uniform plans that are tried, from the largest."""
TIED = "linear.quantized_tied"
"""Of the embedding and its head, which no other rewrite serves: left out."""
HEADS = (
    "rewrites", "bytes", "best uniform plan", "solved, mostly",
    "loss, uniform", "loss, solved", "ratio", "KL, uniform", "KL, solved", "KL, ratio",
)  # fmt: skip
WORDS = curves_plot.Words(
    up="loss increase on held-out text, nats a byte",
    across="bytes of the linear layers, as a share of bfloat16",
    solved="solved layer by layer",
    uniform="best of one for all",
    point="{:.1%} of the bytes, {:.2g} nats",
)


class Found(NamedTuple):
    """A plan, and what was measured of it: its share of the bytes, and nats a byte of text."""

    name: str
    share: float
    loss: float
    kl: float


@dataclass(frozen=True)
class Contest:
    """The solver's plan within a share of the bytes, and the uniform ones that fit there."""

    solved: Found
    uniform: Sequence[Found]

    @property
    def rival(self) -> Found:
        return min(self.uniform, key=lambda plan: plan.loss)

    def row(self, *first: str) -> str:
        cells = [*first, self.rival.name, self.solved.name]
        for kind in ("loss", "kl"):
            uniform = min(getattr(plan, kind) for plan in self.uniform)
            solved = getattr(self.solved, kind)
            cells += [f"{uniform:.3g}", f"{solved:.3g}", f"{solved / uniform:.2f}"]
        return f"| {' | '.join(cells)} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--low-rank", type=float, nargs="*", default=[75.0, 50.0, 35.0])
    parser.add_argument("--all", type=float, nargs="*", default=[35.0, 27.0, 22.0])
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    every = [name for name in passes.available() if name.startswith("linear.") and name != TIED]
    asked = {"low_rank": (["linear.low_rank"], args.low_rank), "all": (every, args.all)}
    rows: list[str] = []
    lines: list[curves_plot.Line] = []
    for name, (rewrites, percents) in asked.items():
        if not percents:
            continue
        bench = Bench(rewrites, args)
        contests = [bench.contest(percent / 100) for percent in percents]
        rows += [c.row(name, f"{p:g} %") for c, p in zip(contests, percents, strict=True)]
        for solved in (False, True):
            plans = [contest.solved if solved else contest.rival for contest in contests]
            points = sorted((plan.share, plan.loss) for plan in plans)
            lines.append(curves_plot.Line(name, solved, points))
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", *rows, sep="\n")
    if args.svg:
        args.svg.write_text(curves_plot.svg(lines, WORDS))


class Bench:
    """The tiny model, its priced candidates, and what to measure plans on."""

    def __init__(self, rewrites: list[str], args: argparse.Namespace) -> None:
        self.made = made = compiler(
            rewrites, args.windows, torch.bfloat16, args.length, args.device
        )

        def held(kind: Kind) -> Reference:
            quality, graph = replace(made.quality, kind=kind), made.captured.graph
            return Reference(quality, made.evaluate, graph, made.request.calibration.verify)

        self.loss, self.kl = held("loss_increase"), held("kl")

    @cached_property
    def table(self) -> Table:
        return self.made.table()

    def contest(self, part: float) -> Contest:
        uniform = [self.found(name, part, plan) for name, plan in self.uniform(part).items()]
        *_, solved = [self.found(mostly(p), part, p, solved=True) for p in self.solved(part)]
        return Contest(solved, uniform)

    def solved(self, part: float) -> Iterator[list[Proposal]]:
        """Of least predicted KL, once single sites were measured; then what `refine` made of it."""
        # what another share had measured is not known to a search
        table = replace(self.table, columns=[list(columns) for columns in self.table.columns])
        search, made = within(self.made, table, part), self.made
        measure_swaps(search, made.measure_column, deadline=math.inf)
        choice = search.next()
        if choice is None:
            raise SystemExit(f"{part:.0%} of the bytes cannot be reached")
        yield made.chosen(search, choice)
        measure = partial(self.measured, search)
        search.tell(choice, measure(choice))
        done = refine(search, partial(made.measure_about, search), measure, deadline=math.inf)
        made.scores.save()
        if done is not None and search.best is not None:
            print(json.dumps({"within": part, **asdict(done)}))
            yield made.chosen(search, search.best.choice)

    def measured(self, search: Search, choice: Choice) -> dict[str, float]:
        """Bytes of a choice, and its KL on the text that choices are made by."""
        made, plan = self.made, self.made.chosen(search, choice)
        error = made.choose_reference.measure(made.realise(plan).graph).mean
        return {"weights": share(made, plan) * dense_bytes(made), "error": error}

    def uniform(self, part: float) -> dict[str, list[Proposal]]:
        """By name, the largest plan of each setting that fits."""
        fitting: dict[str, tuple[str, list[Proposal]]] = {}
        for rewrite in self.made.rewrites:
            for sized, size in sizes(rewrite):
                for setting, plan in self.plans(sized, bool(size)).items():
                    name = f"{rewrite.name.partition('.')[2]} {setting}".strip()
                    if name not in fitting and share(self.made, plan) <= part:
                        fitting[name] = (f"{name} {size}".strip(), plan)
        return dict(fitting.values())

    def plans(self, rewrite: Rewrite, sized: bool) -> dict[str, list[Proposal]]:
        """Each setting of a rewrite at all sites; at one that lacks it, the setting that takes the
        most nearly equal share of the site's bytes."""
        made = self.made
        offered = propose(made.sites, [rewrite], (*made.scenarios, made.final), "forward").by_site
        sites = [{setting(p, sized): p for p in found} for found in offered.values() if found]
        plans: dict[str, list[Proposal]] = {}
        for name in dict.fromkeys(name for site in sites for name in site):
            part = fmean(self.part(site[name]) for site in sites if name in site)
            plans[name] = [
                site.get(name) or min(site.values(), key=lambda p: abs(self.part(p) - part))
                for site in sites
            ]
        return plans

    def part(self, proposal: Proposal) -> float:
        """What a proposal leaves of the bytes of its site."""
        lower, final = proposal.rewrite.lower, self.made.final
        calls = lower(proposal.match, proposal.candidate, final)
        return weight_bytes(calls) / weight_bytes(baseline_calls(proposal.site, final))

    def found(self, name: str, part: float, plan: list[Proposal], *, solved: bool = False) -> Found:
        graph = self.made.realise(plan).graph
        errors = [reference.measure(graph).mean for reference in (self.loss, self.kl)]
        found = Found(name, share(self.made, plan), *errors)
        print(json.dumps({"within": part, "solved": solved, **found._asdict()}), flush=True)
        return found


def mostly(plan: Sequence[Proposal]) -> str:
    """The candidate that a plan has most of."""
    (label, count), *_ = Counter(p.candidate.label for p in plan).most_common(1)
    return f"{count} x {label}"


def sizes(rewrite: Rewrite) -> Iterator[tuple[Rewrite, str]]:
    """A rewrite with one of `FRACTIONS` alone at a time, and which; as it is, if it has none."""
    if not hasattr(rewrite, "fractions"):
        yield rewrite, ""
        return
    own: Any = rewrite
    for fraction in FRACTIONS:
        yield replace(own, fractions=(fraction,)), f"{fraction:g}"


def setting(proposal: Proposal, sized: bool) -> str:
    """A candidate without its size, if that is of a fraction: its label otherwise."""
    label = proposal.candidate.label
    return re.sub(r"(rank|k|keep)\d+-?", "", label) if sized else label


if __name__ == "__main__":
    main()
