"""Renders Jinja templates in a separate process, because a template is a program from an untrusted source.

    rendering = render(template, trusted={"bos_token": "<s>"}, contents={"messages": [...]})

One process renders all templates, and is started when it is first needed: a new interpreter that does not import this
package (`jinja_worker`), with no environment, no open files, and limits of time, memory and output. When a limit is
exceeded, the process is ended, and the next rendering starts a new one. It also ends with the calling process.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

_WORKER = Path(__file__).with_name("jinja_worker.py")
# Limits of a rendering, which takes milliseconds: processor time, if the system can limit it, and wall time; both are
# extended by as much again for each MiB of the request. Where processor time is limited, the limit of wall time leaves
# room for a machine that is busy with other work. So does the limit for starting an interpreter.
_CPU_SECONDS, _CLOCK_SECONDS, _START_SECONDS = 1.0, 1.4 if sys.platform == "win32" else 20.0, 60.0
_MEMORY_NBYTES = 512 << 20
_REQUEST_NBYTES, _ANSWER_NBYTES = 8 << 20, 1 << 30
_OTHERWISE = "expected one that renders a conversation: choose a built-in format instead, such as chatml"


if sys.platform == "win32":
    _OUT_OF_TIME = (1,)  # the exit status after `kill`
else:
    _OUT_OF_TIME = (-signal.SIGPROF, -signal.SIGKILL)  # after the limits of processor time and wall time


@dataclasses.dataclass(frozen=True)
class Rendering:
    """The result of a template.

    Attributes:
        text: the rendering.
        spans: the parts of a second rendering, in which stand-ins replace the contents: texts, each with whether it
            comes from a content. Joined they equal `text`, unless the template inspects contents in ways that stand-ins
            do not support. None if the second rendering fails.
    """

    text: str
    spans: tuple[tuple[str, bool], ...] | None


def render(template: str, trusted: Mapping[str, Any], contents: Mapping[str, Any], source: str) -> Rendering:
    """Renders a template in the separate process.

    Args:
        template: the Jinja template.
        trusted: variables of the format itself; their text counts as the template's.
        contents: variables that others wrote, `messages` among them; only the roles of messages count as the format's.
        source: where the template is from, for errors.

    Raises:
        LlamaJaxError: for an invalid template; for a template that refuses these variables, exceeds a limit or does
            something forbidden; for variables that are not JSON.
    """
    try:
        request = {"template": template, "trusted": dict(trusted), "contents": dict(contents)}
        line = json.dumps(request, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise LlamaJaxError(f"a message holds {shortened(error.object[error.start])}: expected Unicode text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise LlamaJaxError(f"messages for a chat template: {shortened(str(error))}: expected JSON values") from None
    if len(line) > _REQUEST_NBYTES:
        raise LlamaJaxError(f"the conversation has {len(line)} bytes: expected at most {_REQUEST_NBYTES}")
    answer = _worker.ask(line, source)
    if problem := answer.get("limit"):
        raise LlamaJaxError(f"{source}: its chat template {problem}: {_OTHERWISE}")
    if problem := answer.get("refused"):
        said = shortened(problem, 300)[1:-1]
        raise LlamaJaxError(
            f"{source}: its chat template refuses the conversation ({said}): expected roles in the template's order"
        )
    if problem := answer.get("error"):
        raise LlamaJaxError(f"{source}: its chat template fails ({shortened(problem, 300)[1:-1]}): {_OTHERWISE}")
    spans = answer.get("spans")
    return Rendering(answer["plain"], None if spans is None else tuple((text, content) for text, content in spans))


class _Worker:
    """The process, and the two pipes to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._ready = 0, False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the process unless it runs; does not wait until it is ready."""
        with self._lock:
            self._start()

    def ask(self, line: bytes, source: str) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
            LlamaJaxError: if the answer does not come in time, or the process cannot be started.
        """
        with self._lock:
            answer = None
            try:
                process = self._start()
                self._ready = self._ready or _exchange(process, b"", _START_SECONDS) is not None
                if not self._ready:
                    raise LlamaJaxError(
                        f"the process for chat templates does not start: expected {sys.executable} to import jinja2"
                    )
                answer = _exchange(process, line, _CLOCK_SECONDS * (1 + len(line) / (1 << 20)))
            finally:  # without an answer, the next line on the pipe would not belong to the next request
                if answer is None or "limit" in answer:
                    self.end()
        if answer is None:
            problem = f"takes more than {_CPU_SECONDS:g} s"
            if process.returncode not in _OUT_OF_TIME:
                problem = "ends the process that renders it"
            raise LlamaJaxError(f"{source}: its chat template {problem}: {_OTHERWISE}")
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        self.end()
        limits = map(str, (_CPU_SECONDS, _MEMORY_NBYTES, _REQUEST_NBYTES))
        specs = map(importlib.util.find_spec, ("jinja2", "markupsafe"))
        folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_WORKER), *limits, *sorted(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={} if os.name == "posix" else None,  # Windows cannot start an interpreter without an environment
                start_new_session=True,  # Ctrl-C at a terminal does not reach it
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # the same on Windows
            )
        except OSError as error:
            raise LlamaJaxError(f"no process for chat templates can be started ({error.strerror})") from None
        self._process, self._owner, self._ready = process, os.getpid(), False
        return process

    def end(self) -> None:
        """Ends the process, if there is one and this process started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any] | None:
    """Sends a line and reads one; None if the process ends before it answers, as it does when time is up."""
    ending = threading.Timer(seconds, process.kill)
    ending.daemon = True
    ending.start()
    try:
        writing, reading = process.stdin, process.stdout
        assert writing is not None and reading is not None, "both are pipes"
        writing.write(line)
        writing.flush()
        data = reading.readline(_ANSWER_NBYTES)
        return json.loads(data) if data.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    finally:
        ending.cancel()


_worker = _Worker()
atexit.register(_worker.end)
start = _worker.start
