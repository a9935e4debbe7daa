"""One declaration for each weight: its axes, role, shared input, initialisation and names in other formats.

All code that needs facts about weights reads them here: initialisation, the abstract tree, names in recipes, manifests
and foreign files, inputs for calibration, counts of parameters, bytes read in a step, shardings.

Outside of the model's tree a weight has one name: `embed_VD`, or `layers.7.ffn.up_DF` for a weight of layer 7, counted
from 0; `layers.*.ffn.up_DF` is the weight in all layers. Inside the tree layers are stacked (`Stack`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from llamajax.errors import LlamaJaxError
from quant import is_weight, layer_of, nbytes

if TYPE_CHECKING:
    from llamajax.config import Config

LAYERS = "layers."
_DEVIATION = 0.02

Role = Literal["product", "table", "head", "norm", "bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The facts about a weight that are known before its values.

    Attributes:
        axes: a letter for each axis of a weight of one layer (`config.py` explains them).
        over: the letter that a product contracts; "" for a weight without a product.
        roles: its uses: "product" with activations; "table", whose rows are looked up; "head", the product that gives
            logits; "norm"; "bias". A tied embedding is both table and head.
        input: a name for the activations that the weight is multiplied with; weights of a layer with the same name
            share them.
        maker: the weight of the layer that makes these activations channel by channel, so that a channel can be scaled
            down there and scaled up in all weights that share it; "" if there is none.
        init: "normal"; "residual", normal and smaller, for weights whose outputs are added to the residual stream;
            "ones"; "zeros".
        offset: added to the weight wherever it is used.
        bias: the weight of the layer that is added to the product, "" for none.
        foreign: its name in each foreign format, unless the family has another; `{}` is the layer. A matrix contracted
            over its first axis is stored transposed there, [out, in].
    """

    axes: str
    over: str = ""
    roles: tuple[Role, ...]
    input: str = ""
    maker: str = ""
    init: Literal["normal", "residual", "ones", "zeros"] = "normal"
    offset: float = 0.0
    bias: str = ""
    foreign: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def shape(self, config: "Config") -> tuple[int, ...]:
        """The shape of one layer's weight."""
        sizes = config.sizes
        return tuple(sizes[letter] for letter in self.axes)

    @property
    def axis(self) -> int:
        """The axis that products contract, from the end; -2 if there is none."""
        return self.axes.index(self.over) - len(self.axes) if self.over else -2

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, which can be quantized."""
        return bool(self.over)

    @property
    def is_only_looked_up(self) -> bool:
        """Whether it is never multiplied with activations."""
        return self.roles == ("table",)

    @property
    def transposed(self) -> bool:
        """Whether foreign files store it as [out, in]."""
        return self.is_matrix and self.axis == -2


def foreign(huggingface: str, gguf: str) -> Mapping[str, str]:
    """Makes the names for `Spec.foreign`."""
    return MappingProxyType({"huggingface": huggingface, "gguf": gguf})


def norm(huggingface: str, gguf: str) -> Spec:
    """Declares the weights of an RMSNorm over the width."""
    return Spec(axes="D", roles=("norm",), init="ones", foreign=foreign(f"{huggingface}.weight", f"{gguf}.weight"))


def with_offset(spec: Spec, config: "Config") -> Spec:
    """Returns the spec of a norm with the config's offset, so that weight and offset are 1 in all initially."""
    if not config.norm_offset or "norm" not in spec.roles:
        return spec
    return dataclasses.replace(spec, offset=config.norm_offset, init="zeros")


_EMBED = Spec(
    axes="VD",
    over="D",
    roles=("table",),
    foreign=foreign("model.embed_tokens.weight", "token_embd.weight"),
)
_HEAD = Spec(axes="VD", over="D", roles=("head",), input="head", foreign=foreign("lm_head.weight", "output.weight"))
_FINAL_NORM = norm("model.norm", "output_norm")


def whole_specs(config: "Config") -> dict[str, Spec]:
    """Returns the specs of the weights outside of layers."""
    final = with_offset(_FINAL_NORM, config)
    if config.tied_embeddings:
        tied = dataclasses.replace(_EMBED, roles=("table", "head"), input="head")
        return {"embed_VD": tied, "norm.weight_D": final}
    return {"embed_VD": _EMBED, "norm.weight_D": final, "head_VD": _HEAD}


# ---- Layers ----------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        block: makes the module: `block(config, key=…, dtype=…)`, called as `model.Block` is.
        specs: the specs of its weights for a config, by their path in the module.
        cache: the kind of its part of a cache, a key of `caches.PARTS`.
    """

    block: Callable[..., Any]
    specs: Callable[["Config"], Mapping[str, Spec]]
    cache: str = "full"


# Every kind of layer by name; `model.py` adds a LLaMA's kinds, other code adds its own.
KINDS: dict[str, Kind] = {}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers that are scanned together: a pattern of P of them, repeated R times.

    Attributes:
        first: number of its first layer.
        pattern: a key of `KINDS` for each of P positions.
        repeats: R.
    """

    first: int
    pattern: tuple[str, ...]
    repeats: int

    def layers(self, position: int) -> range:
        """Numbers of the R layers at one position of the pattern."""
        step = len(self.pattern)
        return range(self.first + position, self.first + step * self.repeats, step)


def unrolled(stacks: tuple[Stack, ...]) -> tuple[Stack, ...]:
    """Returns the same layers with a separate stack for each, for programs without loops."""
    kinds = {
        layer: stack.pattern[p] for stack in stacks for p in range(len(stack.pattern)) for layer in stack.layers(p)
    }
    return tuple(Stack(layer, (kinds[layer],), 1) for layer in sorted(kinds))


class Place(NamedTuple):
    """Identifies one weight of a model: a weight of one layer, or a weight outside of layers.

    Attributes:
        name: as in the specs: `embed_VD`, `ffn.up_DF`.
        layer: number of the layer, or None.
    """

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        """`embed_VD`, or `layers.7.ffn.up_DF`."""
        return self.name if self.layer is None else f"{LAYERS}{self.layer}.{self.name}"


class Leaf(NamedTuple):
    """A leaf of the model's tree: a weight, or a stack of the weights of some layers.

    Attributes:
        name: as `Place.name`.
        layers: numbers of the layers, in the order of the stack; None outside of layers.
        spec: the spec of its weights.
    """

    name: str
    layers: range | None
    spec: Spec

    @property
    def places(self) -> tuple[Place, ...]:
        """The places of the weights in it."""
        return (Place(self.name),) if self.layers is None else tuple(Place(self.name, i) for i in self.layers)


@functools.lru_cache(maxsize=64)
def leaves(config: "Config", stacks: tuple[Stack, ...] | None = None) -> Mapping[str, Leaf]:
    """Every leaf of the model by its name, in the order of names.

    A stack of all layers is called `layers.*.ffn.up_DF`, of some layers `layers.0:12:2.ffn.up_DF`, of one layer
    `layers.3.ffn.up_DF`.
    """
    stacks = stacks or config.stacks
    made: dict[str, Leaf] = {}
    whole = whole_specs(config)
    for name in sorted(whole):
        if name > LAYERS:
            break
        made[name] = Leaf(name, None, whole[name])
    for stack in stacks:
        for position, kind in enumerate(stack.pattern):
            layers, specs = stack.layers(position), KINDS[kind].specs(config)
            for name in sorted(specs):
                made[f"{LAYERS}{_numbers(layers, config)}.{name}"] = Leaf(name, layers, specs[name])
    return MappingProxyType(made | {name: Leaf(name, None, whole[name]) for name in sorted(whole) if name > LAYERS})


def _numbers(layers: range, config: "Config") -> str:
    """Returns `*` for all layers, `3` for one, else a slice."""
    if len(layers) == config.num_layers and len(layers) > 1:
        return "*"
    if len(layers) == 1:
        return str(layers[0]) if config.num_layers > 1 else "*"
    return f"{layers.start}:{layers[-1] + 1}:{layers.step}"


@functools.lru_cache(maxsize=64)
def specs(config: "Config") -> Mapping[Place, Spec]:
    """Returns the spec of every weight of the model, in the order embedding, layers, other weights."""
    whole = whole_specs(config)
    made = {Place("embed_VD"): whole.pop("embed_VD")}
    for layer in range(config.num_layers):
        of_layer = KINDS[kind_of_layer(config, layer)].specs(config)
        made |= {Place(name, layer): spec for name, spec in sorted(of_layer.items())}
    return MappingProxyType(made | {Place(name): spec for name, spec in whole.items()})


def kind_of_layer(config: "Config", layer: int) -> str:
    """The key of `KINDS` for one layer."""
    stack, position, _ = locate(config.stacks, layer)
    return stack.pattern[position]


def locate(stacks: tuple[Stack, ...], layer: int) -> tuple[Stack, int, int]:
    """The stack that a layer is in, its position in the pattern, and its place along the stack."""
    for stack in stacks:
        count = layer - stack.first
        if 0 <= count < len(stack.pattern) * stack.repeats:
            return stack, count % len(stack.pattern), count // len(stack.pattern)
    raise LlamaJaxError(
        f"layer {layer}: the model has layers 0 to {stacks[-1].layers(len(stacks[-1].pattern) - 1)[-1]}"
    )


def inputs(config: "Config", layer: int) -> dict[str, tuple[str, ...]]:
    """The weights of a layer that share each of its inputs, in the order of their use."""
    shared: dict[str, tuple[str, ...]] = {}
    for name, spec in KINDS[kind_of_layer(config, layer)].specs(config).items():
        if spec.input:
            shared[spec.input] = (*shared.get(spec.input, ()), name)
    return shared


def num_parameters(config: "Config") -> int:
    """Returns the number of weights of a model; a tied head counts once."""
    return sum(math.prod(spec.shape(config)) for spec in specs(config).values())


def product_weights(config: "Config", head: bool = True) -> int:
    """Returns the number of weights that the activations of a token are multiplied with."""
    wanted = ("product", "head") if head else ("product",)
    return sum(
        math.prod(spec.shape(config)) for spec in specs(config).values() if any(role in wanted for role in spec.roles)
    )


# ---- The model's tree ------------------------------------------------------------------------------------------------


def new(names: tuple[str, ...], kind: str, config: "Config", key: jax.Array, dtype: Any) -> Iterator[jax.Array]:
    """Yields initial weights of a layer, each with its own random key.

    "normal" has standard deviation 0.02, "residual" 0.02 / sqrt(2 L), as in GPT-2 (Radford et al. 2019).

    Args:
        names: names of the specs.
        kind: the kind of the layer.
        config: the architecture.
        key: split into one key for each name.
        dtype: dtype of the weights.
    """
    for name, one in zip(names, jax.random.split(key, len(names)), strict=True):
        yield begin(KINDS[kind].specs(config)[name], config, one, dtype)


def begin(spec: Spec, config: "Config", key: jax.Array, dtype: Any) -> jax.Array:
    """Makes the initial value of a weight."""
    shape = spec.shape(config)
    if spec.init in ("ones", "zeros"):
        return jnp.full(shape, float(spec.init == "ones"), dtype)
    scale = _DEVIATION / (math.sqrt(2 * config.num_layers) if spec.init == "residual" else 1)
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


def named_weights(model: Any) -> dict[str, Any]:
    """The weights of a model or of a pytree like it, by the names of `leaves`; a quantized weight is one entry."""
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)[0]
    found = {path_name(path): leaf for path, leaf in flat}
    return {name: found[_where(leaf, model.plan)] for name, leaf in leaves(model.config, model.plan).items()}


def weights_of(model: Any) -> dict[Place, Any]:
    """Returns every single weight of a model; the weights of layers are taken out of their stacks."""
    named = named_weights(model)
    found = {
        place: named[name] if leaf.layers is None else (name, number)
        for name, leaf in leaves(model.config, model.plan).items()
        for number, place in enumerate(leaf.places)
    }
    taken = {}
    for place in specs(model.config):
        one = found[place]
        taken[place] = layer_of(named[one[0]], one[1]) if place.layer is not None else one
    return taken


def named_arrays(model: Any) -> dict[str, Any]:
    """The arrays of a model by name: `layers.*.ffn.up_DF`, or `layers.*.ffn.up_DF.planes.0` of a quantized weight."""
    return {
        name + part: array for name, weight in named_weights(model).items() for part, array in parts_of(weight).items()
    }


def parts_of(weight: Any) -> dict[str, Any]:
    """The arrays of a weight by the suffix of their names: "" for a plain array, or for example ".planes.0"."""
    flat = jax.tree_util.tree_flatten_with_path(weight)[0]
    return {(f".{path_name(path)}" if path else ""): leaf for path, leaf in flat}


def rebuilt(name: str, like: Any, arrays: Mapping[str, Any]) -> Any:
    """Builds the weight `name` from arrays named as by `named_arrays`; `like`, maybe abstract, gives its structure."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name + part] for part in parts_of(like)])


def block_weights(block: Any) -> dict[str, Any]:
    """The weights of one layer by the names of its specs."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(block, is_leaf=is_weight)[0]}


def _where(leaf: Leaf, plan: tuple[Stack, ...]) -> str:
    """A leaf's path in the tree."""
    if leaf.layers is None:
        return leaf.name
    stack, position, _ = locate(plan, leaf.layers[0])
    return f"stacks.{plan.index(stack)}.{position}.{leaf.name}"


def names_in_tree_order(model: Any) -> list[str]:
    """The names of `leaves` in the order in which jax flattens the tree."""
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)[0]
    name_of = {_where(leaf, model.plan): name for name, leaf in leaves(model.config, model.plan).items()}
    return [name_of[path_name(path)] for path, _ in flat]


def path_name(path: tuple[Any, ...]) -> str:
    """A name such as `attention.query_DQ` from a key path, without the `value` of an `nnx.Param`."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def step_bytes(model: Any, head: bool = True) -> int:
    """Returns the bytes of weights that a forward pass of one token reads: all but tables that are only looked up."""
    spec_of = {name: leaf.spec for name, leaf in leaves(model.config, model.plan).items()}
    return sum(
        nbytes(weight)
        for name, weight in named_weights(model).items()
        if not spec_of[name].is_only_looked_up and (head or "head" not in spec_of[name].roles)
    )
