"""Bundles: what they contain, that damage is found before anything runs, that runners need none of our source."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jsonschema
import numpy as np
import pytest
import safetensors.numpy

import export.bundle
import export.cli.export
import export.golden
import export.targets
import llamajax
import quant
from export.bundle import Bundle, open_bundle, seal, write
from export.golden import GOLDEN_TOKENS, golden, golden_prompts
from export.profiles import PROFILES, Spec
from export.targets import add_target, profile_for
from export.verification import verify
from export.vocabulary import TEXTS
from llamajax.cli import main
from llamajax.errors import LlamaJaxError
from llamajax.files import locked
from tests.isolated import run_isolated
from tests.reference import forward, weights_of

# Written by the first release that wrote bundles.
VERSION1 = Path(__file__).parent / "bundles" / "version1"
SPEC = Spec(slots=96, buckets=(4, 16))


@pytest.fixture(scope="module")
def bundle(tiny_int4, tiny_tokenizer, tmp_path_factory) -> Bundle:
    return write(tiny_int4, tiny_tokenizer, tmp_path_factory.mktemp("bundles") / "tiny", SPEC)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    shutil.copytree(bundle.path, tmp_path / "copy")
    return tmp_path / "copy"


def run_jax(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_isolated(path, *arguments, runner="run_jax.py")


def test_jax_alone_gives_the_tokens_of_generate(bundle: Bundle, tiny_int4) -> None:
    ids = [1, 5, 9, 300, 17, 42, 8]
    expected = llamajax.generate(tiny_int4, None, ids, temperature=0, max_new_tokens=64)
    for runner in ("run_jax.py", "run_jax_export.py"):
        done = run_isolated(bundle.path, f"--ids={','.join(map(str, ids))}", runner=runner)
        assert done.returncode == 0, done.stderr
        assert [int(token) for token in done.stdout.split()] == expected.tokens


@pytest.mark.matrix
@pytest.mark.parametrize(("profile", "dtype"), [("scanned", "float32"), ("cpu", "float16"), ("unrolled", "bfloat16")])
def test_golden_prompts_are_what_the_programs_give(profile: str, dtype: str, tiny_int4, tmp_path: Path) -> None:
    spec = Spec(slots=96, buckets=(4, 16), cache_dtype=dtype, profile=PROFILES[profile])
    bundle = write(tiny_int4, None, tmp_path / "tiny", spec)
    arrays = safetensors.numpy.load_file(bundle.file("golden.safetensors"))
    for index in range(2):
        prompt = arrays[f"prompt_{index}"].tolist()
        made = llamajax.generate(tiny_int4, None, prompt, temperature=0, max_new_tokens=64, cache_dtype=dtype)
        assert arrays[f"tokens_{index}"].tolist() == made.tokens
        whole = jax.tree.map(
            lambda leaf: quant.dequantize(leaf) if isinstance(leaf, quant.QTensor) else leaf,
            tiny_int4,
            is_leaf=lambda node: isinstance(node, quant.QTensor),
        )
        expected_V = forward(tiny_int4.config, weights_of(whole), np.asarray(prompt))[-1]
        error = np.max(np.abs(arrays[f"logits_{index}"] - expected_V))
        # The error follows from rounding to the cache's dtype.
        low, high = {"float32": (0, 1e-5), "float16": (1e-5, 5e-3), "bfloat16": (1e-4, 5e-2)}[dtype]
        assert low <= error < high
    (result,) = verify(bundle, ["jax"])
    assert result.exact and result.largest_logit_error < 1e-5


def test_golden_prompts_of_a_large_model(bundle: Bundle, tiny_int4, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(export.golden, "_LARGE_MODEL", 0)
    made = golden(tiny_int4, golden_prompts(tiny_int4, tiny_tokenizer, SPEC), SPEC)
    arrays = safetensors.numpy.load_file(bundle.file("golden.safetensors"))
    assert made.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(made[name], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "golden prompt 1: 0 tokens: expected 1 to 95"),
        ([5] * 96, "golden prompt 1: 96 tokens: expected 1 to 95"),
        ([320], "golden prompt 1: id 320: expected 0 to 319"),
    ],
)
def test_golden_prompts_that_do_not_fit(prompt: list[int], message: str, tiny_int4) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        golden(tiny_int4, [[1], prompt], SPEC)


def test_golden_logits_that_are_not_finite(tiny_int4) -> None:
    broken = jax.tree.map(lambda leaf: leaf, tiny_int4)
    broken.norm.weight_D.set_value(broken.norm.weight_D.get_value() * np.float32(np.nan))
    with pytest.raises(LlamaJaxError, match="golden prompt 0: the logits behind 1 tokens are not finite"):
        golden(broken, [[1]], SPEC)


def test_text_and_full_cache(bundle: Bundle, tiny_int4, tiny_tokenizer) -> None:
    prompt = "Once upon a time, the café"
    expected = llamajax.generate(tiny_int4, tiny_tokenizer, prompt, temperature=0, max_new_tokens=20)
    done = run_jax(bundle.path, f"--prompt={prompt}", "--max_new_tokens=20")
    assert done.stdout.rstrip("\n") == (prompt + expected.text).rstrip("\n")
    assert "tokens/s" in done.stderr
    # The buckets do not cover 90 tokens: the last ones are decoded one by one, until the cache is full.
    ids = np.random.default_rng(0).integers(3, 300, 90).tolist()
    done = run_jax(bundle.path, f"--ids={','.join(map(str, ids))}")
    expected = llamajax.generate(tiny_int4, None, ids, temperature=0, max_new_tokens=7)
    assert [int(token) for token in done.stdout.split()] == expected.tokens
    done = run_jax(bundle.path, f"--ids={','.join(['7'] * 96)}")
    assert done.returncode == 1 and "96 tokens: expected 1 to 95" in done.stderr


def test_the_same_model_gives_the_same_bytes(bundle: Bundle, tiny_int4, tiny_tokenizer, tmp_path: Path) -> None:
    again = write(tiny_int4, tiny_tokenizer, tmp_path / "again", SPEC)
    assert (again.path / "manifest.json").read_bytes() == (bundle.path / "manifest.json").read_bytes()


def test_nothing_says_where_it_was_made(bundle: Bundle) -> None:
    here = str(Path(export.bundle.__file__).parents[1]).encode()
    for file in bundle.path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert here not in data, file
            assert file.suffix not in (".mlirbc", ".jax") or b".py" not in data, file


def test_weights_are_packed_and_named_in_order(bundle: Bundle, tiny_int4) -> None:
    weights = bundle.weights()
    names = list(weights)
    assert names[0] == "embed_VD.planes.0" and "layers.*.ffn.up_DF.planes.0" in names and names[-1] == "norm.weight_D"
    block = tiny_int4.stacks[0][0]
    np.testing.assert_array_equal(weights["layers.*.ffn.up_DF.planes.0"], block.ffn.up_DF.get_value().planes[0])
    np.testing.assert_array_equal(weights["layers.*.attention_norm.weight_D"], block.attention_norm.weight_D[...])
    arrays = jax.tree.leaves(tiny_int4)
    assert len(weights) == len(arrays)
    assert sum(array.nbytes for array in weights.values()) == sum(array.nbytes for array in arrays)
    size = sum(array.nbytes for array in weights.values())
    assert bundle.file("weights.safetensors").stat().st_size < size + 16384


def test_the_manifest_is_as_its_schema_says(bundle: Bundle) -> None:
    schema = json.loads(Path(export.bundle.__file__).with_name("manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(bundle.file("manifest.json").read_text()), schema)


def test_a_flipped_byte_anywhere_is_found(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(copy.rglob("*")):
        if not file.is_file():
            continue
        data = file.read_bytes()
        positions = {0, len(data) - 1, *rng.integers(0, len(data), 60 if file.name == "manifest.json" else 3).tolist()}
        for position in positions:
            flipped = bytearray(data)
            flipped[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            with pytest.raises(LlamaJaxError, match=r"SHA-256|damaged|format|not a bundle"):
                open_bundle(copy)
        file.write_bytes(data)
    assert open_bundle(copy)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "programs/decode.mlirbc"])
def test_a_runner_too_finds_damage(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / name).write_bytes(data)
    done = run_jax(copy)
    assert done.returncode == 1 and done.stdout == ""
    assert "not a whole bundle" in done.stderr and "Traceback" not in done.stderr


def test_missing_surplus_and_outside_files(copy: Path) -> None:
    (copy / "extra.txt").write_text("?")
    with pytest.raises(LlamaJaxError, match=r"extra.txt: the manifest does not name this file"):
        open_bundle(copy)
    (copy / "extra.txt").unlink()
    (copy / "tokenizer.model").rename(copy.parent / "tokenizer.model")
    with pytest.raises(LlamaJaxError, match=r"tokenizer.model: no such file, though the manifest names it"):
        open_bundle(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../tokenizer.model"] = manifest["files"].pop("tokenizer.model")
    resealed(copy, manifest)
    with pytest.raises(LlamaJaxError, match=r"'\.\./tokenizer.model'.*: the manifest is damaged"):
        open_bundle(copy)
    assert run_jax(copy).returncode == 1


def resealed(folder: Path, manifest: dict) -> None:
    """Writes the manifest as given, with a correct last line, as an attacker would."""
    files = manifest["files"]
    seal(folder, manifest)
    data = (folder / "manifest.json").read_text()
    honest = json.loads(data)["files"]
    text = data[: data.rindex(',\n "sha256"')].replace(json.dumps(honest, indent=1).replace("\n", "\n "), "FILES")
    text = text.replace("FILES", json.dumps(files, indent=1).replace("\n", "\n ")).encode()
    (folder / "manifest.json").write_bytes(text + export.bundle._SEAL + export.bundle._closing(text))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda m: m.pop("weights"), "'weights' is a required property"),
        (lambda m: m["programs"]["decode"].update(file="/etc/passwd"), "'/etc/passwd' is not among its files"),
        (
            lambda m: m["programs"]["decode"]["inputs"][0].update(dtype="int64"),
            r"inputs\[0\].dtype: 'int64' is not one of",
        ),
        (lambda m: m["files"]["weights.safetensors"].update(bytes="many"), "'many' is not of type 'integer'"),
        (lambda m: m["targets"].update(onnx={"files": ["../x"]}), "'../x' is not among its files"),
        (lambda m: m.update(surprise=1), "'surprise' was unexpected"),
    ],
)
def test_a_manifest_that_makes_no_sense(fault, message: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    fault(manifest)
    manifest.pop("sha256")
    text = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    (copy / "manifest.json").write_bytes(text + export.bundle._SEAL + export.bundle._closing(text))
    with pytest.raises(LlamaJaxError, match=message):
        open_bundle(copy)


def test_a_newer_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    seal(copy, {**manifest, "version": 2})
    with pytest.raises(
        LlamaJaxError, match="version 2: this release reads 'llamajax-bundle' version 1; a newer bundle"
    ):
        open_bundle(copy)
    done = run_jax(copy)
    assert done.returncode == 1 and "version 2: this runner reads version 1" in done.stderr


def test_swapped_arguments_are_caught(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    names = [weight["name"] for weight in manifest["weights"]]
    up, gate = (names.index(f"layers.*.ffn.{part}_DF.planes.0") for part in ("up", "gate"))
    manifest["weights"][up], manifest["weights"][gate] = manifest["weights"][gate], manifest["weights"][up]
    seal(copy, manifest)
    (result,) = verify(open_bundle(copy), ["jax"])
    assert not result.held and not result.skipped
    assert not result.exact or result.largest_logit_error > result.tolerance


def test_runners_compare_the_golden_texts(copy: Path, tiny_tokenizer) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    entries = manifest["golden"]["texts"]
    assert manifest["tokens"]["refusal"] is None
    assert [entry["text"] for entry in entries[: len(TEXTS)]] == list(TEXTS) and len(entries) > len(TEXTS)
    assert [entry["ids"] for entry in entries] == [tiny_tokenizer.encode(entry["text"]) for entry in entries]
    entries[4]["ids"][-1] += 1
    seal(copy, manifest)
    (result,) = verify(open_bundle(copy), ["jax"])
    assert result.error.startswith(f"{TEXTS[4]!r} gives ids [1, ") and "expected" in result.error


def test_a_bundle_of_the_first_version_holds() -> None:
    bundle = open_bundle(VERSION1)
    for result in verify(bundle, ["jax"]):
        assert result.held, result
    # A copy made now writes the same weights: order and names of arguments have not changed.
    assert list(bundle.weights())[:2] == ["embed_VD.planes.0", "embed_VD.scale"]


def test_export_verify_and_run(tiny_int4, tiny_tokenizer, tmp_path: Path, capfd) -> None:
    llamajax.save_checkpoint(tiny_int4, tmp_path / "model", tokenizer=tiny_tokenizer)
    output = tmp_path / "out"
    argv = [f"--model={tmp_path}/model", f"--output={output}", "--slots=96", "--buckets=4,16", "--programs=score"]
    assert main(["export", *argv, "--template=llama2"]) == 0
    out, err = capfd.readouterr()
    assert "prefill_4" in out and "score" in out and "profile scanned, targets: none" in err and "--chat" not in err
    assert main(["verify", str(output), "--json"]) == 0
    results = {result["runtime"]: result for result in json.loads(capfd.readouterr().out)}
    assert results["jax"]["held"] and results["jax"]["exact"] and results["jax_export"]["held"]
    assert results["jax"]["conversations"] == 12 and results["jax"]["texts"] > 20
    assert results["iree"]["skipped"] == "the bundle has no target iree"
    assert main(["run", str(output), "--prompt=Once upon", "--max_new_tokens=4"]) == 0
    assert capfd.readouterr().out.startswith("Once upon")
    assert main(["run", str(output), "--chat", "--prompt=Hi", "--max_new_tokens=2", "--stop=."]) == 0
    out, err = capfd.readouterr()
    assert out.endswith("\n") and "2 made" in err and "cut: --max_new_tokens allows more" in err
    assert main(["export", *argv]) == 1
    assert "exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["verify"], 1, "no bundle is given: expected llamajax verify BUNDLE"),
        (["verify", "nowhere"], 1, "nowhere: not a bundle: manifest.json: No such file"),
        (["verify", "nowhere", "elsewhere"], 2, "unexpected argument 'elsewhere'"),
        (["run"], 1, "no bundle is given"),
        (["export"], 1, "--model or --output is missing"),
        (["export", "--model=box", "--output=x", "--target=abacus"], 1, "target 'abacus': expected one of iree"),
        (["export", "--model=box", "--output=x", "--target=iree-abacus"], 1, "expected one of iree-cpu, iree-cpu-host"),
        (["export", "--model=box", "--output=x", "--target=onnx-2"], 1, "target 'onnx-2': expected one of onnx"),
        (["export", "--model=box", "--output=x", "--target=tpu"], 1, "expected a name after it, as in tpu:v5e:2x2"),
        (
            ["export", "--model=box", "--output=x", "--target=onnx,litert"],
            1,
            "no profile for all targets: onnx takes unrolled; litert takes float: write a bundle for each",
        ),
        (
            ["export", "--model=box", "--output=x", "--target=iree-cpu", "--profile=scanned"],
            1,
            "profile 'scanned': iree-cpu takes unrolled: expected --profile=unrolled",
        ),
        (
            ["export", "--model=box", "--output=x", "--target=onnx", "--python=onnx=no/python"],
            1,
            "target onnx: no/python: No such file or directory",
        ),
        (["export", "--model=box", "--output=x", "--buckets=a"], 1, "--buckets=a: expected whole numbers"),
        (["export", "--model=box", "--output=x", "--slots=4096"], 1, "expected at most the model's context, 512"),
        (["export", "--bundle=x"], 1, "--bundle needs --target"),
        (["export", "--bundle=x", "--target=onnx", "--python=onnx"], 1, "expected NAME=PATH"),
    ],
)
def test_errors_are_one_line(argv: list[str], code: int, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_the_profile_is_chosen_for_all_targets() -> None:
    assert profile_for([]) == "scanned" and profile_for([], "cpu") == "cpu"
    assert profile_for(["iree-cpu"]) == profile_for(["savedmodel", "onnx", "tpu:v5e:2x2"]) == "unrolled"
    assert profile_for(["coreml", "savedmodel"]) == "float" and profile_for(["savedmodel"], "float") == "float"


def test_a_toolchain_that_is_not_there_is_found_before_anything_is_written(tmp_path: Path, monkeypatch, capsys) -> None:
    empty = tmp_path / "python"  # runs Python without packages, and has no tool beside it
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    empty.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for target, message in {"iree-cpu": "no iree-compile beside", "savedmodel": "has no tensorflow"}.items():
        argv = ["export", "--model=box", f"--output={tmp_path / 'out'}", f"--target={target}"]
        assert main([*argv, f"--python={target}={empty}"]) == 1
        err = capsys.readouterr().err
        assert f"target {target}: " in err and message in err and f"--python={target}=PATH" in err, err
        assert list(tmp_path.iterdir()) == [empty]


def test_a_target_that_fails_leaves_no_bundle(tiny_int4, tiny_tokenizer, tmp_path: Path, monkeypatch, capsys) -> None:
    llamajax.save_checkpoint(tiny_int4, tmp_path / "model", tokenizer=tiny_tokenizer)

    def write(model, tokenizer, path: Path, spec: Spec, source: str, **_) -> Bundle:
        path.mkdir()
        (path / "file").touch()
        return Bundle(path, {"profile": spec.profile.name})

    def fail(bundle: Bundle, target: str, python: str) -> Bundle:
        assert bundle.manifest["profile"] == "unrolled"
        raise LlamaJaxError(f"target {target}: out of luck")

    monkeypatch.setattr(export.cli.export, "write", write)
    monkeypatch.setattr(export.cli.export, "add_target", fail)
    monkeypatch.setattr(export.cli.export, "check_toolchain", lambda target, python: None)
    argv = [f"--model={tmp_path}/model", f"--output={tmp_path}/out", "--slots=16", "--buckets=4", "--target=iree-cpu"]
    assert main(["export", *argv]) == 1
    assert capsys.readouterr().err == "llamajax: target iree-cpu: out of luck\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_target_that_fails_changes_nothing(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(LlamaJaxError, match=r"target tpu:nonsense: .*another one with --python=tpu:nonsense=PATH"):
        add_target(open_bundle(copy), "tpu:nonsense")
    with pytest.raises(LlamaJaxError, match="no/such/python: No such file or directory: expected a Python"):
        add_target(open_bundle(copy), "iree-cpu", "no/such/python")
    assert (copy / "manifest.json").read_bytes() == before
    assert open_bundle(copy)


def test_a_target_that_was_killed_before_the_manifest_named_it(copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """`open_bundle` refuses the leftover; the next export removes that, and only that, and adds its target."""

    def toolchain(python: str, command: list[str], target: str) -> dict:
        Path(command[2], "model.bin").write_bytes(b"made")
        return {"target": target, "files": ["model.bin"], "compiler": "none", "options": [], "profile": "scanned"}

    def killed(folder: Path, manifest: dict) -> None:
        shutil.copytree(folder, tmp_path / "left")  # what lies on the disk at that moment
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.targets, "_run", toolchain)
    monkeypatch.setattr(export.cli.export, "check_toolchain", lambda target, python: None)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(export.targets, "seal", killed)
        add_target(open_bundle(copy), "cuda:one")
    assert open_bundle(copy)  # a process that lives undoes its changes
    left = tmp_path / "left"
    assert (left / "targets" / "cuda-one" / "model.bin").exists()
    with pytest.raises(LlamaJaxError, match=r"targets/cuda-one.*: expected regular files that the manifest names"):
        open_bundle(left)
    with locked(left):
        assert main(["export", f"--bundle={left}", "--target=cuda:two"]) == 1
    assert "another process is writing to it" in capsys.readouterr().err
    assert main(["export", f"--bundle={left}", "--target=cuda:two"]) == 0
    assert f"{left}: removed targets/cuda-one" in capsys.readouterr().err
    assert [path.name for path in (left / "targets").iterdir()] == ["cuda-two"]
    assert list(open_bundle(left).manifest["targets"]) == ["cuda:two"]
    (left / "programs" / "surplus").mkdir()
    (left / "targets" / "file").touch()
    assert main(["export", f"--bundle={left}", "--target=cuda:one"]) == 1
    assert (left / "programs" / "surplus").exists() and (left / "targets" / "file").exists()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu)")
def test_programs_compile_for_a_tpu_from_the_bundle_alone(copy: Path) -> None:
    made = add_target(open_bundle(copy), "tpu:v5e:2x2")
    entry = made.manifest["targets"]["tpu:v5e:2x2"]
    assert "targets/tpu-v5e-2x2/decode.pjrt" in entry["files"]
    assert entry["report"]["decode"]["aliased_bytes"] > 0


def test_safetensors_reads_what_runners_read(bundle: Bundle) -> None:
    arrays = safetensors.numpy.load_file(bundle.file("golden.safetensors"))
    assert set(arrays) == {f"{name}_{i}" for name in ("prompt", "tokens", "logits") for i in range(2)}
    assert len(arrays["tokens_0"]) == GOLDEN_TOKENS
