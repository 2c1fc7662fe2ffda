"""Decoding attention over a packed cache against the fastest exact attention, on one GPU.

    python benchmarks/kv_decode.py [--only check shapes rows pages short kept] [--tune] [--peers]
        [--out FILE]

Checks first that the kernel's error against float64 over the dequantised cache is below the one of
bfloat16 attention, then times CUDA graphs of one layer (32 query heads, 8 KV heads of 128; "rows":
more query heads) and prints JSON lines: microseconds, terabytes a second of what has to be read,
and the ratio to the faster of cuDNN's and flash attention in the same run. "pages", which has to be
asked for: blocks on pages in no order against the same ones side by side. "short", as well: few
blocks under the launches that there could be of them, a step with its new token stored in one
launch and in two, and rotary embeddings with and without what mixes channels. "kept", too: what
reading some tiles takes, and choosing them, for each token and for eight. --tune tries other
launches beside what a call gets by itself. --peers adds kernels of FlashInfer and vLLM and the
quantised cache of Transformers to "shapes"; those that are not installed are named.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import kv_peers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.cost_models.timing import time_calls
from fxopt.emit.registry import register_ops
from fxopt.ir.ops import mix_channels, rotate, rotate_both
from fxopt.ir.site import AttentionInfo
from fxopt.ir.workload import Scenario
from fxopt.kernels._triton.common import processors
from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_append import triton as kv_append
from fxopt.kernels.kv_attention import allocate, cached_attention, parse, state_bytes
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import Blocks, split_state
from fxopt.kernels.kv_attention.mutating import attend_image
from fxopt.kernels.kv_attention.packing import FLOAT8, LARGEST, code_range
from fxopt.kernels.kv_attention.pages import sizes, store
from fxopt.kernels.kv_attention.triton import decode
from fxopt.kernels.kv_exact.triton import decode_exact
from fxopt.kernels.kv_int8 import launch
from fxopt.kernels.kv_int8.triton import STAGES, decode_packed
from fxopt.passes.kv_cache.calls import cached_calls

HEADS, KV, DIM = 32, 8, 128
SHORT = ((1, 2048), (1, 4096), (2, 1024))
SHAPES = ((16, 32768), (64, 8192), (1, 131072), (1, 2048))
KINDS = ("k4v4", "k4v2", "k2v2", "k8v8", "k8v4", "kf8vf8", "k8vf8")
LAYOUTS = tuple(f"{kind}g128r64s4" for kind in KINDS)
CODES = (torch.int64, torch.uint8, torch.float8_e4m3fn)
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
LINES: list[dict[str, Any]] = []


def report(**line: Any) -> None:
    LINES.append(line)
    print(json.dumps(line), flush=True)


class Packed:
    """One layer's packed cache at `length` tokens, and a decoding step on it."""

    def __init__(self, layout: str, batch: int, length: int, heads: int = HEADS) -> None:
        fmt = parse(layout).classes[0].format
        assert fmt is not None
        self.fmt: Blocks = fmt
        capacity = length + 256
        state = allocate(parse(layout), batch, KV, DIM, DIM, capacity, torch.bfloat16, "cuda")
        _, _, self.part = split_state(parse(layout), KV, state)[0]
        self.bytes = batch * state_bytes(parse(layout), 1, KV, DIM, DIM, length, 2)
        self.start = torch.tensor(length, device="cuda")
        self.length = length
        fill(self.part, self.fmt, length)
        q = torch.randn(batch, heads, 1, DIM, device="cuda", dtype=torch.bfloat16)
        self.arguments = Arguments(q, None, None, DIM**-0.5, True, [0], 0.0, [0])
        self.new = {
            side: torch.randn(batch, KV, 1, DIM, device="cuda", dtype=torch.bfloat16)
            for side in ("key", "value")
        }

    def step(self, **options: Any) -> Tensor:
        return decode_packed(
            self.arguments, self.new, self.part, self.start, None, self.fmt, **options
        ).joined()

    def paged(self) -> Packed:
        """The same blocks on pages in no order."""
        moved = copy.copy(self)
        moved.part = scattered(self.part)
        return moved

    def general(self) -> Tensor:
        return decode(self.arguments, self.new, self.part, self.start, None, self.fmt).joined()

    def exactly(self, dtype: torch.dtype) -> Tensor:
        """Attention in `dtype` over the dequantised cache."""
        wide = {n: t if t.dtype in CODES else t.to(dtype) for n, t in self.part.items()}
        new = {n: t.to(dtype) for n, t in self.new.items()}
        q = self.arguments.q.to(dtype)
        chosen = Arguments(q, None, None, DIM**-0.5, True, [0], 0.0, [0])
        attention = attention_reference if dtype == torch.float64 else flash
        return attend_image(attention, chosen, new, wide, None, self.fmt, self.length)


def fill(part: dict[str, Tensor], fmt: Blocks | None, length: int) -> None:
    """Contents that a prefill of `length` tokens could have stored, without what one costs."""
    for name, tensor in part.items():
        if fmt is not None and name == "block_start":
            starts = torch.arange(len(tensor), device=tensor.device) * fmt.group
            tensor.copy_(starts.clamp(max=fmt.packed(length)))
        elif fmt is not None and tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif fmt is not None and tensor.dtype == torch.float8_e4m3fn:
            tensor.copy_(tensor.float().uniform_(-LARGEST, LARGEST))
        elif fmt is not None and name.endswith("_scale"):
            least, largest = code_range(fmt.bits(name.removesuffix("_scale")))
            tensor.uniform_(0.7, 1.3).mul_(5 / (largest - least))
        elif fmt is not None and name.endswith("_zero"):
            middle = 0.0 if fmt.bits(name.removesuffix("_zero")) == FLOAT8 else -2.5
            tensor.uniform_(middle - 0.3, middle + 0.3)
        else:
            tensor.normal_()


def scattered(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """`part` with its blocks on pages in no order, the first of which none has."""
    batch, _, blocks = sizes(part, "key")
    order = torch.randperm(batch * blocks, device=part["key"].device)
    found = {**part, "table": (1 + order).int().view(batch, blocks)}
    for name, x in part.items():
        if x.dim() == 5:
            found[name] = x.new_empty((1 + batch * blocks, x.shape[1], 1, *x.shape[3:]))
            store(found, name, 0, x)
    return found


def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a captured call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    for _ in range(repeats + 5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return sorted(times[5:])[repeats // 2]


def errors(heads: int, layout: str, length: int) -> bool:
    """Reports whether the kernel is nearer to float64 than bfloat16 attention; False if far off."""
    torch.manual_seed(length)
    case = Packed(layout, 2, length, heads)
    exact = case.exactly(torch.float64)
    found = {"int8": case.step(), "general": case.general(), "bf16": case.exactly(torch.bfloat16)}
    relative = {
        name: float((out.double() - exact).norm() / exact.norm()) for name, out in found.items()
    }
    good = relative["int8"] <= relative["bf16"]
    report(check=layout, heads=heads, length=length, good=good, **relative)
    return relative["int8"] <= 4 * relative["bf16"]


def exact_times(batch: int, length: int, heads: int = HEADS) -> dict[str, float]:
    """Microseconds of the library's kernels over bfloat16 keys and values."""
    q = torch.randn(batch, heads, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, KV, length, DIM, device="cuda", dtype=torch.bfloat16)
    found: dict[str, float] = {}
    for name, backend in BACKENDS.items():
        # With one query the heads of a KV head can be its queries, which is the fastest form.
        for form, queries in (("", q), (" grouped", q.view(batch, KV, heads // KV, DIM))):
            with sdpa_kernel(backend):
                try:
                    found[name + form] = microseconds(
                        lambda queries=queries: F.scaled_dot_product_attention(
                            queries, k, v, enable_gqa=queries.shape[1] != KV
                        )
                    )
                except RuntimeError as error:
                    report(refused=name + form, why=str(error).splitlines()[0][:120])
    return found


def own_exact(batch: int, length: int) -> float:
    """Microseconds of the kernel that reads an exact cache in a captured decoding step."""
    state = allocate(parse(""), batch, KV, DIM, DIM, length + 256, torch.bfloat16, "cuda")
    _, _, part = split_state(parse(""), KV, state)[0]
    fill(part, None, length)
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, KV, 1, DIM, device="cuda", dtype=torch.bfloat16)
    arguments = Arguments(q, None, None, DIM**-0.5, True, [0], 0.0, [0])
    start = torch.tensor(length, device="cuda")
    new = {"key": k, "value": v}
    return microseconds(lambda: decode_exact(arguments, new, part, start, None).joined())


def shapes(tuned: bool, peers: bool) -> None:
    """All layouts at all shapes."""
    missing: set[str] = set()
    for batch, length in SHAPES:
        exact = exact_times(batch, length)
        whole = batch * KV * length * DIM * 4
        for name, time in exact.items():
            speed = round(whole / time / 1e6, 2)
            report(kernel=name, B=batch, T=length, us=round(time, 1), tbs=speed)
        own = own_exact(batch, length)
        ratio = round(min(exact.values()) / own, 2)
        report(kernel="own exact", B=batch, T=length, us=round(own, 1), ratio=ratio)
        torch.cuda.empty_cache()
        for layout in LAYOUTS:
            case = Packed(layout, batch, length)
            tried = other_splits(batch, length) if tuned else ()
            timed(case, layout, min(exact.values()), tried, B=batch, T=length)
            if batch == 1 and layout == LAYOUTS[0]:
                general = round(microseconds(case.general), 1)
                report(kernel="general " + layout, B=batch, T=length, us=general)
            del case
            torch.cuda.empty_cache()
        if peers:
            kv_peers.run(batch, length, microseconds, report, missing)


def rows(tuned: bool) -> None:
    """8 and 16 query rows a KV head."""
    batch, length = SHAPES[0]
    for heads in (8 * KV, 16 * KV):
        fastest = min(exact_times(batch, length, heads).values())
        case = Packed(LAYOUTS[0], batch, length, heads)
        tried = ({"num_warps": 1},) if tuned else ()
        timed(case, LAYOUTS[0], fastest, tried, B=batch, T=length, heads=heads)
        del case
        torch.cuda.empty_cache()


def pages() -> None:
    """All layouts at all shapes, side by side and on pages."""
    good = True
    for batch, length in SHAPES:
        for layout in LAYOUTS:
            case = Packed(layout, batch, length)
            paged = case.paged()
            same = torch.equal(case.step(), paged.step())
            good = good and same
            apart, on_pages = microseconds(case.step), microseconds(paged.step)
            report(
                pages=layout, B=batch, T=length, same=same, us=round(on_pages, 1),
                side_by_side=round(apart, 1), longer=round(on_pages / apart, 3),
            )  # fmt: skip
            del case, paged
            torch.cuda.empty_cache()
    if not good:
        raise SystemExit("pages changed a result")


def short() -> None:
    """Few blocks, where how long a program takes is what counts."""
    for batch, length in SHORT:
        fastest = min(exact_times(batch, length).values())
        own = own_exact(batch, length)
        report(kernel="own exact", B=batch, T=length, us=round(own, 1))
        for layout in ("k4v4g128r64s4", "k8v8g128r64s4", "k2v2g128r64s4"):
            case = Packed(layout, batch, length)
            timed(case, layout, fastest, short_launches(case, batch), B=batch, T=length)
            del case
    for batch, length in SHORT[:1]:
        for layout in ("", "k4v4g128r64s4"):
            whole_step(layout, batch, length)
    for batch in (1, 16, 64):
        rotations(batch)


def short_launches(case: Packed, batch: int) -> Iterator[dict[str, int]]:
    """As for many blocks, then a program of some warps for each block."""
    rows, blocks = HEADS // KV, len(case.part["block_start"]) - 1
    warps = launch.warps(case.fmt, rows)
    at_once = launch.at_once(case.fmt, DIM, DIM, warps, STAGES)
    splits = launch.splits(batch * KV, blocks, at_once, processors(torch.device("cuda")))
    tile = launch.exact_tile(case.fmt)
    yield {"splits": splits, "num_warps": warps, "num_stages": STAGES, "exact_tile": tile}
    one: dict[str, int] = {"splits": blocks, "num_stages": 1}
    for warps, tile, shares in ((4, 64, 4), (4, 32, 4), (4, 64, 2), (8, 64, 4)):
        yield {**one, "num_warps": warps, "exact_tile": tile, "exact_shares": shares}


def whole_step(layout: str, batch: int, length: int) -> None:
    """The operator, its new token stored in the launch that joins the shares, or in one before."""
    state = allocate(parse(layout), batch, KV, DIM, DIM, length + 256, torch.bfloat16, "cuda")
    _, fmt, part = split_state(parse(layout), KV, state)[0]
    fill(part, fmt, length)
    new = [
        torch.randn(batch, heads, 1, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV, KV)
    ]
    start = torch.tensor(length, device="cuda")
    rest = (None, None, None, DIM**-0.5, True, [0], 0.0, [0], layout)
    times: dict[str, float] = {}
    places = kv_append.PLACES
    for name, most in (("together", places), ("apart", (0, 0))):
        kv_append.PLACES = most
        call = microseconds(lambda: cached_attention(*new, state, start, *rest))
        times[name] = round(call, 1)
    kv_append.PLACES = places
    report(step=layout or "exact", B=batch, T=length, **times)


def rotations(batch: int) -> None:
    """Queries and keys of one token turned, and mixed, by a call each and by one of both."""
    register_ops()
    q, k = (
        torch.randn(batch, 1, heads, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, KV)
    )
    cos, sin = torch.randn(2, 1, 1, 1, DIM, device="cuda", dtype=torch.bfloat16)
    mixes = torch.randn(2, KV, DIM, DIM, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "turned apart": lambda: [rotate(x, cos, sin) for x in (q, k)],
        "turned": lambda: rotate_both(q, k, cos, sin),
        "mixed apart": lambda: [
            mix_channels(rotate(x, cos, sin), m).contiguous()
            for x, m in zip((q, k), mixes, strict=True)
        ],
        "mixed": lambda: rotate_both(q, k, cos, sin, *mixes),
    }
    with torch.no_grad():
        times = {name: round(microseconds(call), 2) for name, call in calls.items()}
    report(rotation=True, B=batch, **times)


def other_splits(batch: int, length: int) -> Iterator[dict[str, int]]:
    """Launches that compile no new kernel, by programs a multiprocessor."""
    places = [wave * 132 // (batch * KV) for wave in (2, 3, 4, 6, 8, 12)]
    for splits in sorted({max(1, min(127, length // 128, n)) for n in places}):
        yield {"splits": splits}


def timed(case: Packed, layout: str, fastest: float, tried: Any, **line: Any) -> None:
    """What a call gets by itself, then the launches `tried`."""
    for options in ({}, *tried):
        time = microseconds(lambda options=options: case.step(**options))
        report(
            kernel=layout, **line, default=not options, us=round(time, 1),
            tbs=round(case.bytes / time / 1e6, 2), ratio=round(fastest / time, 2), **options,
        )  # fmt: skip


def operator_is_captured() -> None:
    """A step through the operator, which packs as well, equals itself under a CUDA graph."""
    layout = LAYOUTS[0]
    state = allocate(parse(layout), 2, KV, DIM, DIM, 1500, torch.bfloat16, "cuda")
    start = torch.zeros((), dtype=torch.int64, device="cuda")
    rest = (None, None, None, DIM**-0.5, True, [0], 0.0, [0], layout)
    heads = (HEADS, KV, KV)
    prompt = [torch.randn(2, h, 1000, DIM, device="cuda", dtype=torch.bfloat16) for h in heads]
    cached_attention(*prompt, state, start, *rest)
    start += 1000
    new = [torch.randn(2, h, 1, DIM, device="cuda", dtype=torch.bfloat16) for h in heads]
    copies = [t.clone() for t in state]
    eager = [cached_attention(*new, copies, start + i, *rest) for i in range(200)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cached_attention(*new, state, start, *rest)
        start += 1
    same = True
    for expected in eager:
        graph.replay()
        same = same and torch.equal(out, expected)
    report(check="cuda graph", good=same)


def check() -> None:
    checks = [(HEADS, x, length) for x in LAYOUTS for length in (900, 5000)]
    checks += [(KV, LAYOUTS[0], 333), (64, LAYOUTS[0], 2049), (56, "k4v4g64r8s0", 1500)]
    good = all([errors(*each) for each in checks])
    operator_is_captured()
    if not good:
        raise SystemExit("the kernel is wrong; nothing is timed")


def kept() -> None:
    """The calls that plans are priced by: a KV head's share of one token's attention in which all
    tiles are read, or some, and what choosing them takes where others keep the choice."""
    info = AttentionInfo(
        HEADS, KV, DIM, DIM, torch.bfloat16, True, 0, 0.0, False, False, False, False, True
    )
    for past in (32_768, 131_072):
        scenario = Scenario("decode", 1, 1, past)
        for layout in ("", "k4v4g128r64s4"):
            for top_keys, refresh in ((0, 1), (1024, 1), (1024, 8), (4096, 1), (4096, 8)):
                asked = replace(info, top_keys=top_keys, refresh=refresh)
                for call in cached_calls(asked, parse(layout).classes[0].format, scenario):
                    assert call.run is not None
                    timing = time_calls([call.run(torch.device("cuda"))] * 8)
                    name, micros = call.key.partition("/")[0], round(1e6 * timing.seconds, 1)
                    line = {"past": past, "layout": layout or "exact", "top_keys": top_keys}
                    report(**line, refresh=refresh, call=name, microseconds=micros)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=["check", "shapes", "rows"])
    parser.add_argument("--tune", action="store_true", help="other launches are tried as well")
    parser.add_argument("--peers", action="store_true", help="other libraries as well")
    parser.add_argument("--out", help="file for the lines")
    args = parser.parse_args()
    report(device=torch.cuda.get_device_name(), torch=torch.__version__)
    if "check" in args.only:
        check()
    if "shapes" in args.only:
        shapes(args.tune, args.peers)
    if "rows" in args.only:
        rows(args.tune)
    if "pages" in args.only:
        pages()
    if "short" in args.only:
        short()
    if "kept" in args.only:
        kept()
    if args.out:
        with open(args.out, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in LINES)


if __name__ == "__main__":
    main()
