"""MLP -> the same MLP with fewer channels.

    y = linear(silu(linear(x, gate)) * linear(x, up), down)
    y = linear(silu(linear(x, gate[kept])) * linear(x, up[kept]), down')

`down'` is fitted to what the whole MLP returned. Stays dense: pays on every device and at every
number of tokens, in proportion to the channels that went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import Site
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import dense, groups, projection

MULTIPLE = 64
PLACE = ("nn_module_stack", "fqn")


@dataclass(frozen=True)
class ChannelPruned(dense.Structure):
    """`fractions` of the channels are kept, in multiples of 64. `least` of those kept are the
    least important instead of the most; with `down` fitted again that did not help."""

    fractions: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875)
    least: float = 0.0

    name: ClassVar[str] = "linear.channel_pruned"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.09695"
    groups: ClassVar[str] = "channels"

    def match(self, site: Site) -> Match | Refusal:
        if reason := groups.refusal(site, "channels"):
            return reason
        match = Match(site)
        if not self.candidates(match, ()):
            return Refusal(
                f"{_channels(match)} channels: no multiple of {MULTIPLE} below it is worth keeping"
            )
        return match

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        channels = _channels(match)
        counts = {MULTIPLE * round(channels * f / MULTIPLE) for f in self.fractions}
        touches = tuple(site.key for site in groups.group_info(match).members)
        return [
            Candidate(self.name, f"keep{count}", {"channels": count}, touches)
            for count in sorted(counts)
            if 0 < count < channels
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        *first, last = groups.infos(match)
        count = _count(candidate)
        layers = [replace(info, out_features=count) for info in first]
        layers.append(replace(last, in_features=count))
        return [dense.dense_call(info, scenario) for info in layers]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        *first, last = statistics.members
        weight, gram = dense.weight_of(last), statistics.gram
        kept = _kept(weight, gram, _count(candidate), self.least)
        rows = {f"weight{k}": dense.weight_of(m)[kept] for k, m in enumerate(first)}
        down = projection.columns(weight, gram, kept).to(weight.dtype)
        tensors = {**rows, f"weight{len(first)}": down.contiguous(), "kept": kept}
        given = groups.biases(statistics.members)
        of_last = f"bias{len(first)}"
        return {**tensors, **{n: b if n == of_last else b[kept] for n, b in given.items()}}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Of the last member, for the input that the others would make unpruned."""
        k = inputs["member"]
        return F.linear(
            inputs["x"][..., tensors["kept"]], tensors[f"weight{k}"], tensors.get(f"bias{k}")
        )

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        *members, last = groups.group_info(match).members
        *found, end = groups.nodes(match, self.name, editor)
        made: dict[fx.Node, fx.Node] = {}
        for k, (member, node) in enumerate(zip(members, found, strict=True)):
            weight = editor.tensor(member, "pruned", tensors[f"weight{k}"])
            bias = tensors.get(f"bias{k}")
            held = None if bias is None else editor.tensor(member, "pruned_bias", bias)
            made[node] = dense.call(editor, member, node.args[0], weight, held)
        for node in _between(end, found):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
            made[node] = editor.call(last, node.target, args, kwargs)
            # what is computed again belongs where it was
            made[node].meta.update({k: node.meta[k] for k in PLACE if k in node.meta})
        x, bias = dense.input_and_bias(end)
        weight = editor.tensor(last, "pruned", tensors[f"weight{len(members)}"])
        editor.replace(last, dense.call(editor, last, made[x], weight, bias))


def _channels(match: Match) -> int:
    return groups.infos(match)[-1].in_features


def _count(candidate: Candidate) -> int:
    return int(candidate.parameters["channels"])


def _kept(weight: Tensor, gram: Tensor, count: int, least: float) -> Tensor:
    """Channels by the energy of what each adds to the output, in ascending order."""
    energy = gram.diagonal() * weight.double().square().sum(0)
    order = energy.argsort(descending=True, stable=True)
    tail = round(least * count)
    return torch.cat([order[: count - tail], order[len(order) - tail :]]).sort().values


def _between(last: fx.Node, first: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes from `first` to `last`, without both, in order."""
    found, waiting = set[fx.Node](), [last.args[0]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found and node not in first:
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in last.graph.nodes if node in found]
