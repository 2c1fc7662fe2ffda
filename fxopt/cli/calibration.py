"""Calibration inputs: from a text file, a JSON-lines file, or Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxopt.ir.errors import FxoptError

from .models import transformers
from .named import made_by

Tokenize = Callable[[str], list[int]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
SEQUENCES = 12
LENGTH = 512
"""Tokens a sequence where neither the user nor the workload says."""


def load_calibration(source: str, model_source: str, model: nn.Module, length: int) -> list[Any]:
    """Inputs from a text file, a JSON-lines file, or what `package.module:factory` yields.

    Text becomes `SEQUENCES` sequences of `length` tokens, spread over the file (fewer and shorter
    when it is short). A line of JSON is a text, {"text": ...}, or a dict of inputs as lists. Texts
    longer than `length` tokens are cut; given tokens are not.
    """
    path = Path(source)
    if not path.is_file():
        if ":" in source and not path.exists():
            return _of_factory(source)
        raise FxoptError(
            f"calibration: there is no file {source!r}; pass a text file, a .jsonl file or "
            "package.module:factory"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FxoptError(f"calibration: {source} is not UTF-8 text") from None
    length = min(length, _config(model, "max_position_embeddings") or length)
    if path.suffix in (".jsonl", ".ndjson"):
        inputs = list(_json_lines(source, text, Path(model_source), model, length))
    else:
        tokens = tokenizer(Path(model_source), model)(text)
        inputs = [{"input_ids": row} for row in _windows(tokens, length)]
    if not inputs:
        raise FxoptError(f"calibration: {source} holds no tokens")
    return inputs


def tokenizer(folder: Path, model: nn.Module) -> Tokenize:
    """The folder's tokenizer; bytes for a model of 256 tokens that has none."""
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        try:
            auto = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise FxoptError(
                f"calibration: the tokenizer of {folder} cannot be loaded: {error}"
            ) from error
        return lambda text: cast("list[int]", auto(text, verbose=False)["input_ids"])
    if _config(model, "vocab_size") == 256:
        return lambda text: list(text.encode())
    raise FxoptError(
        f"calibration: {folder} holds no tokenizer, and its tokens are not bytes (vocab_size 256); "
        'pass a .jsonl file of {"input_ids": [...]} lines, or package.module:factory'
    )


def _config(model: nn.Module, name: str) -> int | None:
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None


def _of_factory(source: str) -> list[Any]:
    made = made_by(source, "calibration")
    if isinstance(made, Tensor | dict | str) or not isinstance(made, Iterable):
        raise FxoptError(
            f"calibration: {source} gives {type(made).__name__}, not an iterable of inputs, such "
            "as a list of tensors, tuples or dicts"
        )
    try:
        inputs = list(cast("Iterable[Any]", made))
    except Exception as error:
        raise FxoptError(
            f"calibration: iterating over {source} raised {type(error).__name__}: {error}"
        ) from error
    if not inputs:
        raise FxoptError(f"calibration: {source} yields nothing")
    return inputs


def _windows(tokens: list[int], length: int) -> list[Tensor]:
    """Up to `SEQUENCES` rows [1, length], spread evenly; at least three where tokens permit."""
    length = max(min(length, len(tokens) // 3 or len(tokens)), 1)
    count = min(SEQUENCES, len(tokens) // length)
    step = len(tokens) // max(count, 1)
    return [torch.tensor([tokens[i * step : i * step + length]]) for i in range(count)]


def _json_lines(
    source: str, text: str, folder: Path, model: nn.Module, length: int
) -> Iterable[dict[str, Tensor]]:
    tokenize: Tokenize | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item: Any = json.loads(line)
            item = item.get("text", item) if isinstance(item, dict) else item
            if isinstance(item, str):
                # only texts need a tokenizer
                tokenize = tokenize or tokenizer(folder, model)
                if tokens := tokenize(item)[:length]:
                    yield {"input_ids": torch.tensor([tokens])}
            elif isinstance(item, dict):
                yield _inputs_of(cast("dict[str, Any]", item), _config(model, "vocab_size"))
            else:
                raise ValueError("it is neither a text nor a dict of inputs")
        except (ValueError, TypeError) as error:
            raise FxoptError(f"calibration: {source}, line {number}: {error}") from None


def _inputs_of(item: dict[str, Any], vocabulary: int | None) -> dict[str, Tensor]:
    """One sequence as tensors [1, ...]; integers stay integers."""
    inputs = {name: torch.tensor([value]) for name, value in item.items()}
    if not inputs or any(value.numel() == 0 for value in inputs.values()):
        raise ValueError("it holds an empty input")
    ids = inputs.get("input_ids")
    if ids is not None and vocabulary and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"input_ids must lie in 0..{vocabulary - 1}, the model's vocabulary")
    return inputs
