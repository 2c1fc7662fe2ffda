"""ONNX files, checked by onnx.checker and compared with the module in onnxruntime."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.traceback import preserve_node_meta

from ..ir.errors import ExportError
from .lowering import Kind, Lowered
from .module import OptimizedModule
from .ort import Session
from .samples import Samples

OPSET = 23
TOLERANCE = 1e-4


@dataclass(frozen=True)
class OnnxReport:
    """What was written: `difference` is the largest |onnxruntime - module| over all outputs, in
    units of max(1, largest |output|), and `size` is in bytes, external data included."""

    path: Path
    kind: Kind
    opset: int
    nodes: int
    size: int
    difference: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_onnx(
    module: OptimizedModule,
    path: str | Path,
    kind: Kind = "forward",
    target: Literal["portable", "ort"] = "portable",
    dtype: torch.dtype | None = None,
) -> OnnxReport:
    """Write `module` as one ONNX file with dynamic batch and length.

    "forward" takes the original's inputs; "generate" also takes `past.<layer>.<name>` and returns
    `present.<layer>.<name>`, the cache as the plan stores it: one file serves prefill, with a past
    of length 0, and decoding. Half precision becomes float32 unless `dtype` is the module's own.
    Only standard operators are written for either `target`. The file appears when the checker
    accepts it and onnxruntime agrees with the module at several sizes; ExportError otherwise.
    """
    final = Path(path)
    _check_request(module, final, kind, target)
    if dtype not in (None, torch.float32, module.dtype):
        raise ExportError(
            f"export_onnx: dtype is torch.float32 or the module's {module.dtype}, got {dtype}; "
            f"convert the model to {dtype} and optimise that"
        )
    lowered = Lowered(
        module.program, module.program.tree.collect(module), kind, dtype or torch.float32
    ).eval()
    samples = Samples(lowered)
    with torch.no_grad(), _quiet(), preserve_node_meta():
        exported = _trace(lowered, samples)
        written: Any = _translate(exported, lowered)
    _rename_dimensions(written.model, lowered)
    _write_provenance(written, exported)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as folder:
        work = Path(folder) / final.name
        written.save(str(work))
        difference = _verify(work, lowered, samples, Direct(module, lowered))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == work):
            os.replace(file, final.parent / file.name)
    names = (tuple(v.name for v in values) for values in
             (written.model.graph.inputs, written.model.graph.outputs))  # fmt: skip
    count = sum(1 for _ in written.model.graph)
    return OnnxReport(final, kind, OPSET, count, size, difference, *names)


def _check_request(module: OptimizedModule, path: Path, kind: str, target: str) -> None:
    if kind not in ("forward", "generate"):
        raise ExportError(f'export_onnx: kind is "forward" or "generate", got {kind!r}')
    if target not in ("portable", "ort"):
        raise ExportError(f'export_onnx: target is "portable" or "ort", got {target!r}')
    if kind == "generate" and not module.program.causal_lm:
        why = module.program.reason or "it is no causal language model"
        raise ExportError(f"export_onnx: {module.program.name} has no generation graph: {why}")
    if path.is_dir() or not path.parent.is_dir():
        raise ExportError(f"export_onnx: {path} must name a file in a folder that exists")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise ExportError(
            f"export_onnx: {', '.join(missing)} not installed; pip install 'fxopt[onnx]'"
        )


def _trace(lowered: Lowered, samples: Samples) -> torch.export.ExportedProgram:
    inputs = samples.traced()
    dynamic = tuple(
        {dim: torch.export.Dim.DYNAMIC for dim in samples.dynamic(name)} for name in lowered.inputs
    )
    try:
        return torch.export.export(
            lowered, tuple(inputs), dynamic_shapes={"inputs": dynamic}, strict=False
        )
    except Exception as error:
        raise ExportError(_explain(lowered, "traced", error)) from error


def _translate(exported: torch.export.ExportedProgram, lowered: Lowered) -> Any:
    outputs = [*_output_names(lowered), *(slot.present for slot in lowered.slots)]
    try:
        return torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=lowered.inputs, output_names=outputs,
        )  # fmt: skip
    except Exception as error:
        raise ExportError(_explain(lowered, "translated to ONNX", error)) from error


def _explain(lowered: Lowered, what: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    first = (lines or [type(cause).__name__])[0][:300]
    return (
        f"{lowered.program.name} cannot be {what}: {type(cause).__name__}: {first}; nothing was "
        "written. keep= the site whose op is named, or export the kind that does not need it"
    )


def _output_names(lowered: Lowered) -> list[str]:
    """`logits` and the like; numbered where the output has no keys."""
    return [name.replace("..", ".") or "output" for name in _leaves(lowered.program.output)]


def _leaves(spec: Mapping[str, Any]) -> Iterator[str]:
    if spec["kind"] == "leaf":
        yield ""
    keys = spec.get("keys") or [f"output_{i}" for i in range(len(spec.get("children", ())))]
    for key, child in zip(keys, spec.get("children", ()), strict=True):
        for name in _leaves(child):
            yield f"{key}.{name}" if name else key


def _rename_dimensions(model: Any, lowered: Lowered) -> None:
    """Symbols become "batch", "length" and `<input>_<dimension>`, wherever they occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for index, dim in enumerate(value.shape):
            text = str(getattr(dim, "value", dim))
            if text.isidentifier() and text not in names:
                names[text] = _dimension(value.name, index, len(value.shape), set(names.values()))
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or "(?!)")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        for index, dim in enumerate(value.shape):
            text = getattr(dim, "value", None)
            if isinstance(text, str):
                value.shape[index] = pattern.sub(lambda match: names[match[0]], text)


def _dimension(name: str, index: int, rank: int, taken: set[str]) -> str:
    if index == 0 and "batch" not in taken:
        return "batch"
    if name == "input_ids" and index == 1:
        return "length"
    if name == "attention_mask" and index == 1:
        return "total_length"
    if not name.startswith("past."):
        return f"{name.replace('.', '_')}_{index}"
    # A packed block has one dimension more than a token.
    _, layer, tensor, *head_class = name.split(".")
    side = tensor.partition("_")[0]
    kind = side if side in ("sink", "recent") else "blocks" if rank == 5 else "past"
    return next(n for n in (kind, "_".join([kind, layer, *head_class])) if n not in taken)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _write_provenance(written: Any, exported: torch.export.ExportedProgram) -> None:
    """`ai.fxopt.rewrite` and `ai.fxopt.site` on every node that a rewrite made."""
    programs = [exported, getattr(written, "exported_program", None)]
    origin = {
        node.name: node.meta["custom"]
        for source in programs
        for node in (source.graph.nodes if source is not None else ())
        if node.meta.get("custom", {}).get("fxopt")
    }
    for node in written.model.graph:
        # Traces of source files tell of the machine that exported.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        made = origin.get(scopes[-1]) if scopes else None
        if made is not None:
            node.metadata_props["ai.fxopt.rewrite"] = made["fxopt"]
            node.metadata_props["ai.fxopt.site"] = made["site"]


class Direct:
    """The module's own answer to an export's inputs, where it computes in the export's dtype."""

    def __init__(self, module: OptimizedModule, lowered: Lowered) -> None:
        self.module, self.lowered = module, lowered
        self.applies = not lowered.halves and module.device.type == "cpu"
        self.cache: Any = None

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given: dict[str, Any] = dict(zip(self.lowered.inputs, inputs, strict=True))
        if "logits_to_keep" in self.module.program.placeholders:
            given.setdefault("logits_to_keep", torch.arange(given["input_ids"].shape[1]))
        if not self.lowered.slots:
            return self.module.run_flat(given)
        batch, length = given["input_ids"].shape
        if given["attention_mask"].shape[1] == length:
            self.cache = self.module.make_cache(batch, length)  # pyright: ignore
        self.cache.reserve(given["attention_mask"].shape[1])
        states = {"past": self.cache.states, "start": self.cache.start}
        outputs = self.module.run_flat({**given, **states})
        self.cache.advance(length)
        return outputs


def _verify(path: Path, lowered: Lowered, samples: Samples, direct: Direct) -> float:
    """Largest relative difference over the samples; ExportError when it is too large."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
        session = Session(path)
    except Exception as error:
        raise ExportError(_explain(lowered, "loaded by onnxruntime", error)) from error
    worst = 0.0
    for inputs in samples.checks():
        with torch.no_grad():
            wanted = list(lowered(*inputs))
            if direct.applies:
                own = direct(inputs)
                wanted[: len(own)] = own
        try:
            found = session.run(dict(zip(lowered.inputs, inputs, strict=True)))
        except Exception as error:
            raise ExportError(_explain(lowered, "run by onnxruntime", error)) from error
        pairs = zip(wanted, found.values(), strict=True)
        worst = max(worst, *(_difference(a, b) for a, b in pairs))
    limit = TOLERANCE if lowered.dtype == torch.float32 else 0.02
    if not worst <= limit:
        raise ExportError(
            f"export_onnx: onnxruntime differs from {lowered.program.name} by {worst:.2e} of its "
            f"output, more than {limit:.0e}; nothing was written"
        )
    return worst


def _difference(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if not wanted.numel():
        return 0.0
    wanted, found = wanted.double(), found.double()
    both = ~(torch.isnan(wanted) & torch.isnan(found))
    scale = max(1.0, float(wanted[both].abs().max())) if both.any() else 1.0
    gap = (wanted - found)[both].abs()
    return float(gap.max()) / scale if gap.numel() else 0.0


@contextmanager
def _quiet() -> Generator[None]:
    """The exporter's progress and warnings are not the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
