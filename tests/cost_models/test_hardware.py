"""Facts of a device: probed once, kept on disk, probed again where the file is another's."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cost_models import hardware, probing
from fxopt.cost_models.hardware import Device, probe

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """What was measured, in an empty cache folder; products are small."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    made: list[Device] = []
    measure, rates = hardware._measure, probing._rates
    monkeypatch.setattr(hardware, "_measure", lambda *a: made.append(measure(*a)) or made[-1])
    monkeypatch.setattr(probing, "_rates", lambda device, rows, size: rates(device, 16, 64))
    monkeypatch.setattr(probing, "_copied", lambda device, size: 1e9 + size)
    return made


def test_a_cpu_is_probed_once(probed: list[Device]) -> None:
    first = probe("cpu")
    assert {"float32", "bfloat16", "float16"} <= set(first.matmul_rate)
    assert "float8_e4m3fn" not in first.matmul_rate
    assert set(first.few_rows_rate) == set(first.matmul_rate)
    assert min(first.launch_seconds, first.thread_bandwidth, first.cache_bandwidth) > 0
    assert (first.kind, first.host_link, first.graph_seconds) == ("cpu", 0.0, 0.0)
    assert first.probed == date.today().isoformat()
    assert probe("cpu") == first
    assert len(probed) == 1
    probe("cpu", refresh=True)
    assert len(probed) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept["facts"].pop("cache_bytes"),
        lambda kept: kept["facts"].update(host_link=1.0),
        lambda kept: kept.update(torch="1.0"),
        lambda kept: kept.update(facts=[]),
    ],
)
def test_facts_of_another_version_are_probed_again(
    probed: list[Device], tmp_path: Path, spoil: Any
) -> None:
    first = probe("cpu")
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert set(kept["facts"]) == {f.name for f in fields(Device)}
    spoil(kept)
    path.write_text(json.dumps(kept))
    assert asdict(probe("cpu")).keys() == asdict(first).keys()
    assert len(probed) == 2


def test_the_last_level_of_cache_is_the_largest(probed: list[Device]) -> None:
    probe("cpu")
    kept = probe("cpu")
    assert len(probed) == 1
    sizes = list(kept.cache_bytes.values())
    assert sizes == sorted(sizes)
    assert kept.last_cache == max(sizes, default=0)


def test_caches_of_data_are_read_by_level(tmp_path: Path) -> None:
    levels = [("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "1024K")]
    for i, (kind, level, size) in enumerate(levels):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    (tmp_path / "index3").mkdir()  # of which the system says nothing
    assert probing.cpu_caches(tmp_path) == {"L1": 48 * 2**10, "L2": 2**20}
    assert probing.cpu_caches(tmp_path / "none") == {}


@pytest.mark.gpu
def test_a_gpu_is_probed_whole() -> None:
    found = probing.facts_of(torch.device("cuda"), "a GPU")
    assert found.graph_seconds < found.launch_seconds < 1e-3
    assert 1e9 < found.host_link <= min(found.to_host, found.to_device)
    assert found.bandwidth < found.cache_bandwidth
    assert found.matmul_rate["bfloat16"] > 5 * found.few_rows_rate["bfloat16"]
    if torch.cuda.get_device_capability() >= (9, 0):
        assert found.matmul_rate["float8_e4m3fn"] > found.matmul_rate["bfloat16"]
