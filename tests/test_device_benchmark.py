"""`benchmarks/device.py` without a device: all runs at small sizes; missing, wrong or late results are reported."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device.py"


@pytest.fixture(scope="module")
def device() -> types.ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("device_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def statuses(report: dict) -> set[str]:
    return {step["status"] for step in report["steps"]}


@pytest.mark.exhaustive
def test_everything_small(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "device.json"
    assert device.main(["--small", f"--json={file}"]) == 0
    report, printed = json.loads(file.read_text()), capsys.readouterr()
    assert statuses(report) == {"ok"}
    assert report["small"] and report["device"]["platform"]
    assert set(report["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy"}
    assert set(report["commit"]) == {"hash", "dirty"}
    sections = {name: [step for step in report["steps"] if step["section"] == name] for name in ("kernels", "model")}
    kernels = sections["kernels"]
    assert {(step["kernel"], step["lowering"]) for step in kernels} == {
        (kernel, lowering) for kernel in ("triton", "mosaic") for lowering in ("kernel", "XLA")
    }
    assert all(step["interpreted"] and 0 < step["of_bound"] <= 1 and step["error"] > 0 for step in kernels)
    logits, text, coarse = sections["model"]
    assert (text["model"], text["equal"], text["tokens"]) == ("box", True, 12) and text["text"]
    assert 0 <= logits["of_bound"] <= 1 and 0 < coarse["of_bound"] <= 1
    figures = [step for step in report["steps"] if step["section"] == "small"]
    work = {(step["weights"], step["phase"]) for step in figures}
    assert work == {(kind, phase) for kind in ("int4-g32", "bfloat16") for phase in ("decode", "prefill")}
    for step in figures:
        assert step["tokens_per_second"] > 0 and step["gigabytes_per_second"] > 0 and step["of_copy_bandwidth"] > 0
        assert ("faster_than_bfloat16" in step) == (step["weights"] == "int4-g32")
    for step in report["steps"]:
        assert step["name"] in printed.out and step["name"] in printed.err


def test_what_is_late_is_left_out(device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps are those of a device; figures that are not measured do not count as wrong."""
    monkeypatch.setattr(device, "bandwidth", lambda size, repeats: {})
    assert device.main(["--seconds=-1", "--small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("no time left") for line in lines) == len(lines) - 7, (
        "the other lines: device, commit, column names, four sections"
    )


def a_run(device, folder: Path):
    head = {"device": device.device(), "versions": device.versions(), "commit": device.commit()}
    return device.Run([], 60, folder / "device.json", head)


def test_a_step_that_does_not_end(device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the timer's end all results so far are written, and the process ends."""
    run, codes = a_run(device, tmp_path), []
    monkeypatch.setattr(device.os, "_exit", codes.append)

    def hang() -> dict:
        run.give_up()
        codes.append(json.loads(run.file.read_text())["steps"])
        return {}

    run.do(device.Step("kernels", "a", 1, dict))
    run.do(device.Step("kernels", "b", 1, hang))
    code, steps = codes
    assert code == 1
    assert [(step["status"], step["note"]) for step in steps] == [("ok", ""), ("failed", "still running at the end")]


def test_failures_are_kept_and_the_rest_goes_on(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> dict:
        raise RuntimeError("no such instruction\nand much more")

    def memory() -> dict:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate")

    def small() -> dict:
        raise device.Skip("needs 17 GB")

    work = {"a": fail, "b": memory, "c": small, "d": lambda: {"of_bound": 7.0, "wrong": True}, "e": lambda: {}}
    work["g"] = lambda: {"error": float("nan"), "tokens": 3}
    run = a_run(device, tmp_path)
    for name, one in work.items():
        run.do(device.Step("kernels", name, 1, one))
    run.do(device.Step("kernels", "f", 61, lambda: {}))
    assert run.finish() == 1
    steps = json.loads((tmp_path / "device.json").read_text())["steps"]
    assert [(step["name"], step["status"], step["note"]) for step in steps] == [
        ("a", "failed", "RuntimeError: no such instruction"),
        ("b", "skipped", "out of memory"),
        ("c", "skipped", "needs 17 GB"),
        ("d", "wrong", ""),
        ("e", "ok", ""),
        ("g", "wrong", "not finite: error"),
        ("f", "skipped", "no time left"),
    ]
    assert "RuntimeError: no such instruction" in capsys.readouterr().out


def test_a_wrong_product_is_noticed(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales are those of the neighbouring group, as in a kernel that counts groups wrongly."""
    case, layout = device.Case("int4", 32, 256, 128), device.gpu.layout

    def wrong(stack):
        made = layout(stack)
        columns = device.dataclasses.replace(made.columns, scale=jnp.roll(made.columns.scale, 1, axis=-2))
        return device.dataclasses.replace(made, columns=columns)

    monkeypatch.setattr(device.gpu, "layout", wrong)
    figures = device.product(device.gpu, case, 1, "bfloat16", True)
    assert figures["wrong"] and figures["of_bound"] > 1


def test_times_of_a_product(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed functions compile and run over a stack, for both layouts and axes."""
    monkeypatch.setattr(device, "_STACK_BYTES", 1)
    for module in (device.gpu, device.tpu):
        for axis in (-1, -2):
            stack = device.weights(device.Case("int4", 32, 256, 128, axis=axis)).stack
            x_RK = jnp.ones((17, 256), jnp.bfloat16)  # no kernel: kernels do not run on a CPU
            figures = device.product_times(
                lambda x_RK, layer: layer.restore().scale.sum(dtype=jnp.float32), module.layout(stack), x_RK
            )
            assert all(figures[name] > 0 for name in ("seconds", "faster_than_plain", "faster_than_bfloat16"))


@pytest.mark.parametrize(("limit", "skipped"), [(None, False), (12e9, True), (80e9, False)])
def test_memory(device, limit: float | None, skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = types.SimpleNamespace(memory_stats=lambda: None if limit is None else {"bytes_limit": limit})
    monkeypatch.setattr(device.jax, "devices", lambda: [stats])
    config = device.llamajax.preset("llama3-8b")
    device.check_memory(config, "int4-g32", 1)
    if skipped:
        with pytest.raises(device.Skip, match=r"needs 17\.\d GB of memory, the device gives 12\.0"):
            device.check_memory(config, "bfloat16", 1)
    else:
        device.check_memory(config, "bfloat16", 64)


_WITHOUT = """
import json, sys
for name in ("safetensors", "sentencepiece", "jsonschema", "flatbuffers", "matplotlib", "torch", "transformers"):
    sys.modules[name] = None
import device
assert device.main(["--small", "--seconds=-1"]) == 0
print(json.dumps(device.compare_logits("float32", 8)))
"""


def test_it_needs_no_more_than_jax_and_flax() -> None:
    """Without our package's other dependencies it takes random weights of the box's shape, and says so."""
    path = {"PYTHONPATH": f"{ROOT}:{SCRIPT.parent}"}
    command = [sys.executable, "-W", "error", "-c", _WITHOUT]
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["model"] == "random weights of the box's shape (safetensors and sentencepiece not installed)"
    assert 0 <= figures["of_bound"] <= 1 and not figures["wrong"] and figures["largest_logit"] > 0
