"""The examples run to their end and print what they are about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def printed(name: str, folder: Path, *arguments: str) -> str:
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_long_context_finds_what_it_found_before(tmp_path: Path) -> None:
    text = printed("long_context", tmp_path)
    assert re.search(r"^kv_cache .* holds$", text, re.MULTILINE)
    found = re.search(r"answers found before: (\d+), after: (\d+) of 16", text)
    assert found is not None
    before, after = map(int, found.groups())
    assert before >= 14
    assert after >= before - 2


@pytest.mark.slow
def test_encoder_latency_reports_time_and_error(tmp_path: Path) -> None:
    text = printed("encoder_latency", tmp_path)
    # whether the limit of time holds is up to the machine
    assert re.search(r"^latency +\S+ ", text, re.MULTILINE)
    assert re.search(r"^relative_error .* holds$", text, re.MULTILINE)
    assert text.rstrip().endswith("(2, 256, 256)")


@pytest.mark.exhaustive
def test_vision_keeps_its_own_metric(tmp_path: Path) -> None:
    text = printed("vision", tmp_path)
    for row in ("weights", "metric_drop"):
        assert re.search(rf"^{row} .* holds$", text, re.MULTILINE)
    found = re.search(r"agreement (\d+)%", text)
    assert found is not None
    assert int(found[1]) >= 90


@pytest.mark.exhaustive
def test_edit_plan_locks_a_layer_and_keeps_the_budget(tmp_path: Path) -> None:
    text = printed("edit_plan", tmp_path, "--out", str(tmp_path))
    assert re.search(r"^weights .* holds$", text, re.MULTILINE)
    from fxopt import Plan

    edited = Plan.load(tmp_path / "edited.json")
    last = [d for d in edited.decisions if d.key.startswith("model.layers.5.")]
    linear = [d for d in last if d.family == "linear"]
    assert linear
    assert all(d.locked and not d.rewritten for d in linear)
    assert any(d.rewritten for d in edited.decisions)


@pytest.mark.exhaustive
def test_compare_budgets_trades_error_for_bytes(tmp_path: Path) -> None:
    text = printed("compare_budgets", tmp_path, "--out", str(tmp_path))
    found = re.findall(r"^kl (\S+): a cache of (\S+) MiB, predicted kl (\S+)$", text, re.MULTILINE)
    (strict, large, less), (loose, small, more) = [tuple(map(float, row)) for row in found]
    assert less <= strict
    assert more <= loose
    # as it is: 3 MiB
    assert small < large < 3
    assert (tmp_path / "frontier.svg").read_text().startswith("<svg")


@pytest.mark.exhaustive
def test_onnxruntime_writes_what_the_module_writes(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    text = printed("onnx_runtime", tmp_path, "--out", str(tmp_path))
    assert "onnxruntime differs from the module by at most" in text
    found = re.findall(r"^(?:onnxruntime|fxopt): +(b.*)$", text, re.MULTILINE)
    assert len(found) == 2
    assert found[0] == found[1]
