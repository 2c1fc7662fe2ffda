"""The prepared tensors of a choice after distillation, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .compiler import Compiler
from .decide.distill import Outcome, trains
from .decide.propose import Prepare, Proposal, Remade
from .ir.distill import Distill

SAID = "recover: "
"""How a note begins that says what came of distillation."""


@dataclass
class Distillation(Remade):
    """Tensors by proposal, for `Compiler.realise`: trained ones, others as `prepare` gives them."""

    outcome: Outcome = field(default_factory=lambda: Outcome(0))
    taken_back: bool = False

    @property
    def improved(self) -> bool:
        """Whether any block is better than it was."""
        return any(block.after < block.before for block in self.outcome.blocks)

    @property
    def said(self) -> str:
        """What came of it, in a sentence."""
        found, count, left_out = self.outcome.blocks, self.outcome.count, self.outcome.left_out
        if not count + left_out:
            return "nothing was distilled: the plan rewrites no layer into tensors that train"
        better = sum(block.after < block.before for block in found)
        text = f"{better} of {count + left_out} blocks are better on sequences held out"
        if left_out:
            text += f", {left_out} could not be trained apart from the others"
        if self.taken_back:
            return f"{text}, but not the whole model on the part to choose by: undone"
        if len(found) == count and not self.outcome.interrupted:
            return text
        by = "Ctrl-C" if self.outcome.interrupted else "the time limit"
        return f"{text}; {by} ended it after {len(found)}"

    def take_back(self) -> None:
        """Give what `prepare` gives again."""
        self.anew.clear()
        self.taken_back = True


def distilled(
    compiler: Compiler, proposals: Sequence[Proposal], how: Distill, prepare: Prepare
) -> Distillation:
    """Distil a choice whose tensors are first those of `prepare`, which stay as they are."""
    training = [p for p in compiler.in_turn(proposals, prepare) if trains(p.site)]
    held = {p.where: _copied(prepare(p)) for p in training}
    made = Distillation(prepare, dict(held))
    editor = compiler.realise(proposals, made)
    found = [(p.site, _registered(held[p.where], editor.graph)) for p in training]
    made.outcome = compiler.distil(editor, [one for one in found if one[1]], how)
    made.anew = {k: {n: t.detach() for n, t in of.items()} for k, of in held.items()}
    return made


def too_few(compiler: Compiler) -> str | None:
    """Why the calibration does not do, where it leaves no sequence to hold out."""
    if len(compiler.request.calibration.fit) > 1:
        return None
    return (
        "distillation holds some of the sequences out that tensors are fitted on, and there is "
        "one; pass a calibration of four sequences or more"
    )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that can be trained as parameters of their own: editors register such as
    they are."""
    return {n: nn.Parameter(t.detach().clone()) if _real(t) else t for n, t in tensors.items()}


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1


def _registered(tensors: Mapping[str, Tensor], graph: nn.Module) -> list[nn.Parameter]:
    """The parameters of a graph that are these tensors, or views of them."""
    places = {_place(t) for t in tensors.values() if isinstance(t, nn.Parameter)}
    return [p for p in graph.parameters() if _place(p) in places]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
