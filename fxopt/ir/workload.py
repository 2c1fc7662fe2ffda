"""Workloads: what the rewritten module will be asked to do, as sizes that costs refer to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

LENGTHY = 3
"""Axes up to which an input is [batch, length, ...]; with more it is an image or a video, whose
second axis is no length."""


@dataclass(frozen=True)
class Scenario:
    """One kind of call: `queries` new tokens a sequence after `past` cached ones.

    `repeats` is how often the workload makes such a call, so that its latency is a sum. `source`
    is how many tokens an encoder reads, once, for each sequence; 0 where there is no encoder.
    `keep` is of how many tokens of a sequence, the newest, logits are wanted; 0: of all.
    """

    name: str
    batch: int
    queries: int
    past: int
    repeats: int = 1
    source: int = 0
    keep: int = 0

    @property
    def length(self) -> int:
        """Keys that the last query of the call can see."""
        return self.past + self.queries


@dataclass(frozen=True)
class Forward:
    """One pass over the example inputs; `batch` and `length` are read from them when None. Images
    and videos have no length."""

    batch: int | None = None
    length: int | None = None
    kind: Literal["forward"] = "forward"


@dataclass(frozen=True)
class Generate:
    """A prompt of `prompt` tokens for `batch` sequences, then `new_tokens` decoding steps."""

    batch: int
    prompt: int
    new_tokens: int = 128
    kind: Literal["generate"] = "generate"

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"Generate.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Train:
    """One training step on `batch` sequences of `seq` tokens."""

    batch: int
    seq: int
    kind: Literal["train"] = "train"


@dataclass(frozen=True)
class Several:
    """Workloads by name, all `Generate` or all `Forward`, that one module serves.

    Its latency is the sum of theirs, its memory that of the largest; each has latency rows of its
    own, "name" and "name.call". `optimize` and `plan` take a mapping and make one of these.
    """

    parts: tuple[tuple[str, Forward | Generate], ...]
    kind: Literal["several"] = "several"

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if len(set(names)) != len(names) or not names:
            raise ValueError("workload: takes at least one workload, each under its own name")
        for name in names:
            if not name or "." in name or "@" in name:
                raise ValueError(f"workload: the name {name!r} is empty or has a '.' or '@' in it")
        if len({type(part) for _, part in self.parts}) > 1:
            raise ValueError("workload: those by name are all fxopt.Generate or all fxopt.Forward")


Workload = Forward | Generate | Train | Several


def parts(workload: Workload) -> dict[str, Forward | Generate | Train]:
    """The workloads by name; one alone has the name ""."""
    return dict(workload.parts) if isinstance(workload, Several) else {"": workload}


def named(name: str, call: str) -> str:
    """The name of a call of the workload `name`."""
    return f"{name}.{call}" if name else call


def scenarios(workload: Workload, source: int = 0) -> tuple[Scenario, ...]:
    """The calls a workload consists of; its latency is their sum weighted by `repeats`.

    Calls of named workloads are "name.call". With `source` the prompt is what an encoder reads, as
    that many tokens, and the decoder begins with one token.
    """
    if isinstance(workload, Several):
        return tuple(
            replace(call, name=named(name, call.name))
            for name, part in workload.parts
            for call in scenarios(part, source)
        )
    if isinstance(workload, Generate) and source:
        batch, new = workload.batch, workload.new_tokens
        return (
            Scenario("prefill", batch, 1, 0, source=source),
            Scenario("decode", batch, 1, max(1, new // 2), repeats=new, source=source),
        )
    if isinstance(workload, Generate):
        middle = workload.prompt + workload.new_tokens // 2
        return (
            Scenario("prefill", workload.batch, workload.prompt, 0, keep=1),
            Scenario("decode", workload.batch, 1, middle, repeats=workload.new_tokens, keep=1),
        )
    if isinstance(workload, Train):
        return (Scenario("train", workload.batch, workload.seq, 0),)
    return (Scenario("forward", workload.batch or 1, workload.length or 1, 0),)
