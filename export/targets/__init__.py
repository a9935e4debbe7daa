"""What other runtimes need beside StableHLO: one file each, run as a script with the Python that has its toolchain.

    python export/targets/to_iree.py BUNDLE FOLDER iree-cpu      # writes into FOLDER, prints a JSON object

A target reads the bundle alone, and imports nothing of llamajax: toolchains pin versions that do not go together, so
each may live in an environment of its own. What it prints goes into the manifest, with the files that it wrote.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.bundle import Bundle, open_bundle, seal
from llamajax.errors import LlamaJaxError
from llamajax.files import new_folder

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


def kind_of(target: str) -> str:
    """`iree` for `iree-cpu`, `tpu` for `tpu:v5e:2x2`.

    Raises:
        LlamaJaxError: for a kind that does not exist.
    """
    kind = target.partition(":")[0].partition("-")[0]
    if kind not in SCRIPTS:
        raise LlamaJaxError(f"target {target!r}: expected one of {', '.join(SCRIPTS)}, as iree-cpu or tpu:v5e:2x2")
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
    with new_folder(bundle.file(place), beside=path) as partial:
        script = str(Path(__file__).parent / SCRIPTS[kind])
        entry = _run(python, [script, str(bundle.path), str(partial), target], target)
        entry["files"] = [f"{place}/{name}" for name in entry["files"]]
        bundle.file("targets").mkdir(exist_ok=True)
    seal(bundle.path, {**bundle.manifest, "targets": {**bundle.manifest["targets"], target: entry}})
    return open_bundle(bundle.path)


def _run(python: str, command: list[str], target: str) -> dict[str, Any]:
    """What a script printed.

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
    entry: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(entry)
