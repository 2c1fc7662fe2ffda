"""Expressions that reach a module or a tensor from the module whose method reads it."""

from __future__ import annotations

import json
import keyword
from functools import reduce

from .tree import Tree


def module_path(tree: Tree, start: str, path: str, reserved: frozenset[str] = frozenset()) -> str:
    """`self.layers[0].mlp` for the module at `path` under the module with key `start`."""
    text, current = "self", start
    for name in path.split(".") if path else ():
        hidden = current == "" and name in reserved
        text += _step(tree.modules[current].base, name, "modules", hidden)
        current = tree.modules[current].children[name] or ""
    return text


def tensor_path(
    tree: Tree, start: str, target: str, reserved: frozenset[str] = frozenset()
) -> str | None:
    """`self.q_proj.weight` for the tensor named `target`, None when it is not under `start`."""
    key = tree.key(target)
    if key is None:
        return None
    inside = f"{start}." if start else ""
    local = target[len(inside) :] if target.startswith(inside) else None
    if local is None or tree.key(f"{inside}{local}") != key:
        local = tree.local_tensors(start).get(key)
    if local is None:
        return None
    owner, _, name = local.rpartition(".")
    prefix = module_path(tree, start, owner, reserved)
    holder = reduce(lambda at, part: tree.modules[at].children[part] or "",
                    owner.split(".") if owner else (), start)  # fmt: skip
    kind = "parameters" if name in tree.modules[holder].parameters else "buffers"
    hidden = holder == "" and name in reserved
    return prefix + _step("Module", name, kind, hidden)


def _step(base: str, name: str, kind: str, hidden: bool) -> str:
    if base in ("ModuleList", "Sequential") and name.isdigit():
        return f"[{name}]"
    if base == "ModuleDict":
        return f"[{json.dumps(name)}]"
    if hidden or not name.isidentifier() or keyword.iskeyword(name):
        return f"._{kind}[{json.dumps(name)}]"
    return f".{name}"
