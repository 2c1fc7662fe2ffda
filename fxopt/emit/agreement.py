"""Whether onnxruntime computes what the module computes, in calls of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ir.errors import ExportError
from .aligned import OUTPUT, Aligned
from .difference import difference
from .lowering import Lowered, empty_states
from .module import OptimizedModule
from .onnx_errors import explain
from .ort import Session
from .packed import Rounded, compare_cache
from .samples import Samples


@dataclass
class Agreement:
    """Largest difference of an output or of an exact part of the cache: with onnxruntime's
    roundings to e4m3 (`aligned`), and with each side's own. `rounded` counts what was rounded
    (packed integers, inputs of fp8 layers) and went different ways."""

    aligned: float = 0.0
    free: float = 0.0
    rounded: Rounded = field(default_factory=Rounded)


class Run(Protocol):
    """The module's own calls: `past` is the cache before a call as an export takes it."""

    past: list[Tensor]

    def begin(self, batch: int) -> None: ...
    def __call__(self, plain: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, and the cache after the call, which is not yet the `past` of the next."""
        ...

    def advance(self) -> None: ...


class LoweredRun:
    """What the graph computes in the export's dtype."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.past: list[Tensor] = []
        self.present: list[Tensor] = []

    def begin(self, batch: int) -> None:
        self.past = empty_states(self.lowered, batch)

    def __call__(self, plain: Sequence[Tensor]) -> list[Tensor]:
        found = list(self.lowered(*plain, *self.past))
        self.present = found[len(found) - len(self.past) :]
        return found

    def advance(self) -> None:
        self.past = self.present


class ModuleRun:
    """What the module itself computes, through its own cache."""

    def __init__(self, module: Any, lowered: Lowered) -> None:
        self.module, self.lowered = module, lowered
        self.past: list[Tensor] = []
        self.cache: Any = None
        self.after: Any = None

    def begin(self, batch: int) -> None:
        self.past = empty_states(self.lowered, batch)
        self.cache = self.module.make_cache(batch, 0) if self.past else None

    def __call__(self, plain: Sequence[Tensor]) -> list[Tensor]:
        names = self.lowered.inputs[: len(plain)]
        given: dict[str, Any] = dict(zip(names, plain, strict=True))
        if "logits_to_keep" in self.module.program.placeholders:
            given.setdefault("logits_to_keep", torch.arange(given["input_ids"].shape[1]))
        if self.cache is None:
            return list(self.module.run_flat(given))
        from .growing import grown_states

        self.after = self.cache.fork()
        length = given["input_ids"].shape[1]
        self.after.reserve(self.after.get_seq_length() + length)
        given |= {"past": self.after.states, "start": self.after.start}
        outputs = self.module.run_flat(given)
        self.after.advance(length)
        return [*outputs, *grown_states(self.module.program, self.after)]

    def advance(self) -> None:
        if self.cache is not None:
            from .growing import grown_states

            self.cache = self.after
            self.past = grown_states(self.module.program, self.cache)


def own_run(module: OptimizedModule, lowered: Lowered) -> Run:
    """The module where it computes in the export's dtype on the CPU; else its graph, that does."""
    direct = not lowered.halves and module.device.type == "cpu"
    return ModuleRun(module, lowered) if direct else LoweredRun(lowered)


@dataclass
class Comparison:
    """Calls of both sides. `probe` is the file with its roundings to e4m3 as further outputs, where
    it has any; both sides are given the module's past at each call, so that no error adds up."""

    path: Path
    probe: Path | None
    lowered: Lowered
    run: Run
    tolerance: float

    def compare(self, samples: Samples, advance: Callable[[], None]) -> Agreement:
        """All calls of `samples`; ExportError where a packed cache is not the module's."""
        found = Agreement()
        file = Session(self.path)
        probe = None if self.probe is None else Session(self.probe)
        for batch, calls in samples.sequences:
            self.run.begin(batch)
            for plain in calls:
                self._call(plain, file, probe, found)
                self.run.advance()
                advance()
        return found

    def _call(
        self, plain: Sequence[Tensor], file: Session, probe: Session | None, so_far: Agreement
    ) -> None:
        given = [*plain, *self.run.past]
        feed = dict(zip(self.lowered.inputs, given, strict=True))
        found = list(self._onnxruntime(file, feed).values())
        align: AbstractContextManager[Any] = nullcontext()
        seen = found
        if probe is not None:
            so_far.free = max(so_far.free, self._outputs(self.run(plain), found))
            exposed = self._onnxruntime(probe, feed)
            choices = [exposed.pop(name) for name in list(exposed) if name.startswith(OUTPUT)]
            seen = list(exposed.values())
            align = Aligned(choices, self.tolerance, so_far.rounded)
        with align:
            wanted = self.run(plain)
            if self.run.past:
                self.lowered(*given)
        gap = max(self._outputs(wanted, found), self._outputs(wanted, seen))
        if self.run.past:
            gap = max(gap, self._cache(plain, wanted, found, so_far.rounded))
        so_far.aligned = max(so_far.aligned, gap)
        if probe is None:
            so_far.free = so_far.aligned

    def _onnxruntime(self, session: Session, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return session.run(feed)
        except Exception as error:
            raise ExportError(explain(self.lowered, "run by onnxruntime", error)) from error

    def _outputs(self, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        count = len(found) - len(self.run.past)
        return max(difference(a, b) for a, b in zip(wanted[:count], found[:count], strict=True))

    def _cache(
        self,
        plain: Sequence[Tensor],
        wanted: Sequence[Tensor],
        found: Sequence[Tensor],
        rounded: Rounded,
    ) -> float:
        """The difference of the exact parts of what both return as the cache."""
        mask = plain[self.lowered.inputs.index("attention_mask")]
        count = len(self.run.past)
        tensors = (self.run.past, wanted[-count:], found[-count:])
        worst = 0.0
        for layer, state in enumerate(self.lowered.program.states):
            slots = [i for i, slot in enumerate(self.lowered.slots) if slot.layer == layer]
            own = [[every[i] for i in slots] for every in tensors]
            new = self.lowered.appended[layer]
            gap = compare_cache(f"present.{layer}", state, own, new, mask, self.tolerance, rounded)
            worst = max(worst, gap)
        return worst
