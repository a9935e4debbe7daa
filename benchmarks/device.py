"""Measures a GPU or TPU in one run of eight minutes: whether kernels and the model are right there, and how fast.

On the machine with the accelerator, from a checkout or from the output of `git archive`:

    pip install "jax[cuda13]" flax                 # or jax[tpu]; images of JAX have both
    PYTHONPATH=. python benchmarks/device.py --json=device.json

Nothing else is needed. With sentencepiece and safetensors the compared model is the box, without them a model with
random weights of its shape. The steps, in this order:

- bandwidth: bytes per second of a copy (read and written) and of reading alone. Other figures are compared with it.
- kernels: the packed product of each scheme by the backend's kernel, compared with the product in float64 on the host:
  the error, as a fraction of the bound in the kernel's docstring. Also the time of one product, in a loop over a stack
  that is larger than any cache, beside XLA's product of the same packed weights (dequantize, then multiply) and of
  bfloat16 weights.
- model: logits of the prepared model, compared with those of the same weights on the CPU, unprepared and in float32. In
  float32 they may differ by 1e-4 of the largest logit; in bfloat16 by three times the error of bfloat16 on the CPU.
  Also the greedy text: each token must be the one that the CPU would choose there, or equally good within twice these
  tolerances.
- decode and prefill of TinyLlama-1.1B and Llama 3 8B, random weights in int4-g32 and bfloat16, with 1, 8 and 64 rows.

The table goes to stdout and progress to stderr. A JSON file, rewritten after each step, holds everything: device,
versions, commit, and the status of each step: "ok", "wrong" (a number is out of bounds), "failed" (with the first line
of the error) or "skipped" (no time left, or not enough memory). Times are medians; compile time has its own column.
Without a GPU or TPU, or with `--small`, shapes are small and the kernels of both backends run in Pallas' interpreter,
without times: this checks the program itself. The exit code is 1 if a step is wrong or failed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import llamajax
import quant
from llamajax.evaluation.speed import measure_decode, measure_prefill, memory_bandwidth, random_model
from llamajax.families import config_from_hf
from llamajax.files import new_file, read_json
from llamajax.generation.engine import SLOT_MULTIPLE
from llamajax.generation.programs import DECODE_BLOCK
from llamajax.model import abstract_model
from llamajax.quantization.quantize import quantize
from quant.kernels import gpu, tpu

_ROOT = Path(__file__).resolve().parents[1]
_RECIPE = "int4-g32"
_SMALL = llamajax.Config(
    vocab_size=64, width=64, ffn_width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, context_length=512
)
_PROMPT = "Once upon a time, there was a little"
_STACK_BYTES = 256 << 20  # packed weights that one repeat reads: several times the caches of any card
_CONTEXT, _PREFILL = 128, 128
_LENGTH = 128  # tokens of the sequences whose logits the CPU computes, padding included: one program
_NO_TIME = "no time left"
_WARM_SECONDS, _SAMPLE_SECONDS = 0.3, 0.02
# The bound is for the worst case; actual rounding errors are far smaller. This limit, relative to the root of the sum
# of squares of the product, also detects a kernel that is wrong by a few parts in ten thousand. It is only
# for the GPU kernel, because the TPU rounds weights.
_RELATIVE = 1e-5


class Skip(Exception):
    """Raised by a step that this machine cannot run; the message gives the reason."""


class Step(NamedTuple):
    """One measurement.

    Attributes:
        section: "bandwidth", "kernels", "model", or the name of a shape.
        name: unique within its section.
        needs: seconds that it may take; with less time left it is skipped.
        work: returns figures by name; "wrong" is true if a number is out of bounds.
    """

    section: str
    name: str
    needs: float
    work: Callable[[], dict[str, Any]]


# ---- Timing ---------------------------------------------------------------------------------------------------------


def timed(function: Callable[..., Any], *args: Any, repeats: int = 10) -> tuple[float, float]:
    """Returns the median seconds of a call, and the seconds of compiling.

    An accelerator is first kept busy for a while, because its clock slows down while the host compiles. A sample is as
    many calls as take 20 ms, so that the start of a call does not matter.
    """
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(program(*args))
    calls, busy = 1, 0.0
    start = time.perf_counter()
    while jax.default_backend() != "cpu" and busy < _WARM_SECONDS:
        jax.block_until_ready(program(*args))
        calls, busy = calls + 1, time.perf_counter() - start
    calls = max(1, math.ceil(calls * _SAMPLE_SECONDS / busy)) if busy else 1
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([program(*args) for _ in range(calls)][-1])
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds), compiling


def bandwidth(size: int, repeats: int) -> dict[str, Any]:
    """Measures the bandwidth of a copy that changes every number (read and written), and of reading."""
    seconds, compiling = timed(lambda x: x + jnp.int32(1), jnp.zeros(size // 4, jnp.int32), repeats=repeats)
    reading = memory_bandwidth(size, repeats)
    return {
        "gigabytes_per_second": 2 * size / seconds / 1e9,
        "read_gigabytes_per_second": reading / 1e9,
        "seconds": seconds,
        "compile_seconds": compiling,
    }


def on_device(tree: Any) -> Any:
    """Puts a tree on the default device without committing it, like a model of random weights.

    A program compiled for committed int4 arrays may refuse them: JAX reports, at least on a CPU, that their layout is
    not the one that the program expects.
    """
    return jax.device_put(jax.tree.map(np.asarray, tree))


# ---- Kernels --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A product with packed weights. `axis` -1 is a table [M, K] like a head; `planes` may be "zero" and "offset"."""

    scheme: str
    group_size: int
    K: int
    M: int
    axis: int = -2
    planes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The case as text for people."""
        return " ".join((f"{self.scheme}-g{self.group_size}", *self.planes, f"{self.K}x{self.M}", *self._table()))

    def _table(self) -> tuple[str, ...]:
        return ("table",) if self.axis == -1 else ()


class Weights(NamedTuple):
    """The weight of a case, and its exact values on the host in float64.

    Attributes:
        stack: QTensor of two layers; the second one is multiplied.
        exact_KM: its values, computed from codes that were never packed.
        largest_CM: the largest magnitude in each group that its scale, zero point and offset allow.
    """

    stack: quant.QTensor
    exact_KM: np.ndarray
    largest_CM: np.ndarray


@functools.lru_cache(maxsize=1)
def weights(case: Case) -> Weights:
    """Draws random codes, scales, zero points and offsets, in the dtypes that recipes store."""
    rng, scheme = np.random.default_rng(0), quant.SCHEMES[case.scheme]
    shape = (2, case.K, case.M) if case.axis == -2 else (2, case.M, case.K)
    groups = list(shape)
    groups[case.axis] //= case.group_size
    codes = rng.integers(0, 2**scheme.bits, shape, np.uint8)
    parts = {"scale": rng.uniform(0.01, 0.1, groups).astype(np.float16)}
    if "zero" in case.planes:
        parts["zero"] = rng.integers(0, 2**scheme.bits, groups, np.uint8)
    if "offset" in case.planes:
        parts["offset"] = rng.uniform(-0.5, 0.5, groups).astype(np.float16)
    with jax.default_device(jax.devices("cpu")[0]):
        planes = {name: jnp.asarray(plane) for name, plane in parts.items()}
        stack = quant.QTensor.from_codes(jnp.asarray(codes), planes.pop("scale"), scheme, axis=case.axis, **planes)

    def columns(array: np.ndarray) -> np.ndarray:
        layer = array[1].astype(np.float64)
        return layer if case.axis == -2 else layer.T

    scale, zero, offset = (columns(parts[name]) if name in parts else 0.0 for name in ("scale", "zero", "offset"))
    value_KM = columns(codes) - (2 ** (scheme.bits - 1) if scheme.kind == "int" else 0)
    by_group = lambda plane: np.repeat(plane, case.group_size, 0) if np.ndim(plane) else plane  # noqa: E731
    exact_KM = (value_KM - by_group(zero)) * by_group(scale) + by_group(offset)
    most = 2 ** (scheme.bits - 1) if scheme.kind == "int" else 2**scheme.bits - 1
    largest_CM = np.maximum(np.maximum(most, zero) * scale, np.abs(offset))
    return Weights(on_device(stack), exact_KM, largest_CM)


def bound(module: Any, made: Weights, x_RK: np.ndarray, dtype: str, by_kernel: bool) -> np.ndarray:
    """Returns the error that the docstring of the lowering's `matmul` allows, [R, M]."""
    K = x_RK.shape[1]
    if module is gpu and by_kernel:
        x_RC = np.abs(x_RK).reshape(len(x_RK), len(made.largest_CM), -1).sum(-1)
        return (K + 16) * 2.0**-23 * (x_RC @ made.largest_CM)
    if module is gpu:
        relative = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 0.0}[dtype] + K * 2.0**-23
    else:
        relative = (2.0**-8 if dtype == "bfloat16" else 0.0) + (K + 4) * 2.0**-24
    return relative * (np.abs(x_RK) @ np.abs(made.exact_KM))


def product(module: Any, case: Case, rows: int, dtype: str, interpret: bool) -> dict[str, Any]:
    """Measures the error of one product and, on the device in bfloat16, its time beside others."""
    made = weights(case)
    laid_out = jax.jit(module.layout)(made.stack)
    layer = laid_out.at_layer(jnp.int32(1))
    by_kernel = gpu.uses_kernel(layer, rows) if module is gpu else tpu.uses_kernel(layer, rows, dtype)
    x_RK = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, case.K)), dtype)
    multiply = functools.partial(module.matmul, interpret=interpret)
    y_RM = np.asarray(jax.jit(multiply)(x_RK, layer), np.float64)
    x = np.asarray(x_RK, np.float64)
    exact_RM = x @ made.exact_KM
    error = np.abs(y_RM - exact_RM)
    relative = float(np.linalg.norm(error) / np.linalg.norm(exact_RM))
    of_bound = float(np.max(error / bound(module, made, x, dtype, by_kernel)))
    figures = {
        "kernel": "triton" if module is gpu else "mosaic",
        "lowering": "kernel" if by_kernel else "XLA",
        **case._asdict(),
        "rows": rows,
        "dtype": dtype,
        "interpreted": interpret,
        "error": float(np.max(error)),
        "of_bound": of_bound,
        "relative_error": relative,
        "wrong": not (of_bound <= 1 and (relative <= _RELATIVE or not (module is gpu and by_kernel))),  # NaN too
    }
    if not interpret and dtype == "bfloat16":
        figures |= product_times(multiply, laid_out, x_RK)
    return figures


def product_times(multiply: Callable[..., jax.Array], laid_out: Any, x_RK: jax.Array) -> dict[str, Any]:
    """Times a product, as the mean over a stack: ours, XLA's with packed weights, and XLA's with bfloat16 weights."""
    size = laid_out.nbytes // 2
    copies = -(-_STACK_BYTES // (2 * size))
    stack = jax.tree.map(lambda plane: jnp.concatenate([plane] * copies), laid_out)
    K, M = laid_out.shape[-2:] if laid_out.axis == -2 else laid_out.shape[:-3:-1]
    matrices = [jnp.full((K, M), 0.02, jnp.bfloat16) for _ in range(2 * copies)]

    def plain(x_RK: jax.Array, layer: Any) -> jax.Array:
        if isinstance(layer, tpu.TpuWeight):
            return tpu.matmul(x_RK, dataclasses.replace(layer, kernel=False))
        weight_KM = quant.dequantize(layer.sliced().columns, x_RK.dtype)
        return jnp.dot(x_RK, weight_KM, preferred_element_type=jnp.float32)

    def walk(one: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        zeros = jnp.zeros((len(x_RK), M), jnp.float32)
        return lambda x_RK, stack: jax.lax.fori_loop(
            0, 2 * copies, lambda layer, sum_RM: sum_RM + one(x_RK, stack.at_layer(layer)), zeros
        )

    def unpacked(x_RK: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        return sum(jnp.dot(x_RK, weight_KM, preferred_element_type=jnp.float32) for weight_KM in matrices)

    ours, compiling = timed(walk(multiply), x_RK, stack)
    dequantized, _ = timed(walk(plain), x_RK, stack)
    bfloat16, _ = timed(unpacked, x_RK, matrices)
    return {
        "seconds": ours / (2 * copies),
        "compile_seconds": compiling,
        "gigabytes_per_second": size * 2 * copies / ours / 1e9,
        "faster_than_plain": dequantized / ours,
        "faster_than_bfloat16": bfloat16 / ours,
    }


def kernel_steps(backend: str) -> Iterator[Step]:
    """Yields the steps for the backend's kernel; on a CPU small steps for both kernels."""
    small = backend == "cpu"
    for module, name in ((gpu, "gpu"), (tpu, "tpu")):
        if not small and backend != name:
            continue
        label = "triton" if module is gpu else "mosaic"
        for case, rows, dtype in small_cases(module) if small else device_cases(module):
            work = functools.partial(product, module, case, rows, dtype, small)
            yield Step("kernels", f"{label} {case.label}, {rows} x {dtype}", 0 if small else 10, work)


def small_cases(module: Any) -> list[tuple[Case, int, str]]:
    """Returns one small case of each kind, with rows and dtype."""
    cases = [
        (Case("int4", 32, 256, 128), 1, "bfloat16"),
        (Case("int4", 32, 256, 128, axis=-1), 16, "bfloat16"),
        (Case("uint4", 128, 256, 128, planes=("zero",)), 8, "bfloat16"),
        (Case("int8", 128, 256, 128), 65, "bfloat16"),
    ]
    if module is gpu:
        cases.append((Case("uint4", 32, 256, 128, planes=("zero", "offset")), 3, "float32"))
    return cases


def device_cases(module: Any) -> list[tuple[Case, int, str]]:
    """Returns cases with shapes of the 8B model and a head; the largest parts of decoding come first."""
    square, up, down = (Case("int4", 32, K, M) for K, M in ((4096, 4096), (4096, 14336), (14336, 4096)))
    cases = [(square, rows, "bfloat16") for rows in (1, 8, 16, 64)]
    cases += [(square, 8, "float32"), (square, 8, "float16")]
    cases += [(case, rows, "bfloat16") for case in (up, down) for rows in (1, 8)]
    cases += [(Case("int4", 32, 2048, 32000, axis=-1), 1, "bfloat16")]
    cases += [(Case("int4", 128, 4096, 4096), rows, "bfloat16") for rows in (1, 8)]
    cases += [(Case("uint4", 128, 4096, 4096, planes=("zero",)), 8, "bfloat16")]
    cases += [(Case("int8", 128, 4096, 4096), rows, "bfloat16") for rows in (1, 8)]
    if module is gpu:
        cases += [(Case("uint4", 32, 4096, 4096, planes=("zero", "offset")), 8, "bfloat16")]
        cases += [(Case("int2", 64, 4096, 4096), 1, "bfloat16")]
    return cases


# ---- The whole model ------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """The compared model: quantized, on the CPU, once for each dtype of activations."""

    name: str
    tokenizer: Any
    prompt: Any
    models: dict[str, Any]


@functools.lru_cache(maxsize=1)
def reference() -> Reference:
    """Loads the box in int4-g32, or makes random weights of its shape if safetensors or sentencepiece is missing."""
    missing = [name for name in ("safetensors", "sentencepiece") if not available(name)]
    if missing:
        name = f"random weights of the box's shape ({' and '.join(missing)} not installed)"
        tokenizer, prompt = None, list(range(1, 9))
        config = config_from_hf(read_json(_ROOT / "llamajax" / "box" / "config.json"))
        model = random_model(config, _RECIPE)
    else:
        loaded, tokenizer = llamajax.load("box", dtype=jnp.float32)
        name, prompt, model = "box", _PROMPT, quantize(loaded, _RECIPE)
    cpu = jax.devices("cpu")[0]
    models = {dtype: jax.device_put(in_dtype(model, dtype), cpu) for dtype in ("float32", "bfloat16")}
    return Reference(name, tokenizer, prompt, models)


def available(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # the module is hidden
        return False


def in_dtype(model: Any, dtype: str) -> Any:
    """Returns the model with the same codes and every other array in `dtype`."""
    is_packed = lambda node: isinstance(node, quant.QTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_packed(leaf) else leaf.astype(dtype), model, is_leaf=is_packed)


@functools.lru_cache(maxsize=2)
def prepared(dtype: str) -> Any:
    """Returns the reference model on the device, in its layout."""
    return llamajax.prepare(on_device(reference().models[dtype]))


def drawn(length: int) -> np.ndarray:
    """Returns random token ids [T]; a shorter sequence is the beginning of a longer one."""
    config = reference().models["float32"].config
    return np.random.default_rng(0).integers(1, config.vocab_size, _LENGTH).astype(np.int32)[:length]


def cpu_logits(dtype: str, token_T: np.ndarray) -> np.ndarray:
    """Returns logits [T, V] computed on the CPU; padding after a token does not change its logits."""
    padded = np.pad(token_T, (0, _LENGTH - len(token_T)))
    return logits(reference().models[dtype], padded)[: len(token_T)]


def logits(model: Any, token_T: np.ndarray) -> np.ndarray:
    """Returns logits [T, V] computed on the device of the model."""
    return np.asarray(_forward(model, jax.device_put(token_T[None], jax.tree.leaves(model)[0].sharding)))[0]


@jax.jit
def _forward(model: Any, token_BT: jax.Array) -> jax.Array:
    return model(token_BT)[0]


@functools.lru_cache(maxsize=2)
def tolerance(dtype: str) -> float:
    """Returns how much logits on a device may differ from those of the CPU in float32."""
    expected_TV = cpu_logits("float32", drawn(_LENGTH))
    if dtype == "float32":
        return 1e-4 * float(np.abs(expected_TV).max())
    return 3 * float(np.abs(cpu_logits(dtype, drawn(_LENGTH)) - expected_TV).max())


def compare_logits(dtype: str, length: int) -> dict[str, Any]:
    """Compares the logits of a sequence of `length` tokens, which are the rows of its products."""
    expected_TV = cpu_logits("float32", drawn(length))
    error = float(np.abs(logits(prepared(dtype), drawn(length)) - expected_TV).max())
    of_bound = error / tolerance(dtype)
    figures = {"model": reference().name, "dtype": dtype, "tokens": length, "error": error, "of_bound": of_bound}
    return figures | {"largest_logit": float(np.abs(expected_TV).max()), "wrong": not of_bound <= 1}


def compare_text(dtype: str, tokens: int) -> dict[str, Any]:
    """Compares the device's greedy text with the CPU's choice after each of its beginnings.

    If these are the same at each token, the CPU's greedy text is the same.
    """
    name, tokenizer, prompt, _ = reference()
    made = llamajax.generate(prepared(dtype), tokenizer, prompt, max_new_tokens=tokens, temperature=0)
    ids = tokenizer.encode(prompt) if tokenizer else prompt
    logits_TV = cpu_logits("float32", np.asarray([*ids, *made.tokens], np.int32)[:-1])[len(ids) - 1 :]
    short_T = logits_TV.max(-1) - logits_TV[np.arange(len(made.tokens)), made.tokens]
    of_bound = float(short_T.max()) / (2 * tolerance(dtype))
    equal = int(np.argmax([*(short_T > 0), True]))  # tokens before the first difference
    return {
        "model": name,
        "dtype": dtype,
        "tokens": len(made.tokens),
        "tokens_equal": equal,
        "equal": equal == len(made.tokens),
        "text": made.text,
        "token_ids": made.tokens,
        "error": float(short_T.max()),
        "of_bound": of_bound,
        "wrong": not of_bound <= 1,
        "note": "" if equal == len(made.tokens) else f"the CPU chooses otherwise at token {equal + 1}",
    }


def model_steps(small: bool) -> Iterator[Step]:
    """Yields float32 steps first, which are exact enough to find errors, then bfloat16, which the TPU kernel needs."""
    for dtype in ("float32", "bfloat16"):
        for length in (8,) if small else (8, 64):
            work = functools.partial(compare_logits, dtype, length)
            yield Step("model", f"logits of {length} tokens, {dtype}", 0 if small else 15, work)
        if not small or dtype == "float32":
            work = functools.partial(compare_text, dtype, 12 if small else DECODE_BLOCK)
            yield Step("model", f"greedy text, {dtype}", 0 if small else 20, work)


# ---- Speed of shapes ------------------------------------------------------------------------------------------------


class Models:
    """Holds the current model, one at a time: the last one is freed before the next is made."""

    def __init__(self, dtype: str):
        """Holds no model yet; activations get `dtype`."""
        self._dtype, self._key, self._model = dtype, None, None

    def get(self, config: llamajax.Config, kind: str) -> Any:
        """Returns a model with random weights of that shape, in the recipe or in floats, ready to run."""
        if self._key != (config, kind):
            self._key = self._model = None
            llamajax.clear_programs()
            if kind == _RECIPE:
                self._model = llamajax.prepare(random_model(config, kind, dtype=self._dtype), donate=True)
            else:
                self._model = random_floats(config, kind)
            self._key = config, kind
        return self._model


def random_floats(config: llamajax.Config, dtype: str) -> Any:
    """Draws random weights on the device, layer by layer: on the host, eight billion take longer than the rest."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 3:
            return jax.lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))
        return jnp.asarray(0.02, dtype) * jax.random.normal(key, shape, dtype)

    def one(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, dtype)
        return draw(jax.random.key(sum(name.encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, abstract_model(config, dtype))


def check_memory(config: llamajax.Config, kind: str, batch: int) -> None:
    """Raises Skip if the device reports less memory than the weights, a cache and a margin take."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    weight_bytes = config.num_parameters * (4.5 / 8 if kind == _RECIPE else 2)
    slots = -(-(_CONTEXT + DECODE_BLOCK) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    cache_bytes = batch * slots * config.num_layers * 2 * config.num_kv_heads * config.head_size * 2
    needed = 1.1 * weight_bytes + 2 * cache_bytes
    if limit is not None and needed > limit:
        raise Skip(f"needs {needed / 1e9:.1f} GB of memory, the device gives {limit / 1e9:.1f}")


def speed(models: Models, shape: str, config: llamajax.Config, kind: str, phase: str, batch: int) -> dict[str, Any]:
    """Measures decode or prefill by `llamajax.evaluation.speed`."""
    check_memory(config, kind, batch)
    model = models.get(config, kind)
    if phase == "decode":
        measured = measure_decode(model, _CONTEXT, batch=batch)
    else:
        measured = measure_prefill(model, _PREFILL, batch=batch)
    return {
        "shape": shape,
        "weights": kind,
        "phase": phase,
        "rows": batch,
        "length": measured.length,
        "seconds": measured.seconds,
        "compile_seconds": measured.compile_seconds,
        "bytes_read": measured.bytes_read,
        "operations": measured.operations,
        "tokens_per_second": measured.tokens_per_second,
        "gigabytes_per_second": measured.gigabytes_per_second,
        "gigaflops_per_second": measured.gigaflops_per_second,
    }


def speed_steps(small: bool) -> Iterator[Step]:
    """Yields all steps of one model before the next, because making a model takes a while."""
    shapes = {"small": _SMALL} if small else {name: llamajax.preset(name) for name in ("tinyllama-1.1b", "llama3-8b")}
    models = Models("bfloat16")
    for shape, config in shapes.items():
        for kind in (_RECIPE, "bfloat16"):
            for phase in ("decode", "prefill"):
                for batch in (2,) if small else (1, 8, 64):
                    work = functools.partial(speed, models, shape, config, kind, phase, batch)
                    needs = 0 if small else 15 if config.num_parameters < 2e9 else 30
                    rows = f"{batch} row{'' if batch == 1 else 's'}"
                    yield Step(shape, f"{kind}, {phase}, {rows}", needs, work)


# ---- The run --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the figures depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version()} | packages


def device() -> dict[str, Any]:
    """Describes the first device, which is measured."""
    first = jax.devices()[0]
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "platform_version": first.client.platform_version,
        "driver": driver.splitlines()[0] if driver else None,
    }


def commit() -> dict[str, Any]:
    """Returns the commit of this checkout and whether files differ from it; None if this is no checkout."""
    top = said("git", "-C", str(_ROOT), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != _ROOT:
        return {"hash": None, "dirty": None}
    dirty = said("git", "-C", str(_ROOT), "status", "--porcelain")
    return {"hash": said("git", "-C", str(_ROOT), "rev-parse", "HEAD"), "dirty": None if dirty is None else bool(dirty)}


def said(*command: str) -> str | None:
    """Returns what a program prints, or None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclasses.dataclass
class Run:
    """The steps of a run and the results so far.

    Attributes:
        steps: all steps, in order.
        seconds: the time that the whole run may take.
        file: the JSON file, or None.
        head: device, versions, commit.
        results: one for each step that was begun or skipped: section, name, status, note, elapsed, figures.
        start: the start time on the clock of `time.monotonic`.
    """

    steps: list[Step]
    seconds: float
    file: Path | None
    head: dict[str, Any]
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    start: float = dataclasses.field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self.start

    def do(self, step: Step) -> None:
        """Runs one step; any error is kept in its result."""
        result = {"section": step.section, "name": step.name, "status": "failed", "note": "still running at the end"}
        self.results.append(result)
        start = time.monotonic()
        if self.elapsed() + step.needs > self.seconds:
            result |= {"status": "skipped", "note": _NO_TIME}
        else:
            try:
                result |= outcome(step.work())
            except Skip as reason:
                result |= {"status": "skipped", "note": str(reason)}
            except Exception as error:  # compilers and drivers raise many kinds
                line = next(iter(str(error).splitlines()), "")[:300]
                out_of_memory = "RESOURCE_EXHAUSTED" in line
                result |= {
                    "status": "skipped" if out_of_memory else "failed",
                    "note": "out of memory" if out_of_memory else f"{type(error).__name__}: {line}",
                }
        result["elapsed"] = time.monotonic() - start
        self.compare()
        self.save()
        print(
            f"{self.elapsed():6.1f} s  {step.section}: {step.name}: {result['status']} {result['note']}",
            file=sys.stderr,
        )

    def compare(self) -> None:
        """Adds the ratios of figures to the copy's bandwidth and to bfloat16 of the same shape."""
        copy = next((each.get("gigabytes_per_second") for each in self.results if each["section"] == "bandwidth"), None)
        plain = {speed_key(each): each for each in self.results if each.get("weights") == "bfloat16"}
        for each in self.results:
            if copy and "gigabytes_per_second" in each:
                each["of_copy_bandwidth"] = each["gigabytes_per_second"] / copy
            other = plain.get(speed_key(each))
            if each.get("weights") == _RECIPE and other:
                each["faster_than_bfloat16"] = other["seconds"] / each["seconds"]

    def report(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return {**self.head, "seconds": self.seconds, "elapsed": self.elapsed(), "steps": self.results}

    def save(self) -> None:
        """Writes the whole JSON file."""
        if self.file:
            with new_file(self.file) as partial:
                partial.write_text(json.dumps(self.report(), indent=1) + "\n", encoding="utf-8")

    def finish(self) -> int:
        """Prints the table; returns the exit code."""
        self.save()
        print(table(self.head, self.results), flush=True)
        return int(any(each["status"] in ("wrong", "failed") for each in self.results))

    def give_up(self) -> None:
        """Ends the process during a step that does not end, because a compiler cannot be interrupted."""
        os._exit(self.finish())


def outcome(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns figures with their status. Figures that are not finite become None, as JSON lacks them, and are noted."""
    broken = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    wrong = figures.pop("wrong", False) or bool(broken)
    note = {"note": f"not finite: {', '.join(broken)}"} if broken else {}
    return {"status": "wrong" if wrong else "ok", "note": ""} | figures | dict.fromkeys(broken) | note


def speed_key(result: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the key under which results of two kinds of weights are compared."""
    return tuple(result.get(name) for name in ("shape", "phase", "rows"))


def table(head: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Returns a table with one line per step under the name of its section."""
    columns = (
        ("status", lambda each: each["status"]),
        ("error/bound", lambda each: shown(each, "of_bound", ".2g")),
        ("ms", lambda each: shown(each, "seconds", ".3f", 1e3)),
        ("tokens/s", lambda each: shown(each, "tokens_per_second", ".1f")),
        ("GB/s", lambda each: shown(each, "gigabytes_per_second", ".1f")),
        ("of copy", lambda each: shown(each, "of_copy_bandwidth", ".0%")),
        ("x plain", lambda each: shown(each, "faster_than_plain", ".2f")),
        ("x bfloat16", lambda each: shown(each, "faster_than_bfloat16", ".2f")),
        ("compile s", lambda each: shown(each, "compile_seconds", ".1f")),
    )
    rows = [["", *(name for name, _ in columns), ""]]
    for number, each in enumerate(results):
        if number == 0 or results[number - 1]["section"] != each["section"]:
            rows.append([each["section"]])
        rows.append([f"  {each['name']}", *(text(each) for _, text in columns), each["note"]])
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(len(columns) + 1)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append("  ".join([*cells, *row[len(columns) + 1 :]]).rstrip())
    of = head["device"]
    names = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    revision = f"{head['commit']['hash']}{' with changes' if head['commit']['dirty'] else ''}"
    return "\n".join([f"{of['platform']}: {of['kind']}, driver {of['driver']}; {names}", f"commit {revision}", *lines])


def shown(result: dict[str, Any], name: str, form: str, factor: float = 1) -> str:
    """Formats a figure; empty if there is none."""
    value = result.get(name)
    return "" if value is None else format(value * factor, form)


def main(argv: list[str]) -> int:
    """Runs all steps and prints the table; `argv` has no program name. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="seconds for the whole run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all results, rewritten after each step")
    parser.add_argument(
        "--only", default="", help="regular expression searched in 'section: name': run only these steps; default: all"
    )
    parser.add_argument("--small", action="store_true", help="small shapes and interpreted kernels, as on a CPU")
    options = parser.parse_args(argv)
    backend = "cpu" if options.small else jax.default_backend()
    small = backend == "cpu"
    size, repeats = (1 << 24, 3) if small else (1 << 32, 10)
    steps = [
        Step("bandwidth", "copy", 0, functools.partial(bandwidth, size, repeats)),
        *kernel_steps(backend),
        *model_steps(small),
        *speed_steps(small),
    ]
    steps = [step for step in steps if re.search(options.only, f"{step.section}: {step.name}")]
    head = {"device": device(), "versions": versions(), "commit": commit(), "small": small}
    run = Run(steps, options.seconds, options.json, head)
    watchdog = threading.Timer(max(options.seconds, 1), run.give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        run.save()
        for step in run.steps:
            run.do(step)
    finally:
        watchdog.cancel()
    return run.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
