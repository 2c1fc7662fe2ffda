"""The model that a command is given: a Hugging Face folder, or a factory of the user's."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxopt.ir.errors import FxoptError

from .named import made_by


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and the example inputs that came with it, if any did."""

    module: nn.Module
    example: Any = None


def load_model(
    source: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Loaded:
    """A Hugging Face folder, or what `package.module:factory` gives: a module, or a pair of a
    module and its example inputs. Moved to `device` when there is one; a folder's model in `dtype`,
    or as it is stored."""
    folder = Path(source)
    if folder.is_dir():
        loaded = Loaded(_from_folder(folder, dtype))
    elif folder.exists():
        raise FxoptError(f"{source} is a file: name the folder that holds config.json and weights")
    elif ":" not in source:
        raise FxoptError(
            f"there is no folder {source!r}; a model is a Hugging Face folder on this machine, or "
            "package.module:factory"
        )
    elif dtype is not None:
        raise FxoptError(f"--dtype: {source} makes its model in a dtype of its own")
    else:
        loaded = _from_factory(source)
    module = loaded.module.eval()
    if device is not None:
        module = module.to(device)
    return Loaded(module, on_device(loaded.example, device))


def on_device(inputs: Any, device: torch.device | None) -> Any:
    """Inputs with their tensors on `device`; as they are when there is none."""
    if device is None:
        return inputs
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise FxoptError(
            "Hugging Face folders need transformers: pip install 'fxopt[hf]'"
        ) from None


def _from_factory(source: str) -> Loaded:
    made = made_by(source, "model")
    if isinstance(made, tuple):
        pair = cast("tuple[Any, ...]", made)
        if len(pair) != 2:
            raise FxoptError(
                f"model: {source} gives a tuple of {len(pair)}; a pair (module, example_inputs) "
                "is meant"
            )
        made, example = pair
    else:
        example = None
    if not isinstance(made, nn.Module):
        raise FxoptError(
            f"model: {source} gives {type(made).__name__}, not a torch.nn.Module or a pair "
            "(module, example_inputs)"
        )
    return Loaded(made, example)


def _from_folder(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    if (folder / "graph.json").exists():
        raise FxoptError(f"{folder} was written by fxopt: start from the original model's folder")
    config = folder / "config.json"
    if not config.exists():
        raise FxoptError(f"{folder} is no Hugging Face model: it has no config.json")
    hub = transformers()
    hub.utils.logging.disable_progress_bar()
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        found = getattr(hub, names[0], None)
        if found is None:
            raise FxoptError(
                f"{folder} is a {names[0]}, which this transformers does not have; load it "
                "yourself and pass package.module:factory"
            )
        model, info = found.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except FxoptError:
        raise
    except Exception as error:  # what a broken folder raises depends on where it is broken
        raise FxoptError(f"{folder} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise FxoptError(
            f"{folder}: its weights lack {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, which would be "
            "random; the folder is incomplete, or config.json names another class than they are of"
        )
    return model
