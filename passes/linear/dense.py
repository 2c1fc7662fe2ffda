"""What the rewrites of linear layers share: the unrewritten call, its sizes, its refusals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.ir.cost import OpCall
from fxopt.ir.patches import from_rows, input_steps, output_steps, to_rows
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import EmbeddingInfo, ExpertsInfo, Family, LinearInfo, Site, rows_of
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import projection

# Below this a layer holds too few bytes to be worth a decision.
LEAST_FEATURES = 64
WORKLOADS = frozenset({"forward", "generate"})
_SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
}


@dataclass(frozen=True)
class Structure(ABC):
    """What rewrites of one linear layer declare alike."""

    family: ClassVar[Family] = "linear"
    workloads: ClassVar[frozenset[str]] = WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def match(self, site: Site) -> Match | Refusal:
        return refusal(site) or Match(site)

    @abstractmethod
    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        """The sizes that save bytes at this site."""

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        info = linear_info(match)
        return f"no rank saves bytes at {info.out_features} x {info.in_features}"


def linear_info(match: Match) -> LinearInfo:
    """The facts of a matched linear site."""
    info = match.site.info
    assert isinstance(info, LinearInfo)
    return info


def refusal(site: Site) -> Refusal | None:
    """Why no structure may replace this site's weight, if it may not."""
    if not isinstance(site.info, LinearInfo):
        return Refusal(f"{site.family} site: the rewrite serves linear layers")
    info = site.info
    if site.blocked is not None:
        return Refusal(site.blocked)
    if info.shared_with:
        return Refusal(f"the weight is shared with {', '.join(info.shared_with)}")
    return unfit(info)


def unfit(info: LinearInfo | ExpertsInfo) -> Refusal | None:
    """Why a weight of this dtype or size is left alone, if it is."""
    if info.dtype not in _SHORT:
        return Refusal(f"weights of {info.dtype} are not supported")
    if min(info.in_features, info.out_features) < LEAST_FEATURES:
        return Refusal(
            f"{info.out_features} x {info.in_features} is too small: both sides must have at "
            f"least {LEAST_FEATURES} features"
        )
    return None


def weight_of(statistics: SiteStatistics) -> Tensor:
    """The site's weight, [out, in]."""
    if statistics.weight is None:
        raise ValueError("a linear rewrite was given statistics without the weight")
    return statistics.weight.detach().contiguous()


def low_rank(statistics: SiteStatistics, rank: int) -> tuple[Tensor, Tensor]:
    """`down` [rank, in] and `up` [out, rank] in float64, the best for the site's inputs. The
    weight is decomposed once for all ranks."""
    weight = weight_of(statistics)
    _, directions = statistics.once(
        "spectrum", lambda: projection.spectrum(weight, statistics.gram)
    )
    return projection.truncated(weight, directions, rank)


def with_bias(tensors: dict[str, Tensor], statistics: SiteStatistics) -> dict[str, Tensor]:
    """`tensors` for `emulate`, which sees nothing else, and so needs the bias among them."""
    if statistics.bias is not None:
        tensors["bias"] = statistics.bias.detach()
    return tensors


def input_and_bias(node: fx.Node) -> tuple[Any, Any]:
    """The arguments of a site's node that outlive its weight, as they stand."""
    x, *rest = node.args
    return x, rest[1] if len(rest) > 1 else node.kwargs.get("bias")


def rows_and_bias(editor: Editor, site: Site) -> tuple[Any, Any]:
    """The site's input as rows [..., in], and its bias."""
    x, bias = input_and_bias(editor.node(site))
    for target, arguments in input_steps(linear_info(Match(site)).patch):
        x = editor.call(site, target, (x, *arguments), {})
    return x, bias


def replace_by_rows(editor: Editor, site: Site, y: fx.Node) -> None:
    """Let rows [..., out] stand for what the site returned."""
    for target, arguments in output_steps(linear_info(Match(site)).patch):
        y = editor.call(site, target, (y, *arguments), {})
    editor.replace(site, y)


def call(editor: Editor, site: Site, x: Any, weight: fx.Node, bias: Any) -> fx.Node:
    """An `aten.linear` at the site."""
    arguments = (x, weight) if bias is None else (x, weight, bias)
    return editor.call(site, torch.ops.aten.linear.default, arguments, {})


def ladder(
    info: LinearInfo, fractions: Sequence[float], *, at_most: int, parts: int = 1
) -> list[int]:
    """Ranks, ascending, at `fractions` of the one where `parts` factorised layers hold as many
    parameters as the weight: multiples of 16 (8 in small layers) that save parameters."""
    sides = info.in_features + info.out_features
    even = info.in_features * info.out_features / (parts * sides)
    step = rank_step(info)
    ranks = {max(step, step * round(even * fraction / step)) for fraction in fractions}
    return sorted(rank for rank in ranks if rank < even and rank <= at_most)


def rank_step(info: LinearInfo) -> int:
    """What ranks are multiples of: 16, or 8 in small layers."""
    return 16 if min(info.in_features, info.out_features) >= 512 else 8


def signature(info: LinearInfo, scenario: Scenario) -> str:
    """Sizes and dtype as they stand in the key of an op call: "m16n4096k4096/bf16"."""
    patch = f"/{'x'.join(map(str, info.patch))}b{scenario.batch}" if info.patch else ""
    bias = "/bias" if info.bias else ""
    sizes = f"m{rows_of(info, scenario)}n{info.out_features}k{info.in_features}"
    return f"{sizes}/{_SHORT[info.dtype]}{bias}{patch}"


def short(info: ExpertsInfo) -> str:
    """The dtype as it stands in keys."""
    return _SHORT[info.dtype]


def patched_shape(info: LinearInfo, scenario: Scenario) -> tuple[int, ...]:
    """A shape of x with as many patches as the call has, one below the other."""
    first, *rest = info.patch
    count = rows_of(info, scenario) // scenario.batch
    channels = info.in_features // math.prod(info.patch)
    return (scenario.batch, channels, count * first, *rest)


def linear_call(
    op: str,
    form: str,
    info: LinearInfo,
    scenario: Scenario,
    *,
    weight_bytes: int,
    flops: float,
    hidden_elements: int = 0,
    temporary_bytes: int = 0,
    launches: int = 1,
    convolves: bool = False,
    make: Callable[[Callable[..., Tensor]], tuple[Callable[..., Tensor], tuple[Any, ...]]],
) -> OpCall:
    """An op call that reads x and a weight of `weight_bytes` and writes y.

    `hidden_elements` are written and read again between two products. `make` gets a function
    that draws a random tensor of the layer's dtype on the device, and returns the op and its
    arguments after x and before the bias. The op takes rows, unless it `convolves`.
    """
    size, rows = info.dtype.itemsize, rows_of(info, scenario)
    bias_bytes = info.out_features * size if info.bias else 0

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        patch = () if convolves else info.patch
        x = random(*(patched_shape(info, scenario) if info.patch else (rows, info.in_features)))
        bias = random(info.out_features) if info.bias else None
        function, arguments = make(random)
        return lambda: from_rows(function(to_rows(x, patch), *arguments, bias=bias), patch)

    return OpCall(
        op=op,
        key=f"{op.partition('::')[2]}/{form}{'/' if form else ''}{signature(info, scenario)}",
        flops=flops,
        bytes_read=weight_bytes + bias_bytes + (rows * info.in_features + hidden_elements) * size,
        bytes_written=(rows * info.out_features + hidden_elements) * size,
        weight_bytes=weight_bytes + bias_bytes,
        temporary_bytes=temporary_bytes,
        launches=launches,
        family=f"{op}/{form}/{_SHORT[info.dtype]}",
        run=run,
    )


def elementwise_call(
    op: str, info: LinearInfo, scenario: Scenario, function: Callable[[Tensor], Any], reads: int
) -> OpCall:
    """An op call that reads `reads` tensors of the layer's output's size and writes one."""
    rows, size = rows_of(info, scenario), info.dtype.itemsize
    elements = rows * info.out_features

    def run(device: Any) -> Callable[[], Any]:
        y = torch.randn((rows, info.out_features), device=device).to(info.dtype)
        return lambda: function(y)

    return OpCall(
        op=op,
        key=f"{op.partition('::')[2]}/m{rows}n{info.out_features}/{_SHORT[info.dtype]}",
        flops=float(elements),
        bytes_read=reads * elements * size,
        bytes_written=elements * size,
        temporary_bytes=elements * size,
        run=run,
    )


def dense_call(info: LinearInfo, scenario: Scenario) -> OpCall:
    """The linear layer as it is: the price of keeping it."""
    elements = info.in_features * info.out_features

    def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        weight = random(info.out_features, info.in_features)
        return (
            (convolve, (kernel(weight, info), info.patch)) if info.patch else (F.linear, (weight,))
        )

    return linear_call(
        "aten::convolution" if info.patch else "aten::linear",
        "",
        info,
        scenario,
        weight_bytes=elements * info.dtype.itemsize,
        flops=2.0 * rows_of(info, scenario) * elements,
        convolves=bool(info.patch),
        make=make,
    )


def embedding_call(
    op: str,
    form: str,
    info: EmbeddingInfo,
    scenario: Scenario,
    *,
    row_bytes: int,
    make: Callable[[Callable[..., Tensor]], Callable[[Tensor], Tensor]],
) -> OpCall:
    """An op call that reads one row of `row_bytes` a token. The table's bytes are those of the
    head that it is tied to. `make` gets what `linear_call` gives, and returns the op of indices."""
    rows, size = scenario.batch * scenario.queries, info.dtype.itemsize

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        function, ids = make(random), torch.randint(info.rows, (rows,), device=device)
        return lambda: function(ids)

    return OpCall(
        op=op,
        key=f"{op.partition('::')[2]}/{form}{'/' if form else ''}m{rows}n{info.rows}"
        f"k{info.features}/{_SHORT[info.dtype]}",
        flops=0.0,
        bytes_read=rows * row_bytes,
        bytes_written=rows * info.features * size,
        run=run,
    )


def rows_call(info: EmbeddingInfo, scenario: Scenario) -> OpCall:
    """A tied embedding as it is."""

    def make(random: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return partial(F.embedding, weight=random(info.rows, info.features))

    return embedding_call(
        "aten::embedding",
        "",
        info,
        scenario,
        row_bytes=info.features * info.dtype.itemsize,
        make=make,
    )


def kernel(weight: Tensor, info: LinearInfo) -> Tensor:
    """A weight [out, in] as that of a convolution over the layer's patches."""
    return weight.reshape(len(weight), -1, *info.patch)


def convolution(patch: Sequence[int]) -> Any:
    """The op that convolves over so many sizes."""
    return getattr(torch.ops.aten, f"conv{len(patch)}d").default


def convolve(x: Tensor, weight: Tensor, patch: Sequence[int], *, bias: Tensor | None) -> Tensor:
    """The convolution whose kernel is its stride."""
    return convolution(patch)(x, weight, bias, list(patch))
