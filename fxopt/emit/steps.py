"""Decoding steps as CUDA graphs: replayed by one launch, where Python takes longer than the GPU.

The first step of a kind runs as it is, so that its kernels are compiled; the second is captured,
and from then on what a step is given is copied to where the graph reads it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fxopt.kernels.kv_attention.op import decodes_on_device

from ..ir.recording import is_recorded
from .cache import Cache
from .program import State

logger = logging.getLogger(__name__)

MASK = "attention_mask"
# More new tokens than speculative decoding checks at once are a prefill of their own length.
MOST_TOKENS = 8

Inputs = dict[str, Any]
Run = Callable[[Inputs], tuple[Any, ...]]


@dataclass
class Step:
    """One kind of step over one cache: the tensors that it reads, and the graph once there is one.

    `inputs` are static; an attention mask has a column for every token that the cache holds, as
    no kernel reads it past the newest.
    """

    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Any, ...] = ()
    refused: bool = False

    @classmethod
    def of(cls, inputs: Mapping[str, Any], capacity: int) -> Step:
        static = dict(inputs)
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    shape = (len(value), capacity) if name == MASK else value.shape
                    static[name] = value.new_zeros(shape)
        return cls(static)

    def load(self, inputs: Mapping[str, Any]) -> None:
        """Copy what a step is given to where it is read."""
        for name, value in inputs.items():
            if name == MASK and value is not None:
                self.inputs[name][:, : value.shape[1]].copy_(value)
            elif isinstance(value, Tensor):
                self.inputs[name].copy_(value)

    def capture(self, run: Run) -> None:
        """Record `run`; nothing is computed. Where it cannot be recorded, steps stay eager."""
        graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(graph):
                self.outputs = run(self.inputs)
            self.graph = graph
        except RuntimeError as error:
            logger.info("decoding steps stay eager: a CUDA graph could not be made (%s)", error)
            self.refused = True

    def replay(self) -> tuple[Any, ...]:
        """The outputs as new tensors: the graph's own are written over by the next step."""
        assert self.graph is not None
        self.graph.replay()
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in self.outputs)


@dataclass
class Steps:
    """The steps of one module: by cache, whose end is also theirs, and by what they are given."""

    known: WeakKeyDictionary[Cache, tuple[int, dict[Any, Step]]] = field(
        default_factory=WeakKeyDictionary
    )

    def __call__(self, run: Run, inputs: Mapping[str, Any], cache: Cache) -> tuple[Any, ...]:
        """`run(inputs)` for the tokens that come next in `cache`, which is not advanced."""
        with torch.cuda.device_of(next(v for v in inputs.values() if isinstance(v, Tensor))):
            return self._call(run, inputs, cache)

    def _call(self, run: Run, inputs: Mapping[str, Any], cache: Cache) -> tuple[Any, ...]:
        version, steps = self.known.get(cache, (cache.length.version, {}))
        if version != cache.length.version:
            steps.clear()  # its tensors are others now
        self.known[cache] = cache.length.version, steps
        key = _key(inputs)
        step = steps.get(key)
        if step is None:
            step = steps[key] = Step.of(inputs, cache.capacity)
            step.load(inputs)
            return run(step.inputs)
        step.load(inputs)
        if step.graph is None and not step.refused:
            step.capture(run)
        return run(step.inputs) if step.refused else step.replay()

    def forget(self) -> None:
        """Drop all graphs: the tensors of the module are others now."""
        self.known.clear()


def replayable(ids: Tensor, states: tuple[State, ...]) -> bool:
    """Whether a step with these tokens may be a CUDA graph: all that changes is read on the GPU."""
    if not ids.is_cuda or is_recorded(ids) or ids.shape[1] > MOST_TOKENS:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return all(
        decodes_on_device(
            s.num_heads // s.num_kv_heads * ids.shape[1],
            (s.head_dim, s.value_dim),
            s.dtype,
            s.layout,
            ids.device,
        )
        for s in states
    )


def _key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What one graph serves: shapes and dtypes, the mask's length aside, and all else by value."""
    return tuple(
        (n, tuple(v.shape[: 1 if n == MASK else None]), v.dtype)
        if isinstance(v, Tensor)
        else (n, repr(v))
        for n, v in inputs.items()
    )


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Generator[None]:
    """As `torch.cuda.graph`, which also collects garbage and empties the allocator's cache: at
    each `generate` that would take longer than the steps it saves. Other threads may go on."""
    stream = _side(torch.cuda.current_device(), threading.get_ident())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _side(device: int, thread: int) -> torch.cuda.Stream:
    """One for all captures of a thread: a library keeps a workspace of 32 MiB for each stream that
    it sees."""
    del thread
    return torch.cuda.Stream(device)
