"""Renders untrusted Jinja templates: the program of the process that `jinja_process` starts.

It runs as a file, with Jinja and the standard library alone (`llamajax` would import JAX). Each request is a line of
JSON on standard input, and its answer a line of JSON on standard output. Templates get the same environment as in
transformers (`render_jinja_template` in utils/chat_template_utils.py): an immutable sandbox, trimmed blocks, loop
controls, `tojson`, `strftime_now`, `raise_exception`, the tag `generation`. A conversation is rendered twice: as it is,
and with its contents replaced by stand-ins (`stand_ins`).
"""

import contextlib
import datetime
import functools
import importlib
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamajax.chat import stand_ins
    from llamajax.chat.stand_ins import TooMuchError
else:
    sys.path += [*sys.argv[4:], str(Path(__file__).parent)]  # the folders of Jinja, after the interpreter's own
    import stand_ins
    from stand_ins import TooMuchError

    sys.path.pop()

import jinja2.ext
import jinja2.runtime
import jinja2.sandbox

# A rendering may have _OUTPUT_LENGTH characters, and _OUTPUT_GROWTH more for each byte of the request.
_OUTPUT_LENGTH, _OUTPUT_GROWTH = 512 << 10, 4
# The largest number and repeated length that a template may use; no format of conversations needs more.
_MOST_REPEATED = 1 << 20
_LONG_FIELD = re.compile(r"[0-9]{7}")
# Modules that Python and Jinja import late; they are imported at the start, because no file can be opened afterwards.
_LATE = ("encodings.unicode_escape", "html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap")


class RefusedError(Exception):
    """The template called `raise_exception`."""


# ---- Jinja -----------------------------------------------------------------------------------------------------------


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers; in addition, forbidden access raises at once, and large repeats are refused."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int):
                    _check_number(len(text) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_number(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            _check_fields(left)
        return _aware(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
        text = getattr(called, "__self__", None)
        if isinstance(text, str):
            for number in arguments:
                _check_number(number)
            if called.__name__.startswith("format"):
                _check_fields(text)
        return _aware(super().call(context, called, *arguments, **named))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.sandbox.SecurityError(f"{attribute!r} of a {type(obj).__name__} may not be used")

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return _aware("".join(parts))


_marking = False


def _aware(value: Any) -> Any:
    """Wraps the result of a Jinja operation on texts, so that it compares like the texts that stand-ins stand for."""
    return stand_ins.Content(value) if _marking and type(value) is str else value


def _aware_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filtered(*arguments: Any, **named: Any) -> Any:
        return _aware(function(*arguments, **named))

    return filtered


# `str_join` is the operator `~` in the code that Jinja generates for a template.
setattr(jinja2.runtime, "str_join", lambda values: _aware("".join(map(str, values))))  # noqa: B010


def _check_number(number: Any) -> None:
    if isinstance(number, int) and number > _MOST_REPEATED:
        raise TooMuchError("asks for more memory than a template may have")


def _check_fields(text: str) -> None:
    """Refuses a format string with fields of a million or more characters."""
    if _LONG_FIELD.search(text):
        raise TooMuchError("asks for more memory than a template may have")


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %}…{% endgeneration %}` around a model's text; it renders its body unchanged."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Dict:
    """The global `dict`."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)


class Namespace(jinja2.utils.Namespace):
    """The global `namespace`, whose names must not begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        """Has no parameter names, because Jinja's own `Namespace` accepts names like `self`."""
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: Any, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"{name!r} may not be a name of a namespace")


def _raise_exception(message: Any) -> None:
    raise RefusedError(str(message))


def _tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False):
    _check_number(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    filters = environment.filters | {"tojson": _tojson}
    environment.filters = {name: _aware_filter(function) for name, function in filters.items()}
    environment.globals |= {"raise_exception": _raise_exception, "dict": Dict(), "namespace": Namespace}
    return environment.from_string(text)


def _rendered(template: jinja2.Template, values: dict[str, Any], limit: int) -> str:
    made, length = [], 0
    for part in template.generate(values):
        made.append(part)
        length += len(part)
        if length > limit:
            raise TooMuchError(f"writes more than {limit} characters")
    return "".join(made)


def answer(line: bytes) -> dict[str, Any]:
    """Answers a request: with its renderings, or the reason why there are none."""
    global _marking
    try:
        request = json.loads(line)
        template, trusted, contents = request["template"], request["trusted"], request["contents"]
        limit = _OUTPUT_LENGTH + _OUTPUT_GROWTH * len(line)
        trusted["strftime_now"] = datetime.datetime.now().strftime
        compiled = _compiled(template)
        _marking = False
        random.seed(len(line))
        plain = _rendered(compiled, trusted | contents, limit)
        alphabets = stand_ins.begin(contents, (plain, template))
        again = stand_ins.marked(contents)
        for message, original in zip(again.get("messages", ()), contents.get("messages", ()), strict=True):
            message["role"] = original["role"]
        _marking = True
        random.seed(len(line))
        try:
            spans = list(alphabets.spans(_rendered(compiled, trusted | again, limit)))
        except (TooMuchError, MemoryError):
            raise
        except Exception:  # for example, digits are not a number once they are stand-ins
            spans = None
        return {"plain": plain, "spans": spans}
    except RefusedError as error:
        return {"refused": _line(error)}
    except TooMuchError as error:
        return {"limit": _line(error)}
    except (MemoryError, OverflowError):
        return {"limit": "asks for more memory than a template may have"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {_line(error)}"}


def _line(error: BaseException) -> str:
    return " ".join(str.__str__(str(error)).split())[:300]


# ---- The process -----------------------------------------------------------------------------------------------------


def limit_process(memory_nbytes: int) -> None:
    """Removes what rendering does not need (memory, files, core dumps) from this process, if the system can."""
    for name in _LATE:
        importlib.import_module(name)
    time.localtime()  # reads the time zone's file
    try:
        import resource
    except ImportError:  # Windows: the parent process ends this one when time is up
        return
    for name, amount in (("RLIMIT_AS", memory_nbytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", 0), ("RLIMIT_CORE", 0)):
        if hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            with contextlib.suppress(OSError, ValueError):  # macOS rejects some limits that it defines
                resource.setrlimit(getattr(resource, name), (amount, amount))


def main(cpu_seconds: float, memory_nbytes: int, request_nbytes: int) -> None:
    """Answers requests until standard input ends."""
    reading, writing = sys.stdin.buffer, sys.stdout.buffer
    limit_process(memory_nbytes)
    timed = hasattr(signal, "ITIMER_PROF")
    writing.write(b"{}\n")  # ready
    writing.flush()
    while line := reading.readline(request_nbytes):
        if timed:
            # The signal ends the process, whatever it is doing.
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds * (1 + len(line) / (1 << 20)))
        data = json.dumps(answer(line), ensure_ascii=False).encode("utf-8", "replace")
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        writing.write(data + b"\n")
        writing.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
