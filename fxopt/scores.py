"""Errors of candidates, kept on disk: another budget for the same model and data scores nothing.

What is kept is a number each; tensors are prepared again for the candidates that are chosen.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .cost_models.hardware import cache_folder, read_json, write_json
from .decide.propose import Proposal
from .ir.rewrite import Rewrite

N = TypeVar("N", float, float | None)
INTERVAL = 5.0
"""Seconds between writes, so that an interrupted scoring goes on where it stopped."""


class Scores:
    """Numbers by key for one model, one calibration and one way of measuring (`identity`)."""

    def __init__(self, identity: Iterable[str], folder: Path | None = None) -> None:
        digest = hashlib.sha256("|".join(identity).encode()).hexdigest()[:16]
        self._path = (folder or cache_folder()) / f"scores-{digest}.json"
        stored = read_json(self._path)
        self._known: dict[str, Any] = stored if isinstance(stored, dict) else {}
        self._saved, self._dirty = time.monotonic(), False

    def __call__(self, key: str, compute: Callable[[], N]) -> N:
        """The number (or None) at `key`, computed where it is not known yet."""
        if key not in self._known:
            self._known[key] = compute()
            self._dirty = True
            if time.monotonic() > self._saved + INTERVAL:
                self.save()
        return self._known[key]

    def __contains__(self, key: str) -> bool:
        """Whether the number at `key` is known."""
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        """The number at `key`, which is known."""
        return self._known[key]

    def save(self) -> None:
        """Write what was computed since the last time."""
        if self._dirty:
            stored = read_json(self._path)
            write_json(self._path, {**(stored if isinstance(stored, dict) else {}), **self._known})
        self._saved, self._dirty = time.monotonic(), False


def key_of(proposals: Sequence[Proposal]) -> str:
    """What tells candidates at their sites from all others, their rewrites' code included."""
    return "+".join(map(_key, proposals))


def _key(proposal: Proposal) -> str:
    rewrite, candidate = proposal.rewrite, proposal.candidate
    values = ",".join(f"{name}={value}" for name, value in sorted(candidate.parameters.items()))
    site = f"{proposal.site.family}:{proposal.site.key}"
    return f"{site}:{rewrite.name}@{rewrite.version}.{_source(type(rewrite))}({values})"


@cache
def _source(kind: type[Rewrite]) -> str:
    """A digest of the module that a rewrite is written in."""
    try:
        text = inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):  # defined in a session without a file
        return "interactive"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def data_digest(batches: Any) -> str:
    """A digest of all tensors and values among calibration batches."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(batches):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
