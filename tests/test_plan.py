"""What `plan` predicts, compared with the memory that models, caches and processes take."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import llamajax
from llamajax import LlamaJaxError, open_checkpoint, preset
from llamajax.caches import empty_cache
from llamajax.cli import main
from llamajax.cli.plan import parse_memory
from llamajax.evaluation.speed import random_model
from llamajax.families import config_to_hf
from llamajax.plan import longest_context, plan, plan_weights

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def held(tree: object) -> int:
    """Returns the bytes of a tree's arrays."""
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize("recipe", ["int4-g32", "int8", "nf4-g64", "bfloat16"])
def test_weights_are_those_of_a_model(recipe: str) -> None:
    config = dataclasses.replace(preset("box"), num_layers=2)
    made = plan(config, recipe, context=100, dtype=jnp.float32, backend="cpu")
    model = random_model(config, recipe, dtype=jnp.bfloat16)
    assert made.stored == held(model)
    if recipe == "bfloat16":
        assert made.weights == 2 * made.stored == 4 * config.num_parameters  # computed in float32
    else:
        # The recipe keeps norms, which are then in float32.
        norms = (2 * config.num_layers + 1) * config.width
        assert made.weights == held(llamajax.prepare(model, "cpu")) + 2 * norms


def test_a_checkpoint_as_it_is() -> None:
    opened = open_checkpoint("box")
    made = plan(opened, context=512, batch=3, cache_dtype="int8", backend="cpu")
    assert (made.recipe, made.dtype, made.cache_dtype) == ("as stored", "bfloat16", "int8")
    assert made.stored == made.weights == 2 * 3_672_320
    c = opened.config
    # One byte per element, 5 bytes per head and token for scale and zero point, and the lengths.
    assert made.cache == 2 * c.num_layers * 3 * c.num_kv_heads * 512 * (c.head_size + 5) + 3 * 4
    assert made.total == made.weights + made.cache + made.activations + made.programs


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int4"])
def test_the_cache_is_what_the_engine_makes(cache_dtype: str) -> None:
    config = dataclasses.replace(preset("box"), num_layers=1)
    made = plan(config, context=257, batch=2, cache_dtype=cache_dtype, backend="cpu")
    # The last token is never in the cache: 256 slots serve a context of 257.
    assert made.cache == held(empty_cache(config, 2, 256, cache_dtype))
    larger = plan(config, context=258, batch=2, cache_dtype=cache_dtype, backend="cpu")
    assert larger.cache == held(empty_cache(config, 2, 512, cache_dtype))


def test_a_longer_context_copies_no_more_of_a_window() -> None:
    """Activations grow with the context by a full layer's keys and values in float32; with rings alone, not at all."""
    grown = {}
    for window, kinds in ((None, ("full",)), (512, ("window",)), (512, ("window", "full"))):
        config = dataclasses.replace(preset("llama3.2-1b"), window=window, layer_kinds=kinds)
        weights = plan_weights(config, "int4-g32", dtype=jnp.float32, backend="cpu")
        shorter, longer = (weights.plan(context).activations for context in (2048 + 1, 4096 + 1))
        grown[kinds] = longer - shorter
    assert grown[("window",)] == 0
    assert grown[("full",)] == grown[("window", "full")] == 4 * 2048 * 2 * 8 * 64


def test_shapes_that_no_machine_here_holds() -> None:
    """Llama 3 70B has 70.6e9 weights, all but the norms at 4.5 bits; 80 layers with 8 KV heads of 128."""
    made = plan(preset("llama3-70b"), "int4-g32", context=8192, dtype="bfloat16", backend="cpu")
    norms = 161 * 8192
    assert made.stored == (70_553_706_496 - norms) * 4.5 / 8 + 2 * norms
    assert made.stored <= made.weights < 1.01 * made.stored
    assert made.cache == 2 * 80 * 8 * 8192 * 128 * 2 + 4


def test_the_longest_context_fits_and_no_longer_one_does() -> None:
    weights = plan_weights(preset("llama2-7b"), "int4-g32", dtype="float32", backend="cpu")
    memory = 4_900 * MIB
    longest = longest_context(weights, memory, 1, "int8")
    assert 0 < longest < 4096
    assert weights.plan(longest, 1, "int8").most <= memory < weights.plan(longest + 1, 1, "int8").most
    assert longest_context(weights, 3 << 30, 1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0: expected at least 1"),
        ({"batch": 0}, "batch is 0: expected at least 1"),
        ({"context": 513}, "context is 513 tokens: expected at most 512, the model's context length"),
        ({"cache_dtype": "int2"}, "the cache's dtype is 'int2': expected one of float32"),
        ({"recipe": "mixed-4.5bpw"}, "recipe is 'mixed-4.5bpw', whose bits, outliers or channel order depend"),
        ({"recipe": "int5-g7"}, "int5-g7"),
    ],
)
def test_what_cannot_be_planned(options: dict, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message.replace("(", r"\(")):
        plan(preset("box"), **options)


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("24G", 24 << 30), ("24GiB", 24 << 30), ("24GB", 24_000_000_000), ("1.5m", 1536 << 10), ("700", 700)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "24 gigabytes", "0", "nan", "1" * 400, "1e3G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LlamaJaxError, match="expected a size such as 24G or 24GiB"):
        parse_memory(text)


def test_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--shape=llama2-7b", "--recipe=int8", "--backend=cpu", "--batch=2", "--context=4096"]
    assert main([*arguments, "--memory=10G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["most"] + found["process"] > found["memory"] == 10 << 30
    room = found["memory"] - found["process"]
    would = found["would_fit"]
    # Keys and values of 2 rows: 2 x 32 layers x 2 x 4096 x 4096 floats take 8 GiB, in 8 bits little more than 2 GiB.
    assert set(would["kv_cache"]) == {"int8", "int4"} and would["batch"] == 0
    assert 0 < found["longest_context"] < 4096
    assert would["recipe"] == {} and all(total <= room for total in would["kv_cache"].values())
    assert main([*arguments, "--memory=16GB"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit 14.90 GiB" in printed and "--batch=1" in printed and "--recipe=int4-g32" in printed
    assert "ternary" not in printed  # ternary is for models that were trained for it


def test_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_to_hf(preset("llama3.2-1b"))))
    assert main(["plan", f"--shape={file}", "--backend=cpu", "--memory=24G", "--context=1000"]) == 0
    printed = capsys.readouterr().out
    assert "1,235,814,400 weights; 1 row of 1,000 tokens; cpu" in printed
    assert "fits 24.00 GiB" in printed
    assert "2.30 GiB at rest" in printed  # two bytes per weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=box", "--shape=box"], "--model and --shape are both given: expected one of them"),
        (["--shape=llama9"], "--shape=llama9: expected a config.json, or one of"),
        (["--memory=much"], "--memory=much: expected a size"),
        (["--model=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_errors_are_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- Processes -------------------------------------------------------------------------------------------------------


def measured(case: str, scratch: Path) -> list[dict[str, float]]:
    """Runs `benchmarks/plan.py` on a case; returns what it prints, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # so that the first process compiles
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), f"--scratch={scratch}", "--json", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc for a peak of memory"
)


@linux
def test_a_process_of_the_box(tmp_path: Path) -> None:
    """Programs, which the first process compiles, take most of the memory: the plan is right within a factor of 2."""
    for found in measured("box,,512,1,auto", tmp_path):
        assert found["plan"] / 2 < found["generating"] < 2 * found["plan"]


@linux
@pytest.mark.exhaustive
def test_a_process_of_1b_parameters(tmp_path: Path) -> None:
    first, second = measured("tinyllama-1.1b,int4-g32,2048,1,auto", tmp_path)
    assert second["compiled"] == 0
    assert abs(second["plan"] / second["generating"] - 1) < 0.05
    assert abs(first["plan"] / first["generating"] - 1) < 0.1  # the first process compiled as well
