"""Decoding steps as CUDA graphs: what they compute is what the steps compute one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.emit import steps
from fxopt.emit.cache import Cache
from fxopt.emit.program import State
from fxopt.emit.steps import Step, Steps, replayable
from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_attention import allocate, parse
from fxopt.kernels.kv_attention.device import attend_and_append
from fxopt.kernels.kv_attention.mutating import cached_attention_mutating

pytest.importorskip("transformers")
pytest.importorskip("triton")

from tests.emit.test_packed_generation import MODES, PADDING, left_padded, pair

LAYOUT = "k4v4g32r8s4"


def a_cache(capacity: int = 96) -> Cache:
    return Cache.allocate([(2, 16, 16, LAYOUT)], 2, capacity, torch.float32)


class Graph:
    """Stands in for a CUDA graph: what was captured is computed again from the same tensors."""

    def __init__(self) -> None:
        self.replays = 0
        self.again: Callable[[], Any] = lambda: None

    def replay(self) -> None:
        self.replays += 1
        self.again()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are made from here on, replayed by calling again."""
    made: list[Graph] = []

    def capture(step: Step, run: Any) -> None:
        graph = Graph()
        made.append(graph)
        step.outputs = run(step.inputs)

        def again() -> None:
            step.outputs = run(step.inputs)

        graph.again = again
        step.graph = graph  # type: ignore[assignment]

    monkeypatch.setattr(Step, "capture", capture)
    return made


def doubled(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    mask = inputs["attention_mask"]
    seen = 0 if mask is None else mask.sum()
    return (2 * inputs["input_ids"] + seen,)


def test_every_step_gets_its_own_inputs_and_its_own_outputs(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    found: list[Tensor] = []
    for i in range(4):
        ids = torch.full((2, 1), i)
        found += known(doubled, {"input_ids": ids, "attention_mask": None}, cache)
    assert [int(x[0, 0]) for x in found] == [0, 2, 4, 6]
    assert [graph.replays for graph in graphs] == [3]


def test_a_growing_mask_is_one_kind_of_step(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    ids = torch.zeros(2, 1, dtype=torch.long)
    sums = [
        int(known(doubled, {"input_ids": ids, "attention_mask": mask}, cache)[0][0, 0])
        for mask in (torch.ones(2, length, dtype=torch.long) for length in (5, 6, 7))
    ]
    assert sums == [10, 12, 14]
    assert len(graphs) == 1


def test_a_cache_goes_on_outside_of_inference_mode(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    for i in range(5):
        with torch.inference_mode(i < 3), torch.no_grad():
            ids, mask = torch.full((2, 1), i), torch.ones(2, 5 + i, dtype=torch.long)
            (out,) = known(doubled, {"input_ids": ids, "attention_mask": mask}, cache)
            assert int(out[0, 0]) == 2 * i + 2 * (5 + i)
    assert [graph.replays for graph in graphs] == [4]


def test_other_shapes_are_other_steps(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    for length in (1, 1, 3, 3, 1):
        ids = torch.full((2, length), length)
        (out,) = known(doubled, {"input_ids": ids, "attention_mask": None}, cache)
        assert torch.equal(out, 2 * ids)
    assert [graph.replays for graph in graphs] == [2, 1]


@pytest.mark.parametrize(
    "change",
    [lambda c: c.reserve(256), lambda c: c.batch_select_indices(torch.tensor([1, 0]))],
)
def test_other_tensors_in_the_cache_are_captured_anew(
    graphs: list[Graph], change: Callable[[Cache], None]
) -> None:
    known, cache = Steps(), a_cache()
    inputs = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "attention_mask": None}
    for _ in range(3):
        known(doubled, inputs, cache)
    change(cache)
    for _ in range(3):
        known(doubled, inputs, cache)
    assert [graph.replays for graph in graphs] == [2, 2]


def test_what_leaves_the_tensors_in_place_keeps_the_graph(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    inputs = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "attention_mask": None}
    for _ in range(2):
        known(doubled, inputs, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reserve(cache.capacity)
    cache.reset()
    known(doubled, inputs, cache)
    assert [graph.replays for graph in graphs] == [2]


def test_steps_end_with_their_cache_and_are_not_copied_with_it(graphs: list[Graph]) -> None:
    known, cache = Steps(), a_cache()
    inputs = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "attention_mask": None}
    for _ in range(2):
        known(doubled, inputs, cache)
    fork = cache.fork()
    known(doubled, inputs, fork)
    assert len(graphs) == 1
    del cache, fork
    assert not known.known


def test_what_cannot_be_captured_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(steps, "_capturing", refuse)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    known, cache = Steps(), a_cache()
    for i in range(4):
        ids = torch.full((2, 1), i)
        (out,) = known(doubled, {"input_ids": ids, "attention_mask": None}, cache)
        assert int(out[0, 0]) == 2 * i


def test_a_cpu_replays_nothing() -> None:
    state = State(4, 2, 16, 16, LAYOUT, torch.float32)
    assert not replayable(torch.zeros(2, 1, dtype=torch.long), (state,))


@pytest.mark.parametrize("layout", ["", LAYOUT, "0:k2v4g32r0s0|1:exact"])
@pytest.mark.parametrize("window", [0, 21])
def test_kernels_read_no_mask_past_the_newest_token(layout: str, window: int) -> None:
    """A mask as long as the capacity gives what one of the right length gives."""
    length, capacity = 75, 128
    kernels = partial(attend_and_append, attention_reference)
    rest = (None, None, 0.25, True, [window], 0.0, [2 if window else 0], layout)
    states = [allocate(parse(layout), 2, 2, 16, 16, capacity, torch.float32) for _ in range(2)]
    x = [torch.randn(2, heads, length + 1, 16) for heads in (4, 2, 2)]
    mask = torch.ones(2, length + 1, dtype=torch.long)
    mask[1, :9] = 0
    prompt = [t[:, :, :length] for t in x]
    for state in states:
        start = torch.tensor(0)
        cached_attention_mutating(*prompt, state, start, mask[:, :length], *rest, kernels=kernels)
    start = torch.tensor(length)
    wide = torch.randint(2, (2, capacity))
    wide[:, : length + 1] = mask
    new = [t[:, :, length:] for t in x]
    found = [
        cached_attention_mutating(*new, state, start, seen, *rest, kernels=kernels)
        for state, seen in zip(states, (mask, wide), strict=True)
    ]
    assert torch.equal(*found)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def on_device(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The rewritten model on the GPU, where its steps are graphs."""
    return copy.deepcopy(pair(name, kind, dtype)[1]).to("cuda")


def both_ways(opt: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What `generate` gives with and without graphs."""
    found: list[Tensor] = []
    for graphs in (True, False):
        opt.cuda_graphs = graphs
        torch.manual_seed(1)
        found.append(opt.generate(ids, max_new_tokens=90, min_new_tokens=90, **options))
    opt.cuda_graphs = True
    return found[0], found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(["llama", "gemma3"], ["exact", "k4v4", "mixed"]), ("llama", "kept")],
)
def test_graphs_generate_the_same_tokens(name: str, kind: str, mode: str, padded: bool) -> None:
    opt = on_device(name, kind)
    ids = torch.randint(2, 96, (3, 40))
    mask = left_padded(ids, PADDING if padded else (0, 0, 0)).to("cuda")
    graphed, eager = both_ways(opt, ids.to("cuda"), attention_mask=mask, **MODES[mode])
    assert torch.equal(graphed, eager)


def seen(opt: Any) -> list[tuple[int, dict[Any, Step]]]:
    """The steps whose cache is still there: none after `generate`, which drops its own."""
    return list(opt._steps.known.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "k4v4", "kept"])
def test_a_conversation_continues_with_graphs(kind: str) -> None:
    opt = on_device("llama", kind)
    ids = torch.randint(2, 96, (2, 30), device="cuda")
    found: list[Tensor] = []
    for graphs in (True, False):
        opt.cuda_graphs = graphs
        cache = opt.make_cache(2, 60)
        text = opt.generate(ids, past_key_values=cache, max_new_tokens=25, do_sample=False)
        text = torch.cat([text, ids[:, :9]], 1)
        # more than it has room for: the tensors become others
        text = opt.generate(text, past_key_values=cache, max_new_tokens=60, do_sample=False)
        cache.crop(-20)
        text = opt.generate(
            text[:, :-20], past_key_values=cache, max_new_tokens=30, do_sample=False
        )
        found.append(text)
        if graphs:
            assert [s.graph is not None for _, kinds in seen(opt) for s in kinds.values()] == [True]
    assert torch.equal(*found)


@pytest.mark.gpu
def test_other_weights_are_captured_anew() -> None:
    opt = on_device("llama", "k4v4")
    ids = torch.randint(2, 96, (1, 30), device="cuda")
    cache = opt.make_cache(1, 200)
    opt.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert seen(opt)
    opt.load_state_dict({n: t.clone() for n, t in opt.state_dict().items()}, assign=True)
    assert not seen(opt)


@pytest.mark.gpu
def test_threads_replay_their_own_graphs() -> None:
    opt = on_device("llama", "k4v4")
    prompts = [torch.randint(2, 96, (1, 20 + i), device="cuda") for i in range(4)]
    run = partial(opt.generate, max_new_tokens=80, do_sample=False)
    alone = [run(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, prompts))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_replays_are_what_a_caller_keeps() -> None:
    opt = on_device("llama", "exact", torch.bfloat16)
    ids = torch.randint(2, 96, (2, 20), device="cuda")
    cache = opt.make_cache(2, 64)
    with torch.no_grad():
        opt(ids, past_key_values=cache)
        kept = [opt(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
    with torch.no_grad():
        whole = opt(torch.cat([ids, ids[:, :5]], 1)).logits[:, -5:]
    assert len({x.data_ptr() for x in kept}) == 5
    error = (torch.cat(kept, 1).float() - whole.float()).abs().max()
    assert error < 0.05 * whole.float().abs().max()


@pytest.mark.gpu
def test_with_gradients_steps_are_eager() -> None:
    opt = on_device("llama", "exact")
    ids = torch.randint(2, 96, (1, 20), device="cuda")
    cache = opt.make_cache(1, 64)
    for _ in range(3):
        opt(ids[:, :1], past_key_values=cache)
    assert not seen(opt)
