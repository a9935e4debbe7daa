"""Kills, interrupts and full disks at random moments, and closed or broken streams: see `kills` and `streams`.

Each harness runs in a process of its own, which imports the libraries once and forks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")


def passes(module: str, *options: str) -> str:
    """Runs one of the harnesses; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *options],
        env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_few_kills() -> None:
    out = passes("kills", "--kills=2", "--interrupts=3", "--disks=1", "--only=convert", "--seed=1")
    assert out.startswith("2 kills, 3 interrupts, 1 disks, of 1 commands, seed 1: 0 problems")


@pytest.mark.exhaustive
def test_many_kills() -> None:
    print(passes("kills", "--kills=100", "--interrupts=100", "--disks=20", "--seed=13"))


def test_a_few_streams() -> None:
    assert passes("streams", "--sample=8", "--seed=2") == "8 cases, 0 wrong\n"


@pytest.mark.exhaustive
def test_all_streams() -> None:
    assert passes("streams").endswith(" cases, 0 wrong\n")
