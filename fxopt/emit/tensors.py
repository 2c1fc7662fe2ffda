"""The tensors of a saved module: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ir.errors import FxoptError
from .facts import tensor_facts
from .program import Program

# No name under which transformers finds weights by itself: without fxopt it would fill the
# original's class with what fits and leave the rest random.
TENSORS, INDEX = "fxopt.safetensors", "fxopt.safetensors.index.json"


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, limit: int | None = None) -> str:
    """Write `tensors` into `folder`, no file larger than `limit` bytes unless one tensor is.

    Returns the name of the file to open: that of the tensors, or of the index of several files.
    """
    stored = _separate(tensors)
    frozen = {k for k, v in tensors.items() if isinstance(v, nn.Parameter) and not v.requires_grad}
    parts = list(_parts(stored, limit))
    names = [TENSORS]
    if len(parts) > 1:
        count = len(parts)
        names = [f"fxopt-{part:05}-of-{count:05}.safetensors" for part in range(1, count + 1)]
    for name, keys in zip(names, parts, strict=True):
        metadata = {"format": "pt", "frozen": json.dumps([key for key in keys if key in frozen])}
        save_file({key: stored[key] for key in keys}, folder / name, metadata=metadata)
    if len(parts) == 1:
        return TENSORS
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in stored.values())},
        "weight_map": {k: name for name, keys in zip(names, parts, strict=True) for k in keys},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return INDEX


def load_tensors(program: Program, folder: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of `program` from `folder`, by their keys; parameters are Parameters again.

    The files must hold exactly these keys, in the shapes and dtypes of the graph: FxoptError
    names those that are missing, not asked for, or different.
    """
    tree = program.tree
    modules = tree.modules.values()
    parameters = {key for entry in modules for key in entry.parameters.values() if key}
    wanted = parameters | {key for entry in modules for key in entry.buffers.values() if key}
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        values, frozen = _read(path, device)
        for key, value in values.items():
            if key in parameters:
                trains = value.is_floating_point() and key not in frozen
                value = nn.Parameter(value, requires_grad=trains)
            found[key] = value
    _check_keys(wanted, set(found), folder)
    for node in program.graph.find_nodes(op="get_attr"):
        known, key = tensor_facts(node), tree.key(str(node.target))
        if known is None or key is None:
            continue
        value = found[key]
        if (value.dtype, tuple(value.shape)) != known:
            raise FxoptError(
                f"{folder}: {key} is {value.dtype} {list(value.shape)} and the graph reads "
                f"{known.dtype} {list(known.shape)}: the files are of different modules; save again"
            )
    return found


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        plain = value.detach().contiguous()
        address = plain.untyped_storage().data_ptr()
        stored[key] = plain.clone() if address in storages else plain
        storages.add(address)
    return stored


def _parts(stored: Mapping[str, Tensor], limit: int | None) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for key, value in stored.items():
        if part and limit is not None and size + value.nbytes > limit:
            yield part
            part, size = [], 0
        part.append(key)
        size += value.nbytes
    yield part


def _files(folder: Path) -> Sequence[Path]:
    """The files that hold the tensors; an index may name nothing outside of its folder."""
    index = folder / INDEX
    if not index.exists():
        return [folder / TENSORS]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(Path(name).name == name and name.endswith(".safetensors") for name in names):
            raise ValueError("it names something else than files of this folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FxoptError(f"{index}: not an index that fxopt wrote ({error}); save again") from error
    return [folder / name for name in sorted(names)]


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of one file and the keys of those that do not train."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            frozen = set(json.loads((file.metadata() or {}).get("frozen", "[]")))
            return {key: file.get_tensor(key) for key in file.keys()}, frozen  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FxoptError(f"{path}: unreadable or truncated ({error}); save again") from error


def _check_keys(wanted: set[str], found: set[str], folder: Path) -> None:
    for what, keys in (("it lacks", wanted - found), ("it also holds", found - wanted)):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (", …" if len(keys) > 5 else "")
            raise FxoptError(f"{folder}, tensors: {what} {shown}; save the module again")
