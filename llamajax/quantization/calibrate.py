"""Collects statistics of the inputs of a layer's weights on a calibration text, one layer at a time.

Activations stay on the host, [W, T, D] for W windows of T tokens. Device memory holds the weights and the statistics of
one layer. Dimension key as in `config.py`; `K` is the contraction axis of any weight.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.layer import Layer
from llamajax.model import NO_CACHE, Llama, model_from
from llamajax.parameters import KINDS, Place, Spec, block_weights, kind_of_layer, leaves, specs
from quant import Probe, Rule, add_to_hessian, quantize_rtn, search_scale, smoothing_scale, values

# Number of tokens on which the search for input scales measures its error.
_SAMPLES = 1024
_BATCH_TOKENS = 4096

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Statistics(NamedTuple):
    """Statistics of one input x over all tokens of the calibration text.

    Attributes:
        mean_square_K: float32, mean square of each channel.
        mean_abs_K: float32, mean magnitude of each channel.
        max_abs_K: float32, largest magnitude of each channel.
        hessian_KK: float32, mean of x x', or None if it was not requested.
        sample_TK: float32, inputs of about 1,000 tokens.
        missing: None, or float32 [K, K] or [K, D]: mean of x e', where e is the float layer's input minus x, or the
            float layer's output minus this layer's.
    """

    mean_square_K: jax.Array
    mean_abs_K: jax.Array
    max_abs_K: jax.Array
    hessian_KK: jax.Array | None
    sample_TK: jax.Array
    missing: jax.Array | None = None


def calibration_windows(tokens: np.ndarray, config: Config, window: int, bos_id: int | None = None) -> np.ndarray:
    """Splits a text into windows that do not overlap, int32 [W, T]; tokens that do not fill a last window are dropped.

    With `bos_id`, every window begins with BOS: either with that of a document, where what is left of the document
    before it is shorter than a window and is dropped, or in place of a token, as in llama.cpp's tools/imatrix.

    Args:
        tokens: ids [n] of a text; or windows [W, T], which are returned as they are.
        config: the architecture.
        window: T, for ids.
        bos_id: the id of BOS; None if texts of the model begin without it.

    Raises:
        LlamaJaxError: if the text is shorter than one window, holds ids that the model does not have, or has another
            shape.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim not in (1, 2):
        raise LlamaJaxError(f"calibration of shape {tokens.shape}: expected ids [n], or windows of ids [W, T]")
    if tokens.ndim == 2:
        tokens, window, bos_id = tokens.reshape(-1), tokens.shape[-1], None
    if window < 1 or window > config.context_length:
        raise LlamaJaxError(f"a calibration window of {window} tokens: expected 1 to {config.context_length}")
    if len(tokens) < window:
        raise LlamaJaxError(f"the calibration text has {len(tokens)} tokens: expected at least {window}, one window")
    begins = np.flatnonzero(tokens == bos_id) if bos_id is not None else np.empty(0, int)
    firsts = [0]
    while (first := firsts[-1] + window) + window <= len(tokens):
        later = begins[np.searchsorted(begins, first) :][:1]
        firsts.append(int(later[0]) if later.size and later[0] < first + window else first)
    windows_WT = np.stack([tokens[first : first + window] for first in firsts if first + window <= len(tokens)])
    if bos_id is not None:
        windows_WT[:, 0] = bos_id
    if windows_WT.min() < 0 or windows_WT.max() >= config.vocab_size:
        raise LlamaJaxError(f"the calibration text holds an id outside of the model's {config.vocab_size} ids")
    return windows_WT


def block_of(weights: Mapping[str, Any], config: Config, layer: int) -> Any:
    """Builds one layer, a pytree like the model, from its weights by the names of their specs."""
    structure, names = _block_tree(config, kind_of_layer(config, layer))
    return jax.tree.unflatten(structure, [weights[name] for name in names])


@functools.lru_cache(maxsize=8)
def _block_tree(config: Config, kind: str) -> tuple[Any, tuple[str, ...]]:
    """Returns the tree structure of a layer, and the names of its weights in the order of its leaves."""
    block = jax.eval_shape(lambda: KINDS[kind].block(config, key=jax.random.key(0), dtype=jnp.float32))
    return jax.tree.structure(block), tuple(block_weights(block))


def advance(block: Any, x_WTD: np.ndarray, numbers: Mapping[str, float]) -> np.ndarray:
    """Replaces the activations before a layer by those behind it, in place."""
    for rows in _batches(x_WTD):
        x_WTD[rows] = run_block(block, jnp.asarray(x_WTD[rows]), dict(numbers))
    return x_WTD


def forward(block: Any, x_BTD: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
    """Applies a layer to whole sequences, without a KV cache; `numbers` are the layer's `Config.numbers`."""
    where = NO_CACHE.begin(x_BTD.shape[1])
    return block(x_BTD, where, NO_CACHE, Layer(0, numbers=numbers))[0]


run_block = jax.jit(forward)


def embedded(outside: Mapping[str, Any], windows_WT: np.ndarray, config: Config) -> np.ndarray:
    """Returns the input of the first layer, float32; `outside` holds the weights outside of layers by name."""
    return np.array(jax.jit(Llama.embed)(outside_model(outside, config), windows_WT).astype(jnp.float32))


def outside_model(outside: Mapping[str, Any], config: Config) -> Llama:
    """Builds a model that has only weights outside of layers: enough for `embed`, the final norm or `head`."""
    return model_from(dict.fromkeys(leaves(config)) | dict(outside), config)


def float_block(read: Callable[[Place], Any], layer: int, config: Config) -> Any:
    """Reads one layer of the float model."""
    return block_of({place.name: values(read(place)) for place in specs(config) if place.layer == layer}, config, layer)


def behind_layers(
    read: Callable[[Place], Any],
    x_WTD: np.ndarray,
    config: Config,
    on_layer: Callable[[int, np.ndarray], None] = lambda layer, x_WTD: None,
) -> np.ndarray:
    """Applies all layers of the float model to the residual stream, in place; `on_layer` sees what is behind each."""
    for layer in range(config.num_layers):
        x_WTD = advance(float_block(read, layer, config), x_WTD, config.numbers(layer))
        on_layer(layer, x_WTD)
    return x_WTD


def observe(
    block: Any,
    x_WTD: np.ndarray,
    groups: Mapping[str, str],
    hessians: bool,
    numbers: Mapping[str, float],
    wanted: "Wanted | None" = None,
) -> dict[str, Statistics]:
    """Collects statistics of some inputs within a layer, computed with the layer's current weights.

    Args:
        block: the layer, with arrays as weights.
        x_WTD: activations before the layer, float32.
        groups: names of inputs (`Spec.input`), each with the name of a weight that has this input.
        hessians: whether to compute Hessians, which are by far the largest part.
        numbers: the layer's `Config.numbers`.
        wanted: the float model's values of the input, or of the layer's output, for `Statistics.missing`.
    """
    batches = list(_batches(x_WTD))
    stride = max(1, x_WTD.shape[0] * x_WTD.shape[1] // _SAMPLES)
    totals, samples = None, []
    for rows in batches:
        target = None if wanted is None else jnp.asarray(wanted.values_WTn[rows])
        totals, sample = _observe(
            block,
            jnp.asarray(x_WTD[rows]),
            totals,
            dict(numbers),
            target,
            tuple(groups.items()),
            hessians,
            stride,
            wanted is not None and wanted.is_output,
        )
        samples.append(sample)
    assert totals is not None  # there is at least one window
    return {
        group: statistics._replace(sample_TK=jnp.concatenate([sample[group] for sample in samples]))
        for group, (_, statistics) in totals.items()
    }


class Wanted(NamedTuple):
    """The float model's activations, to be compared with those of a quantized layer.

    Attributes:
        values_WTn: float32, the observed input [W, T, K], or the layer's output [W, T, D].
        is_output: whether they are the layer's output.
    """

    values_WTn: np.ndarray
    is_output: bool


def inputs_and_output(
    block: Any, x_WTD: np.ndarray, groups: Mapping[str, str], numbers: Mapping[str, float]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the inputs of a layer's weights by input name, [W, T, K], and the layer's output, [W, T, D]."""
    made: dict[str, np.ndarray] = {}
    output_WTD = np.empty_like(x_WTD)
    for rows in _batches(x_WTD):
        seen, output_WTD[rows] = _inputs(block, jnp.asarray(x_WTD[rows]), dict(numbers), tuple(groups.items()))
        for group, part in seen.items():
            made.setdefault(group, np.empty((*x_WTD.shape[:2], part.shape[-1]), np.float32))[rows] = part
    return made, output_WTD


def observe_array(x_WTK: np.ndarray, hessian: bool) -> Statistics:
    """Collects the statistics of given activations, [W, T, K]."""
    total = None
    for rows in _batches(x_WTK):
        total = _add_batch(total, jnp.asarray(x_WTK[rows]), hessian)
    assert total is not None  # there is at least one window
    flat_TK = x_WTK.reshape(-1, x_WTK.shape[-1])
    return total[1]._replace(sample_TK=jnp.asarray(flat_TK[:: max(1, len(flat_TK) // _SAMPLES)]))


@functools.partial(jax.jit, static_argnames="hessian", donate_argnames="total")
def _add_batch(total: Any, x_BTK: jax.Array, hessian: bool) -> tuple[jax.Array, Statistics]:
    return _add(total, x_BTK.reshape(-1, x_BTK.shape[-1]).astype(jnp.float32), hessian)


@functools.partial(jax.jit, static_argnames=("groups", "hessians", "stride", "is_output"), donate_argnames="totals")
def _observe(
    block: Any,
    x_BTD: jax.Array,
    totals: Any,
    numbers: Mapping[str, Any],
    wanted_BTn: jax.Array | None,
    groups: tuple[tuple[str, str], ...],
    hessians: bool,
    stride: int,
    is_output: bool,
) -> tuple[dict[str, tuple[jax.Array, Statistics]], dict[str, jax.Array]]:
    """Adds a batch to the (tokens, statistics) of each input, None for the first batch; also samples each input."""
    seen, output_BTD = _inputs(block, x_BTD, numbers, groups)
    added, samples = {}, {}
    for group, _ in groups:
        x_TK = seen[group].reshape(-1, seen[group].shape[-1])
        samples[group] = x_TK[::stride]
        missing_Tn = None
        if wanted_BTn is not None:
            missing_Tn = (wanted_BTn - (output_BTD if is_output else seen[group])).reshape(len(x_TK), -1)
        added[group] = _add(totals and totals[group], x_TK, hessians, missing_Tn)
    return added, samples


@functools.partial(jax.jit, static_argnames="groups")
def _inputs(
    block: Any, x_BTD: jax.Array, numbers: Mapping[str, Any], groups: tuple[tuple[str, str], ...]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns the inputs within a layer by name, float32, and the layer's output."""
    seen: dict[str, jax.Array] = {}
    first = {weight: group for group, weight in groups}
    probed = [
        Probe(weight, first[name], seen) if name in first else weight for name, weight in block_weights(block).items()
    ]
    output_BTD = forward(jax.tree.unflatten(jax.tree.structure(block), probed), x_BTD, numbers)
    return {group: seen[group].astype(jnp.float32) for group, _ in groups}, output_BTD


def _add(
    total: Any, x_TK: jax.Array, hessian: bool, missing_Tn: jax.Array | None = None
) -> tuple[jax.Array, Statistics]:
    """Adds some tokens to running means and maxima."""
    tokens, width = x_TK.shape
    if total is None:
        zeros_K = jnp.zeros(width, jnp.float32)
        empty = jnp.zeros((0, width), jnp.float32)
        hessian_KK = jnp.zeros((width, width), jnp.float32) if hessian else None
        missing = None if missing_Tn is None else jnp.zeros((width, missing_Tn.shape[-1]), jnp.float32)
        total = jnp.zeros((), jnp.float32), Statistics(zeros_K, zeros_K, zeros_K, hessian_KK, empty, missing)
    count, old = total
    kept = count / (count + tokens)
    mean = lambda before, values_TK: before * kept + values_TK.sum(0) / (count + tokens)  # noqa: E731
    magnitude_TK = jnp.abs(x_TK)
    statistics = Statistics(
        mean(old.mean_square_K, x_TK * x_TK),
        mean(old.mean_abs_K, magnitude_TK),
        jnp.maximum(old.max_abs_K, magnitude_TK.max(0)),
        add_to_hessian(old.hessian_KK, count, x_TK)[0] if hessian else None,
        old.sample_TK,
        None if missing_Tn is None else old.missing * kept + _matmul(x_TK.T / (count + tokens), missing_Tn),
    )
    return count + tokens, statistics


def _batches(x_WTD: np.ndarray) -> Iterable[slice]:
    """Yields slices of windows of up to about 4,096 tokens, all of one length, so that one compiled program serves."""
    count, length = x_WTD.shape[:2]
    most = max(1, _BATCH_TOKENS // length)
    size = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    return (slice(first, first + size) for first in range(0, count, size))


def input_scale(rule: Rule, weights: list[jax.Array], seen: Statistics, config: Config, made: int) -> jax.Array:
    """Returns the factors by which to scale up the input channels of weights [K, M] that share an input: float32 [K].

    Args:
        rule: the weights' rule.
        weights: float32.
        seen: statistics of their input.
        config: the architecture.
        made: number of output channels of the weight that makes the input. The attention's output projection gets its
            input from the value projection, which has fewer: query heads that share a value head share their scales,
            because there is only one value channel to fold them into.
    """

    def shared(x_K: jax.Array) -> jax.Array:
        if x_K.shape[0] == made:
            return x_K
        heads = _by_head(config)
        return jnp.broadcast_to(jnp.max(x_K.reshape(heads), axis=1, keepdims=True), heads).reshape(-1)

    if rule.scaling == "smoothquant":
        return shared(smoothing_scale(seen.max_abs_K, weights))
    rule = rule.for_inputs(len(weights[0]))
    assert rule.scheme is not None  # a rule that quantizes
    rounded: Callable[[jax.Array], Any] = functools.partial(
        quantize_rtn, scheme=rule.scheme, group_size=rule.group_size, scale_dtype="float32", clip=rule.clip
    )
    return search_scale(weights, shared(seen.mean_abs_K), seen.sample_TK, rounded)


def fold(
    weights: dict[str, Any], of: Mapping[str, Spec], group: str, scale_K: jax.Array, config: Config, norm_dtype: Any
) -> None:
    """Scales up the input channels of some weights of a layer, and scales down the weight that makes this input.

    Args:
        weights: the layer's weights by name, float32; changed in place.
        of: their specs.
        group: name of the input.
        scale_K: positive factors.
        config: the architecture.
        norm_dtype: dtype in which norms are stored. The folded norm is rounded to it, and the weights are scaled by the
            ratio of the norm to its rounded, folded form.
    """
    members = [name for name, spec in of.items() if spec.input == group]
    producer = of[members[0]].maker
    if weights[producer].ndim == 1:
        offset = of[producer].offset
        whole_K = weights[producer] + offset
        stored_K = (whole_K / scale_K - offset).astype(norm_dtype).astype(jnp.float32)
        folded_K = stored_K + offset
        scale_K = jnp.where(folded_K == 0, scale_K, whole_K / jnp.where(folded_K == 0, 1, folded_K))
        weights[producer] = stored_K
    else:
        of_output = scale_K
        if weights[producer].shape[-1] != scale_K.shape[0]:
            of_output = scale_K.reshape(_by_head(config))[:, 0].reshape(-1)
        for name in filter(None, (producer, of[producer].bias)):
            weights[name] = weights[name] / of_output
    for name in members:
        weights[name] = weights[name] * scale_K[:, None]


def _by_head(config: Config) -> tuple[int, int, int]:
    """Returns the shape (K, G, H) that groups query channels by the key/value head that they share."""
    return config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size
