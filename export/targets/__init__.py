"""What other runtimes need beside StableHLO: one file each, run as a script with the Python that has its toolchain.

    python export/targets/to_iree.py BUNDLE FOLDER iree-cpu      # writes into FOLDER, prints a JSON object

A target reads the bundle alone, and imports nothing of llamajax: toolchains pin versions that do not go together, so
each may live in an environment of its own. What it prints goes into the manifest, with the files that it wrote.
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

# Kind of target, which is its name up to the first "-" or ":", and its script. A script that had the name of what it
# imports would import itself.
SCRIPTS = {
    "iree": "to_iree.py",
    "onnx": "to_onnx.py",
    "savedmodel": "to_savedmodel.py",
    "litert": "to_litert.py",
    "coreml": "to_coreml.py",
    "tpu": "ahead_of_time.py",
    "cuda": "ahead_of_time.py",
}


# By kind: the profiles of bundles that it takes, the first being what is chosen for it, and the modules that its
# script imports. IREE's compiler is a program, which may also be elsewhere on PATH.
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
    """The profile of a bundle that is to have all these targets.

    Args:
        targets: as `iree-cpu`.
        chosen: a profile that is wanted, or None.

    Raises:
        LlamaJaxError: if no profile suits them all, or not the chosen one.
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
    """Looks whether a target can be built, before anything is written for it.

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
    """Builds a target from a bundle, into `targets/` of its folder. The manifest changes last, and at once.

    Args:
        bundle: opened, so that its files are known to be whole.
        target: as `iree-cpu`.
        python: that has the toolchain.

    Raises:
        LlamaJaxError: if the target exists already or its toolchain fails; then nothing has changed.
    """
    kind = kind_of(target)
    if target in bundle.manifest["targets"]:
        raise LlamaJaxError(f"{bundle.path}: it has target {target!r} already: export again for another one")
    place = f"targets/{target.replace(':', '-')}"
    # Beside the bundle, not in it: what a killed toolchain leaves would be files that the manifest does not name.
    path = bundle.path.absolute()
    shutil.rmtree(bundle.file(place), ignore_errors=True)  # of a run that was killed before the manifest named it
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
    """Removes folders under `targets/` that the manifest does not name; returns what they were.

    `add_target` leaves one if it is killed before the manifest names it, and `open_bundle` refuses what is surplus.

    Raises:
        LlamaJaxError: if the manifest is not whole; then nothing is removed.
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
    """The JSON object that a script printed in its last line."""
    entry: Mapping[str, Any] = json.loads(_output(python, command, target).strip().splitlines()[-1])
    return dict(entry)


def _output(python: str, command: list[str], target: str) -> str:
    """What a Python printed.

    Raises:
        LlamaJaxError: if it failed, with the last line that it wrote.
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
