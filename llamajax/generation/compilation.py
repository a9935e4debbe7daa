"""Compiles ahead of time, so that compilation is counted and timed apart from running, and keeps programs on disk.

The key of a program is made of shapes, settings and the source files of this project. Code that is replaced in a
running process (a patched method of the model, for example) is not part of the key: use `fresh_programs`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import platform
import stat
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

import quant
from llamajax.allocator import give_back
from llamajax.errors import LlamaJaxError
from llamajax.files import new_file, read_bytes
from llamajax.threads import thread_count
from quant import compiler_options

# Most programs that a function holds in memory: the most recently used ones. A program takes up to 20 MiB.
MOST_PROGRAMS = 64
# Most bytes of files in a folder of programs; beyond it, the oldest files are removed.
FOLDER_BYTES = 1 << 30
_LARGEST_PROGRAM = 1 << 30  # bytes; programs are much smaller
_DIGEST_BYTES = 32
_setting = threading.Lock()  # held while one of JAX's settings differs from the user's
_functions: "weakref.WeakSet[CompiledFunction]" = weakref.WeakSet()
_keeps_programs = True  # whether programs are kept on disk; False within `fresh_programs`
_said: set[str] = set()


@dataclasses.dataclass
class Compilations:
    """Counts of compiled and loaded programs, and the time that callers waited for them.

    Attributes:
        compilations: the number of programs compiled.
        loads: the number of programs loaded from disk instead.
        compile_seconds: the time for both, and for waiting for a thread that compiled the same program.
    """

    compilations: int = 0
    loads: int = 0
    compile_seconds: float = 0.0


class CompiledFunction:
    """`jax.jit` that compiles explicitly, once for each combination of shapes, dtypes, shardings and JAX's settings.

    If JAX's persistent compilation cache is on (`jax_compilation_cache_dir`), programs are kept in a subfolder of that
    folder. JAX's own keys are the lowered functions, and tracing and lowering a model take several times as long as
    loading a compiled program. The keys here are the inputs of compilation: arguments, options, settings, versions, the
    processor and the source of this project. Like JAX's own files, these files hold machine code, and they are Python
    pickles: anyone who can write to that folder can run code in your name. So the folder is used only if it is yours
    and nobody else can write to it (`is_private`). Beyond `FOLDER_BYTES`, the least recently used files are removed.

    Several threads may call it: while one compiles a program, the others wait for that program.

    Attributes:
        total: the counts of all calls so far.
    """

    def __init__(self, function: Callable[..., Any], donate_argnames: tuple[str, ...] = ()):
        """Wraps a pure function of pytrees; arguments named in `donate_argnames` give their memory to the results."""
        self.total = Compilations()
        self._function = function
        self._donated = donate_argnames
        self._programs: dict[Any, Any] = {}
        self._making: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()  # of the two dictionaries and the total
        _functions.add(self)

    def __call__(self, *args: Any, counted: Compilations | None = None) -> Any:
        """Runs the function; compiles it first if these shapes are new, and adds that to `counted`."""
        return self.compile(*args, counted=counted)(*args)

    def compile(self, *args: Any, counted: Compilations | None = None) -> Any:
        """Returns the program for arguments of these shapes, which may be `jax.ShapeDtypeStruct`s or NumPy arrays."""
        leaves, structure = jax.tree.flatten(args)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None) or device) for leaf in leaves)
        key = structure, shapes, _settings()
        program = self._found(key)
        if program is not None:
            return program
        begun = time.perf_counter()
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        took = Compilations()
        with making:
            program = self._found(key)  # another thread may have compiled it meanwhile
            if program is None:
                program, loaded = self._load_or_compile(structure, shapes, args)
                took.loads, took.compilations = int(loaded), int(not loaded)
                self._remember(key, program)
        took.compile_seconds = time.perf_counter() - begun
        with self._lock:
            self._making.pop(key, None)
            for count in (self.total, counted):
                if count is not None:
                    count.compilations += took.compilations
                    count.loads += took.loads
                    count.compile_seconds += took.compile_seconds
        return program

    def _found(self, key: Any) -> Any:
        """Returns a program in memory and moves it to the end, so that the first is the least recently used."""
        with self._lock:
            program = self._programs.pop(key, None)
            if program is not None:
                self._programs[key] = program
            return program

    def _remember(self, key: Any, program: Any) -> None:
        with self._lock:
            self._programs[key] = program
            if len(self._programs) > MOST_PROGRAMS:
                del self._programs[next(iter(self._programs))]

    def _forget(self, programs: dict[Any, Any]) -> dict[Any, Any]:
        """Replaces the programs in memory by `programs`; returns the earlier ones."""
        with self._lock:
            before, self._programs = self._programs, programs
            return before

    def _load_or_compile(self, structure: Any, shapes: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, bool]:
        """The program, and whether it was loaded from disk."""
        options = compiler_options(jax.default_backend())
        name = f"{self._function.__module__}.{self._function.__qualname__}"
        # Shardings over several devices are described by axes, which do not tell one order of devices from another.
        on_one_device = all(len(sharding.device_set) == 1 for *_, sharding in shapes)
        file = _program_file(f"{name} {self._donated} {options} {(structure, shapes)}") if on_one_device else None
        if file is not None and (program := _kept(file)):
            return program, True
        with _unknown_to_jax() if file is not None else contextlib.nullcontext():
            traced = jax.jit(_anew(self._function, unique=file is not None), donate_argnames=self._donated)
            program = traced.lower(*args).compile(options)
        if file is not None:
            _keep(program, file)
        give_back()  # compiling takes 100 MiB for a while
        return program, False


# ---- Forgetting ------------------------------------------------------------------------------------------------------


def clear_programs() -> None:
    """Discards the programs of `generate`, `stream` and `measure_decode` in memory, and frees that memory.

    Programs on disk stay, and are loaded when they are needed again. This frees half of the memory that a new shape of
    `generate` takes: of 18 MiB on a CPU (2 layers of width 64; 24 MiB for 8 layers of width 512) its two programs hold
    9 (14), of which 0.3 are machine code. JAX's own caches hold the rest, some 150 traced functions and a few small
    programs for each shape: `jax.clear_caches()` frees it, and with both calls a process is as large after many rounds
    as after one. The C library keeps part of the freed pages for later (glibc's `malloc_trim(0)` returns them to the
    system).
    """
    for function in _functions:
        function._forget({})


@contextlib.contextmanager
def fresh_programs() -> Iterator[None]:
    """A context in which `generate` and the like compile their programs anew, and neither load them nor keep them.

    Use it for code that is replaced while Python runs, which is not part of the keys of programs:

        with fresh_programs(), unittest.mock.patch.object(Block, "__call__", mine):
            generate(model, tokenizer, prompt)

    Afterwards the earlier programs are used again. The context applies to all threads of the process, but not to
    programs of your own (`jax.jit`): use `jax.clear_caches` for those.
    """
    global _keeps_programs
    before, kept = _keeps_programs, {function: function._forget({}) for function in _functions}
    _keeps_programs = False
    try:
        yield
    finally:
        _keeps_programs = before
        for function in _functions:
            function._forget(kept.get(function, {}))


# ---- Compiling -------------------------------------------------------------------------------------------------------


def _anew(function: Callable[..., Any], unique: bool) -> Callable[..., Any]:
    """Returns the function as a new object, of which JAX has traced nothing; with `unique`, also under a new name.

    The new name keeps JAX from finding the program on its own disk cache. XLA on a CPU cannot write out a program that
    was loaded from there: the copy would lack functions.
    """

    @functools.wraps(function)
    def again(*args: Any) -> Any:
        return function(*args)

    if unique:
        again.__name__ = f"{function.__name__}_{time.time_ns()}"
    return again


@contextlib.contextmanager
def _unknown_to_jax() -> Iterator[None]:
    """A context in which JAX keeps no program on disk."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    with _setting:
        before = jax.config.values[setting]
        jax.config.update(setting, float("inf"))
        try:
            yield
        finally:
            jax.config.update(setting, before)


def _settings() -> tuple[Any, ...]:
    """JAX's settings and the mesh in use, which change what a function is traced to."""
    # Read attributes where they exist: JAX's context managers change the attribute, not `values`.
    values = jax.config.values
    return *(getattr(jax.config, name, values[name]) for name in _setting_names()), jax.sharding.get_abstract_mesh()


@functools.cache
def _setting_names() -> tuple[str, ...]:
    """The names of the settings that may change a program: all but those of caches."""
    return tuple(name for name in sorted(jax.config.values) if "cache" not in name)


# ---- Programs on disk ------------------------------------------------------------------------------------------------


def _program_file(description: str) -> Path | None:
    """The file in which a program is kept; None if programs are not kept."""
    root = jax.config.values["jax_compilation_cache_dir"]
    if not _keeps_programs or not root or "://" in root:  # for gs://…, only JAX itself keeps programs
        return None
    if not jax.config.values["jax_enable_compilation_cache"] or jax.process_count() > 1:
        return None
    folder = Path(root, "llamajax")
    if not is_private(folder):
        return None
    flags = {name: value for name, value in sorted(os.environ.items()) if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    device = jax.devices()[0]
    versions = jax.__version__, jaxlib.__version__, flax.__version__, device.client.platform_version
    settings = dict(zip((*_setting_names(), "mesh"), _settings(), strict=True))
    machine = f"{device.device_kind} {processor_features()} {thread_count()}"  # code depends on the number of threads
    made_from = f"{description} {settings} {flags} {versions} {machine} {_source_hash()}"
    return folder / hashlib.sha256(made_from.encode()).hexdigest()


def is_private(folder: Path) -> bool:
    """Whether nobody else can put files into a folder; a folder that does not exist is made for its owner alone.

    If others may read the folder but not write to it, that permission is removed. A refused folder causes one warning
    with the reason.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        problem = None
        if not stat.S_ISDIR(status.st_mode):
            problem = "it is not a folder"
        elif os.name == "posix" and status.st_uid != os.geteuid():
            problem = f"it belongs to user {status.st_uid}, not to you ({os.geteuid()})"
        elif os.name == "posix" and status.st_mode & 0o022:
            problem = f"others can write to it (mode {stat.S_IMODE(status.st_mode):o}, expected 700)"
        elif os.name == "posix" and status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        _say_once(
            f"{folder}: compiled programs are neither kept there nor loaded: {problem}. Remove it, or name another "
            "folder with JAX_COMPILATION_CACHE_DIR"
        )
    return problem is None


def drop_oldest(folder: Path, limit: int = FOLDER_BYTES) -> None:
    """Removes the least recently used files of a folder until it holds at most `limit` bytes."""
    try:
        status = {
            Path(entry.path): entry.stat() for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)
        }
        total = sum(each.st_size for each in status.values())
        for file in sorted(status, key=lambda file: max(status[file].st_atime, status[file].st_mtime)):
            if total <= limit:
                break
            file.unlink(missing_ok=True)
            total -= status[file].st_size
    except OSError as error:
        _say_once(f"{folder}: old compiled programs could not be removed ({error.strerror})")


@functools.cache
def processor_features() -> str:
    """A text that differs between processors that need different machine code."""
    cpuinfo = Path("/proc/cpuinfo")
    # `files.read_text` does not work here: the kernel reports a size of 0 for its files.
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"{platform.machine()} {platform.processor()} {features[:1]}"


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _source_hash() -> str:
    """A hash of all source files that a program can be made from."""
    digest = hashlib.sha256()
    for folder in (Path(quant.__file__).parent, Path(__file__).parents[1]):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _kept(file: Path) -> Any:
    """Loads the program that `_keep` wrote; None if there is none, it is damaged, or this machine cannot load it."""
    try:
        data = read_bytes(file, _LARGEST_PROGRAM)
    except FileNotFoundError:
        return None
    except (OSError, LlamaJaxError) as error:
        _say_once(f"{error}: this compiled program is not used")
        return None
    try:
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("damaged")
        program = serialize_executable.deserialize_and_load(*pickle.loads(content))
    except Exception as error:  # of many kinds; compiling again is right for all of them
        reason = " ".join(str(error).split())[:200]
        _say_once(f"{file.parent}: a kept program cannot be loaded ({reason}): it is compiled again")
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # marks it as used: `drop_oldest` removes others first
    return program


def _keep(program: Any, file: Path) -> None:
    """Writes a program after its SHA-256, whole or not at all; warns if it cannot be written."""
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        with new_file(file) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
    except (OSError, ValueError, NotImplementedError, LlamaJaxError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        _say_once(f"{file.parent}: compiled programs are not kept ({reason}): the next start compiles them again")
        return
    drop_oldest(file.parent)
