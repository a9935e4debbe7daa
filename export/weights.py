"""Converts a model to the named, ordered flat arrays that a program takes, and back inside a trace."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from export.profiles import Profile
from llamajax import (
    Llama,
    leaves,
    model_from,
    named_arrays,
    named_weights,
    parts_of,
    prepare,
    rebuilt,
    unrolled,
    weights_of,
)
from quant import Layout, QTensor, dequantize, dequantize_runs, map_quantized


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "layer"], meta_fields=["arithmetic"])
@dataclasses.dataclass(frozen=True, eq=False)
class ExportedWeight(Layout):
    """A packed weight in a program: each product is a separate function, which readers and runtimes can recognise.

    Attributes:
        weight: QTensor [..., K, M] or [..., M, K].
        layer: index of the layer, as in every `Layout`.
        arithmetic: the way of unpacking codes, as in `Profile`.
    """

    weight: QTensor
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    arithmetic: Literal["integer", "float"] = "integer"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, or of one layer of it."""
        return self.weight.shape if self.layer is None else self.weight.shape[1:]

    def sliced(self) -> "ExportedWeight":
        """One layer; a stack of one is only reshaped."""
        if self.layer is not None and self.weight.shape[0] == 1:
            one = jax.tree.map(lambda array: array.reshape(array.shape[1:]), self.weight)
            return dataclasses.replace(self, weight=one, layer=None)
        return super().sliced()

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """The reference product, with the order of the weight's groups applied to the activations."""
        weight = self.sliced().weight
        if weight.order is not None:
            x_RK = jnp.take(x_RK, weight.order.reshape(-1), axis=1)
            weight = dataclasses.replace(weight, order=None)
        return _named_product(f"matmul_{_described(weight)}", weight.axis, self.arithmetic)(x_RK, weight)

    def restore(self) -> QTensor:
        """The weight."""
        return self.sliced().weight

    def rows(self, row_n: jax.Array) -> jax.Array:
        """Rows of a table, float32: IREE drops a rounding to a narrower float that is followed by widening."""
        return _named_rows(f"take_rows_{_described(self.weight)}", self.arithmetic)(self.weight, row_n)

    axis = property(lambda self: self.weight.axis)
    dtype = property(lambda self: self.weight.dtype)
    group_size = property(lambda self: self.weight.group_size)
    activations = property(lambda self: self.weight.activations)
    nbytes = property(lambda self: self.weight.nbytes)
    outlier_index = property(lambda self: self.weight.outlier_index)


def _described(weight: QTensor) -> str:
    """`int4_g32_axis2`: scheme, group size and contraction axis (from the end), then the schemes of a second level.

    An example with a second level is `uint4_g32_axis2_scale_uint6_offset_uint6`.
    """
    planes = {"scale": weight.scale, "offset": weight.offset}
    second = [f"_{name}_{scheme.name}" for name, plane in planes.items() if (scheme := getattr(plane, "scheme", None))]
    return f"{weight.scheme.name}_g{weight.group_size}_axis{-weight.axis}{''.join(second)}"


@functools.cache
def _named_product(name: str, axis: int, arithmetic: Literal["integer", "float"]) -> Callable[..., jax.Array]:
    def product(x_RK: jax.Array, weight: QTensor) -> jax.Array:
        x_RK = x_RK.astype(jnp.float32)
        if weight.outlier is not None:
            equation = "RK,KM->RM" if axis == -2 else "RK,MK->RM"
            return jnp.einsum(equation, x_RK, dequantize(weight, arithmetic=arithmetic))
        # One product per run of each group: if runs were joined, some runtimes would store the whole weight as floats.
        # Each run is a plain matrix, because some runtimes lack products over two axes.
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

    A name consists of the weight's name and the path of the array in it, such as `layers.*.ffn.up_DF.planes.0`, or
    `layers.3.ffn.up_DF.planes.0` with unrolled layers, which come one after the other.
    """
    if profile.layers == "scanned":
        return named_arrays(model)
    return {name + part: array for name, weight in _unrolled(model).items() for part, array in parts_of(weight).items()}


def _unrolled(model: Llama) -> dict[str, Any]:
    """Every weight by its name, with one weight per layer, in the order of the unrolled model."""
    weights = weights_of(model)
    plan = unrolled(model.config.stacks)
    return {str(leaf.places[0]): weights[leaf.places[0]] for leaf in leaves(model.config, plan).values()}


def assemble(arrays: Mapping[str, Any], like: Llama, profile: Profile) -> Llama:
    """The inverse of `parameters` inside a trace; packed weights become `ExportedWeight`, prepared ones stay unchanged.

    Args:
        arrays: the arrays by name.
        like: a model of the same structure; its leaves may be abstract.
        profile: the profile given to `parameters`.
    """
    exported = lambda qtensor: ExportedWeight(qtensor, arithmetic=profile.arithmetic)  # noqa: E731
    if profile.layers == "scanned":
        weights = {name: rebuilt(name, weight, arrays) for name, weight in named_weights(like).items()}
        return model_from(map_quantized(exported, weights), like.config)
    plan = unrolled(like.config.stacks)
    # Stacks of one layer each give programs without loops.
    stack = lambda weight: jax.tree.map(lambda array: array[None], weight)  # noqa: E731
    of = leaves(like.config, plan)
    single = {name: rebuilt(name, weight, arrays) for name, weight in _unrolled(like).items()}
    weights = {
        name: single[str(leaf.places[0])] if leaf.layers is None else stack(single[str(leaf.places[0])])
        for name, leaf in of.items()
    }
    return model_from(map_quantized(exported, weights), like.config, plan)


def taken_by(profile: Profile, model: Llama) -> Llama:
    """The model in the form for a profile's programs: unchanged, or abstract in a backend's layout."""
    if profile.backend is None:
        return model
    return jax.eval_shape(lambda model: prepare(model, profile.backend), model)
