"""What masks of attention cost in quality on the tiny trained model, and what the solver makes of
them.

    python benchmarks/attention_quality.py [--kl 0.01] [--documents 100] [--svg curves.svg]
        [--heads heads.svg]

A table at 4,096 bytes: the plan of fewest FLOPs within the KL, beside it dense attention, the
window of as many FLOPs in all heads, and the nearest size of every other mask in all heads. FLOPs
are those of attention, what chooses keys included, as a share of the dense ones; KL is on held-out
text, and answered are documents whose value free decoding gives. With `--svg` the KL of each mask
is drawn against its FLOPs, one size in all heads and as solved; points are also lines of JSON.
With `--heads` the map of the plan's heads is drawn.

Nothing is timed to decide: options are priced for a made-up device that computes, and to which
memory is free. What is measured on was not seen by any decision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import curves_plot
import torch
import transformers

import fxopt
from fxopt.compiler import Compiler
from fxopt.cost_models.hardware import Device
from fxopt.cost_models.measured import Measured
from fxopt.decide.propose import Proposal, propose
from fxopt.decide.quality import Reference
from fxopt.decide.search import Limits, Search, measure_swaps
from fxopt.decide.table import Column, Table
from fxopt.passes.attention import corrected
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve
from fxopt.session import Session
from fxopt.show.heads import svg as drawn_heads

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_lm_data import MODEL_DIR, heldout_text, heldout_windows, retrieval_documents

WINDOW = "attention.window"
SHARES = (0.15, 0.2, 0.3, 0.5, 0.7)
"""Of the dense FLOPs, at which the curves of solved plans have a point."""
COUNTED = Device(
    "1 TFLOP/s, memory free", "cpu", bandwidth=math.inf, matmul_rate={"float32": 1e12},
    launch_seconds=0.0, memory_bytes=0, threads=1, probed="",
)  # fmt: skip
BATCH = 4
Choice = Sequence[Proposal]
"""What is chosen; heads that it leaves out are dense."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=12, help="to decide on")
    parser.add_argument("--windows", type=int, default=6, help="of text to measure on")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    bench = Bench(args)
    plan = bench.decided(args.kl)
    if args.heads:
        args.heads.write_text(drawn_heads(plan))
    print(f"| heads | FLOPs | KL, nats a byte | answered |\n|{'---|' * 4}", flush=True)
    for name, choice in bench.contest(plan):
        told = bench.answered(bench.made.emit(bench.made.realise(choice)))
        found = f"{bench.share(choice):.3f} | {bench.kl(choice):.2g} | {told:.1%}"
        print(f"| {name} | {found} |", flush=True)
    if args.svg:
        lines = [*bench.curves()]
        words = curves_plot.Words(
            up="KL on held-out text, nats a byte",
            across=f"FLOPs of attention at {args.length:,} bytes, as a share of dense",
            solved="solved head by head",
            uniform="one size in all heads",
            point="{:.1%} of the FLOPs, {:.2g} nats",
        )
        args.svg.write_text(curves_plot.svg(lines, words))


class Counting(Compiler):
    """Decides by FLOPs, which are the same whatever else runs on the machine."""

    @cached_property
    def costs(self) -> Measured:
        return Measured(COUNTED, "float32", limit=0.0)


class Bench:
    """The tiny model, what its heads could be, and what to measure on."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.device = args.device
        text, middle = heldout_windows(args.length), len(heldout_text()) // 2
        half = -(-args.sequences // 2)
        asked, _ = retrieval_documents(half, args.length, filler=heldout_text()[:middle])
        # by turns, so that each third of them has both
        rows = chain.from_iterable(zip(text[:half], asked, strict=True))
        calibration = [self._batch(row) for row in rows][: args.sequences]
        request = resolve(
            model.to(args.device).eval(), fxopt.Budget(kl=args.kl, minimize="latency"),
            calibration[0], workload=fxopt.Forward(1, args.length), calibration=calibration,
            keep=(), rewrites=["attention"], at=None, seed=0, time_limit=None,
        )  # fmt: skip
        self.made = Counting(request)
        self.table = self.made.table()
        self.documents, self.answer = retrieval_documents(
            args.documents, args.length, seed=1, filler=heldout_text()[middle:]
        )
        held = [self._batch(row) for row in text[-args.windows :]]
        made = self.made
        self.reference = Reference(made.quality, made.evaluate, made.captured.graph, held)

    def _batch(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": row[None].to(self.device)}

    @cached_property
    def uniform(self) -> dict[tuple[str, str], Choice]:
        """Every candidate, in all heads that take it, by its mask and label."""
        found: dict[tuple[str, str], list[Proposal]] = {}
        for column in chain.from_iterable(self.table.columns):
            for p in column.proposals:
                found.setdefault((mask_of(p), p.candidate.label), []).append(p)
        return dict(found)

    def decided(self, kl: float) -> fxopt.Plan:
        """What `optimize` decides, as verified on the third part of the calibration."""
        made = self.made.under(fxopt.Budget(kl=kl, minimize="latency"))
        session = Session(made, made.table())
        # without the limit of seconds that the search has for it
        measure_swaps(session.search, made.measure_column, deadline=math.inf)
        return session.optimize().plan

    def contest(self, plan: fxopt.Plan) -> Iterator[tuple[str, Choice]]:
        """What was decided and its rivals, each with what it is in words."""
        yield "dense", ()
        chosen = {(d.key, d.label) for d in plan.rewritten}
        every = chain.from_iterable(self.uniform.values())
        solved = [p for p in every if (p.site.key, p.candidate.label) in chosen]
        yield f"solved: {counted(solved, len(self.table.keys))}", solved
        share = self.share(solved)
        width = self.window_of(share)
        if windows := self.windows(width):
            yield f"window {width} in all", windows
        for name in dict.fromkeys(name for name, _ in self.uniform if name != WINDOW):
            sizes = {label: plan for (own, label), plan in self.uniform.items() if own == name}
            label = min(sizes, key=lambda label: abs(self.share(sizes[label]) - share))
            yield f"{name.removeprefix('attention.')} {label} in all", sizes[label]

    def window_of(self, share: float) -> int:
        """The smallest window that takes `share` of the FLOPs in all heads; where none does, one
        that is too large to be offered."""
        sizes = range(1, self.made.widest.length // 2)
        return 1 + bisect_left(sizes, share, key=lambda width: self.share(self.windows(width)))

    def windows(self, width: int) -> Choice:
        made = self.made
        (window,) = (rewrite for rewrite in made.rewrites if rewrite.name == WINDOW)
        one: Any = replace(window, windows=(width,), corrected=0.0)  # pyright: ignore[reportCallIssue]
        found = propose(made.sites, [one], (*made.scenarios, made.final), "forward")
        return [p for offered in found.by_site.values() for p in offered]

    def curves(self) -> Iterator[curves_plot.Line]:
        """A line a mask of one size in all heads, and one as solved; then all masks together."""
        names = list(dict.fromkeys(name for name, _ in self.uniform))
        for name in names:
            sizes = [plan for (own, _), plan in self.uniform.items() if own == name]
            yield self.line(name, False, sizes)
            yield self.line(name, True, self.solved([name]))
        yield self.line("all masks", True, self.solved(names))

    def line(self, name: str, solved: bool, plans: Sequence[Choice]) -> curves_plot.Line:
        points = sorted((self.share(plan), self.kl(plan)) for plan in plans)
        line = curves_plot.Line(name, solved, points)
        print(json.dumps({"mask": name, "solved": solved, "points": points}), flush=True)
        return line

    def solved(self, names: Sequence[str]) -> list[Choice]:
        """Of least predicted KL with these masks, at each of `SHARES` that they can reach."""

        def allowed(column: Column) -> bool:
            return all(mask_of(p) in names for p in column.proposals)

        columns = [[c for c in columns if allowed(c)] for columns in self.table.columns]
        table = Table(self.table.keys, columns, self.table.factor)
        kept = sum(options[0].cost.seconds for options in columns)
        found: list[Choice] = []
        for share in SHARES:
            search = Search(table, Limits({"latency": share * kept}, {}, {"error": 1.0}))
            choice = search.next()
            if choice is not None:
                found.append(self.made.chosen(search, choice))
        return found

    def share(self, plan: Choice) -> float:
        """FLOPs of attention, as a share of the dense ones."""
        chosen = {p.site.key: p for p in plan}
        taken = whole = 0.0
        for (site,) in self.table.keys:
            for scenario in self.made.scenarios:
                dense, p = baseline_calls(site, scenario), chosen.get(site.key)
                calls = p.rewrite.lower(p.match, p.candidate, scenario) if p else dense
                taken += sum(call.flops for call in calls)
                whole += sum(call.flops for call in dense)
        return taken / whole

    def kl(self, plan: Choice) -> float:
        """Nats a byte on the held-out text."""
        return self.reference.measure(self.made.realise(plan).graph).mean

    @torch.no_grad()
    def answered(self, module: Any) -> float:
        """The share of documents whose six bytes are decoded without an error."""
        found = 0
        for part in self.documents.split(BATCH):
            prompt = part[:, : self.answer.start].to(self.device)
            told = module.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                max_new_tokens=self.answer.stop - self.answer.start,
            )  # fmt: skip
            found += int((told[:, self.answer.start :].cpu() == part[:, self.answer]).all(1).sum())
        return found / max(len(self.documents), 1)


def mask_of(p: Proposal) -> str:
    """The rewrite; one that is corrected by rows that see all keys is a mask of its own."""
    return p.rewrite.name + corrected.SUFFIX * p.candidate.label.endswith(corrected.SUFFIX)


def counted(plan: Choice, heads: int) -> str:
    """The labels of a plan and how many heads have each, the rest dense."""
    labels = Counter(p.candidate.label for p in plan)
    parts = [f"{count} {label}" for label, count in labels.most_common()]
    return ", ".join([*parts, f"{heads - len(plan)} dense"])


if __name__ == "__main__":
    main()
