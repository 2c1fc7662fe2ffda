"""A module as a folder. Loading executes nothing from it: the source is generated again."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import FxoptError
from .module import OptimizedModule, module_class
from .serial import from_text, to_text
from .tensors import load_tensors, save_tensors

logger = logging.getLogger("fxopt")

GRAPH, SOURCE, PLAN = "graph.json", "model.py", "plan.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
METHOD = "fxopt"
# What tokenizers and processors write beside a model, and what people add to a folder of one.
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
KEPT = (*TOKENIZER, "README.md", "LICENSE*", ".gitattributes")


def save(module: OptimizedModule, path: str | Path, *, shard_bytes: int | None = None) -> None:
    """Write `module` to the folder `path`: graph, tensors, plan, configs, and source to read.

    The folder appears whole or not at all. One that an earlier `save` wrote is replaced, except
    for tokenizer files, README.md and licences in it; tokenizer files come from the folder that
    the original was loaded from where it has none. FxoptError when `path` is a file, or a folder
    with something else in it. `shard_bytes` limits each file of tensors.
    """
    target = Path(path)
    _check_target(target)
    text = to_text(module.program, indent=1)
    with _replacing(target) as folder:
        (folder / GRAPH).write_text(text, encoding="utf-8")
        (folder / SOURCE).write_text(module.source, encoding="utf-8")
        weights = save_tensors(module.program.tree.collect(module), folder, shard_bytes)
        if module.plan is not None:
            module.plan.save(folder / PLAN)
        if hasattr(module.config, "to_json_file"):
            _saved_config(module, weights).to_json_file(folder / CONFIG)
        if hasattr(module.generation_config, "to_json_file"):
            module.generation_config.to_json_file(folder / GENERATION)
        _copy_missing(target, folder, KEPT)
        original = getattr(module.config, "name_or_path", None)
        if original:
            _copy_missing(Path(original), folder, TOKENIZER)


def load(path: str | Path, device: torch.device | str = "cpu") -> OptimizedModule:
    """The module that `save` wrote to `path`, on `device`.

    Neither the original's class nor any code in the folder is needed or run. A `model.py` that
    differs from what is generated here is reported through the logger. FxoptError when the folder
    is incomplete or was edited into something else.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FxoptError(f"{folder} {what}; pass the folder that opt.save() wrote")
    if not (folder / GRAPH).exists() and (folder / CONFIG).exists():
        raise FxoptError(
            f"{folder} holds a model as transformers saves it, and no {GRAPH} of opt.save(); load "
            "it with from_pretrained and pass the model to fxopt.optimize"
        )
    program = from_text(_text(folder / GRAPH))
    tensors = load_tensors(program, folder, device)
    config = _config(folder / CONFIG)
    module = module_class(program, config)(program, tensors)
    module.config = config
    module.generation_config = _generation_config(folder / GENERATION)
    module.plan = _plan(folder / PLAN)
    if module.plan is not None:
        module.report = module.plan.report("loaded: not measured again")
    _compare_source(module, folder / SOURCE)
    return module.eval()


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FxoptError(f"{target} is a file; opt.save() writes a folder")
    if target.is_dir() and not (target / GRAPH).exists():
        others = [entry.name for entry in target.iterdir() if not _matches(entry, KEPT)]
        if others:
            raise FxoptError(
                f"{target} holds something else than a saved module ({sorted(others)[0]}); "
                "name another folder"
            )


def _matches(entry: Path, patterns: Sequence[str]) -> bool:
    """Whether `entry` is a file of one of these names; Python files never are."""
    named = any(fnmatch(entry.name, pattern) for pattern in patterns)
    return named and entry.suffix != ".py" and entry.is_file()


def _copy_missing(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for entry in source.iterdir() if source.is_dir() else ():
        if _matches(entry, patterns) and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)


def _saved_config(module: OptimizedModule, weights: str) -> Any:
    """The config by which transformers finds its way back here (`emit.pretrained`)."""
    config = copy.deepcopy(module.config)
    config.architectures = [module.program.name]
    config.dtype = module.dtype
    config.quantization_config = {"quant_method": METHOD, "weights": weights}
    for name in ("auto_map", "transformers_weights"):
        vars(config).pop(name, None)
    return config


@contextmanager
def _replacing(target: Path) -> Generator[Path]:
    """A new folder beside `target` that takes its place when the block ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(target)
    old: Path | None = None
    try:
        yield work
        mask = _umask()
        work.chmod(0o777 & ~mask)
        for file in work.iterdir():
            file.chmod(0o666 & ~mask)
        if target.exists():
            old = _beside(target)
            os.replace(target, old / "old")
        os.replace(work, target)
    except BaseException:
        if old is not None and not target.exists() and (old / "old").exists():
            os.replace(old / "old", target)
        raise
    finally:
        for leftover in (work, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def _beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxoptError(
            f"{path}: cannot be read ({error}); pass the folder that opt.save() wrote"
        ) from error


def _config(path: Path) -> Any:
    """The Hugging Face config; code that a config names is never fetched or run."""
    if not path.exists() or not find_spec("transformers"):
        return None
    from transformers import AutoConfig, PreTrainedConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError, OSError):
        config = PreTrainedConfig.from_json_file(path)
    vars(config).pop("quantization_config", None)
    return config


def _generation_config(path: Path) -> Any:
    if not path.exists() or not find_spec("transformers"):
        return None
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(json.loads(_text(path)))


def _plan(path: Path) -> Any:
    if not path.exists():
        return None
    from ..ir.plan import Plan

    return Plan.load(path)


def _compare_source(module: OptimizedModule, path: Path) -> None:
    if path.exists() and _text(path) != module.source:
        logger.warning(
            "%s differs from the source that this fxopt generates from %s: it was edited or "
            "written by another version. It was not run; the generated source is used.",
            path,
            GRAPH,
        )
