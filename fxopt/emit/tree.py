"""The module tree of a model as data: hierarchy, parameter order, ties, buffer persistence.

A tree is read from the original model, edited (rewritten sites change their parameters) and built
again into a skeleton of generated classes. Modules and tensors that the original shares are one
entry with several names, so ties survive.
"""
# The containers of nn.Module have no public way to be filled in order.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

CONTAINERS: dict[str, type[nn.Module]] = {
    "Sequential": nn.Sequential,
    "ModuleList": nn.ModuleList,
    "ModuleDict": nn.ModuleDict,
}


@dataclass
class Entry:
    """One module. Parameters and buffers map a local name to the key of a tensor, or to None."""

    cls: str
    base: str = "Module"
    parameters: dict[str, str | None] = field(default_factory=dict)
    buffers: dict[str, str | None] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)
    children: dict[str, str | None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of parameters, then of buffers."""
        return [*self.parameters, *self.buffers]

    def copy(self) -> Entry:
        return Entry(
            self.cls,
            self.base,
            dict(self.parameters),
            dict(self.buffers),
            set(self.transient),
            dict(self.children),
        )


@dataclass
class Tree:
    """`modules` by their first qualified name ("" is the root), `tensors` by theirs."""

    modules: dict[str, Entry] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> Tree:
        """The tree of `model`; tensors are the model's own objects, nothing is copied."""
        tree = Tree()
        names: dict[int, str] = {}
        keys: dict[int, str] = {}

        def tensor_key(prefix: str, name: str, value: Tensor | None) -> str | None:
            if value is None:
                return None
            key = keys.setdefault(id(value), prefix + name)
            tree.tensors[key] = value
            return key

        def visit(module: nn.Module, fqn: str) -> str:
            if id(module) in names:
                return names[id(module)]
            names[id(module)] = fqn
            prefix = f"{fqn}." if fqn else ""
            entry = tree.modules[fqn] = Entry(type(module).__name__, _base(module))
            entry.transient = set(module._non_persistent_buffers_set)
            for name, value in module._parameters.items():
                entry.parameters[name] = tensor_key(prefix, name, value)
            for name, value in module._buffers.items():
                entry.buffers[name] = tensor_key(prefix, name, value)
            for name, child in module._modules.items():
                entry.children[name] = None if child is None else visit(child, prefix + name)
            return fqn

        visit(model, "")
        return tree

    def copy(self) -> Tree:
        """An independent tree over the same tensors."""
        return Tree({fqn: entry.copy() for fqn, entry in self.modules.items()}, dict(self.tensors))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Tree:
        """This tree over other tensors with the same keys."""
        return Tree(self.modules, dict(tensors))

    def module_id(self, fqn: str) -> str | None:
        """The key in `modules` of the module that `fqn` names, through any alias."""
        current = ""
        for name in fqn.split(".") if fqn else ():
            entry = self.modules.get(current)
            found = entry.children.get(name) if entry else None
            if found is None:
                return None
            current = found
        return current

    def key(self, fqn: str) -> str | None:
        """The key in `tensors` of the parameter or buffer that `fqn` names."""
        owner, _, name = fqn.rpartition(".")
        module = self.module_id(owner)
        if module is None:
            return None
        entry = self.modules[module]
        return entry.parameters.get(name) or entry.buffers.get(name)

    def local_tensors(self, module: str) -> dict[str, str]:
        """Tensor key -> path of it under `module`, the shortest first found."""
        found: dict[str, str] = {}
        for path, entry in self.walk(module):
            prefix = f"{path}." if path else ""
            for name, key in (*entry.parameters.items(), *entry.buffers.items()):
                if key is not None:
                    found.setdefault(key, prefix + name)
        return found

    def local_modules(self, module: str) -> dict[str, str]:
        """Module key -> path of it under `module`."""
        found: dict[str, str] = {}
        for path, _ in self.walk(module):
            target = self.module_id(f"{module}.{path}".strip("."))
            if target is not None:
                found.setdefault(target, path)
        return found

    def walk(self, module: str = "", path: str = "") -> Iterator[tuple[str, Entry]]:
        """Every (path under `module`, entry), aliases included, in registration order."""
        entry = self.modules[module]
        yield path, entry
        for name, child in entry.children.items():
            if child is not None:
                yield from self.walk(child, f"{path}.{name}" if path else name)

    def add(self, module: str, name: str, value: Tensor, order: Sequence[str] = ()) -> str:
        """Register `value` in the module with key `module`; returns its qualified name.

        A Parameter stays one, anything else becomes a persistent buffer. A taken name gets a
        number appended. `order` are the names before the edit: what takes the place of a dropped
        parameter stands before those that followed it.
        """
        entry = self.modules[module]
        local = self._free_name(module, name)
        names = entry.parameters if isinstance(value, nn.Parameter) else entry.buffers
        gone = [index for index, old in enumerate(order) if old not in entry.names]
        later = {old for old in order[gone[0] :]} if gone else set[str]()
        moved = {old: names.pop(old) for old in list(names) if old in later}
        names[local] = self._register(module, local, value)
        names.update(moved)
        return f"{module}.{local}" if module else local

    def constant(self, name: str, value: Tensor) -> str:
        """Register a tensor of the graph that is no part of the state dict, at the root."""
        local = self._free_name("", name)
        self.modules[""].buffers[local] = self._register("", local, value)
        self.modules[""].transient.add(local)
        return local

    def _free_name(self, module: str, name: str) -> str:
        local, count = name, 0
        while local in self.modules[module].names or local in self.modules[module].children:
            count += 1
            local = f"{name}_{count}"
        return local

    def _register(self, module: str, name: str, value: Tensor) -> str:
        known = next((key for key, held in self.tensors.items() if held is value), None)
        if known is not None:
            return known  # another name of it
        key = f"{module}.{name}" if module else name
        while key in self.tensors:
            key += "_"
        self.tensors[key] = value
        return key

    def drop(self, module: str, name: str) -> None:
        """Forget a parameter or buffer of one module; the tensor goes with its last name."""
        entry = self.modules[module]
        key = entry.parameters.pop(name, None) or entry.buffers.pop(name, None)
        if key is None:
            return
        others = (
            key in other.parameters.values() or key in other.buffers.values()
            for other in self.modules.values()
        )
        if not any(others):
            self.tensors.pop(key, None)

    def forget(self, key: str) -> None:
        """Drop a tensor under every name that it still has."""
        for module, entry in self.modules.items():
            held = {**entry.parameters, **entry.buffers}
            for name in [name for name, value in held.items() if value == key]:
                self.drop(module, name)

    def collect(self, root: nn.Module) -> dict[str, Tensor]:
        """The tensors that `root`, a module built from this tree, holds now, by their keys."""
        found: dict[str, Tensor] = {}
        for fqn, entry in self.modules.items():
            module = root
            for part in fqn.split(".") if fqn else ():
                module = module._modules[part] or module
            for names, held in (
                (entry.parameters, module._parameters),
                (entry.buffers, module._buffers),
            ):
                for name, key in names.items():
                    value = held.get(name)
                    if key is not None and value is not None:
                        found[key] = value
        return found

    def fill(self, root: nn.Module, classes: Callable[[str, Entry], type[nn.Module]]) -> None:
        """Give `root`, a bare module, the contents of the tree; `classes` picks the others'."""
        made: dict[str, nn.Module] = {"": root}

        def build(module: str) -> nn.Module:
            if module not in made:
                made[module] = _bare(classes(module, self.modules[module]))
                attach(module)
            return made[module]

        def attach(module: str) -> None:
            entry, owner = self.modules[module], made[module]
            owner.training = False
            for name, key in entry.parameters.items():
                value = None if key is None else self.tensors[key]
                owner._parameters[name] = value  # pyright: ignore[reportArgumentType]
            for name, key in entry.buffers.items():
                owner._buffers[name] = None if key is None else self.tensors[key]
            owner._non_persistent_buffers_set.update(entry.transient & set(entry.buffers))
            for name, child in entry.children.items():
                owner._modules[name] = None if child is None else build(child)

        attach("")


class Leaf(nn.Module):
    """A module of the original whose parameters remain and whose forward moved to its caller."""

    def extra_repr(self) -> str:
        tensors = [*self._parameters.items(), *self._buffers.items()]
        return ", ".join(
            f"{name}={list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for name, value in tensors
            if isinstance(value, torch.Tensor)
        )


def leaf_class(entry: Entry) -> type[nn.Module]:
    """The class of a module that has no code of its own."""
    if entry.base in CONTAINERS:
        return CONTAINERS[entry.base]
    return type(entry.cls, (Leaf,), {"__module__": __name__})


def _base(module: nn.Module) -> str:
    return next(
        (name for name, base in CONTAINERS.items() if isinstance(module, base)),
        "Module",
    )


def _bare(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module
