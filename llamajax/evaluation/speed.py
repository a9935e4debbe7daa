"""Measures how fast a model runs and the limits of the machine, in one process; speeds are medians.

    model = prepare(random_model(preset("tinyllama-1.1b")), donate=True)
    print(measure_decode(model, context=128).tokens_per_second)

The programs are those that `generate` runs. Speed does not depend on the values of weights, and the context length is
given, so a model of a preset's shape with random weights is sufficient. Making one takes no more memory than the model.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint.assemble import Stacks
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.generation.compilation import Compilations
from llamajax.generation.engine import Engine
from llamajax.generation.programs import DECODE_BLOCK, EngineState
from llamajax.model import Llama
from llamajax.parameters import Place, Spec, product_weights, specs, step_bytes
from llamajax.quantization.foreseen import FLOATS, quantized_shape, rules_of
from llamajax.threads import thread_count
from quant import QTensor, Rule

_DEVIATION = 0.02  # standard deviation of random weights, as at the start of training


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Time, work and memory of one kind of work.

    Attributes:
        phase: "prefill" or "decode".
        batch: number of rows.
        length: tokens in the prompt, or in the cache before a decode step.
        tokens: tokens of all rows that were prefilled or generated in `seconds`.
        seconds: duration of the whole prefill, or of one decode step: the median of the repeats, without compilation.
        bytes_read: bytes that the work must read: the weights once per forward pass, and the cache of the context.
        operations: floating point operations that the work requires: products with weights, and attention scores and
            mixtures.
        programs: programs compiled for the work, or loaded from the compilation cache of an earlier run.
        compile_seconds: time that compiling or loading these programs took.
        resident_bytes: memory of this process afterwards, or None if the system does not report it.
    """

    phase: str
    batch: int
    length: int
    tokens: int
    seconds: float
    bytes_read: int
    operations: int
    programs: int
    compile_seconds: float
    resident_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all rows together."""
        return self.tokens / self.seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read per second, in units of 1e9."""
        return self.bytes_read / self.seconds / 1e9

    @property
    def gigaflops_per_second(self) -> float:
        """Floating point operations per second, in units of 1e9."""
        return self.operations / self.seconds / 1e9

    def limit(self, bandwidth: float, flops: float) -> float:
        """Tokens per second that the machine allows: limited by reading or by products in floats, whichever is slower.

        Args:
            bandwidth: bytes read from memory per second.
            flops: operations of products per second.
        """
        return self.tokens / max(self.bytes_read / bandwidth, self.operations / flops)


# ---- Random weights -------------------------------------------------------------------------------------------------


def random_model(
    config: Config, weights: str | Path = "int4-g32", *, dtype: jax.typing.DTypeLike = jnp.float32, seed: int = 0
) -> Llama:
    """Makes a model of random weights directly in its stored form: memory holds the result and one more weight.

    Codes are random bytes. All scales of a weight are equal, and give values of the usual size, so that nothing
    overflows.

    Args:
        config: the architecture.
        weights: a recipe, as for `quantize`, or one of float32, bfloat16, float16. Only the recipe's schemes matter,
            not its way of choosing codes.
        dtype: dtype of activations and of weights that the recipe keeps; overridden if `weights` is a float type.
        seed: the same seed gives the same weights.

    Raises:
        LlamaJaxError: for a recipe that does not exist, that does not fit, or whose schemes depend on a text.
    """
    if str(weights) in FLOATS:
        dtype = str(weights)
    rules = rules_of(weights, config)
    generator, stacks = np.random.default_rng(seed), Stacks(config, rules.__getitem__)
    for place, spec in specs(config).items():
        one = jax.ShapeDtypeStruct(spec.shape(config), np.dtype(dtype))
        stacks.put(place, _random_weight(place, one, rules[place], spec, generator))
    return stacks.model()


def _random_weight(
    place: Place, weight: jax.ShapeDtypeStruct, rule: Rule, spec: Spec, generator: np.random.Generator
) -> Any:
    """Makes one weight by its rule, in NumPy arrays; norms are ones."""
    shape = weight.shape
    if not spec.is_matrix:
        return np.full(shape, float(spec.init == "ones"), weight.dtype)
    if rule.keep:
        # Uniform numbers take a third of the time of normal ones.
        even = generator.random(shape, np.float32) - np.float32(0.5)
        even *= np.float32(_DEVIATION * math.sqrt(12))
        return even.astype(weight.dtype)
    return _filled(quantized_shape(place, weight, rule, spec), generator, _DEVIATION)


def _filled(abstract: Any, generator: np.random.Generator, deviation: float) -> QTensor:
    """Fills a quantized weight, or a quantized plane of its scales, with random codes and constant scales."""
    scheme = abstract.scheme
    middle = 2 ** (scheme.bits - 1)
    step: Any = deviation / float(jnp.std(scheme.decode(jnp.arange(2**scheme.bits, dtype=jnp.uint8))))
    if scheme.scale_code == "e8m0":
        step = round(math.log2(step)) + 127  # an exponent
    elif scheme.scale_code == "ue4m3":
        step = 8  # the code of 2**-6, the smallest normal number

    def codes(plane: Any) -> np.ndarray:
        drawn = np.frombuffer(generator.bytes(math.prod(plane.shape)), np.uint8).reshape(plane.shape)
        if scheme.kind == "ternary":
            return drawn & ~((drawn >> 1) & drawn & 0x55)  # code 3 does not exist: use 2 instead
        return drawn

    def numbers(plane: Any, value: float) -> Any:
        if plane is None or isinstance(plane, jax.ShapeDtypeStruct):
            return None if plane is None else np.full(plane.shape, value, plane.dtype)
        return _filled(plane, generator, value)

    return dataclasses.replace(
        abstract,
        planes=tuple(codes(plane) for plane in abstract.planes),
        scale=numbers(abstract.scale, step),
        zero=numbers(abstract.zero, middle),
        offset=numbers(abstract.offset, -middle * step),
    )


# ---- What the machine can do ----------------------------------------------------------------------------------------


def memory_bandwidth(size: int = 1 << 29, repeats: int = 8) -> float:
    """Bytes per second that can be read from memory: the fastest of the repeats, because it is a limit.

    On a CPU, as many threads as XLA uses compute the maximum of their parts of an int32 buffer with NumPy. Nothing in
    Python reads faster; it is as fast as a C loop that only reads. On other devices XLA computes the maximum.

    Args:
        size: bytes of the buffer; several times the size of the processor's caches.
        repeats: how often the buffer is read.
    """
    if jax.default_backend() != "cpu":
        buffer = jnp.ones(size // 4, jnp.int32)
        largest = jax.jit(jnp.max)
        return size / min(_times(lambda: jax.block_until_ready(largest(buffer)), repeats))
    threads = thread_count()
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return size / min(_times(lambda: list(pool.map(np.max, parts)), repeats))


def product_rate(config: Config, dtype: jax.typing.DTypeLike = jnp.float32, rows: int = 256, repeats: int = 8) -> float:
    """Operations per second of `jnp.matmul` with a matrix of the model's size: the fastest of the repeats.

    Args:
        config: the model's config. The product is [rows, D] with [D, F].
        dtype: dtype of both factors.
        rows: tokens at once.
        repeats: how often the product is computed.
    """
    x_RD = jnp.full((rows, config.width), 0.5, dtype)
    weight_DF = jnp.full((config.width, config.ffn_width), 0.5, dtype)
    product = jax.jit(jnp.matmul)
    seconds = min(_times(lambda: jax.block_until_ready(product(x_RD, weight_DF)), repeats))
    return 2 * rows * weight_DF.size / seconds


def resident_bytes() -> int | None:
    """Resident memory of this process, mapped files included; None if the system has no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)


def _times(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure_prefill(
    model: Llama,
    length: int,
    *,
    batch: int = 1,
    cache_dtype: jax.typing.DTypeLike | None = None,
    repeats: int = 5,
) -> Measurement:
    """Measures the prefill of prompts of `length` tokens, in the chunks that `generate` cuts them into.

    Args:
        model: the model, prepared or not.
        length: tokens per prompt, from 1 to the model's context length.
        batch: rows, at least 1.
        cache_dtype: one of `cache.CACHE_DTYPES`; the model's dtype unless given.
        repeats: number of measurements, at least 1.

    Raises:
        LlamaJaxError: for a value out of range.
    """
    _check(model.config, {"prefill": length, "batch": batch, "repeats": repeats}, length)
    counted = Compilations()
    engine = Engine(model, batch, length, cache_dtype=cache_dtype, counted=counted)
    state, rows = engine.empty(), range(batch)
    token_BT = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length + 1), np.int32)
    # One token more than is prefilled: the last token of a prompt is the input of the first decode step.
    chunks = engine.plan(state, rows, token_BT.tolist(), [0] * batch)

    def once() -> float:
        nonlocal state
        jax.block_until_ready(state)
        start = time.perf_counter()
        for chunk in chunks:
            state = engine.extend(state, rows, chunk)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    seconds = _median(once, repeats)
    c = model.config
    pairs = length * (length + 1) // 2
    operations = batch * (
        2 * length * product_weights(c, head=False) + 4 * pairs * c.num_layers * c.num_heads * c.head_size
    )
    read = len(chunks) * step_bytes(model, head=False)
    tokens = batch * length
    return _measurement("prefill", batch, length, tokens, seconds, read, operations, counted)


def measure_decode(
    model: Llama,
    context: int,
    *,
    batch: int = 1,
    cache_dtype: jax.typing.DTypeLike | None = None,
    steps: int = 8,
    repeats: int = 5,
) -> Measurement:
    """Measures a step of greedy decoding after a context of `context` tokens in each row.

    Args:
        model: the model, prepared or not.
        context: tokens in the cache, from 1 to the model's context length.
        batch: rows, at least 1.
        cache_dtype: one of `cache.CACHE_DTYPES`; the model's dtype unless given.
        steps: decode steps per repeat, which is one call of the program: 1 to `programs.DECODE_BLOCK`. The context
            grows with each step and is reset for each repeat.
        repeats: number of measurements, at least 1.

    Raises:
        LlamaJaxError: for a value out of range.
    """
    _check(model.config, {"context": context, "batch": batch, "steps": steps, "repeats": repeats}, context)
    if steps > DECODE_BLOCK:
        raise LlamaJaxError(f"steps is {steps}: expected at most {DECODE_BLOCK}, the steps of one call of the program")
    counted = Compilations()
    engine = Engine(model, batch, context + steps, cache_dtype=cache_dtype, counted=counted)
    state = engine.empty()
    context_bytes = state.cache.bytes_of(context)

    def once() -> float:
        nonlocal state
        state = jax.block_until_ready(_at_length(state, context, steps))
        start = time.perf_counter()
        state, made = jax.block_until_ready(engine.step(state, steps))
        seconds = time.perf_counter() - start
        if not np.isfinite(made.log_probability_BM[:, :steps]).all():
            raise LlamaJaxError(
                f"the logits behind {context} tokens are not finite: the weights hold NaN or infinity, or values "
                f"overflow {model.dtype}: expected a model with finite logits"
            )
        return seconds / steps

    seconds = _median(once, repeats)
    c = model.config
    products = product_weights(c)
    scores = 4 * (context + 1) * c.num_layers * c.num_heads * c.head_size
    read = step_bytes(model) + context_bytes
    operations = batch * (2 * products + scores)
    return _measurement("decode", batch, context, batch, seconds, read, operations, counted)


def _at_length(state: EngineState, context: int, steps: int) -> EngineState:
    """The state with `context` tokens in its cache (of any content), for `steps` greedy steps in each row."""
    length_B = jnp.full(state.rows, context, jnp.int32)
    asked = dataclasses.replace(
        state.asked,
        left_B=jnp.full(state.rows, steps, jnp.int32),
        sampler=dataclasses.replace(state.asked.sampler, temperature=jnp.zeros(state.rows, jnp.float32)),
    )
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, length_B=length_B), asked=asked)


def _median(once: Callable[[], float], repeats: int) -> float:
    """Median seconds of the repeats, after a first call that compiles."""
    once()
    return statistics.median(once() for _ in range(repeats))


def _measurement(
    phase: str, batch: int, length: int, tokens: int, seconds: float, read: int, operations: int, counted: Compilations
) -> Measurement:
    """Makes a `Measurement`, with the counts of compilations and the memory in use now."""
    programs, compile_seconds = counted.compilations + counted.loads, counted.compile_seconds
    return Measurement(
        phase, batch, length, tokens, seconds, read, operations, programs, compile_seconds, resident_bytes()
    )


def _check(config: Config, numbers: Mapping[str, int], length: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise LlamaJaxError(f"{name} is {number}: expected at least 1")
    if length > config.context_length:
        raise LlamaJaxError(f"{length} tokens: expected at most {config.context_length}, the model's context length")
