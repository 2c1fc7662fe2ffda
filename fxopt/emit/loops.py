"""Runs of equal calls of a container's modules, so that source does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from .frames import Frame, state_index
from .tree import CONTAINERS, Tree

if TYPE_CHECKING:
    from .method import Method

_SINGULAR = {"layers": "layer", "blocks": "block", "stages": "stage", "experts": "expert"}


@dataclass(frozen=True)
class Loop:
    """Calls `frames` of `container`'s modules `first`, `first` + 1, ...: each takes the result of
    the one before (`carried` the first time) and perhaps its own states of the cache."""

    frames: tuple[Frame, ...]
    container: str
    first: int
    carried: fx.Node
    result: fx.Node
    operands: tuple[fx.Node, ...]
    varying: frozenset[fx.Node]
    states: tuple[str, ...]
    method: str

    @property
    def singular(self) -> str:
        return _SINGULAR.get(self.container.rpartition(".")[2], "layer")

    def varies(self, node: fx.Node) -> bool:
        """Whether an input of the first call is another one in each call."""
        return node in self.varying

    def span(self, tree: Tree, module: str) -> str:
        """The slice of the container that is looped over; empty for all of it."""
        holder = tree.module_id(f"{module}.{self.container}".strip("."))
        total = len(tree.modules[holder or ""].children)
        last = self.first + len(self.frames)
        low, high = (str(self.first) if self.first else ""), ("" if last == total else str(last))
        return "" if not low and not high else f"[{low}:{high}]"


def find_loops(frame: Frame, methods: Mapping[int, Method], tree: Tree) -> Iterator[Loop]:
    """The longest foldable runs among the calls of `frame`."""
    run: list[Frame] = []
    for item in [*frame.items, None]:
        if isinstance(item, Frame) and run and _follows(run, item, methods):
            run.append(item)
            continue
        yield from _loop(frame, run, methods, tree)
        run = [item] if isinstance(item, Frame) else []


def _place(frame: Frame) -> tuple[str, int] | None:
    container, _, name = frame.path.rpartition(".")
    return (container, int(name)) if name.isdigit() else None


def _follows(run: list[Frame], item: Frame, methods: Mapping[int, Method]) -> bool:
    first, last = methods[id(run[0])], methods[id(run[-1])]
    here, before = _place(item), _place(run[-1])
    method = methods[id(item)]
    if here is None or before is None or here != (before[0], before[1] + 1):
        return False
    if method.name != first.name or len(method.inputs) != len(first.inputs):
        return False
    if len(last.outputs) != 1 or len(method.outputs) != 1:
        return False
    second = methods[id(run[1])] if len(run) > 1 else method
    chained = False
    for old, prior, new, step in zip(
        first.inputs, last.inputs, method.inputs, second.inputs, strict=True
    ):
        if new is last.outputs[0]:
            # the value that runs through stands at the same place in every call
            chained = chained or (prior is old if len(run) == 1 else prior is _output(run, methods))
            continue
        index, origin = state_index(new), state_index(old)
        if index is not None and origin is not None and new is not old:
            stride = (state_index(step) or 0) - origin
            if index != origin + stride * len(run):
                return False
        elif new is not old:
            return False
    return chained and _only_next_reads(last.outputs[0], item)


def _output(run: list[Frame], methods: Mapping[int, Method]) -> fx.Node | None:
    return methods[id(run[-2])].outputs[0] if len(run) > 1 else None


def _only_next_reads(value: fx.Node, item: Frame) -> bool:
    return all(user in set(item.nodes()) for user in value.users if user.op != "output") and all(
        user.op != "output" for user in value.users
    )


def _loop(
    frame: Frame, run: list[Frame], methods: Mapping[int, Method], tree: Tree
) -> Iterator[Loop]:
    if len(run) < 2:
        return
    container, first = _place(run[0]) or ("", 0)
    holder = tree.module_id(f"{frame.module}.{container}".strip("."))
    if holder is None or tree.modules[holder].base not in CONTAINERS:
        return
    head, second = methods[id(run[0])], methods[id(run[1])]
    place = next(i for i, node in enumerate(second.inputs) if node is head.outputs[0])
    carried = head.inputs[place]
    moving = [
        (old, new)
        for old, new in zip(head.inputs, second.inputs, strict=True)
        if old is not carried and old is not new
    ]
    total = _states(frame)
    states = tuple(_span(state_index(a) or 0, state_index(b) or 0, len(run), total)
                   for a, b in moving)  # fmt: skip
    varying = frozenset(old for old, _ in moving)
    operands = tuple(node for node in head.inputs if node not in varying)
    past = next((node.args[0] for node in varying), None)
    if isinstance(past, fx.Node):
        operands = (*operands, past)
    yield Loop(
        tuple(run), container, first, carried, methods[id(run[-1])].outputs[0],
        operands, varying, states, head.name,
    )  # fmt: skip


def _states(frame: Frame) -> int:
    """How many states the cache has: one more than the highest index that is read."""
    inner = {source for node in frame.nodes() for source in node.all_input_nodes}
    return 1 + max((state_index(node) or 0 for node in inner), default=0)


def _span(first: int, second: int, count: int, total: int) -> str:
    stride = second - first
    last = first + stride * (count - 1)
    low = str(first) if first else ""
    high = "" if last + stride >= total else str(last + 1)
    step = "" if stride == 1 else f":{stride}"
    return "" if not low and not high and not step else f"[{low}:{high}{step}]"
