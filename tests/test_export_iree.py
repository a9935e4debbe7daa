"""IREE: one module of all programs gives the golden tokens, from the bundle's own packed weights."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import export.targets
import llamajax
from export.bundle import Bundle, seal, write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.verification import verify
from llamajax.errors import LlamaJaxError
from tests.counters import PROMPTS, expected_tokens, write_counters
from tests.isolated import run_isolated

MODULES = ("iree.compiler", "iree.runtime")
pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        importlib.util.find_spec("iree") is None or not all(map(importlib.util.find_spec, MODULES)),
        reason="IREE is not installed: pip install iree-base-compiler iree-base-runtime",
    ),
]
SPEC = Spec(slots=96, buckets=(4, 16), programs=("score", "embed", "verify"), profile=PROFILES["unrolled"])
SCRIPT = Path(export.targets.__file__).parents[1] / "runners" / "iree-run-module.sh"
IDS = [1, 5, 9, 300, 17, 42, 8]


@pytest.fixture(scope="module")
def bundle(tiny_int4, tiny_tokenizer, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    return add_target(write(tiny_int4, tiny_tokenizer, path, SPEC), "iree-cpu")


def run(bundle: Bundle, *arguments: str, runner: str = "run_iree.py") -> str:
    done = run_isolated(bundle.path, *arguments, runner=runner, hidden=("jax",))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_golden_prompts_are_exact(bundle: Bundle) -> None:
    made = json.loads(run(bundle, "--golden"))
    assert len(made["prompts"]) == bundle.manifest["golden"]["prompts"]
    for prompt in made["prompts"]:
        assert prompt["exact"] and float(prompt["largest_logit_error"]) < 1e-4, prompt


def test_several_rows_and_a_bfloat16_cache(tiny_int4, tmp_path: Path) -> None:
    spec = Spec(batch=2, slots=32, buckets=(4,), cache_dtype="bfloat16", profile=PROFILES["unrolled"])
    bundle = add_target(write(tiny_int4, None, tmp_path / "tiny", spec), "iree-cpu")
    expected = llamajax.generate(tiny_int4, None, IDS, temperature=0, max_new_tokens=20, cache_dtype="bfloat16")
    made = run(bundle, f"--ids={','.join(map(str, IDS))}", "--max_new_tokens=20")
    assert [int(token) for token in made.split()] == expected.tokens


def test_state_of_other_names_shapes_and_dtypes(tmp_path: Path) -> None:
    bundle = add_target(write_counters(tmp_path / "counters"), "iree-cpu")
    (result,) = verify(bundle, ["iree"])
    assert result.held and result.exact and result.tokens == 40, result
    if shutil.which("iree-run-module"):
        done = subprocess.run(["sh", SCRIPT, bundle.path, "12", *map(str, PROMPTS[1])], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [int(token) for token in done.stdout.split()] == expected_tokens(PROMPTS[1], 12)[0]


def test_a_module_for_another_processor_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    processor = bundle.manifest["targets"]["iree-cpu"]["processor"]
    # The target names the kind of the compiling machine, and nothing else of it.
    assert processor["name"] in ("x86-64-v3", "generic")
    assert not any(feature.startswith("avx512") for feature in processor["features"])
    shutil.copytree(bundle.path, tmp_path / "copy")
    for changes, message in (
        ({"features": [*processor["features"], "avx1024"]}, "compiled for a processor with avx1024, which this one"),
        ({"machine": "pdp11"}, "compiled for a processor with pdp11, which this one"),
    ):
        manifest = json.loads(json.dumps(bundle.manifest))
        manifest["targets"]["iree-cpu"]["processor"].update(changes)
        seal(tmp_path / "copy", manifest)
        done = run_isolated(tmp_path / "copy", "--ids=1,5", runner="run_iree.py", hidden=("jax",))
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        assert message in done.stderr


def test_weights_stay_packed(bundle: Bundle) -> None:
    from iree import runtime

    packed = sum(array.nbytes for array in bundle.weights().values())
    file = bundle.file("targets/iree-cpu/model.vmfb")
    module = file.read_bytes()
    planes = {name: array.tobytes() for name, array in bundle.weights().items() if ".planes." in name}
    assert planes
    for name, data in planes.items():
        assert name.encode() in module and data not in module, name
    # Bytes that loading allocates, by IREE's own account.
    config, index = runtime.Config("local-sync"), runtime.ParameterIndex()
    index.load(str(bundle.file("weights.safetensors")))
    weights = runtime.create_io_parameters_module(config.vm_instance, index.create_provider("model"))
    loaded = runtime.load_vm_modules(weights, runtime.VmModule.mmap(config.vm_instance, str(file)), config=config)
    assert len(loaded) == 2
    assert config.device.allocator.statistics["device_bytes_peak"] < 1.2 * packed + 4096


def test_native_tool_gives_the_same_tokens(bundle: Bundle, tiny_int4, tmp_path: Path) -> None:
    if shutil.which("iree-run-module") is None:
        pytest.skip("no iree-run-module on PATH: it is in iree-base-runtime")
    done = subprocess.run(["sh", SCRIPT, bundle.path, "6", *map(str, IDS[:4])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = llamajax.generate(tiny_int4, None, IDS[:4], temperature=0, max_new_tokens=6)
    assert [int(token) for token in done.stdout.split()] == expected.tokens
    shutil.copytree(bundle.path, tmp_path / "old")
    manifest = json.loads(json.dumps(bundle.manifest))
    del manifest["cache"]["state"]  # as in bundles of the first releases
    seal(tmp_path / "old", manifest)
    again = subprocess.run(["sh", SCRIPT, tmp_path / "old", "6", *map(str, IDS[:4])], capture_output=True, text=True)
    assert again.stdout == done.stdout, again.stderr
    for arguments, message in (
        (["6", "1", "320"], "id 320: expected 0 to 319"),
        (["6", "1", "-1"], "id -1: expected 0 to 319"),
        (["6", *"12345"], "5 ids: expected at most 4, the smallest bucket"),
        (["97", "1"], "1 ids and 97 tokens: expected at most 96 + 1 in all"),
    ):
        done = subprocess.run(["sh", SCRIPT, bundle.path, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "") and message in done.stderr, done
    shutil.copytree(bundle.path, tmp_path / "copy")
    features = bundle.manifest["targets"]["iree-cpu"]["processor"]["features"]
    for changes, message in (
        ({"features": [*features, "avx1024"]}, "compiled for a processor with avx1024, which this one"),
        ({"machine": "pdp11"}, "compiled for a processor with pdp11, which this one"),
    ):
        manifest = json.loads(json.dumps(bundle.manifest))
        manifest["targets"]["iree-cpu"]["processor"].update(changes)
        seal(tmp_path / "copy", manifest)
        done = subprocess.run(["sh", SCRIPT, tmp_path / "copy", "1", "1"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "") and message in done.stderr, done
        assert done.stderr.count("\n") == 1


def test_loops_are_refused(tiny_int4, tmp_path: Path) -> None:
    bundle = write(tiny_int4, None, tmp_path / "tiny", Spec(slots=32, buckets=(4,)))
    with pytest.raises(LlamaJaxError, match="profile 'scanned': expected 'unrolled'"):
        add_target(bundle, "iree-cpu")
    assert not list(bundle.path.glob("targets/*"))
