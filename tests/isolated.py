"""Runs a bundle's runner as its users do: as one file, in a process that cannot import this project."""

import subprocess
import sys
import tempfile
from pathlib import Path

from export.bundle import standalone_runner


def run_isolated(
    path: Path, *arguments: str, runner: str, hidden: tuple[str, ...] = (), said: str = ""
) -> subprocess.CompletedProcess:
    """Runs the runner of the bundle at `path`; importing our packages, or others that are hidden, is an error there.

    `said` is its standard input.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / runner
        file.write_text(standalone_runner(runner))
        modules = dict.fromkeys(("llamajax", "quant", "export", *hidden))
        code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        code = f"import sys; sys.modules.update({modules}); {code}"
        command = [sys.executable, "-I", "-c", code, str(file), str(path), *arguments]
        return subprocess.run(command, input=said, capture_output=True, encoding="utf-8", errors="replace", check=False)
