"""Targets: files for runtimes that do not take StableHLO. Each is built by a script, with the Python of its toolchain.

    python export/targets/to_iree.py BUNDLE FOLDER iree-cpu      # writes into FOLDER, prints a JSON object

A script reads only the bundle and does not import llamajax: toolchains pin versions that exclude each other, so each
may need its own environment. The object that it prints goes into the manifest, with the files that it wrote.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.bundle import Bundle, open_bundle, read_manifest, seal
from export.profiles import PROFILES
from export.targets.to_iree import TARGETS as IREE_TARGETS
from llamajax import LlamaJaxError, files

# Each kind of target, which is the target's name up to the first "-" or ":", and its script. A script must not have the
# name of a module that it imports: it would import itself.
SCRIPTS = {
    "iree": "to_iree.py",
    "onnx": "to_onnx.py",
    "savedmodel": "to_savedmodel.py",
    "litert": "to_litert.py",
    "coreml": "to_coreml.py",
    "tpu": "ahead_of_time.py",
    "cuda": "ahead_of_time.py",
}


# By kind: the profiles of bundles that it takes, the default first, and the modules that its script imports. IREE's
# compiler is a program, which may also be on PATH.
_PROFILES = {
    "iree": ("unrolled",),
    "onnx": ("unrolled",),
    "savedmodel": ("scanned", "unrolled", "float"),
    "litert": ("float",),
    "coreml": ("float",),
}
_MODULES = {
    "onnx": ("jax", "onnx"),
    "savedmodel": ("tensorflow",),
    "litert": ("tensorflow",),
    "coreml": ("jax", "coremltools", "stablehlo_coreml"),
    "tpu": ("jax", "flatbuffers", "libtpu"),
    "cuda": ("jax", "flatbuffers"),
}


def profile_for(targets: Sequence[str], chosen: str | None = None) -> str:
    """The profile for a bundle with all of these targets.

    Args:
        targets: names of targets, such as `iree-cpu`.
        chosen: the profile that the user chose, or None.

    Raises:
        LlamaJaxError: if no profile suits all targets, or the chosen one does not.
    """
    takes = {target: _PROFILES.get(kind_of(target), tuple(PROFILES)) for target in targets}
    suitable = [name for name in PROFILES if all(name in names for names in takes.values())]
    if chosen is None and suitable:
        return suitable[0]
    if chosen in suitable:
        return chosen
    wanted = "; ".join(f"{target} takes {' or '.join(names)}" for target, names in takes.items())
    if not suitable:
        raise LlamaJaxError(f"no profile for all targets: {wanted}: write a bundle for each")
    raise LlamaJaxError(f"profile {chosen!r}: {wanted}: expected --profile={suitable[0]}")


def check_toolchain(target: str, python: str) -> None:
    """Checks that a target can be built, before anything is written for it.

    Raises:
        LlamaJaxError: for a target that does not exist, or a Python that lacks its toolchain.
    """
    kind = kind_of(target)
    if (kind == "iree" and target not in IREE_TARGETS) or (
        kind in ("onnx", "savedmodel", "litert", "coreml") and target != kind
    ):
        known = ", ".join(IREE_TARGETS) if kind == "iree" else kind
        raise LlamaJaxError(f"target {target!r}: expected one of {known}")
    if kind in ("tpu", "cuda") and not target.partition(":")[2]:
        raise LlamaJaxError(f"target {target!r}: expected a name after it, as in tpu:v5e:2x2 or cuda:h100")
    places = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if kind == "iree" and shutil.which("iree-compile", path=places) is None:
        raise LlamaJaxError(
            _lacking(target, f"no iree-compile beside {python} or on PATH: pip install iree-base-compiler")
        )
    probe = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
    missing = _output(python, ["-I", "-c", probe, *_MODULES.get(kind, ())], target).split()
    if missing:
        raise LlamaJaxError(_lacking(target, f"{python} has no {missing[0]}"))


def _lacking(target: str, what: str) -> str:
    return f"target {target}: {what} (another Python with --python={target}=PATH)"


def kind_of(target: str) -> str:
    """`iree` for `iree-cpu`, `tpu` for `tpu:v5e:2x2`.

    Raises:
        LlamaJaxError: for a kind that does not exist.
    """
    kind = target.partition(":")[0].partition("-")[0]
    if kind not in SCRIPTS:
        raise LlamaJaxError(f"target {target!r}: expected one of {', '.join(SCRIPTS)}, such as iree-cpu or tpu:v5e:2x2")
    return kind


def add_target(bundle: Bundle, target: str, python: str = sys.executable) -> Bundle:
    """Builds a target from a bundle, into `targets/` of its folder. The manifest changes last, and atomically.

    Args:
        bundle: the opened bundle, whose files are therefore checked.
        target: the name of the target, such as `iree-cpu`.
        python: a Python with the toolchain.

    Raises:
        LlamaJaxError: if the bundle has the target already, or the toolchain fails; the bundle is then unchanged.
    """
    kind = kind_of(target)
    if target in bundle.manifest["targets"]:
        raise LlamaJaxError(f"{bundle.path}: has target {target!r} already: expected a new one: export again for it")
    place = f"targets/{target.replace(':', '-')}"
    # Beside the bundle, not in it: inside, the leftovers of a killed toolchain would be files outside the manifest.
    path = bundle.path.absolute()
    shutil.rmtree(bundle.file(place), ignore_errors=True)  # left by a run that was killed before the manifest named it
    with files.new_folder(bundle.file(place), beside=path) as partial:
        script = str(Path(__file__).parent / SCRIPTS[kind])
        entry = _run(python, [script, str(bundle.path), str(partial), target], target)
        entry["files"] = [f"{place}/{name}" for name in entry["files"]]
        bundle.file("targets").mkdir(exist_ok=True)
    try:
        seal(bundle.path, {**bundle.manifest, "targets": {**bundle.manifest["targets"], target: entry}})
    except BaseException:
        shutil.rmtree(bundle.file(place), ignore_errors=True)
        raise
    return open_bundle(bundle.path)


def clear_unnamed(path: Path) -> list[str]:
    """Removes folders under `targets/` that the manifest does not name; returns their names.

    `add_target` leaves such a folder if it is killed before the manifest names it, and `open_bundle` refuses it.

    Raises:
        LlamaJaxError: if the manifest is damaged; then nothing is removed.
    """
    manifest, targets = read_manifest(path), path / "targets"
    named = {name.split("/")[1] for name in manifest["files"] if name.startswith("targets/")}
    if targets.is_symlink() or not targets.is_dir():
        return []
    with os.scandir(targets) as entries:
        unnamed = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name not in named]
    for entry in unnamed:
        shutil.rmtree(entry.path)
    return [f"targets/{entry.name}" for entry in unnamed]


def _run(python: str, command: list[str], target: str) -> dict[str, Any]:
    """Runs a script and returns the JSON object in its last line."""
    entry: Mapping[str, Any] = json.loads(_output(python, command, target).strip().splitlines()[-1])
    return dict(entry)


def _output(python: str, command: list[str], target: str) -> str:
    """Runs a Python and returns its standard output.

    Raises:
        LlamaJaxError: if it fails; the message has the last line of its standard error.
    """
    try:
        done = subprocess.run([python, *command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LlamaJaxError(
            f"target {target}: {python}: {error.strerror}: expected a Python with its toolchain"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LlamaJaxError(
            f"target {target}: {lines[-1][:300]} (by {python}: another one with --python={target}=PATH)"
        )
    return done.stdout
