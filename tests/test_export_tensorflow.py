"""SavedModel and LiteRT: each runtime alone gives the tokens of `generate`, from packed weights."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import llamajax
from export.bundle import Bundle, write
from export.profiles import PROFILES, Spec
from export.targets import SCRIPTS, add_target
from llamajax.errors import LlamaJaxError

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed: it makes these targets"
    ),
]
needs_litert = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed: it runs this target"
)
IDS = [1, 5, 9, 300, 17, 42, 8]


@pytest.fixture(scope="module")
def float_bundle(tiny_int4, tiny_tokenizer, tmp_path_factory) -> Bundle:
    """A bundle with both targets, small caches, and one bucket that a prompt of 7 ids does not use."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle = write(tiny_int4, tiny_tokenizer, path, Spec(slots=64, buckets=(4, 16), profile=PROFILES["float"]))
    return add_target(add_target(bundle, "savedmodel"), "litert")


def run(bundle: Bundle, runner: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the bundle's runner, which can import neither jax nor this project."""
    hidden = "sys.modules.update(llamajax=None, quant=None, export=None, jax=None)"
    code = f"import runpy, sys; {hidden}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(bundle.file(runner)), str(bundle.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle.path)


@pytest.mark.parametrize("runner", ["run_savedmodel.py", pytest.param("run_litert.py", marks=needs_litert)])
def test_gives_the_tokens_of_generate(runner: str, float_bundle: Bundle, tiny_int4) -> None:
    expected = llamajax.generate(tiny_int4, None, IDS, temperature=0, max_new_tokens=50)
    done = run(float_bundle, runner, f"--ids={','.join(map(str, IDS))}", "--max_new_tokens=50")
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected.tokens
    assert "tokens/s" in done.stderr


def test_weights_are_stored_once_and_packed(float_bundle: Bundle) -> None:
    packed = sum(array.nbytes for array in float_bundle.weights().values())
    (variables,) = (float_bundle.path / "targets" / "savedmodel" / "variables").glob("*.data-*")
    assert variables.stat().st_size < 1.2 * packed + 4096  # plus the names of the variables
    model = (float_bundle.path / "targets" / "litert" / "model.tflite").read_bytes()
    planes = {name: array.tobytes() for name, array in float_bundle.weights().items() if ".planes." in name}
    assert planes
    for name, data in planes.items():
        assert model.count(data) == 1, name


def test_savedmodel_of_loops_with_every_program(tiny_int4, tmp_path: Path) -> None:
    spec = Spec(slots=64, buckets=(16,), programs=("sample", "score"))
    bundle = add_target(write(tiny_int4, None, tmp_path / "tiny", spec), "savedmodel")
    expected = llamajax.generate(tiny_int4, None, IDS, temperature=0, max_new_tokens=8)
    done = run(bundle, "run_savedmodel.py", f"--ids={','.join(map(str, IDS))}", "--max_new_tokens=8")
    assert [int(token) for token in done.stdout.split()] == expected.tokens, done.stderr
    with pytest.raises(LlamaJaxError, match="LiteRT unpacks in floats: export it with --profile=float"):
        add_target(bundle, "litert")


def test_runner_without_its_target(tiny_int4, tmp_path: Path) -> None:
    bundle = write(tiny_int4, None, tmp_path / "tiny", Spec(slots=64, buckets=(16,)))
    done = run(bundle, "run_savedmodel.py", "--ids=1")
    assert done.returncode == 1 and "no SavedModel: expected an export with --target=savedmodel" in done.stderr


@pytest.mark.parametrize("target", ["savedmodel", "litert"])
def test_a_folder_that_is_no_bundle(target: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 7}')
    script = Path(__file__).parents[1] / "export" / "targets" / SCRIPTS[target]
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "format 'other' version 7: expected 'llamajax-bundle' version 1" in done.stderr.splitlines()[-1]
