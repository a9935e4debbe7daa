"""The model's functions as StableHLO programs: weights are arguments, named and in one order, never constants.

    programs = lower(model, Spec(slots=512))
    programs["decode"].artifact          # portable artifact, for any runtime that reads StableHLO

They are the functions that generation uses (`Llama.trunk`, `Llama.logits`, `sample`), traced with a model whose weights
are arguments. What a runtime needs otherwise is a `Profile`: whether layers are one loop or written out one after the
other, and whether codes are taken out of their bytes by shifts or by arithmetic of floats.

Every program takes all weights first, in the order of `parameters`, then its inputs, then the state (keys and values),
and returns its outputs, then the state. Shapes are static.
"""

import dataclasses
import functools
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from llamajax.caches.dense import KVCache
from llamajax.checkpoint.naming import STACKED, leaf_name, model_from, named_leaves, named_weights
from llamajax.errors import LlamaJaxError
from llamajax.generation.sampling import Sampler, sample
from llamajax.model import Llama
from llamajax.prepare import prepare
from quant import LayerRuns, QTensor, dequantize, dequantize_runs
from quant.kernels import Layout

# The oldest StableHLO that knows all that we write (gathers with batch axes); its promise is five years back, two
# forward.
STABLEHLO_VERSION = "1.1.0"
# A constant of more elements must be a weight that was closed over.
LARGEST_CONSTANT = 4096
# Types of arguments that every runtime takes.
_ARGUMENT_TYPES = ("f32", "bf16", "f16", "ui8", "i32", "ui32")

_FLOAT_OPERATIONS = frozenset(
    "abs add and broadcast_in_dim call compare concatenate constant convert cosine divide dot_general dynamic_slice "
    "dynamic_update_slice exponential floor func gather iota log logistic maximum minimum multiply negate not or pad "
    "power reduce reshape return rsqrt select sine slice sort sqrt subtract tanh transpose".split()
)
_INTEGER_OPERATIONS = frozenset("bitcast_convert shift_left shift_right_arithmetic shift_right_logical xor".split())
# `sample` has a cumulative sum (reduce_window) and a random number generator with loops.
_LOOPS = frozenset({"case", "reduce_window", "while"})
# What the layout of a CPU needs besides.
_OTHER_XLA = frozenset({"optimization_barrier", "remainder", "sign"})


@dataclasses.dataclass(frozen=True)
class Profile:
    """What kind of program a runtime wants.

    Attributes:
        name: as in `PROFILES`.
        layers: "scanned", one loop over stacked weights; or "unrolled", each layer's weights an argument of their own.
        arithmetic: how codes are unpacked, as `quant.unpack` takes it.
        operations: that programs may contain, without their dialect.
        backend: whose layout the weights have that programs take: a program of its own, `prepare`, makes them of the
            packed ones, once. None: programs take the packed ones.
    """

    name: str
    layers: Literal["scanned", "unrolled"]
    arithmetic: Literal["integer", "float"]
    operations: frozenset[str]
    backend: str | None = None


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("scanned", "scanned", "integer", _FLOAT_OPERATIONS | _INTEGER_OPERATIONS | _LOOPS),
        Profile("unrolled", "unrolled", "integer", _FLOAT_OPERATIONS | _INTEGER_OPERATIONS),
        Profile("float", "unrolled", "float", _FLOAT_OPERATIONS),
        Profile(
            "cpu",
            "scanned",
            "integer",
            _FLOAT_OPERATIONS | _INTEGER_OPERATIONS | _LOOPS | _OTHER_XLA,
            "cpu",
        ),
    )
}
# Programs that `lower` makes beside prefill and decode.
OPTIONAL_PROGRAMS = ("sample", "score", "embed", "verify")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What programs to make.

    Attributes:
        batch: B, rows.
        slots: S, of the cache.
        cache_dtype: of keys and values, a float type.
        buckets: T of each prefill program.
        programs: of `OPTIONAL_PROGRAMS`.
        drafts: k, tokens that `verify` checks.
        profile: of `PROFILES`.
    """

    batch: int = 1
    slots: int = 512
    cache_dtype: str = "float32"
    buckets: tuple[int, ...] = (16, 64, 256)
    programs: tuple[str, ...] = ()
    drafts: int = 4
    profile: Profile = PROFILES["scanned"]

    def __post_init__(self) -> None:
        """Checks it.

        Raises:
            LlamaJaxError: for a value that makes no sense.
        """
        if self.batch < 1 or self.slots < 1 or self.drafts < 1:
            raise LlamaJaxError(f"batch {self.batch}, slots {self.slots}, drafts {self.drafts}: expected at least 1")
        if self.cache_dtype not in ("float32", "bfloat16", "float16"):
            raise LlamaJaxError(f"cache of {self.cache_dtype!r}: expected float32, bfloat16 or float16 to export")
        if list(self.buckets) != sorted(set(self.buckets)) or not self.buckets or self.buckets[0] < 1:
            raise LlamaJaxError(f"buckets {self.buckets}: expected token counts that grow")
        if self.buckets[-1] > self.slots or self.drafts >= self.slots:
            raise LlamaJaxError(
                f"bucket {self.buckets[-1]}, drafts {self.drafts}: expected less than {self.slots} slots"
            )
        if unknown := set(self.programs) - set(OPTIONAL_PROGRAMS):
            raise LlamaJaxError(f"program {sorted(unknown)[0]!r}: expected one of {', '.join(OPTIONAL_PROGRAMS)}")


@dataclasses.dataclass(frozen=True)
class Value:
    """An argument or a result: its name, dtype as NumPy calls it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, array: Any) -> "Value":
        """Of an array, real or abstract."""
        return cls(name, str(np.dtype(array.dtype)), tuple(array.shape))


@dataclasses.dataclass(frozen=True)
class Program:
    """One lowered function.

    Attributes:
        inputs: its arguments behind the weights.
        outputs: its results. One that has the name of an input is that state, which the input's memory may be used for.
        weights: which weights are its first arguments, used or not: "packed", "prepared" as a backend wants them, or
            "none".
        artifact: StableHLO portable artifact (MLIR bytecode) of a module with one public function, `main`.
        operations: how often each operation occurs.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: Literal["packed", "prepared", "none"]
    artifact: bytes
    operations: Mapping[str, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "layer"], meta_fields=["arithmetic"])
@dataclasses.dataclass(frozen=True, eq=False)
class ExportedWeight(Layout):
    """A packed weight in a program: each product is a function of its own, so that a reader, or a runtime, knows it.

    Attributes:
        weight: QTensor [..., K, M] or [..., M, K].
        layer: as of every `Layout`.
        arithmetic: as of `Profile`.
    """

    weight: QTensor
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    arithmetic: Literal["integer", "float"] = "integer"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of one layer of it."""
        return self.weight.shape if self.layer is None else self.weight.shape[1:]

    def sliced(self) -> "ExportedWeight":
        """One layer; a stack of one is only reshaped."""
        if self.layer is not None and self.weight.shape[0] == 1:
            one = jax.tree.map(lambda array: array.reshape(array.shape[1:]), self.weight)
            return dataclasses.replace(self, weight=one, layer=None)
        return super().sliced()

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """As the reference does, with the order of its groups applied to the activations."""
        weight = self.sliced().weight
        if weight.order is not None:
            x_RK = jnp.take(x_RK, weight.order.reshape(-1), axis=1)
            weight = dataclasses.replace(weight, order=None)
        return _named_product(f"matmul_{_described(weight)}", weight.axis, self.arithmetic)(x_RK, weight)

    def restore(self) -> QTensor:
        """The weight."""
        return self.sliced().weight

    def take_rows(self, row_n: jax.Array) -> jax.Array:
        """Rows of a table, float32: IREE drops the rounding to a narrower float of what is widened again at once."""
        return _named_rows(f"take_rows_{_described(self.weight)}", self.arithmetic)(self.weight, row_n)

    axis = property(lambda self: self.weight.axis)
    dtype = property(lambda self: self.weight.dtype)
    group_size = property(lambda self: self.weight.group_size)
    activations = property(lambda self: self.weight.activations)
    nbytes = property(lambda self: self.weight.nbytes)
    outlier_index = property(lambda self: self.weight.outlier_index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StraightCache(KVCache):
    """A cache for programs without loops."""

    loops: ClassVar[bool] = False


def _described(weight: QTensor) -> str:
    """`int4_g32_axis2`: scheme, group size and contraction axis (from the end)."""
    return f"{weight.scheme.name}_g{weight.group_size}_axis{-weight.axis}"


@functools.cache
def _named_product(name: str, axis: int, arithmetic: Literal["integer", "float"]) -> Callable[..., jax.Array]:
    def product(x_RK: jax.Array, weight: QTensor) -> jax.Array:
        x_RK = x_RK.astype(jnp.float32)
        if weight.outlier is not None:
            equation = "RK,KM->RM" if axis == -2 else "RK,MK->RM"
            return jnp.einsum(equation, x_RK, dequantize(weight, arithmetic=arithmetic))
        # Run by run of each group: what is put together from the slots of bytes, some runtimes write out as floats.
        # Each as a plain matrix: of products over two axes they know less.
        runs = dequantize_runs(weight, arithmetic=arithmetic)
        R, equation = x_RK.shape[0], "RK,KM->RM" if axis == -2 else "RK,MK->RM"
        x_RCSn = x_RK.reshape(R, -1, len(runs), weight.group_size // len(runs))
        parts = []
        for i, run_CnM in enumerate(runs):
            run_KM = run_CnM.reshape((-1, run_CnM.shape[-1]) if axis == -2 else (run_CnM.shape[0], -1))
            parts.append(jnp.einsum(equation, x_RCSn[:, :, i].reshape(R, -1), run_KM))
        return functools.reduce(operator.add, parts)

    product.__name__ = name
    return jax.jit(product)


@functools.cache
def _named_rows(name: str, arithmetic: Literal["integer", "float"]) -> Callable[..., jax.Array]:
    def rows(table: QTensor, row_n: jax.Array) -> jax.Array:
        def pick(plane: jax.Array) -> jax.Array:
            if plane.shape[0] != table.shape[0]:
                return plane
            # LiteRT looks up rows of bytes and of float32, not of the narrower floats that scales may be.
            wide = plane.astype(jnp.float32) if arithmetic == "float" and plane.dtype != jnp.uint8 else plane
            return jnp.take(wide, row_n, axis=0, mode="clip")

        return dequantize(jax.tree.map(pick, table), arithmetic=arithmetic)

    rows.__name__ = name
    return jax.jit(rows)


def parameters(model: Llama, profile: Profile) -> dict[str, Any]:
    """The arrays that are a program's first arguments, by name and in order.

    The order is that of the model's tree: `embed_VD`, `head_VD`, `layers`, `norm`. A name is the path of the array, as
    `layers.ffn.up_DF.planes.0`; with unrolled layers `layers.3.ffn.up_DF.planes.0`, layers in turn.
    """
    if profile.layers == "scanned":
        return named_leaves(model)
    return {name + part: leaf for name, weight in _unrolled(model) for part, leaf in _parts(weight)}


def _unrolled(model: Llama) -> Iterator[tuple[str, Any]]:
    """Every weight of the model by its name, those of a stack layer by layer, in the stack's place."""
    weights = named_weights(model)
    stacked = {name: weight for name, weight in weights.items() if name.startswith(STACKED)}
    before = True
    for name, weight in weights.items():
        if name not in stacked:
            yield name, weight
        elif before:
            before = False
            for layer in range(model.config.num_layers):
                for stacked_name, stack in stacked.items():
                    yield f"{STACKED}{layer}.{stacked_name.removeprefix(STACKED)}", stack[layer]


def _parts(weight: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of one weight, with the end of their names."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(weight)[0]:
        yield (f".{leaf_name(path)}" if path else ""), leaf


def assemble(arrays: Mapping[str, Any], like: Llama, profile: Profile) -> Llama:
    """Undoes `parameters` inside a trace; packed weights become `ExportedWeight`, prepared ones stay as they are.

    Args:
        arrays: by name.
        like: the model, for its structure; leaves may be abstract.
        profile: as `parameters` had it.
    """

    def rebuilt(name: str, weight: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(weight), [arrays[name + part] for part, _ in _parts(weight)])

    def exported(weight: Any) -> Any:
        if isinstance(weight, LayerRuns):
            return LayerRuns(tuple(exported(part) for part in weight.parts))
        return ExportedWeight(weight, arithmetic=profile.arithmetic) if isinstance(weight, QTensor) else weight

    if profile.backend is not None:
        return _from_leaves(list(arrays.values()), like)
    if profile.layers == "scanned":
        weights = {name: exported(rebuilt(name, weight)) for name, weight in named_weights(like).items()}
        return model_from(weights, like.config)
    single = {name: rebuilt(name, weight) for name, weight in _unrolled(like)}
    weights = {}
    for name in named_weights(like):
        if name.startswith(STACKED):
            rest = name.removeprefix(STACKED)
            stack = (single[f"{STACKED}{layer}.{rest}"] for layer in range(like.config.num_layers))
            weights[name] = LayerRuns(tuple(exported(jax.tree.map(lambda array: array[None], one)) for one in stack))
        else:
            weights[name] = exported(single[name])
    return model_from(weights, like.config)


def taken_by(profile: Profile, model: Llama) -> Llama:
    """The model as a profile's programs take it: as it is, or, abstract, as a backend wants it."""
    if profile.backend is None:
        return model
    return jax.eval_shape(lambda model: prepare(model, profile.backend), model)


def lower(model: Llama, spec: Spec) -> dict[str, Program]:
    """Lowers every program that `spec` asks for: `prefill_16`, …, `decode`, and the optional ones.

    Raises:
        LlamaJaxError: if the model cannot be exported like this, or a program is not clean (`check`).
    """
    if any(isinstance(leaf, Layout) for leaf in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Layout))):
        raise LlamaJaxError("the model is prepared for a backend: export it as it was loaded")
    packed_weights = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QTensor))
    if kinds := {leaf.activations for leaf in packed_weights if isinstance(leaf, QTensor) and leaf.activations}:
        raise LlamaJaxError(
            f"weights that ask for rounded activations ({', '.join(sorted(kinds))}): other runtimes lack what rounds: "
            "export with --activations=float32, or llamajax.with_activations(model, 'float32')"
        )
    profile = spec.profile
    taken = taken_by(profile, model)
    weights = parameters(taken, profile)
    kind: Literal["packed", "prepared"] = "packed" if profile.backend is None else "prepared"
    programs = {}
    if profile.backend is not None:
        # Traced with the packed weights as they are: what it returns is what the others take.
        packed = named_leaves(model)
        flat = lambda *arrays: tuple(jax.tree.leaves(prepare(_from_leaves(arrays, model), profile.backend)))  # noqa: E731
        programs["prepare"] = _lower_program("prepare", flat, packed, {}, tuple(weights), "packed", profile)
    for name, function, inputs, results, takes_model in functions(model, spec):
        flat = bound(function, tuple(weights) if takes_model else None, taken, profile)
        first = weights if takes_model else {}
        programs[name] = _lower_program(name, flat, first, inputs, results, kind if takes_model else "none", profile)
    return programs


def _from_leaves(arrays: Sequence[Any], like: Llama) -> Llama:
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


# A program before it is lowered: its name, a function of a model and inputs, these inputs by name, the names of its
# results, and whether it takes a model (else None is what it gets).
Function = tuple[str, Callable[..., tuple], dict[str, jax.ShapeDtypeStruct], tuple[str, ...], bool]


def functions(model: Llama, spec: Spec, sizes: Mapping[str, Any] = types.MappingProxyType({})) -> list[Function]:
    """Every program of `spec` as a function of (model, *inputs), with the shapes of its inputs.

    Args:
        model: for its config.
        spec: what to make.
        sizes: "B", "S" and "T" in place of the spec's, such as symbolic ones; with "T" prefill is one program.
    """
    B, S = sizes.get("B", spec.batch), sizes.get("S", spec.slots)
    config = model.config
    state_shape = (config.num_layers, B, config.num_kv_heads, S, config.head_size)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    state = {name: jax.ShapeDtypeStruct(state_shape, jnp.dtype(spec.cache_dtype)) for name in ("key", "value")}
    # With symbolic sizes nothing can be decided by them: one straight way, whatever the profile.
    cache = KVCache if spec.profile.layers == "scanned" and not sizes else StraightCache
    prefill, decode, verify = (functools.partial(function, cache) for function in (_prefill, _decode, _verify))
    made: list[Function] = []

    def add(name: str, function: Callable[..., tuple], inputs: dict[str, Any], results: tuple[str, ...], weights=True):
        made.append((name, function, inputs, results, weights))

    for name, T in {"prefill": sizes["T"]}.items() if "T" in sizes else ((f"prefill_{T}", T) for T in spec.buckets):
        inputs = {"tokens": int32((B, T)), "count": int32((B,)), "length": int32((B,)), **state}
        add(name, prefill, inputs, ("logits", *state))
    add("decode", decode, {"token": int32((B,)), "length": int32((B,)), **state}, ("logits", *state))
    T = spec.buckets[-1]
    text = {"tokens": int32((B, T)), "count": int32((B,))}
    if "verify" in spec.programs:
        inputs = {"tokens": int32((B, spec.drafts + 1)), "length": int32((B,)), **state}
        add("verify", verify, inputs, ("logits", *state))
    if "score" in spec.programs:
        add("score", _score, text, ("log_probability",))
    if "embed" in spec.programs:
        add("embed", _embed, text, ("embedding",))
    if "sample" in spec.programs:
        floats = {name: jax.ShapeDtypeStruct((B,), jnp.float32) for name in ("temperature", "top_p")}
        inputs = {
            "logits": jax.ShapeDtypeStruct((B, config.vocab_size), jnp.float32),
            "key": jax.ShapeDtypeStruct((B, 2), jnp.uint32),
            "length": int32((B,)),
            **floats,
            "top_k": int32((B,)),
        }
        add("sample", _sample, inputs, ("token", "log_probability"), False)
    return made


def _prefill(make_cache, model: Llama, tokens_BT, count_B, length_B, key, value):
    """Puts the first `count` of the T tokens of each row behind the `length` it holds; logits of the last of them."""
    hidden_BTD, cache = model.trunk(tokens_BT, make_cache(key, value, length_B), count_B)
    is_last_BT1 = (jnp.arange(tokens_BT.shape[1]) == count_B[:, None] - 1)[:, :, None]
    # A sum in which all but one are zero: an index for each row would be a gather.
    last_BD = jnp.sum(jnp.where(is_last_BT1, hidden_BTD, 0), axis=1)
    assert cache is not None  # a cache went in
    is_valid_B = _fits(length_B, tokens_BT, key) & _is_count(count_B, tokens_BT)
    return _or_nan(is_valid_B, model.logits(last_BD)), cache.key_LBKSH, cache.value_LBKSH


def _decode(make_cache, model: Llama, token_B, length_B, key, value):
    """One more token a row, and the logits behind it."""
    logits_BTV, cache = model(token_B[:, None], make_cache(key, value, length_B))
    assert cache is not None
    return _or_nan(_fits(length_B, token_B[:, None], key), logits_BTV[:, 0]), cache.key_LBKSH, cache.value_LBKSH


def _verify(make_cache, model: Llama, tokens_BT, length_B, key, value):
    """The newest token and k drafted ones: logits behind each. The caller advances `length` by what it accepts."""
    logits_BTV, cache = model(tokens_BT, make_cache(key, value, length_B))
    assert cache is not None
    return _or_nan(_fits(length_B, tokens_BT, key), logits_BTV), cache.key_LBKSH, cache.value_LBKSH


def _score(model: Llama, tokens_BT, count_B):
    """Log probability of each token given those before it; 0 for the first, which has none, and for padding."""
    logits_BTV, _ = model(tokens_BT)
    log_probability_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    is_next_BTV = jnp.arange(logits_BTV.shape[-1]) == tokens_BT[:, 1:, None]
    next_BT = jnp.sum(jnp.where(is_next_BTV, log_probability_BTV, 0), axis=-1)
    next_BT = jnp.where(jnp.arange(1, tokens_BT.shape[1]) < count_B[:, None], next_BT, 0)
    return (_or_nan(_is_count(count_B, tokens_BT), jnp.pad(next_BT, ((0, 0), (1, 0)))),)


def _embed(model: Llama, tokens_BT, count_B):
    """The mean of a text's last hidden states, behind the final norm."""
    hidden_BTD, _ = model.trunk(tokens_BT)
    is_text_BT1 = (jnp.arange(tokens_BT.shape[1]) < count_B[:, None])[:, :, None]
    sum_BD = jnp.sum(jnp.where(is_text_BT1, hidden_BTD.astype(jnp.float32), 0), axis=1)
    return (_or_nan(_is_count(count_B, tokens_BT), sum_BD / jnp.maximum(count_B, 1).astype(jnp.float32)[:, None]),)


def _fits(length_B, tokens_BT, key_LBKSH):
    """Whether T tokens behind `length` fit the cache: where not, XLA writes over others. No sum that overflows."""
    return (length_B >= 0) & (length_B <= key_LBKSH.shape[3] - tokens_BT.shape[1])


def _is_count(count_B, tokens_BT):
    """Whether a count of real tokens is from 1 to T."""
    return (count_B >= 1) & (count_B <= tokens_BT.shape[1])


def _or_nan(is_valid_B, x_BX):
    """NaN for a row whose arguments make no sense: a program cannot raise an error."""
    return jnp.where(is_valid_B.reshape(-1, *[1] * (x_BX.ndim - 1)), x_BX, jnp.nan)


def _sample(_: None, logits_BV, key_B2, length_B, temperature_B, top_p_B, top_k_B):
    """Chooses a token as `generate` does: `key` is a row's PRNG key, `length` what its cache holds."""
    key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl="threefry2x32"), length_B)
    return sample(logits_BV, key_B, Sampler(temperature=temperature_B, top_k=top_k_B, top_p=top_p_B))


def bound(function: Callable[..., tuple], names: tuple[str, ...] | None, like: Llama, profile: Profile):
    """A function of (model, *inputs) as one of flat arrays: the weights of these names first, then the inputs."""

    def flat(*arrays):
        if names is None:
            return function(None, *arrays)
        model = assemble(dict(zip(names, arrays, strict=False)), like, profile)
        return function(model, *arrays[len(names) :])

    return flat


def _lower_program(
    name: str,
    flat: Callable[..., tuple],
    weights: Mapping[str, Any],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    results: tuple[str, ...],
    kind: Literal["packed", "prepared", "none"],
    profile: Profile,
) -> Program:
    """Lowers a function of arrays: weights, then inputs."""
    flat.__name__ = name
    arguments = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (*weights.values(), *inputs.values())]
    state = range(len(arguments) - 2, len(arguments)) if "key" in results else ()
    # Lowered for CPU, where nothing in our programs differs by platform; unused weights stay in their place.
    jitted = jax.jit(flat, keep_unused=True, donate_argnums=tuple(state))
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("cpu",))
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        passmanager.PassManager.parse("builtin.module(canonicalize,cse,symbol-dce)").run(module.operation)
        _tidy(module)
        operations = check(module, profile, name)
        text = module.operation.get_asm(enable_debug_info=False)
        artifact = stablehlo.serialize_portable_artifact_str(text, STABLEHLO_VERSION)
    return Program(
        tuple(Value.of(input_name, array) for input_name, array in inputs.items()),
        tuple(Value.of(result, array) for result, array in zip(results, lowered.out_info, strict=True)),
        kind,
        artifact,
        operations,
    )


def _tidy(module: ir.Module) -> None:
    """Takes off jax's own attributes of arguments, results and the module, but for the declared aliasing of state."""
    for name in list(module.operation.attributes):
        if name.startswith("mhlo."):
            del module.operation.attributes[name]
    for function in module.body.operations:
        for kind in ("arg_attrs", "res_attrs"):
            if kind in function.attributes:
                each = [ir.DictAttr(attributes) for attributes in ir.ArrayAttr(function.attributes[kind])]
                aliases = [{name: one[name] for name in ("tf.aliasing_output",) if name in one} for one in each]
                function.attributes[kind] = ir.ArrayAttr.get([ir.DictAttr.get(alias) for alias in aliases])


def check(module: ir.Module, profile: Profile, name: str) -> dict[str, int]:
    """Counts a program's operations, and refuses what other runtimes stumble over.

    Raises:
        LlamaJaxError: for a custom call, a scatter or another operation that is not in the profile's list; an argument
            of another type than float, uint8, int32 or uint32; a weight that was closed over instead of passed.
    """
    counts: Counter[str] = Counter()
    for operation in _walk(module.operation):
        kind = operation.name.rpartition(".")[2]
        counts[kind] += 1
        if kind not in profile.operations and operation.name != "builtin.module":
            raise LlamaJaxError(
                f"program {name}: operation {operation.name} is not in the list of profile {profile.name!r}: other "
                "runtimes may lack it"
            )
        if kind == "constant" and (size := ir.ShapedType(operation.results[0].type)) is not None:
            elements = int(np.prod(size.shape))
            splat = ir.DenseElementsAttr(operation.attributes["value"]).is_splat
            if elements > LARGEST_CONSTANT and not splat:
                raise LlamaJaxError(
                    f"program {name}: a constant of shape {tuple(size.shape)}: expected no weight in the program; pass "
                    "it as an argument"
                )
    for function in module.body.operations:
        if ir.StringAttr(function.attributes["sym_name"]).value != "main":
            continue
        for index, argument in enumerate(function.regions[0].blocks[0].arguments):
            element = str(ir.ShapedType(argument.type).element_type)
            if element not in _ARGUMENT_TYPES:
                raise LlamaJaxError(
                    f"program {name}: argument {index} is {argument.type}: expected one of "
                    f"{', '.join(_ARGUMENT_TYPES)}, which every runtime takes"
                )
    del counts["module"], counts["func"], counts["return"]
    return dict(sorted(counts.items()))


def _walk(operation: Any) -> Iterator[Any]:
    """An operation and all inside it."""
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _walk(inner.operation)
