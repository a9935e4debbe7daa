"""Compiling ahead of time, so that compilation is counted and timed apart from running; whole programs kept on disk."""

import contextlib
import functools
import hashlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

import quant
from quant import compiler_options

_DIGEST_BYTES = 32
_setting = threading.Lock()  # held while a setting of JAX's is not the user's


class CompiledFunction:
    """`jax.jit` that compiles explicitly, once for each combination of shapes, dtypes and shardings.

    Where JAX's persistent compilation cache is on (`jax_compilation_cache_dir`), programs are kept in a folder of that
    folder, instead of as JAX does: JAX finds them by what a function is lowered to, and tracing and lowering a model
    take several times as long as loading what was compiled. Here they are found by what they are made from: arguments,
    options, settings, versions and our source. Like JAX's own the files hold machine code, and they are Python
    pickles: who can write to that folder can run code in your name.

    Attributes:
        compilations: how many programs were compiled, or loaded, so far.
        compile_seconds: how long that took, tracing included.
    """

    def __init__(self, function: Callable[..., Any], donate_argnames: tuple[str, ...] = ()):
        """Wraps a pure function of pytrees; arguments named in `donate_argnames` give their memory to the results."""
        self.compilations = 0
        self.compile_seconds = 0.0
        self._function = function
        self._donated = donate_argnames
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Runs the function, compiling it first if these shapes are new."""
        return self.compile(*args)(*args)

    def compile(self, *args: Any) -> Any:
        """The program for arguments of these shapes; they may be `jax.ShapeDtypeStruct`s."""
        leaves, structure = jax.tree.flatten(args)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        key = structure, tuple((leaf.shape, leaf.dtype, leaf.sharding or device) for leaf in leaves)
        program = self._programs.get(key)
        if program is None:
            start = time.perf_counter()
            program = self._programs[key] = self._load_or_compile(key, args)
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
        return program

    def _load_or_compile(self, key: Any, args: tuple[Any, ...]) -> Any:
        options = compiler_options(jax.default_backend())
        name = f"{self._function.__module__}.{self._function.__qualname__}"
        # What is spread over devices is described by axes, which do not tell one order of devices from another.
        on_one_device = all(len(sharding.device_set) == 1 for *_, sharding in key[1])
        file = _program_file(f"{name} {self._donated} {options} {key}") if on_one_device else None
        if file is None:
            return jax.jit(self._function, donate_argnames=self._donated).lower(*args).compile(options)
        if program := _kept(file):
            return program
        with _unknown_to_jax(self._function) as function:
            program = jax.jit(function, donate_argnames=self._donated).lower(*args).compile(options)
        _keep(program, file)
        return program


@contextlib.contextmanager
def _unknown_to_jax(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function under a name that it never had; inside, JAX keeps no program on disk.

    XLA on a CPU cannot write out a program that JAX found on disk: the copy would lack functions.
    """

    @functools.wraps(function)
    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__name__ = f"{function.__name__}_{time.time_ns()}"
    setting = "jax_persistent_cache_min_compile_time_secs"
    with _setting:
        before = jax.config.values[setting]
        jax.config.update(setting, float("inf"))
        try:
            yield renamed
        finally:
            jax.config.update(setting, before)


def _program_file(description: str) -> Path | None:
    """Where a program is kept; None if none are to be."""
    root = jax.config.values["jax_compilation_cache_dir"]
    if not root or "://" in root:  # JAX takes gs://…, too: then it keeps programs itself, as it does
        return None
    if not jax.config.values["jax_enable_compilation_cache"] or jax.process_count() > 1:
        return None
    # By attribute, because a context manager changes what that gives, not `values`. Those of caches change no program.
    values = sorted(jax.config.values.items())
    settings = {name: getattr(jax.config, name, value) for name, value in values if "cache" not in name}
    flags = {name: value for name, value in sorted(os.environ.items()) if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    client = jax.devices()[0].client
    versions = jax.__version__, jaxlib.__version__, client.platform_version, jax.devices()[0].device_kind
    made_from = f"{description} {settings} {flags} {versions} {_source_hash()}"
    return Path(root, "llamajax", hashlib.sha256(made_from.encode()).hexdigest())


@functools.cache
def _source_hash() -> str:
    """Of all our code that a program can be made from."""
    digest = hashlib.sha256()
    for folder in (Path(quant.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _kept(file: Path) -> Any:
    """The program that `_keep` wrote; None if there is none, or it is damaged, or this machine cannot load it."""
    try:
        data = file.read_bytes()
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return None
        return serialize_executable.deserialize_and_load(*pickle.loads(content))
    except Exception:  # of many kinds, all of which compiling anew mends
        return None


def _keep(program: Any, file: Path) -> None:
    """Writes a program behind its SHA-256, whole or not at all; what cannot be written is not kept."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        partial.rename(file)
    except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
        with contextlib.suppress(OSError):
            partial.unlink()
