"""What each rewrite of linear layers costs in quality at a part of their bytes, on the tiny model.

    python benchmarks/linear_quality.py [--percent 50] [--windows 48] [--only linear.monarch ...]
        [--distill STEPS]

For each rewrite alone (of the layers that it serves), and for all together: the candidates that
the solver takes from priors (nothing is measured to choose), the sum over sites of
E‖Δy‖² / E‖y‖², and KL on text that no fit has seen, as projected and with every site fitted again
behind the rewritten ones before it. With `--distill` KL and the increase of the loss after that
many steps a block as well, with the loss as projected beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import fxopt
from fxopt import passes
from fxopt.compiler import Compiler
from fxopt.decide.options import lowered
from fxopt.decide.priors import Priors
from fxopt.decide.propose import Proposal
from fxopt.decide.quality import Kind, Reference
from fxopt.decide.recover import recover
from fxopt.decide.search import Limits, Search
from fxopt.decide.table import Table, build
from fxopt.distilled import distilled
from fxopt.ir.cost import Cost, OpCall
from fxopt.ir.site import GroupInfo
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_lm_data import MODEL_DIR, heldout_windows

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--percent", type=float, default=50.0)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--distill", type=int, default=0, metavar="STEPS")
    args = parser.parse_args()
    names = [name for name in passes.available() if name.startswith("linear.")]
    heads = ["rewrite", "bytes", "sites", "Σ error", "KL", "KL, fitted again", "mostly"]
    heads += ["KL, distilled", "loss", "loss, distilled"] if args.distill else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for chosen in [[n] for n in args.only or names] + ([] if args.only else [names]):
        made = compiler(chosen, args.windows)
        print(row(made, chosen, args.percent / 100, args.distill), flush=True)


def compiler(
    rewrites: list[str],
    windows: int,
    dtype: torch.dtype = torch.float32,
    length: int = LENGTH,
    device: str = "cpu",
) -> Compiler:
    """The tiny model with `windows` sequences of held-out text, a third each to fit, choose and
    verify."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype).to(device)
    text = heldout_windows(length)[:windows].to(device)
    request = resolve(
        model, fxopt.Budget(weights="50%"), {"input_ids": text[:1]},
        workload=fxopt.Forward(1, length), calibration=[{"input_ids": w[None]} for w in text],
        keep=(), rewrites=rewrites, at=None, seed=0, time_limit=None,
    )  # fmt: skip
    return Compiler(request)


@torch.no_grad()
def row(made: Compiler, names: list[str], part: float, steps: int) -> str:
    title = f"`{names[0]}`" if len(names) == 1 else "all together"
    if not any(made.proposals.by_site.values()):
        return f"| {title} | serves no layer here | | | | | |"
    proposals, stored = choose(made, part)
    if not proposals:
        return f"| {title} | cannot reach {part:.0%} | | | | | |"
    recovery = recover(
        made.captured.graph,
        made.captured.graph,
        proposals,
        made.request.calibration.fit,
        made._run,  # pyright: ignore[reportPrivateUsage]
        made.quality,
        made.statistics,
        made.preparer,
    )
    kl = [error(made, proposals, tensors) for tensors in (None, recovery)]
    (label, count), *_ = Counter(f"{p.candidate.label}" for p in proposals).most_common(1)
    total = sum(site_error(made, proposal) for proposal in proposals)
    return (
        f"| {title} | {stored:.1%} | {len(proposals)} | {total:.2g} | {kl[0]:.3g} | {kl[1]:.3g} "
        f"| {count} x {label} |{trained(made, proposals, steps) if steps else ''}"
    )


def trained(made: Compiler, proposals: list[Proposal], steps: int) -> str:
    """KL after distillation, and the loss before and after."""
    after = distilled(made, proposals, fxopt.Distill(steps=steps), made.preparer)
    loss = [error(made, proposals, tensors, "loss_increase") for tensors in (None, after)]
    found = [error(made, proposals, after), *loss]
    return "".join(f" {value:.3g} |" for value in found)


def error(made: Compiler, proposals: list[Proposal], tensors: Any, kind: Kind = "kl") -> float:
    """Of the whole model on the text kept aside."""
    quality, graph = replace(made.quality, kind=kind), made.captured.graph
    reference = Reference(quality, made.evaluate, graph, made.request.calibration.verify)
    return reference.measure(made.realise(proposals, tensors).graph).mean


def choose(made: Compiler, part: float) -> tuple[list[Proposal], float]:
    """The candidates of least predicted error within `part` of the bytes of the layers that the
    rewrites serve, and the part that those take."""

    def bytes_only(call: OpCall) -> Cost:
        return Cost(0.0, call.weight_bytes)

    scenarios = (*made.scenarios, made.final)
    options = lowered(made.proposals, scenarios, baseline_calls)
    table = build(made.proposals, options, bytes_only, Priors(made.preparer))
    search = within(made, table, part)
    choice = search.next()
    proposals = [] if choice is None else made.chosen(search, choice)
    return proposals, share(made, proposals)


def within(made: Compiler, table: Table, part: float) -> Search:
    """For the least error within `part` of the bytes of the layers that the rewrites serve."""
    whole = dense_bytes(made)
    kept = sum(columns[0].cost.weight_bytes for columns in table.columns)
    return Search(table, Limits({"weights": part * whole}, {"weights": whole - kept}, {"error": 1}))


def share(made: Compiler, proposals: Sequence[Proposal]) -> float:
    """What is left of those bytes."""
    final = made.final
    freed = sum(
        weight_bytes(baseline_calls(p.site, final))
        - weight_bytes(p.rewrite.lower(p.match, p.candidate, final))
        for p in proposals
    )
    return 1 - freed / dense_bytes(made)


def dense_bytes(made: Compiler) -> float:
    """Of the layers that the rewrites serve, as they are."""
    offered = (proposals[0].site for proposals in made.proposals.by_site.values() if proposals)
    served = {
        member
        for site in offered
        for member in (site.info.members if isinstance(site.info, GroupInfo) else [site])
    }
    return sum(weight_bytes(baseline_calls(site, made.final)) for site in served)


def weight_bytes(calls: Iterable[OpCall]) -> float:
    return sum(call.weight_bytes for call in calls)


def site_error(made: Compiler, proposal: Proposal) -> float:
    """E‖Δy‖² / E‖y‖² over the outputs of a site or group, on the rows that were recorded."""
    site, tensors = proposal.site, made.preparer(proposal)
    info, found = site.info, 0.0
    outputs = [(0, site)]
    if isinstance(info, GroupInfo):
        outputs = [(k, info.members[k]) for k in info.outputs]
    for k, member in outputs:
        recorded = made.statistics.at(member)
        inputs, y = {**recorded.inputs, "member": k}, recorded.exact()
        change = proposal.rewrite.emulate(proposal.match, proposal.candidate, tensors, inputs) - y
        found += float(change.square().sum() / y.square().sum().clamp_min(1e-30))
    return found


if __name__ == "__main__":
    main()
