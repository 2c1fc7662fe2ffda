"""`from_pretrained` of transformers for saved modules: a quantizer of the method "fxopt".

transformers makes the original's class without memory, hands it to the quantizer of the method
that `config.json` names, and returns that object. Here it becomes the module that `load` reads
from the same folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..ir.errors import FxoptError
from ..ir.units import BYTES
from .module import OptimizedModule
from .save import GRAPH, METHOD, PLAN, SOURCE, load, save
from .tensors import TENSORS

_OF_TRANSFORMERS = ("quantization_config", "_is_quantized", "transformers_weights")
_BESIDE = (GRAPH, SOURCE, PLAN, Path(PLAN).with_suffix(".safetensors").name)


class FxoptConfig(QuantizationConfigMixin):
    """`quantization_config` of a saved module. `weights` is the file of its tensors, or of their
    index."""

    def __init__(self, quant_method: str = METHOD, weights: str = TENSORS) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.weights = weights


class FxoptQuantizer(HfQuantizer):
    """Makes what `from_pretrained` returns the optimised module of the folder."""

    quantization_config: FxoptConfig
    _dtype: torch.dtype | None = None
    _folder: Path
    _device: torch.device

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise FxoptError(
                "quantization_config: fxopt rewrites no model while it is loaded; load it without, "
                "call fxopt.optimize, and save the result with save_pretrained"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if not isinstance(device_map, str):
            return device_map
        return {"": torch.accelerator.current_accelerator() or torch.device("cpu")}

    def update_tp_plan(self, config: Any) -> Any:
        """The last call before the files are looked for: here it is said which."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any) -> list[Any]:
        return []

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Leaves nothing in `model` that transformers would load, tie or initialise."""
        devices = set((device_map or {"": "cpu"}).values())
        if len(devices) > 1 or "disk" in devices:
            raise FxoptError(
                "device_map: an optimised module runs on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; pass device_map={{'': 0}}"
            )
        self._device = torch.device(devices.pop())
        self._folder = _complete(Path(checkpoint_files[0]).parent, model.config.name_or_path)
        for held in (model._modules, model._parameters, model._buffers):
            held.clear()
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {""}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        module = load(self._folder, self._device)
        if module.program.name != type(model).__name__:
            raise FxoptError(
                f"{self._folder} holds a {module.program.name} and a {type(model).__name__} was "
                f"asked for; use {module.program.name}.from_pretrained, or fxopt.load"
            )
        if self._dtype not in (None, module.dtype):
            raise FxoptError(
                f"dtype: {self._folder} computes in {module.dtype}, which is part of its code; "
                f"load it without dtype, or optimise the original in {self._dtype}"
            )
        module.config = model.config
        for name in _OF_TRANSFORMERS:
            vars(module.config).pop(name, None)
        if module.generation_config is not None:
            module.generation_config = model.generation_config
        _become(model, module)
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True


def save_pretrained(
    module: OptimizedModule,
    save_directory: str | Path,
    *,
    max_shard_size: int | str = "50GB",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """`opt.save_pretrained`; see `OptimizedModule.save_pretrained`."""
    unknown = [name for name, value in kwargs.items() if value and name != "safe_serialization"]
    if unknown:
        raise FxoptError(
            f"save_pretrained: an optimised module does not take {', '.join(unknown)}; save it "
            "without, and upload the folder with huggingface_hub.upload_folder"
        )
    if not hasattr(module.config, "to_json_file"):
        raise FxoptError(
            f"{module.program.name} has no Hugging Face config, by which from_pretrained would "
            "find it; use opt.save and fxopt.load"
        )
    if is_main_process:
        save(module, save_directory, shard_bytes=_bytes(max_shard_size))


def register() -> None:
    """Make `from_pretrained` and the text generation pipeline know optimised modules."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(FxoptConfig)
        auto.register_quantizer(METHOD)(FxoptQuantizer)
    # The pipeline compares class names; the key stands for no model type.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(METHOD, "OptimizedForCausalLM")


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+)\s*(\w+)", size.strip())
    if found is None or found[2].lower() not in BYTES:
        raise FxoptError(f"max_shard_size: {size!r} is no size; write '5GB', or a number of bytes")
    return int(found[1]) * BYTES[found[2].lower()]


def _complete(folder: Path, repository: str) -> Path:
    """`folder`; of a repository of the hub, with the files that only fxopt knows of."""
    snapshot = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and not (folder / GRAPH).exists():
        for name in _BESIDE:
            cached_file(
                repository, name, cache_dir=snapshot.parents[2], revision=snapshot.name,
                subfolder="/".join(folder.relative_to(snapshot).parts),
                _raise_exceptions_for_missing_entries=False,
            )  # fmt: skip
    return folder


def _become(model: nn.Module, module: OptimizedModule) -> None:
    """`from_pretrained` returns the object that it made: it takes class and contents of another."""
    vars(model).clear()
    model.__class__ = type(module)
    vars(model).update(vars(module))
