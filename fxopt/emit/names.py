"""What the values of one method are called: short names, free again once nothing reads them."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..ir.ops import add_rms_norm, attend, gated, mix_channels, rms_norm, rotate, rotate_both
from .facts import tensor_facts
from .frames import floats
from .targets import op_name, root

_HINTS = {
    "add": "x", "attend": "attention", "gated": "inner", "getitem": "item",
    "mix_channels": "mixed", "rms_norm": "normed", "rotate": "rotated", "sym_size": "length",
}  # fmt: skip
_PASSING = {"mul", "to", "unsqueeze", "view", "expand", "reshape", "contiguous", "slice", "getitem",
            "transpose", "permute", "index", "select"}  # fmt: skip
# Names that generated code reads.
_TAKEN = {
    "self", "F", "nn", "torch", "math", "operator", "zip", "float", "slice", "getattr",
    *(
        f.__name__
        for f in (add_rms_norm, attend, gated, mix_channels, rms_norm, rotate, rotate_both)
    ),
}  # fmt: skip


@dataclass
class Names:
    """`inputs` are the values that the method is handed, `hints` what roles values were seen in.

    `left` counts the statements that still read a value.
    """

    inputs: Sequence[fx.Node]
    hints: dict[fx.Node, str]
    left: Counter[fx.Node] = field(default_factory=Counter)
    _of: dict[fx.Node, str] = field(default_factory=dict)
    _owners: dict[str, fx.Node] = field(default_factory=dict)
    _dead: list[str] = field(default_factory=list)

    def __getitem__(self, node: fx.Node) -> str:
        return self._of[node]

    def get(self, node: fx.Node) -> str | None:
        """The name of a value; None before it has one."""
        return self._of.get(node)

    def taken(self, name: str) -> bool:
        """Whether a value that is read again has the name."""
        return name in self._owners

    def hint(self, node: fx.Node) -> str:
        """What a value is, in a word: its role, where it came from, or the op that made it."""
        origin: Any = node
        while origin not in self.hints and op_name(origin) in _PASSING and origin.args:
            source = origin.args[0]
            if source in self.inputs:
                return re.sub(r"_\d+$", "", self._of[source])
            if not isinstance(source, fx.Node) or floats(source):
                break
            origin = source
        if origin.op == "get_attr":
            return "_".join(str(origin.target).split(".")[-2:])
        if op_name(origin) == "sym_size" and not origin.args[1]:
            return "batch"
        name = self.hints.get(origin) or _HINTS.get(op_name(origin), op_name(origin))
        return name.strip("_") or "x"

    def bind(self, node: fx.Node, base: str = "") -> str:
        """Name a value after `base`, or else after what is known of it, with a number behind where
        that is taken."""
        base = base or self.hint(node)
        if not base.isidentifier() or keyword.iskeyword(base) or base in _TAKEN:
            base = f"{base}_" if f"{base}_".isidentifier() else "x"
        name, count = base, 0
        while self.taken(name):
            count += 1
            name = f"{base}_{count}"
        self._of[node] = name
        self._owners[name] = node
        return name

    def spend(self, used: Sequence[fx.Node]) -> None:
        """The values in `used` are read; a name whose value is not read again is free."""
        for node in used:
            self.left[node] -= 1
            name = self._of[node]
            if not self.left[node] and self._owners.get(name) is node:
                del self._owners[name]
                if self.is_computed_here(node):
                    self._dead.append(name)

    def is_computed_here(self, node: fx.Node) -> bool:
        """Whether a value has memory that nothing but its name holds on to."""
        known, source = tensor_facts(node), root(node)
        here = source not in self.inputs and not floats(source)
        return here and known is not None and len(known.shape) > 1

    def free(self, base: str, taken: Collection[str] = (), skip: int = 0) -> str:
        """A name after `base` that no value has, for what is no value of the graph."""
        name, count = (base, 0) if not skip else (f"{base}_{skip}", skip)
        while self.taken(name) or name in taken:
            count += 1
            name = f"{base}_{count}"
        return name

    def released(self) -> list[str]:
        """The names, since the last call, of values that hold memory and are not read again."""
        names = [name for name in dict.fromkeys(self._dead) if not self.taken(name)]
        self._dead.clear()
        return names
