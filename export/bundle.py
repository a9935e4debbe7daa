"""The bundle on disk: programs, packed weights in a file of their own, tokenizer, golden prompts, and a manifest.

    write(model, tokenizer, "box.bundle", Spec())
    bundle = open_bundle("box.bundle")        # every file's SHA-256 is checked

    manifest.json           describes the bundle: config, arguments in order, programs, SHA-256 of every other file
    programs/NAME.mlirbc    StableHLO portable artifact, static shapes
    programs/NAME.jax       the same for `jax.export.deserialize`, any batch, cache size and prompt length
    weights.safetensors     the arrays that are the programs' first arguments
    golden.safetensors      prompts, their greedy continuations as tokens, and the logits after each prompt
    tokenizer.model         the tokenizer of a sentencepiece model; or tokenizer.json, of the library tokenizers
    vocabulary.json         the tokenizer as tables, for runners without these: splitting, pieces, scores or merges
    run_jax.py, …           runners of one file each
    targets/                files that were compiled or converted for a runtime

`manifest.schema.json` beside this file specifies the manifest. The same model and spec give the same bytes. Programs
take weights, inputs, state, in this order; later versions may add inputs with new names, such as adapters.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jsonschema
import numpy as np
import safetensors
import safetensors.numpy
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import llamajax
from export.conversations import chat_of
from export.golden import golden, golden_prompts
from export.lowering import STABLEHLO_VERSION, Program, Value, lower
from export.profiles import PROFILES, Profile, Spec
from export.programs import bound, empty_state, functions
from export.runners.runner import LARGEST_MANIFEST, check_entries, line_of
from export.vocabulary import vocabulary_of
from export.weights import parameters
from llamajax import Llama, LlamaJaxError, Tokenizer, files, named_weights
from quant import compiler_options, quantized, schemes

FORMAT = "llamajax-bundle"
VERSION = 1
_RUNNERS = Path(__file__).parent / "runners"
# Programs that are also written by `jax.export`, and the sizes that are symbolic there.
_TWINS = {"prefill": "BST", "decode": "BS"}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that has been opened and checked.

    Attributes:
        path: the folder of the bundle.
        manifest: the content of manifest.json.
    """

    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Path of a file in the bundle."""
        return self.path / name

    def artifact(self, program: str) -> bytes:
        """Reads the portable artifact of a program.

        Raises:
            LlamaJaxError: if there is no program of that name.
        """
        programs = self.manifest["programs"]
        if program not in programs:
            raise LlamaJaxError(f"{self.path}: no program {program!r}: expected one of {', '.join(programs)}")
        return self.file(programs[program]["file"]).read_bytes()

    def weights(self) -> dict[str, np.ndarray]:
        """Reads the arrays that are the programs' first arguments, in order."""
        with safetensors.safe_open(self.file("weights.safetensors"), "numpy") as file:
            return {weight["name"]: file.get_tensor(weight["name"]) for weight in self.manifest["weights"]}


def write(
    model: Llama,
    tokenizer: Tokenizer | None,
    path: str | Path,
    spec: Spec,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    source: str = "llamajax",
    template: str | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Bundle:
    """Writes a bundle; it appears complete or not at all.

    Args:
        model: a model of QTensors or arrays, not prepared for a backend.
        tokenizer: the tokenizer to include; None for a bundle that takes only ids.
        path: the folder to write; must not exist.
        spec: the programs to make.
        prompts: ids of the golden prompts; built-in texts unless given.
        source: the origin of the weights.
        template: name of the chat template; the checkpoint's own unless given.
        on_note: called with one line of the reason if runners cannot chat.

    Raises:
        LlamaJaxError: if there is no template of that name, the model cannot be exported, or `path` exists.
    """
    if spec.slots > model.config.context_length:
        raise LlamaJaxError(f"{spec.slots} slots: expected at most the model's context, {model.config.context_length}")
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer)
    chat = chat_of(tokenizer, vocabulary, template, source)
    if chat.refusal:
        on_note(f"no --chat in this bundle: {chat.refusal}")
    programs = lower(model, spec)
    with files.new_folder(Path(path)) as folder:
        (folder / "programs").mkdir()
        for name, program in programs.items():
            (folder / "programs" / f"{name}.mlirbc").write_bytes(program.artifact)
        for name, data in _twins(model, dataclasses.replace(spec, profile=_packed(spec.profile))).items():
            (folder / "programs" / f"{name}.jax").write_bytes(data)
        arrays = {name: np.asarray(leaf) for name, leaf in parameters(model, spec.profile).items()}
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "weights.safetensors"
        )
        made = golden(model, prompts or golden_prompts(model, tokenizer, spec), spec)
        safetensors.numpy.save_file(made, folder / "golden.safetensors")
        if tokenizer is not None and vocabulary is not None:
            (folder / llamajax.tokenizer.FILE_NAMES[tokenizer.form]).write_bytes(tokenizer.model_bytes)
            (folder / "vocabulary.json").write_text(json.dumps(vocabulary.values, separators=(",", ":")) + "\n")
        for runner in sorted(_RUNNERS.glob("run_*.py")):
            (folder / runner.name).write_text(standalone_runner(runner.name))
        manifest = _manifest(model, tokenizer, spec, programs, arrays, len(made) // 3, source)
        if vocabulary is not None:
            manifest["golden"]["texts"] = vocabulary.texts
            manifest["tokens"] |= {name: vocabulary.values[name] for name in ("refusal", "version")}
        if chat.section is not None:
            manifest["chat"] = chat.section
            manifest["golden"]["conversations"] = chat.golden
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them readable by their owner only
        seal(folder, manifest)
    return open_bundle(path)


def _manifest(
    model: Llama,
    tokenizer: Tokenizer | None,
    spec: Spec,
    programs: Mapping[str, Program],
    arrays: Mapping[str, np.ndarray],
    prompts: int,
    source: str,
) -> dict[str, Any]:
    """The manifest without the list of files."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "producer": f"llamajax {llamajax.__version__}, jax {jax.__version__}",
        "source": source,
        "config": model.config.to_dict(),
        "schemes": _schemes(model),
        "profile": spec.profile.name,
        "stablehlo_version": STABLEHLO_VERSION,
        "validity": {
            "mlirbc": "StableHLO promises that programs are read for 5 years after they were written",
            "jax": f"jax {jax.__version__} wrote the .jax files: JAX reads them for 6 months, and 3 weeks back",
        },
        "cache": _cache(model, spec),
        "buckets": list(spec.buckets),
        "tokens": {
            "bos": tokenizer.bos_id if tokenizer else None,
            "eos": tokenizer.eos_id if tokenizer else None,
            "stop": list(tokenizer.stop_ids) if tokenizer else [],
        },
        "chat_template": _chat_template(tokenizer),
        "compiler_options": compiler_options(spec.profile.backend) if spec.profile.backend else {},
        # How activations are rounded, if they are: `runner.tolerance` is larger then.
        **({"activations": "int8-token"} if any(weight.activations for weight in quantized(model)) else {}),
        "weights": [_described(Value.of(name, array)) for name, array in arrays.items()],
        "programs": {
            name: {
                "file": f"programs/{name}.mlirbc",
                "weights": program.weights,
                "inputs": [_described(value) for value in program.inputs],
                "outputs": [_described(value) for value in program.outputs],
                "operations": dict(program.operations),
            }
            for name, program in programs.items()
        },
        "jax": {name: f"programs/{name}.jax" for name in _TWINS},
        "golden": {"file": "golden.safetensors", "prompts": prompts},
        "targets": {},
    }


def _chat_template(tokenizer: Tokenizer | None) -> str | None:
    """The Jinja template of a tokenizer; runners use the section `chat` that `conversations` makes from it."""
    data = tokenizer.words.files.get("chat_template.jinja") if tokenizer else None
    return None if data is None else data.decode(errors="replace")


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest atomically: SHA-256 and size of every other file, and its own SHA-256 as the last line."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    listed = {name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    listed.pop("manifest.json", None)
    rest = {key: value for key, value in manifest.items() if key not in ("files", "sha256")}
    text = json.dumps({**rest, "files": listed}, indent=1, ensure_ascii=False).removesuffix("\n}").encode()
    with files.new_file(folder / "manifest.json", beside=folder) as partial:  # inside, a leftover would be unlisted
        partial.write_bytes(text + _SEAL + _closing(text))


_SEAL = b',\n "sha256": '


def _closing(text: bytes) -> bytes:
    """The last bytes of a manifest that begins with `text`: its SHA-256."""
    return b'"%s"\n}\n' % hashlib.sha256(text).hexdigest().encode()


def open_bundle(path: str | Path) -> Bundle:
    """Opens a bundle and checks it before any part of it is used.

    The order of checks keeps their cost below the bundle's own size: the manifest by itself; the kind and size of all
    files in the folder; every file's SHA-256.

    Raises:
        LlamaJaxError: for the first problem: no bundle, a newer version, a missing file, one that differs from the
            manifest, or any other file or link.
    """
    path = Path(path)
    manifest = read_manifest(path)
    try:
        check_entries(path, manifest["files"])
    except ValueError as error:
        raise LlamaJaxError(f"{path}: {line_of(error)}") from None
    for name, expected in manifest["files"].items():
        if _sha256(path / name) != expected["sha256"]:
            raise LlamaJaxError(f"{path}: {name}: not the file that the manifest names (SHA-256 differs)")
    return Bundle(path, manifest)


def read_manifest(path: Path) -> Mapping[str, Any]:
    """Reads and checks the manifest of a bundle without its other files.

    Raises:
        LlamaJaxError: if it is missing, damaged, or of a newer version.
    """
    file = path / "manifest.json"
    try:
        data = files.read_bytes(file, LARGEST_MANIFEST)
    except OSError as error:
        raise LlamaJaxError(f"{path}: not a bundle: manifest.json: {error.strerror}") from None
    manifest = files.parse_json(data, f"{file}: damaged")
    if not isinstance(manifest, dict) or not {"format", "version"} <= set(manifest):
        raise LlamaJaxError(f"{file}: damaged: expected the manifest of a bundle")
    kind, version = manifest["format"], manifest["version"]
    if kind != FORMAT or version != VERSION:
        raise LlamaJaxError(
            f"{file}: format {files.shortened(kind)} version {files.shortened(version)}: this release reads "
            f"{FORMAT!r} version {VERSION}; a newer bundle needs a newer llamajax"
        )
    before, _, closing = data.rpartition(_SEAL)
    if closing != _closing(before):
        raise LlamaJaxError(f"{file}: damaged or changed: its SHA-256 differs from the one in its last line")
    _check_manifest(file, manifest)
    return manifest


def standalone_runner(name: str) -> str:
    """The text of a runner as one file: the shared code of all runners, followed by the runner's own."""
    text = (_RUNNERS / "runner.py").read_text(encoding="utf-8")
    for part, line in _IMPORTS.items():
        _, _, of_part = (_RUNNERS / f"{part}.py").read_text(encoding="utf-8").partition('"""\n\n')
        text = text.replace(line, of_part + "\n\n")
    own = (_RUNNERS / name).read_text(encoding="utf-8").replace("\n" + _IMPORT, "")
    seen, once = set(), []
    for line in (text + "\n\n" + own).splitlines(keepends=True):
        if line not in seen:
            once.append(line)
        if line.startswith("import "):
            seen.add(line)
    return re.sub("\n{4,}", "\n\n\n", "".join(once))


_IMPORT = "from export.runners.runner import main\n"
# The import line that each part replaces.
_IMPORTS = {
    "answers": "from export.runners.answers import chooser, conversation, converse, steps, write_until\n",
    "text": "from export.runners.text import Text\n",
    "text_models": "from export.runners.text_models import MODELS, SPACE, Longest\n",
}


def _twins(model: Llama, spec: Spec) -> dict[str, bytes]:
    """Makes `jax.export` programs: prefill of any length, decode; any batch and cache size; for CPU, GPU and TPU."""
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in parameters(model, spec.profile).items()
    }
    twins = {}
    rings = empty_state(model.config, spec).slots is None  # rings have the same size for any S
    for kind, letters in _TWINS.items():
        letters = letters.replace("S", "") if rings else letters
        constraints = [f"{letter} >= 1" for letter in letters] + (["S >= T"] if {"S", "T"} <= set(letters) else [])
        symbols = jax.export.symbolic_shape(", ".join(letters), constraints=constraints)
        made = functions(model, spec, dict(zip(letters, symbols, strict=True)))
        function, inputs = next((function, inputs) for name, function, inputs, _, _ in made if name == kind)
        flat = bound(function, tuple(abstract), model, spec.profile)
        flat.__name__ = kind
        jitted = jax.jit(flat, keep_unused=True)
        exported = jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(*abstract.values(), *inputs.values())
        twins[kind] = bytes(_without_locations(exported).serialize())
    return twins


def _packed(profile: Profile) -> Profile:
    """The profile of programs that take the packed weights."""
    return PROFILES["scanned"] if profile.backend is not None else profile


def _without_locations(exported: jax.export.Exported) -> jax.export.Exported:
    """The same program without the paths and lines of the source that it was traced from."""
    version = stablehlo.get_version_from_compatibility_requirement(stablehlo.StablehloCompatibilityRequirement.WEEK_4)
    with mlir.make_ir_context():
        text = str(ir.Module.parse(exported.mlir_module()).operation.get_asm(enable_debug_info=False))
    module = stablehlo.serialize_portable_artifact_str(text, version)
    return dataclasses.replace(exported, mlir_module_serialized=module)


def _schemes(model: Llama) -> dict[str, str]:
    """The scheme of each weight by name; a weight whose layers differ has several, separated by commas."""
    return {name: ", ".join(schemes(weight)) for name, weight in named_weights(model).items()}


def _cache(model: Llama, spec: Spec) -> dict[str, Any]:
    """Describes the cache, which programs take and return after other arrays, and how far it can be shortened."""
    empty = empty_state(model.config, spec)
    return {
        "batch": spec.batch,
        "slots": spec.slots,
        "dtype": spec.cache_dtype,
        "layout": "layer, row, key/value head, slot, element",
        "state": [_described(Value.of(name, value)) for name, value in empty.state.items()],
        **({} if empty.spare is None else {"spare": empty.spare}),
    }


def _described(value: Value) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}


@functools.cache
def _schema() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "manifest.schema.json").read_text(encoding="utf-8"))


def _check_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Checks a manifest against the schema, and that it lists a SHA-256 of every file that it names."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_schema()).iter_errors(manifest))
    if error is not None:
        fault = line_of(f"{error.json_path}: {error.message}")
        raise LlamaJaxError(f"{file}: {fault}: the manifest is damaged, or forged")
    state = manifest["cache"].get("state")
    inputs, outputs = (manifest["programs"]["decode"][kind] for kind in ("inputs", "outputs"))
    if state is not None and (inputs[-len(state) :] != state or outputs[-len(state) :] != state):
        raise LlamaJaxError(
            f"{file}: cache.state differs from decode's last inputs and outputs: the manifest is damaged"
        )
    entries = [program["file"] for program in manifest["programs"].values()]
    entries += [*manifest["jax"].values(), manifest["golden"]["file"], "weights.safetensors"]
    for target in manifest["targets"].values():
        entries += target["files"]
    if unknown := [name for name in entries if name not in manifest["files"]]:
        raise LlamaJaxError(f"{file}: {unknown[0]!r} is not among its files: the manifest is damaged")


def _sha256(path: Path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
