"""Files of plans: written under a temporary name and renamed, read with one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import PlanError


def tensors_path(path: Path) -> Path:
    """Where the tensors of the plan at `path` lie."""
    if path.suffix == ".safetensors":
        raise PlanError(f"{path} is where a plan's tensors go: name the plan itself, as plan.json")
    return path.with_suffix(".safetensors")


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file next to `path`, then rename it; nothing half-written."""
    if path.is_dir():
        raise PlanError(f"{path} is a folder: name a file in it, as {path / 'plan.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror or error}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_plan(
    path: Path, text: Callable[[str | None], str], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a plan and its tensors (of any device, strided or shared) beside it, or neither.

    `text` gives the plan from the SHA-256 of the file of tensors, None without any. The pair that
    stood there before stands until both are written.
    """
    if not tensors:
        return write_text(path, text(None))
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def both(temporary: Path) -> None:
        save_file(own, temporary)
        write_text(path, text(_sha256(temporary)))

    # The tensors' rename comes after the plan's, and alone: it cannot fail for want of room.
    write_atomically(tensors_path(path), both)
    return path


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors that belong to a plan; none when their file is not there."""
    if not path.exists():
        return {}
    if _sha256(path) != sha256:
        raise PlanError(
            f"{path} does not belong to the plan beside it, or is damaged: copy both files "
            "together, or remove it to fit the plan again from calibration data"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise PlanError(f"{path} holds no tensors: {error}") from None


def read_plan(path: Path, version: int) -> str:
    """The text of a plan file: JSON, an object, of this schema version."""
    if path.is_dir():
        raise PlanError(f"{path} is a folder: name the plan itself, as {path / 'plan.json'}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path} is not a text file, so not a plan") from None
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not JSON, or cut short: {error}"
        raise PlanError(f"{path} {what}") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise PlanError(f"{path} is JSON, but not a plan: it has no schema_version")
    if data["schema_version"] != version:
        raise PlanError(
            f"{path} has schema version {data['schema_version']!r}; this fxopt reads {version}. "
            f"Make the plan again, or use what wrote it ({data.get('created_by', 'unknown')})"
        )
    return text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
