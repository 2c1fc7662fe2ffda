"""ONNX files, checked by onnx.checker and compared with the module in onnxruntime."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.fx.traceback import preserve_node_meta

from ..ir.errors import ExportError
from .agreement import Agreement, Comparison, own_run
from .aligned import expose_roundings
from .contrib import Target
from .lowering import Kind, Lowered
from .module import OptimizedModule
from .onnx_errors import explain, why_no_generation
from .onnx_names import rename_dimensions, write_provenance
from .samples import Samples

OPSET = 23
TOLERANCE = 1e-4
# In half precision, whose last place is 4e-3.
HALF_TOLERANCE = 0.02
# Larger weights lie in a file beside the model: protobuf ends at 2 GiB.
EXTERNAL_BYTES = 3 * 2**29


class Stages(Protocol):
    """What work is under way; `fxopt.progress` has some that show it."""

    def stage(
        self, name: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[], None]]: ...


class _Silent:
    def stage(
        self, name: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[], None]]:
        del name, total
        return nullcontext(lambda: None)


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far onnxruntime is from the module.

    `size` is in bytes, external data included; `contrib` counts operators outside of the standard,
    `notes` say why there are no more of them. Differences are the largest |onnxruntime - module|
    over all outputs and all exact parts of the cache, in units of max(1, largest |module|).

    Where a value is rounded, in a packed cache or in the input of an fp8 layer, float noise can
    decide to which side: `rounded_differently` is the share of such values that went to the other
    side than in the module; each was checked to be a rounding of a value within the tolerance of
    the module's. `difference` is taken with equal e4m3 inputs and an equal past, `free_difference`
    with each side's own e4m3 inputs; the two are equal where no layer is fp8.
    """

    path: Path
    kind: Kind
    target: Target
    opset: int
    nodes: int
    contrib: Mapping[str, int]
    size: int
    difference: float
    free_difference: float
    rounded_differently: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        made = ", ".join(f"{count} {name}" for name, count in self.contrib.items()) or "none"
        lines = [
            f"{self.kind}, target {self.target}, opset {self.opset}, {self.nodes:,} nodes, "
            f"{self.size / 2**20:.1f} MiB; contrib operators: {made}",
            f"takes {_listed(self.inputs, 'past.')}",
            f"returns {_listed(self.outputs, 'present.')}",
            *self.notes,
            f"onnxruntime differs from the module by at most {self.difference:.1e}",
        ]
        if self.rounded_differently:
            free = self.free_difference
            apart = f", with outputs up to {free:.1e} apart" if free > self.difference else ""
            lines.append(
                f"float noise decided {self.rounded_differently:.1e} of all roundings (packed "
                f"cache, fp8 inputs) differently{apart}"
            )
        return "\n".join(lines)


def _listed(names: Sequence[str], cache: str) -> str:
    """Names, those of a cache as one."""
    others = [name for name in names if not name.startswith(cache)]
    held = len(names) - len(others)
    return ", ".join([*others, *([f"{cache}<layer>.<name> ({held} in all)"] if held else [])])


def export_onnx(
    module: OptimizedModule,
    path: str | Path,
    kind: Kind = "forward",
    target: Target = "portable",
    dtype: torch.dtype | None = None,
    progress: Stages | None = None,
) -> OnnxReport:
    """Write `module` as one ONNX file with dynamic batch and length.

    "forward" takes the original's inputs; "generate" also takes `past.<layer>.<name>` and returns
    `present.<layer>.<name>`, the cache as the plan stores it: one file serves prefill, with a past
    of length 0, and decoding. Half precision becomes float32 unless `dtype` is the module's own.
    "portable" has standard operators alone; "ort" also onnxruntime's own where they are faster.
    The file appears when the checker accepts it and onnxruntime agrees with the module at several
    sizes; ExportError otherwise.
    """
    final = Path(path)
    _check_request(module, final, kind, target)
    if dtype not in (None, torch.float32, module.dtype):
        way_out = f"convert the model to {dtype} and optimise that"
        if not str(dtype).startswith("torch."):
            way_out = "pass a dtype of torch, such as torch.float16"
        raise ExportError(
            f"export_onnx: dtype is torch.float32 or the module's {module.dtype}, got {dtype!r}; "
            f"{way_out}"
        )
    tensors = module.program.tree.collect(module)
    lowered = Lowered(module.program, tensors, kind, dtype or torch.float32, target).eval()
    samples, shown = Samples(lowered), progress or _Silent()
    with torch.no_grad(), _quiet(), preserve_node_meta():
        with shown.stage("tracing"):
            exported = _trace(lowered, samples)
        with shown.stage("translating"):
            written: Any = _translate(exported, lowered)
    rename_dimensions(written.model)
    write_provenance(written, exported)
    counts = Counter(f"{n.domain}::{n.op_type}" for n in written.model.graph if n.domain)
    graph = written.model.graph
    inputs, outputs = (tuple(v.name for v in ends) for ends in (graph.inputs, graph.outputs))
    nodes = sum(1 for _ in graph)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as folder:
        work = Path(folder) / final.name
        probe = _save(written, work)
        with torch.no_grad():
            found = _verify(work, probe, samples, module, shown)
        size = _move(work, final)
    return OnnxReport(
        path=final,
        kind=kind,
        target=target,
        opset=OPSET,
        nodes=nodes,
        contrib=dict(counts),
        size=size,
        difference=found.aligned,
        free_difference=found.free,
        rounded_differently=found.rounded.share,
        inputs=inputs,
        outputs=outputs,
        notes=tuple(lowered.notes),
    )


def _check_request(module: OptimizedModule, path: Path, kind: str, target: str) -> None:
    if kind not in ("forward", "generate"):
        raise ExportError(f'export_onnx: kind is "forward" or "generate", got {kind!r}')
    if target not in ("portable", "ort"):
        raise ExportError(f'export_onnx: target is "portable" or "ort", got {target!r}')
    if kind == "generate" and not module.program.causal_lm:
        raise ExportError(
            f"export_onnx: {module.program.name} has no generation graph: "
            f"{why_no_generation(module.program)}"
        )
    from ..kernels.kv_attention.layout import parse

    keeping = [s.layout for s in module.program.states if parse(s.layout).keeps_choices]
    if kind == "generate" and keeping:
        raise ExportError(
            f"export_onnx: {module.program.name} keeps which tiles of its cache decoded tokens "
            f"read ('{keeping[0]}'), and the past of an ONNX file holds keys and values alone; "
            "nothing was written. Choose the same without it in an edited plan ('top1024' in place "
            "of 'top1024/8'), or leave that rewrite of attention out with rewrites="
        )
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
        raise ExportError(explain(lowered, "traced", error)) from error


def _translate(exported: torch.export.ExportedProgram, lowered: Lowered) -> Any:
    outputs = [*_output_names(lowered), *(slot.present for slot in lowered.slots)]
    try:
        written: Any = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
            input_names=lowered.inputs, output_names=outputs,
        )  # fmt: skip
    except Exception as error:
        raise ExportError(explain(lowered, "translated to ONNX", error, exported)) from error
    _inline(written.model)
    _optimize(written)
    return written


def _inline(model: Any) -> None:
    """Put the operators of the standard in the place of those that are made of them."""
    from onnx.parser import parse_function
    from onnx_ir.passes.common import InlinePass
    from onnx_ir.serde import deserialize_function

    from ..kernels.quantized_experts.onnx import FUNCTION, OPERATOR

    domain, _, name = OPERATOR.partition("::")
    if any((node.domain, node.op_type) == (domain, name) for node in model.graph):
        function = deserialize_function(parse_function(FUNCTION))
        model.functions[function.identifier()] = function
        InlinePass()(model)
        del model.opset_imports[domain]


def _optimize(written: Any) -> None:
    """What `torch.onnx.export` does by itself, after the layers' common sizes and masks became one:
    its patterns are matched against each node, and half of a generation graph is repetition."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    fold_constants(written.model)
    CommonSubexpressionEliminationPass()(written.model)
    RemoveUnusedNodesPass()(written.model)
    written.optimize()


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


def _save(written: Any, path: Path) -> Path | None:
    """Write the model, and where it rounds to e4m3 another one that returns those roundings."""
    values = written.model.graph.initializers.values()
    external = sum(v.const_value.nbytes for v in values if v.const_value) > EXTERNAL_BYTES
    written.save(str(path), external_data=external)
    if not expose_roundings(written.model):
        return None
    probe = path.parent / "probe" / path.name
    probe.parent.mkdir()
    written.save(str(probe), external_data=external)
    return probe


def _move(work: Path, final: Path) -> int:
    """Put the model where it belongs, its data first; the bytes of both."""
    files = [file for file in work.parent.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    for file in sorted(files, key=lambda file: file == work):
        os.replace(file, final.parent / file.name)
    return size


def _verify(
    path: Path, probe: Path | None, samples: Samples, module: OptimizedModule, shown: Stages
) -> Agreement:
    """Compare with the module; ExportError when the difference is too large."""
    import onnx

    lowered = samples.lowered
    tolerance = TOLERANCE if lowered.dtype == torch.float32 else HALF_TOLERANCE
    try:
        onnx.checker.check_model(str(path))
        compared = Comparison(path, probe, lowered, own_run(module, lowered), tolerance)
    except Exception as error:
        raise ExportError(explain(lowered, "loaded by onnxruntime", error)) from error
    with shown.stage("checking", sum(len(calls) for _, calls in samples.sequences)) as advance:
        found = compared.compare(samples, advance)
    if not found.aligned <= tolerance:
        raise ExportError(
            f"export_onnx: onnxruntime differs from {lowered.program.name} by {found.aligned:.2e} "
            f"of its output, more than {tolerance:.0e}; nothing was written"
        )
    return found


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
