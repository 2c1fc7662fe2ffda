"""What recording and scoring a Llama of random weights takes at its peak, under a bound.

python benchmarks/statistics_memory.py [--mib 512] [--rewrites linear.low_rank]

Everything that is scored is computed anew; `--mib 0` bounds nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers

import fxopt
from fxopt import subject
from fxopt.compiler import Compiler
from fxopt.request import resolve


class Resident:
    """The most memory that the process holds beyond what it held before, asked every few ms."""

    def __init__(self) -> None:
        self.peak = self._before = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def beyond(self) -> float:
        """In GiB."""
        return (self.peak - self._before) / 2**30

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    if sys.platform != "linux":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="in place of BEYOND, 0 for no bound")
    parser.add_argument("--rewrites", nargs="+", default=["linear.low_rank"])
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    os.environ["FXOPT_CACHE_DIR"] = tempfile.mkdtemp()
    subject.BEYOND = 2**20 * args.mib or 2**62
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=4096, vocab_size=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(args.device)
    data = [{"input_ids": torch.randint(8192, (1, 256))} for _ in range(args.sequences)]
    data = [{name: ids.to(args.device) for name, ids in batch.items()} for batch in data]
    request = resolve(
        model, fxopt.Budget(weights="50%"), data[0], workload=fxopt.Forward(1, 256),
        calibration=data, keep=(), rewrites=args.rewrites, at=None, seed=0, time_limit=None,
    )  # fmt: skip
    made = Compiler(request)
    passes = 0
    collect = subject.collect

    def counted(*given: object, **options: object) -> object:
        nonlocal passes
        passes += 1
        return collect(*given, **options)  # type: ignore[arg-type]

    subject.collect = counted  # type: ignore[assignment]
    begin = time.perf_counter()
    with Resident() as resident:
        table = made.table()
    seconds = time.perf_counter() - begin
    total = sum(column.prior for columns in table.columns for column in columns)
    print(
        f"{passes} passes, {resident.beyond:.2f} GiB beyond the model at most, {seconds:.0f} s; "
        f"priors add up to {total!r}"
    )


if __name__ == "__main__":
    main()
