"""What is typed wrong, what options become, and what needs no model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from fxopt.cli import run
from fxopt.cli.doctor import PACKAGES, abilities, effects, no_gpu
from fxopt.cli.options import Rows, Sizes, rewrite_names
from fxopt.cli.words import as_options
from fxopt.cost_models.hardware import Device
from fxopt.ir.workload import Forward, Generate

Invoke = Callable[..., tuple[int, str, str]]
FACTS = Device(
    "a card", "cpu", 2e10, {"float32": 5e10}, 2e-6, 24 * 2**30, 2, "2026-01-01",
    cache_bandwidth=1e11, thread_bandwidth=1e10,
)  # fmt: skip
COMMANDS = (
    "optimize", "plan", "apply", "export", "bench", "verify", "diff", "report", "explain",
    "doctor",
)  # fmt: skip


def test_doctor_says_what_a_missing_package_means() -> None:
    everything: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0")
    assert "Triton kernels on the GPU" in " ".join(effects(everything, None))
    without = {**everything, "triton": None, "onnxruntime": None, "transformers": None}
    said = " ".join(effects(without, None))
    for what in ("no triton", "no onnxruntime: no ONNX export", "no transformers"):
        assert what in said
    (said,) = effects(everything, "the driver is too old")
    assert said.startswith("no GPU (the driver is too old): ")
    assert "reference kernels" in said


def test_doctor_says_what_a_gpu_lacks() -> None:
    gpu = replace(FACTS, name="an old card", kind="cuda")
    everything: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0")
    said = effects(everything, None, [gpu, replace(gpu, matmul_rate={"float8_e4m3fn": 1.0})])
    assert [line for line in said if "fp8" in line] == [
        "no fp8 products on an old card: fp8 layers save bytes there, not time"
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found 11040). Please update"),
         "The NVIDIA driver on your system is too old (found 11040)"),
        (None, "the driver shows no device"),
    ],
)  # fmt: skip
def test_doctor_says_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, says: str
) -> None:
    def init() -> None:
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert no_gpu() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert no_gpu() == says


def test_doctor_shows_both_directions_and_both_launches() -> None:
    gpu = replace(
        FACTS, kind="cuda", to_host=5.5e10, to_device=5.1e10, launch_seconds=6e-6,
        graph_seconds=1.5e-6, bandwidth=4.2e12, cache_bytes={"L2": 50 * 2**20},
        cache_bandwidth=7e12, few_rows_rate={"bfloat16": 4e13},
    )  # fmt: skip
    rows = abilities(asdict(gpu))
    assert rows["link"] == "55.0 GB/s to the host, 51.0 GB/s back"
    assert rows["launch"] == "6 µs eager, 1.5 µs in a CUDA graph"
    assert rows["memory"] == "24 GiB at 4.20 TB/s"
    assert rows["caches"] == "L2 50 MiB; the last at 7.00 TB/s"
    assert rows["of 16 rows"] == "bfloat16 40 TFLOP/s"
    assert "link" not in abilities(asdict(FACTS))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 64, "Usage"),
        (["frobnicate"], 64, "No such command"),
        (["plan"], 64, "Missing argument"),
        (["plan", "m"], 64, "names no row; for example --kl 0.02 --kv-cache 40%"),
        (["plan", "m", "--kl", "0"], 64, "budget of zero"),
        (["plan", "m", "--kl", "2%"], 64, "--kl 2%: "),
        (["plan", "m", "--kv-cach", "40%", "--kl", "1"], 64, "--kv-cache"),
        (["plan", "m", "--kl", "1", "--new-tokens", "8"], 64, "--prompt"),
        (["plan", "m", "--kl", "1", "--prompt", "0"], 64, "prompt"),
        (["optimize", "m", "--kl", "1"], 64, "--out FOLDER"),
        (["plan", "absent", "--kl", "1"], 1, "no folder 'absent'"),
        (["plan", "m", "--kl", "1", "--minimize", "speed"], 64, "speed"),
        (["plan", "m", "--latency", "1ms", "--latency", "2ms"], 64, "one latency"),
        (["plan", "absent.module:f", "--kl", "1"], 1, "there is no module 'absent'"),
        (["plan", "os", "--kl", "1", "--device", "tpu"], 64, "write cpu, cuda"),
        (["plan", "os", "--kl", "1", "--device", "cuda:99"], 1, "CUDA devices here"),
        (["plan", "math:frob", "--kl", "1"], 1, "cannot find 'math:frob'"),
        (["plan", "os:getcwd", "--kl", "1"], 1, "gives str, not a torch.nn.Module"),
        (["plan", "torch.nn:ReLU", "--kl", "1"], 1, "give inputs by --calibration"),
        (["plan", "torch.nn:ReLU", "--kl", "1", "--length", "8"], 64, "--prompt says how long"),
        (["diff", "absent.json", "b.json"], 1, "cannot read the plan absent.json"),
        (["export", "absent", "m.onnx"], 1, "not a folder"),
        (["bench", "m", "absent"], 1, "not a folder"),
        (["verify", "m", "."], 1, "holds no plan.json"),
        (["export", ".", "m.onnx", "--kind", "both"], 64, "both"),
        (["export", ".", "m.onnx", "--dtype", "half_float"], 64, "'half_float' is no dtype"),
    ],
    ids=str,
)
def test_mistakes(fxopt: Invoke, arguments: list[str], code: int, says: str) -> None:
    found, shown, error = fxopt(*arguments)
    assert found == code
    assert says in " ".join((error or shown).split())


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("Budget.kv_cache='40': no unit. Example: kv_cache=\"40%\"",
         "--kv-cache 40: no unit. Example: --kv-cache 40%"),
        ("write latency=\"0.7x\" or latency={\"decode\": \"0.7x\"}",
         "write --latency 0.7x or --latency decode=0.7x"),
        ("pass workload=fxopt.Generate(batch=, prompt=, new_tokens=)",
         "pass --prompt and --new-tokens"),
        ("try at='model' or at='lm_head'.", "try --at model or --at lm_head."),
        ("leave it out with rewrites=, or keep= it", "leave it out with --rewrites, or --keep it"),
        ("Loosen weights at layer=3; pass refit=True", "Loosen weights at layer=3; pass --refit"),
        ("make a plan with fxopt.plan", "make a plan with fxopt plan"),
    ],
)  # fmt: skip
def test_messages_name_options(message: str, says: str) -> None:
    assert as_options(message) == says


def test_help_and_version_leave_with_0(fxopt: Invoke) -> None:
    code, shown, _ = fxopt("--version")
    assert (code, shown.strip().count(".")) == (0, 2)
    for command in COMMANDS:
        code, shown, _ = fxopt(command, "--help")
        assert code == 0
        assert f" fxopt {command}" in shown
        assert command == "doctor" or re.search(r"MODEL|PLAN|FOLDER", shown)
        assert "3 budget infeasible" in shown


def test_help_and_completion_do_not_wait_for_torch() -> None:
    heavy = "('torch', 'transformers', 'numpy', 'scipy')"
    code = f"import fxopt.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def complete(line: str, word: int) -> list[str]:
    """What bash is offered for the word at an index of `line`."""
    asked = {"_FXOPT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    code = "import sys; sys.argv[0] = 'fxopt'; from fxopt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_shell_completion() -> None:
    assert complete("fxopt ", 1) == list(COMMANDS)
    assert complete("fxopt ver", 1) == ["verify"]
    assert "--kv-cache" in complete("fxopt plan m --k", 3)
    assert complete("fxopt plan m --minimize l", 4) == ["latency"]
    assert set(complete("fxopt plan m --rewrites kv", 4)) == set(rewrite_names("kv"))
    assert "kv_cache.blocks" in rewrite_names("kv")


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxopt", "diff", "absent", "b"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "fxopt: cannot read the plan absent: No such file or directory\n"


def explode(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("halved nothing")


@pytest.mark.parametrize("how", ["option", "environment", None])
def test_tracebacks_are_shown_on_request_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str | None
) -> None:
    monkeypatch.setattr("fxopt.cli.doctor.examine", explode)
    if how == "environment":
        monkeypatch.setenv("FXOPT_DEBUG", "1")
    assert run(["doctor", *(["--debug"] if how == "option" else [])]) == 1
    error = capsys.readouterr().err
    assert "fxopt: ZeroDivisionError: halved nothing" in error
    assert ("Traceback" in error) is (how is not None)


def test_files_that_cannot_be_written_are_one_error(
    fxopt: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "out.json")

    monkeypatch.setattr("fxopt.cli.doctor.examine", refuse)
    assert fxopt("doctor") == (1, "", "fxopt: [Errno 13] Permission denied: 'out.json'\n")


def test_interrupting_a_command(fxopt: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.cli.doctor.examine", interrupt)
    assert fxopt("doctor") == (130, "", "fxopt: interrupted\n")


@pytest.mark.parametrize(
    ("latency", "expected"),
    [
        (None, {}),
        (["0.7x"], {"latency": "0.7x"}),
        (["decode=0.7x", "prefill=12ms"], {"latency": {"decode": "0.7x", "prefill": "12ms"}}),
    ],
)
def test_budget_options(latency: list[str] | None, expected: dict[str, Any]) -> None:
    budget = Rows(latency=latency, kl="0.1").budget()
    assert budget.model_dump(exclude_none=True) == {"kl": 0.1, **expected}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((None, None, None), None),
        ((4, None, None), Forward(4)),
        ((4, 64, 0), Forward(4, 64)),
        ((None, 64, None), Generate(1, 64)),
        ((2, 64, 8), Generate(2, 64, 8)),
    ],
)
def test_workload_options(sizes: tuple[int | None, ...], expected: Any) -> None:
    assert Sizes(*sizes).workload() == expected
