"""Signals end a process with one line, whatever it is doing. Each test starts a process that imports nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROCESS = Path(__file__).parents[1] / "llamajax" / "process.py"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

_BEGIN = f"""
import gc, hashlib, importlib.util, sys, time
spec = importlib.util.spec_from_file_location("process", {str(PROCESS)!r})
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)
process.begin()
ready = lambda: print("ready", flush=True)
native = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # minutes, without the lock of the interpreter
def ended():
    reason, code = process.interrupted()
    print("llamajax:", reason, file=sys.stderr, flush=True)
    sys.exit(code)
"""
PROGRAMS = {
    "outside of work": "ready(); time.sleep(60)",
    "work": "try:\n    with process.interruptible(): ready(); time.sleep(60)\nexcept KeyboardInterrupt: ended()",
    # Like JAX's callback of the garbage collector: Python drops exceptions that are raised in it.
    "a callback that loses the exception": """
def callback(phase, info):
    if phase == "start" and not process.interrupted():
        ready(); time.sleep(60)
gc.callbacks.append(callback)
try:
    with process.interruptible():
        gc.collect()
        time.sleep(60)
except KeyboardInterrupt: ended()
""",
    # The signal may come before the native code has begun.
    "native code": "try:\n    with process.interruptible(): ready(); native()\nexcept KeyboardInterrupt: ended()",
}


# However the suite was started: shells make commands before `&` ignore SIGINT.
_HEEDS = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"


def start(program: str, *argv: str, stdin: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", _HEEDS + _BEGIN + program, *argv]
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_one_line(program: str, number: signal.Signals, word: str) -> None:
    process = start(PROGRAMS[program])
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, f"llamajax: {word}\n")


def test_a_second_one_does_not_wait() -> None:
    """A second signal ends the process at once, unless right after the first: `timeout` and `make` send two."""
    waits = "try:\n    with process.interruptible(): ready(); time.sleep(60)\nexcept KeyboardInterrupt: ready(); "
    process = start(f"{waits}native()")
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30  # generous: this process may be late to send the second signal
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (130, "llamajax: interrupted\n")
    process = start(f"{waits}time.sleep(0.2); ended()")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (130, 143) and err.count("\n") == 1


def test_an_interrupt_may_call_a_function_instead() -> None:
    """Each interrupt calls the function, also during native code that is too long for the watcher's patience."""
    program = """
import os
begun = time.monotonic()
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
rounds = int(1.5 / (time.monotonic() - begun) * 100_000)
try:
    with process.interruptible():
        with process.interrupt_calls(lambda: os.write(1, b"called\\n")):
            ready()
            sys.stdin.readline()
            hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        ready()
        time.sleep(60)
except KeyboardInterrupt: ended()
"""
    process = start(program, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "called\n"
        time.sleep(0.6)
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["called\n", "ready\n"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "llamajax: interrupted\n")


def test_signals_come_back_from_a_library() -> None:
    """asyncio takes over signals and leaves nothing that handles them: native code could not be ended after it."""
    program = """
import asyncio
async def takes():
    asyncio.get_running_loop().add_signal_handler(2, print)
    ready()
    await asyncio.sleep(0.2)
try:
    with process.interruptible():
        with process.lend_signals(print): asyncio.run(takes())
        ready()
        native()
except KeyboardInterrupt: ended()
"""
    process = start(program)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "llamajax: interrupted\n")


@pytest.mark.parametrize("seconds", [0.3, 60])
def test_a_library_is_asked_to_end(seconds: float) -> None:
    """The first signal asks the library to end; a second signal does not wait for it."""
    program = f"""
import asyncio
async def waits():
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(2, print)
    def end():
        loop.call_soon_threadsafe(asked.set)
    with process.lend_signals(end):
        ready()
        await asked.wait()
        ready()
        await asyncio.sleep({seconds})
try:
    with process.interruptible(): asyncio.run(waits())
except KeyboardInterrupt: ended()
"""
    process = start(program)
    assert process.stdout
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ready\n"
    if seconds == 60:
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "llamajax: terminated\n")


def test_what_the_parent_ignores_is_ignored() -> None:
    program = "import os, signal; ready(); os.kill(os.getpid(), signal.SIGINT); print(signal.getsignal(signal.SIGINT))"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{_BEGIN}\n{program}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n1\n", "")


@pytest.mark.parametrize(("closed", "number"), [("1>&-", 1), ("2>&-", 2), ("1>&- 2>&-", 1)])
def test_no_file_gets_the_number_of_a_closed_stream(closed: str, number: int) -> None:
    """Otherwise messages for people would be written into that file."""
    program = f"{_BEGIN}\nfile = open({str(PROCESS)!r}); sys.exit(0 if file.fileno() > 2 else 7)"
    done = subprocess.run(["sh", "-c", f'exec "$0" -I -c "$1" {closed}', sys.executable, program], check=False)
    assert done.returncode == 0


def test_libraries_that_do_not_fit_into_memory() -> None:
    program = f"{_BEGIN}\nraise ImportError('libfoo.so: failed to map segment from shared object')"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "out of memory while the libraries are loaded (libfoo.so: failed to map segment" in done.stderr


def test_a_limit_that_libraries_do_not_survive_is_said() -> None:
    """Libraries end the process themselves, in C++, under such a limit: our line before it says why."""
    resource = pytest.importorskip("resource")
    for limit, said in ((1500 << 20, True), (resource.getrlimit(resource.RLIMIT_AS)[1], False)):
        program = f"{_BEGIN}\nimport resource; hard = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
        program += f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, hard)); print(process.few_addresses())"
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("ulimit -v is 1536000 KiB: " in done.stdout) == said
