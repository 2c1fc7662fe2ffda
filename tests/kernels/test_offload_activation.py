"""Copies to the host and back: layouts, tracers, the pool of host memory, streams."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.offload_activation import REFERENCE, arrived, landed, offload, op, reload
from fxopt.kernels.offload_activation.op import pool_of
from fxopt.kernels.offload_activation.pool import Pool

LAYOUTS = [
    torch.randn(5, 7, 3),
    torch.randn(5, 7, 3).permute(2, 0, 1).bfloat16(),
    torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    torch.arange(77),
    torch.randn(9) > 0,
    torch.randn(()).double(),
]


@pytest.mark.parametrize("x", LAYOUTS, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_there_and_back(x: Tensor) -> None:
    host = landed(offload(x), x)
    assert host.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert (host.shape, host.dtype) == ((x.numel(),), x.dtype)
    out = arrived(reload(host, x.shape, x.stride(), "cpu"), host)
    assert out.stride() == x.stride()
    assert torch.equal(out, x)
    host.zero_()
    assert torch.equal(out, x)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fxopt.offload.default, (LAYOUTS[1],))
    assert torch.equal(REFERENCE(LAYOUTS[1]), offload(LAYOUTS[1]))


def test_host_memory_is_allocated_once_and_lent_while_it_is_held() -> None:
    pool = Pool()
    first = pool.take(1000, pin=False)
    first.fill_(7)
    kept = first.view(torch.float64)[:3]
    second = pool.take(1000, pin=False)
    other = pool.take(8, pin=False)
    assert len({t.data_ptr() for t in (first, second, other)}) == 3
    assert pool.bytes == 2008
    places = {first.data_ptr(), second.data_ptr()}
    del first, second
    gc.collect()
    again = pool.take(1000, pin=False)
    # the first is still held by a view of it
    assert again.data_ptr() != kept.data_ptr()
    del kept
    gc.collect()
    assert {again.data_ptr(), pool.take(1000, pin=False).data_ptr()} == places
    assert pool.bytes == 2008


class Recorded:
    """Streams and events that write down what they are asked, instead of a device's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Event:
            def record(self, stream: Any) -> None:
                log.append(f"{stream.name} marks {id(self)}")

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Event) -> None:
                log.append(f"{self.name} waits for {id(event)}")

        @contextmanager
        def on(stream: Stream) -> Generator[None]:
            log.append(f"on {stream.name}")
            yield
            log.append(f"off {stream.name}")

        main, side = Stream("main"), Stream("side")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(op, "_stream_of", lambda _: side)


def test_each_copy_waits_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of waits, without a device; what it is for is tested on one."""
    recorded = Recorded(monkeypatch)
    source, target, cpu = torch.randn(5), torch.zeros(5), torch.device("cpu")
    op._copy(target, source, cpu)
    assert torch.equal(target, source)
    first, *between, marked = recorded.log
    assert first == "side waits for main"
    assert between == ["on side", "off side"]
    op._wait(target, cpu)
    assert recorded.log[-1] == f"main waits for {marked.split()[-1]}"
    with pytest.raises(KeyError):
        op._wait(target, cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("x", LAYOUTS, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_there_and_back_on_the_device(x: Tensor) -> None:
    there = x.cuda()
    host = landed(offload(there), there)
    out = arrived(reload(host, there.shape, there.stride(), str(there.device)), host)
    assert host.is_pinned()
    assert torch.equal(out.cpu(), x)


@pytest.mark.gpu
def test_copies_beside_a_busy_device_read_and_write_what_they_should() -> None:
    """Memory is made late and used again early: without the waits copies would see other values."""
    slow = torch.randn(4096, 4096, device="cuda")
    pool, grown = pool_of(slow.device), 0
    for step in range(4):
        hosts: list[Tensor] = []
        for i in range(4):
            x = (slow @ slow).mul_(0).add_(10 * step + i)
            host = offload(x)
            _ = slow @ slow
            hosts.append(landed(host, x))
            del x, host
            torch.empty_like(slow).fill_(-1)
        for i, host in reversed(list(enumerate(hosts))):
            torch.empty_like(slow).fill_(-2)
            out = reload(host, slow.shape, slow.stride(), "cuda:0")
            _ = slow @ slow
            assert bool((arrived(out, host) == 10 * step + i).all())
        del hosts, host, out
        grown = grown or pool.bytes
        assert pool.bytes == grown
