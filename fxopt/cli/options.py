"""Options that commands share, and what they are made into."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxopt.ir.budget import Budget
from fxopt.ir.errors import FxoptError
from fxopt.ir.workload import Forward, Generate, Workload

from .words import as_options

if TYPE_CHECKING:
    import torch

BUDGET, WORKLOAD, SEARCH = "Budget (at least one)", "Workload", "Search"


class Kind(StrEnum):
    forward = "forward"
    generate = "generate"


class Target(StrEnum):
    portable = "portable"
    ort = "ort"


class Objective(StrEnum):
    latency = "latency"
    memory = "memory"
    error = "error"


def rewrite_names(incomplete: str) -> list[str]:
    """Names of rewrites for shells to complete."""
    from fxopt.passes import available

    return [name for name in available() if name.startswith(incomplete)]


def _option(
    panel: str | None,
    text: str,
    *names: str,
    at_least: int | None = None,
    complete: Callable[[str], list[str]] | None = None,
) -> Any:
    return typer.Option(
        *names, help=text, rich_help_panel=panel, show_default=False, min=at_least,
        autocompletion=complete,
    )  # fmt: skip


Model = Annotated[
    str,
    typer.Argument(help="Hugging Face folder, or package.module:factory.", metavar="MODEL"),
]
PlanFile = Annotated[
    Path, typer.Argument(help="plan.json, or a folder that holds one.", metavar="PLAN")
]
Saved = Annotated[
    Path, typer.Argument(help="Folder written by optimize or apply.", metavar="FOLDER")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
Html = Annotated[Path | None, _option(None, "Page to write.")]


@dataclass(frozen=True)
class Source:
    """Where inputs come from, and where the model lies."""

    calibration: Annotated[
        str | None, _option(None, "Text file, .jsonl file, or package.module:factory.")
    ] = None
    length: Annotated[int | None, _option(None, "Tokens a calibration sequence.", at_least=1)] = (
        None
    )
    device: Annotated[str | None, _option(None, "cpu, cuda, cuda:1; omitted: as loaded.")] = None
    dtype: Annotated[str | None, _option(None, "Of the folder's model; omitted: as stored.")] = None


@dataclass(frozen=True)
class Rows:
    """The rows of a budget, as `Budget` reads them."""

    kl: Annotated[str | None, _option(BUDGET, "KL(original‖rewritten), nats a position: 0.02.")] = (
        None
    )
    loss_increase: Annotated[str | None, _option(BUDGET, "Nats a position: 0.05.")] = None
    relative_error: Annotated[str | None, _option(BUDGET, "‖y−ŷ‖/‖y‖: 0.01.")] = None
    latency: Annotated[
        list[str] | None, _option(BUDGET, "12ms, 0.7x, or decode=0.7x once for each scenario.")
    ] = None
    memory: Annotated[str | None, _option(BUDGET, "Device peak: 8GiB, 60%.")] = None
    weights: Annotated[str | None, _option(BUDGET, "500MB, 40%.")] = None
    kv_cache: Annotated[str | None, _option(BUDGET, "40%, 2GiB.")] = None
    activations: Annotated[str | None, _option(BUDGET, "50%, 4GiB.")] = None
    minimize: Annotated[Objective | None, _option(BUDGET, "What to improve within the rows.")] = (
        None
    )

    def budget(self) -> Budget:
        """The budget; its mistakes are usage errors."""
        given: dict[str, Any] = {k: v for k, v in asdict(self).items() if v not in (None, [], ())}
        named = [entry.partition("=") for entry in given.pop("latency", [])]
        if named and all(mark for _, mark, _ in named):
            given["latency"] = {name: value for name, _, value in named}
        elif len(named) == 1:
            given["latency"] = named[0][0]
        elif named:
            raise typer.BadParameter("give one latency, or name=value for each scenario")
        if self.minimize is not None:
            given["minimize"] = self.minimize.value
        try:
            return Budget(**given)
        except ValueError as error:
            raise typer.BadParameter(as_options(str(error))) from None


@dataclass(frozen=True)
class Sizes:
    """What the model will be asked to do."""

    batch: Annotated[int | None, _option(WORKLOAD, "Sequences at once.", at_least=1)] = None
    prompt: Annotated[
        int | None, _option(WORKLOAD, "Tokens of the prompt, or of a forward pass.", at_least=1)
    ] = None
    new_tokens: Annotated[
        int | None,
        _option(WORKLOAD, "Tokens to generate; 0, no sizes: a forward pass.", at_least=0),
    ] = None

    def workload(self) -> Workload | None:
        """Generate when tokens are to be generated, Forward when only sizes are given."""
        if self.batch is None and self.prompt is None and self.new_tokens is None:
            return None
        if not self.new_tokens and (self.new_tokens == 0 or self.prompt is None):
            return Forward(self.batch, self.prompt)
        if self.prompt is None:
            raise typer.BadParameter("--new-tokens needs --prompt, the tokens before them")
        return Generate(self.batch or 1, self.prompt, self.new_tokens or 128)


@dataclass(frozen=True)
class Search:
    """What may be rewritten, and how long to look."""

    keep: Annotated[
        list[str] | None, _option(SEARCH, "Site to leave alone: name or re:pattern.")
    ] = None
    rewrites: Annotated[
        list[str] | None,
        _option(SEARCH, "Rewrite to use: name or re:pattern.", complete=rewrite_names),
    ] = None
    at: Annotated[str | None, _option(SEARCH, "Rewrite only this submodule.")] = None
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=SEARCH)] = 0
    time_limit: Annotated[float | None, _option(SEARCH, "Seconds for scoring and search.")] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `fxopt.optimize`."""
        given = asdict(self)
        return {**given, "keep": given["keep"] or (), "rewrites": given["rewrites"] or None}


def tokens_of(workload: Workload | None) -> int | None:
    """Tokens that one sequence of the workload comes to hold."""
    if isinstance(workload, Generate):
        return workload.prompt + workload.new_tokens
    return workload.length if isinstance(workload, Forward) else None


def device(name: str | None) -> torch.device | None:
    """A device by its name in torch; FxoptError when it is not here."""
    import torch

    if name is None:
        return None
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"--device {name!r}: write cpu, cuda or cuda:<number>")
    found, count = torch.device(name), torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise FxoptError(
            f"--device {name}: this torch sees {count} CUDA devices here; `fxopt doctor` says more"
        )
    return found


def dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name in torch."""
    import torch

    found: Any = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(found, torch.dtype):
        raise typer.BadParameter(f"--dtype {name!r} is no dtype of torch; write float32 or float16")
    return found
