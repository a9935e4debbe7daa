"""What runners and the reader of bundles refuse: forged manifests, files that are not regular, wrong numbers.

Most tests run without jax: they use the code that all runners share, with a session of a few lines of NumPy.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import safetensors.numpy

import export.bundle
import export.runners.runner as runner
import export.targets
import export.verification
import quant
from export.bundle import open_bundle, seal, standalone_runner
from export.profiles import PROFILES
from export.runners import run_jax
from export.targets.to_iree import TARGETS
from llamajax.cli import main
from llamajax.errors import LlamaJaxError
from tests.counters import STATE, write_counters
from tests.isolated import run_isolated

# Written by the first release that wrote bundles.
VERSION1 = Path(__file__).parent / "bundles" / "version1"
# A session that gives the golden logits after a whole prompt, and after that logits that choose the golden tokens.
SESSION = """
class Session:
    def __init__(self, bundle):
        self.name, self.bundle, self.arrays = "table", bundle, bundle.tensors("golden.safetensors")

    def reset(self):
        self.seen = []

    def run(self, name, inputs):
        tokens = inputs["token"] if name == "decode" else inputs["tokens"][0, : inputs["count"][0]]
        self.seen += tokens.tolist()
        for index in range(2):
            prompt, tokens, logits = (self.arrays[f"{name}_{index}"] for name in ("prompt", "tokens", "logits"))
            if self.seen == prompt.tolist():
                return logits[None]
            at = len(self.seen) - len(prompt)
            if self.seen[: len(prompt)] == prompt.tolist() and at < len(tokens):
                return np.eye(1, len(logits), tokens[at])
        return np.zeros((1, len(logits)))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(VERSION1, tmp_path / "copy")
    return tmp_path / "copy"


def refusals(path: Path) -> tuple[str, str]:
    """Returns the errors of the reader and of a runner for a bundle."""
    with pytest.raises(LlamaJaxError) as reader:
        open_bundle(path)
    with pytest.raises(SystemExit) as ended:
        runner.Bundle(str(path))
    assert "\n" not in str(reader.value) and "\n" not in str(ended.value.code)
    return str(reader.value), str(ended.value.code)


def changed(path: Path, change) -> None:
    """Changes the manifest and writes its checksum again, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    seal(path, manifest)


# ---- What a manifest may ask for ------------------------------------------------------------------------------------


def test_all_options_that_we_write_are_allowed_and_no_other() -> None:
    schema = export.bundle._schema()["properties"]["compiler_options"]
    backends = {profile.backend for profile in PROFILES.values()} - {None}
    written = {name: value for backend in backends for name, value in quant.compiler_options(backend).items()}
    assert {name: [value] for name, value in written.items()} == run_jax.OPTIONS
    jsonschema.validate(written, schema)
    assert {name: rule["const"] for name, rule in schema["properties"].items()} == written


@pytest.mark.extras
def test_all_drivers_that_we_write_are_allowed_and_no_other() -> None:
    drivers = export.bundle._schema()["properties"]["targets"]["additionalProperties"]["properties"]["driver"]["enum"]
    assert {target[0] for target in TARGETS.values()} == set(drivers)
    pytest.importorskip("iree.runtime", reason="IREE is not installed: its runner imports it")
    from export.runners import run_iree

    assert run_iree.DRIVERS == tuple(drivers)


@pytest.mark.parametrize("options", [{"xla_dump_to": "DUMP"}, {"xla_cpu_prefer_vector_width": "256"}])
def test_other_compiler_options_are_refused(options: dict, copy: Path) -> None:
    dump = copy.parent / "dump"
    options = {name: str(dump) if value == "DUMP" else value for name, value in options.items()}
    changed(copy, lambda manifest: manifest.update(compiler_options=options))
    with pytest.raises(LlamaJaxError, match=r"compiler_options.*(xla_dump_to|'512' was expected)"):
        open_bundle(copy)
    with pytest.raises(SystemExit, match=r"compiler option xla_\w+=.*: expected one of"):
        run_jax.Session(runner.Bundle(str(copy)))
    assert not dump.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["targets"].update(iree={"files": [], "driver": "task://x"}), "driver: 'task://x' is not one of"),
        (lambda m: m["config"].update(x=[[[[]]]]), "config.x"),
        (lambda m: m.update(chat_template=[]), "chat_template: "),
        (lambda m: m["cache"].update(dtype="float64"), "cache.dtype: 'float64' is not one of"),
        (lambda m: m["programs"].pop("decode"), "'decode' is a required property"),
    ],
)
def test_forged_manifests(change, message: str, copy: Path) -> None:
    changed(copy, change)
    with pytest.raises(LlamaJaxError, match="the manifest is damaged, or forged") as error:
        open_bundle(copy)
    assert message in str(error.value)


@pytest.mark.extras
def test_a_driver_that_is_none_of_ours(copy: Path) -> None:
    pytest.importorskip("iree.runtime", reason="IREE is not installed: its runner imports it")
    from export.runners import run_iree

    changed(copy, lambda m: m["targets"].update({"iree-cpu": {"files": [], "driver": "task://x"}}))
    with pytest.raises(SystemExit, match=r"driver 'task://x': expected one of"):
        run_iree.Session(runner.Bundle(str(copy)))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "C:x", "a//b", "a/./b", "a\\b", "a\nb", ""])
def test_names_of_files(name: str, copy: Path) -> None:
    text = (copy / "manifest.json").read_bytes()
    before = text.rpartition(export.bundle._SEAL)[0].replace(b'"run_jax.py"', json.dumps(name).encode())
    (copy / "manifest.json").write_bytes(before + export.bundle._SEAL + export.bundle._closing(before))
    reader, of_runner = refusals(copy)
    assert "damaged, or forged" in reader and "expected the path of a file inside the bundle" in of_runner


# ---- What lies in the folder ----------------------------------------------------------------------------------------


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1_100_000_000)


def link(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def outside(path: Path) -> None:
    """Moves a file or folder out of the bundle and leaves a link in its place."""
    moved = path.parents[1] / f"moved-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


FOLDERS = {
    "a large manifest": (lambda b: large(b / "manifest.json"), "1100000000 bytes"),
    "a nested manifest": (lambda b: (b / "manifest.json").write_text("[" * 200_000), "manifest"),
    "a manifest of digits": (lambda b: (b / "manifest.json").write_text("9" * 5000), "manifest"),
    "a manifest that is no object": (lambda b: (b / "manifest.json").write_text("[1]"), "manifest|list"),
    "a FIFO as manifest": (lambda b: fifo(b / "manifest.json"), "regular file"),
    "a device as manifest": (lambda b: link(b / "manifest.json", "/dev/zero"), "regular file"),
    "a folder as manifest": (lambda b: ((b / "manifest.json").unlink(), (b / "manifest.json").mkdir()), "manifest"),
    "a FIFO as file": (lambda b: fifo(b / "tokenizer.model"), "tokenizer.model: expected regular files"),
    "a link to a device": (lambda b: link(b / "tokenizer.model", "/dev/zero"), "tokenizer.model: expected regular"),
    "a link inside": (lambda b: link(b / "tokenizer.model", "vocabulary.json"), "tokenizer.model: expected regular"),
    "a link outside": (lambda b: outside(b / "weights.safetensors"), "weights.safetensors: expected regular"),
    "a linked folder": (lambda b: outside(b / "programs"), "programs: expected regular files"),
    "a larger file": (lambda b: large(b / "weights.safetensors"), "weights.safetensors: not as large as"),
    "a surplus file": (lambda b: (b / "programs" / "x").write_text(""), "programs/x: the manifest does not name"),
    "a surplus folder": (lambda b: (b / "x").mkdir(), "x: expected regular files that the manifest names"),
    "a surplus FIFO": (lambda b: fifo(b / "x"), "x: expected regular files that the manifest names"),
    "a surplus link": (lambda b: link(b / "x", "."), "x: expected regular files that the manifest names"),
    "a missing file": (lambda b: (b / "run_jax.py").unlink(), "run_jax.py: no such file, though the manifest names"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_no_plain_bundle(case: str, copy: Path) -> None:
    spoil, message = FOLDERS[case]
    spoil(copy)
    for said in refusals(copy):
        assert any(part in said for part in message.split("|")), said


def test_empty_folders_of_targets_are_no_fault(copy: Path) -> None:
    (copy / "targets/savedmodel/assets").mkdir(parents=True)  # TensorFlow makes it
    changed(copy, lambda manifest: None)
    with pytest.raises(LlamaJaxError, match="targets/savedmodel: expected regular files"):
        open_bundle(copy)
    (copy / "targets/savedmodel/saved_model.pb").write_text("")
    changed(copy, lambda manifest: None)
    assert open_bundle(copy) and runner.Bundle(str(copy)).tensors("golden.safetensors")


def test_state_of_other_names_shapes_and_dtypes(tmp_path: Path) -> None:
    bundle = write_counters(tmp_path / "counters")
    assert [value["name"] for value in runner.Bundle(str(bundle.path)).state] == list(STATE)
    for result in export.verification.verify(bundle, ["jax", "jax_export"]):
        assert result.held and result.exact and result.tokens == 40, result


def test_state_that_the_programs_do_not_take(copy: Path, tmp_path: Path) -> None:
    assert [value["name"] for value in runner.Bundle(str(copy)).state] == ["key", "value"]  # it lacks the key
    bundle = write_counters(tmp_path / "counters")
    for state in (
        [],
        list(reversed(bundle.manifest["cache"]["state"])),
        bundle.manifest["programs"]["decode"]["inputs"],
    ):
        changed(bundle.path, lambda manifest, state=state: manifest["cache"].update(state=state))
        with pytest.raises(LlamaJaxError, match=r"cache.state.*the manifest is damaged"):
            open_bundle(bundle.path)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_hands_on_the_declared_state(tmp_path: Path) -> None:
    """Runs `Model.steps` over a session that adds one to each state, so that the last state counts the steps."""
    write_counters(tmp_path / "counters")
    changed(tmp_path / "counters", lambda m: m["targets"].update(onnx={"files": []}))
    (tmp_path / "page.mjs").write_text(PAGE_TEST)
    page = Path(runner.__file__).parent / "web" / "llama.js"
    command = [
        "node",
        "--no-warnings",
        "--experimental-default-type=module",
        "page.mjs",
        page,
        "counters/manifest.json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = {"float32": "Float32Array", "uint8": "Uint8Array", "int32": "Int32Array"}
    # A prompt of 5 ids takes two buckets; of 4 tokens, 3 are decoded.
    assert json.loads(done.stdout) == [
        [name, dtype, kinds[dtype], list(shape), [4] * int(np.prod(shape))] for name, (shape, dtype) in STATE.items()
    ]


PAGE_TEST = """
import { readFileSync } from "node:fs";
const { Model } = await import(process.argv[2]);
const model = Object.assign(new Model(), { manifest: JSON.parse(readFileSync(process.argv[3])) });
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
let last;
const run = async (feeds) => {
  last = feeds;
  const results = { logits: new Tensor("float32", new Float32Array(8), [1, 8]) };
  for (const name of ["trace", "seen", "ticks"]) {
    const { type, data, dims } = feeds[name];
    results[`${name}_out`] = new Tensor(type, data.map((element) => element + 1), dims);
  }
  return results;
};
model.ort = { Tensor };
model.sessions = { prefill_4: { run }, decode: { run } };
for await (const token of model.steps([3, 1, 4, 1, 5], 4, () => 2));
const names = Object.keys(last).filter((name) => !["token", "length"].includes(name));
const seen = names.map((name) => {
  const { type, data, dims } = last[name];
  return [name, type, data.constructor.name, dims, [...data]];
});
console.log(JSON.stringify(seen));
"""


def test_runners_open_nothing_that_has_no_hash(copy: Path) -> None:
    changed(copy, lambda m: m["golden"].update(file="/etc/passwd"))
    with pytest.raises(ValueError, match="'/etc/passwd': the manifest has no such file"):
        runner.Bundle(str(copy)).file("/etc/passwd")


# ---- Runners as files -----------------------------------------------------------------------------------------------


@pytest.fixture
def tabled(copy: Path) -> Path:
    """A bundle whose run_jax.py needs only NumPy."""
    text = standalone_runner("run_jax.py")
    shared = text[: text.index('"""Runs a bundle with jax alone')]
    (copy / "run_jax.py").write_text(shared + SESSION + "\n\nmain(Session, None)\n")
    changed(copy, lambda manifest: None)
    return copy


def started(*command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)


def test_a_module_added_to_a_bundle_does_not_run(tabled: Path) -> None:
    assert started("copy/run_jax.py", "--golden", folder=tabled.parent).returncode == 0
    for name in ("numpy", "argparse", "json", "mmap"):
        (tabled / f"{name}.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').write_text('')")
    linked = tabled.parent / "linked.py"
    linked.symlink_to(tabled / "run_jax.py")
    places = [("copy/run_jax.py", tabled.parent), ("run_jax.py", tabled), (str(tabled / "run_jax.py"), Path("/"))]
    for command, folder in [*places, (str(linked), Path("/"))]:
        done = started(command, str(tabled), "--golden", folder=folder)
        assert done.returncode == 1 and "the manifest does not name this file" in done.stderr, done.stderr
    # With -m, Python itself writes a folder into the bundle before the runner begins.
    done = started("-m", "run_jax", folder=tabled)
    assert done.returncode == 1 and "the manifest" in done.stderr and done.stderr.count("\n") == 1
    assert not (tabled / "ran").exists()


def test_errors_are_one_line(tabled: Path) -> None:
    for arguments, message in (
        (["--ids=1,300"], "id 300: expected 0 to 299"),
        (["--ids=-1"], "id -1: expected 0 to 299"),
        (["--ids=x"], "ValueError: invalid literal"),
        (["--ids="], "ValueError: invalid literal"),
        (["--temperature=nan", "--ids=1"], "expected --max_new_tokens of 1 or more"),
        (["--max_new_tokens=0", "--ids=1"], "expected --max_new_tokens of 1 or more"),
        (["nowhere"], "nowhere: not a whole bundle: "),
    ):
        done = started("run_jax.py", *arguments, folder=tabled)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_runtime_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run_isolated(tmp_path, runner="run_jax.py", hidden=("jax",))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run_jax.py: ModuleNotFoundError: ")


def test_a_bundle_without_a_tokenizer_asks_for_ids(tabled: Path) -> None:
    (tabled / "vocabulary.json").unlink()
    changed(tabled, lambda manifest: None)
    done = started("run_jax.py", folder=tabled)
    assert done.returncode == 1 and "exported without a tokenizer: expected --ids" in done.stderr


def test_the_end_of_the_context_is_said(tabled: Path) -> None:
    done = started("run_jax.py", f"--ids={','.join(['7'] * 120)}", "--max_new_tokens=64", folder=tabled)
    assert done.returncode == 0 and len(done.stdout.split()) == 9
    assert "the cache's 128 slots are full: 9 of 64 tokens" in done.stderr
    done = started("run_jax.py", "--ids=7", "--max_new_tokens=2", folder=tabled)
    assert done.returncode == 0 and "slots" not in done.stderr and "tokens/s" not in done.stderr


def golden_changed(path: Path, change) -> None:
    arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path / "golden.safetensors").items()}
    change(arrays)
    safetensors.numpy.save_file(arrays, path / "golden.safetensors")
    changed(path, lambda manifest: None)


# ---- Numbers --------------------------------------------------------------------------------------------------------


class Table:
    """A session with given logits, one row for each call."""

    name = "table"

    def __init__(self, rows):
        self.rows, self.calls = iter(rows), []

    def reset(self) -> None:
        pass

    def run(self, name, inputs):
        self.calls.append(name)
        return next(self.rows)[None]


BUNDLE = SimpleNamespace(
    batch=1, slots=8, manifest={"buckets": [4], "config": {"vocab_size": 3}, "golden": {"prompts": 1}}
)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_a_run(value: float) -> None:
    session = Table([np.asarray([0, 1, 0.0]), np.asarray([0, value, 0])])
    made = runner.steps(session, BUNDLE, [1], 5, runner.chooser(0, 0))
    assert next(made)[0] == 1
    with pytest.raises(SystemExit, match="logits behind 2 tokens are not finite"):
        next(made)


def test_the_first_step_is_not_timed() -> None:
    session = Table(np.eye(3)[[0, 1, 2, 0, 1]])
    assert len(list(runner.steps(session, BUNDLE, [1], 4, runner.chooser(0, 0)))) == 4
    assert session.calls == ["prefill_4", "decode", "decode", "decode"] and session.count == 2


def described(activations: str, cache: str, layers: int = 5, width: int = 64) -> SimpleNamespace:
    """Returns the parts of a bundle that determine the tolerance."""
    weights = [{"name": "norm.weight_D", "dtype": activations}]
    config = {"num_layers": layers, "width": width}
    return SimpleNamespace(manifest={"weights": weights, "config": config, "cache": {"dtype": cache}})


# Largest measured errors of jax: stories260K (root mean square of its logits 7.7) and the model in the box (5.45),
# int4-g32, by the programs of the profile "unrolled" on a CPU, 2026-11-26.
MEASURED = {
    ("float32", "float32"): (1.3e-5, 1.5e-5),
    ("float32", "bfloat16"): (6.1e-2, 1.5e-2),
    ("float32", "float16"): (9.5e-3, 1.7e-3),
    ("bfloat16", "bfloat16"): (2.5e-1, 9.4e-2),
    ("float16", "float16"): (2.1e-2, None),
}


@pytest.mark.parametrize("dtypes", MEASURED)
def test_the_tolerance_is_that_of_the_dtypes(dtypes: tuple[str, str]) -> None:
    sizes = ((7.7, 5, 64), (5.45, 4, 256))
    for error, (size, layers, width) in zip(MEASURED[dtypes], sizes, strict=True):
        if error is not None:
            most = runner.tolerance(Table([]), described(*dtypes, layers, width), np.full(9, size))
            assert 3.9 * error < most < 30 * error
    # An error like that of IREE when it rounded rows to bfloat16 must exceed the tolerance of float32.
    assert runner.tolerance(Table([]), described("float32", "float32"), np.full(9, 7.7)) < 9.5e-3 / 20


def golden_report(capsys, expected, rows) -> tuple[str | None, dict]:
    bundle = described("float32", "float32")
    bundle.manifest["config"] |= BUNDLE.manifest["config"]
    bundle.manifest = {**BUNDLE.manifest, **bundle.manifest}
    arrays = {"prompt_0": np.asarray([1]), "tokens_0": np.asarray(expected), "logits_0": np.asarray(rows[0])}
    bundle = SimpleNamespace(batch=1, slots=8, manifest=bundle.manifest, tensors=lambda name: arrays)
    warm = np.eye(3)[[0, 0]]
    failed = runner.golden(Table([*warm, *rows]), bundle, 0.0)
    return failed, json.loads(capsys.readouterr().out)["prompts"][0]


def test_golden_tokens_that_differ_fail_unless_they_are_a_tie(capsys) -> None:
    rows = np.asarray([[0, 9, 0], [0, 9, 9 - 1e-7], [9, 0, 0]], np.float32)
    failed, prompt = golden_report(capsys, [1, 1, 0], rows)
    assert failed is None and prompt["held"] and prompt["exact"]
    failed, prompt = golden_report(capsys, [1, 2, 1], rows)  # a tie, followed by another text
    assert failed is None and prompt["held"] and not prompt["exact"]
    failed, prompt = golden_report(capsys, [1, 1, 2], rows)
    assert failed == "table: golden prompt 0: not the golden tokens or logits"
    assert not prompt["held"] and not prompt["exact"]


def test_golden_that_does_not_hold_is_exit_code_1(tabled: Path) -> None:
    done = started("run_jax.py", "--golden", folder=tabled)
    assert done.returncode == 0 and all(prompt["held"] for prompt in json.loads(done.stdout)["prompts"])
    golden_changed(tabled, lambda arrays: arrays["tokens_1"].__setitem__(20, (arrays["tokens_1"][20] + 1) % 300))
    # The session reads its tokens from the same file, so this shifts one of them away from the expected token.
    text = (tabled / "run_jax.py").read_text()
    (tabled / "run_jax.py").write_text(text.replace("tokens[at])", "tokens[at] - (at == 20))"))
    changed(tabled, lambda manifest: None)
    done = started("run_jax.py", "--golden", folder=tabled)
    assert done.returncode == 1 and done.stderr == "table: golden prompt 0, 1: not the golden tokens or logits\n"


def test_a_device_that_gives_other_numbers_is_found_before_it_is_used(tabled: Path) -> None:
    text = (tabled / "run_jax.py").read_text()
    for factor, code in ((1.001, 0), (1.1, 1)):
        (tabled / "run_jax.py").write_text(text.replace("return logits[None]", f"return logits[None] * {factor}"))
        changed(tabled, lambda manifest: None)
        done = started("run_jax.py", "--ids=1", folder=tabled)
        assert done.returncode == code, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "table: logits of a golden prompt are off by" in done.stderr and "for another device" in done.stderr


def test_weights_that_are_not_numbers_end_a_run(copy: Path) -> None:
    arrays = safetensors.numpy.load_file(copy / "weights.safetensors")
    arrays["norm.weight_D"] = np.full_like(arrays["norm.weight_D"], np.nan)
    safetensors.numpy.save_file(arrays, copy / "weights.safetensors")
    changed(copy, lambda manifest: None)
    done = run_isolated(copy, "--ids=1,2", runner="run_jax.py")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "are not finite: the weights or this runtime are at fault" in done.stderr


# ---- The commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tabled: Path, monkeypatch):
    """Runs `llamajax` on a bundle whose runtime jax is the table session."""
    text = (tabled / "run_jax.py").read_text()
    monkeypatch.setattr(export.verification, "standalone_runner", lambda name: text)
    return lambda name, *arguments: main([name, str(tabled), *arguments])


def test_run_ends_in_one_line(command, capfd) -> None:
    assert command("run", "--ids=1,5", "--max_new_tokens=3") == 0
    out, err = capfd.readouterr()
    assert len(out.split()) == 3 and "loaded in" in err
    for ids, message in (("1,300", "runtime jax: id 300: expected 0 to 299"), ("", "ValueError: invalid literal")):
        assert command("run", f"--ids={ids}") == 1
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("llamajax: ") and message in err and err.count("\n") == 1, err


def test_verify_reports_what_does_not_hold(command, tabled: Path, monkeypatch, capfd) -> None:
    assert command("verify", "--runtime=jax", "--json") == 0
    (result,) = json.loads(capfd.readouterr().out)
    assert result["held"] and result["exact"] and result["largest_logit_error"] == 0 < result["tolerance"] < 1e-3
    text = (tabled / "run_jax.py").read_text()
    wrong = text.replace("tokens[at])", "tokens[at] - (at == 20))")
    monkeypatch.setattr(export.verification, "standalone_runner", lambda name: wrong)
    assert command("verify", "--runtime=jax", "--json") == 1
    (result,) = json.loads(capfd.readouterr().out)
    assert not result["held"] and not result["exact"] and not result["error"]
    monkeypatch.setattr(
        export.verification, "standalone_runner", lambda name: text.replace("logits[None]", "logits[None] / 0")
    )
    assert command("verify", "--runtime=jax", "--json") == 1
    (result,) = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert not result["held"] and "are not finite" in result["error"] and result["largest_logit_error"] is None
    assert command("verify", "--runtime=jax") == 1
    assert "are not finite" in " ".join(capfd.readouterr().out.split())


def test_no_script_has_the_name_of_what_it_imports() -> None:
    folders = [Path(export.targets.__file__).parent, Path(runner.__file__).parent]
    for file in (file for folder in folders for file in folder.glob("*.py") if file.stem != "__init__"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        # Modules that to_litert.py and to_onnx.py import on purpose.
        meant = {"to_savedmodel", "onnx_graph", "onnx_operations", "onnx_packed", "onnx_weights"}
        beside = {other.stem for other in file.parent.glob("*.py")} - meant
        assert not beside & {name.partition(".")[0] for name in names}, file
        # Nor may a script have the name of a package, which the toolchain may import.
        assert importlib.util.find_spec(file.stem) is None, file
