"""Supports meshes with Explicit axes, which are the default of `jax.make_mesh`, and computes shardings of models.

With such axes the sharding of every intermediate array is part of its type, and each operation whose result could be
sharded in several ways must say how. The model leaves that to XLA (Auto axes). Arguments with Explicit axes are
therefore computed with Auto axes, and results are returned with Explicit axes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llamajax.errors import LlamaJaxError
from llamajax.parameters import Leaf, leaves, named_weights, names_in_tree_order


def on_auto_axes(function: Callable[..., Any], out: Callable[..., Any], *args: Any) -> Any:
    """Computes `function(*args)` on Auto axes if an argument is sharded over Explicit ones.

    Args:
        function: takes and returns pytrees of arrays.
        out: makes the shardings of the results, a pytree like theirs. It is called with a function that returns the
            sharding of an array or, given a number, of that many of its first axes.
        *args: arrays, which may be traced.
    """
    meshes = [mesh for leaf in jax.tree.leaves(args) if (mesh := _explicit_mesh(leaf)) is not None]
    if not meshes:
        return function(*args)
    mesh = meshes[0]

    def like(array: Any, axes: int | None = None) -> NamedSharding:
        spec = jax.typeof(array).sharding.spec if _explicit_mesh(array) is not None else ()
        return NamedSharding(mesh, PartitionSpec(*spec[:axes]))

    automatic = jax.sharding.auto_axes(function, axes=mesh.axis_names, out_sharding=out(like))
    return automatic(*args)


def with_auto_axes(tree: Any) -> Any:
    """Returns the same arrays without a copy, with Auto axes in place of the Explicit axes of their shardings."""

    def one(leaf: Any) -> Any:
        mesh = _explicit_mesh(leaf)
        return leaf if mesh is None else jax.device_put(leaf, NamedSharding(_as_auto(mesh), leaf.sharding.spec))

    return jax.tree.map(one, tree)


@contextlib.contextmanager
def auto_mesh() -> Iterator[None]:
    """Gives the mesh of `jax.set_mesh` Auto axes instead of Explicit ones inside the block; not for `jax.jit`."""
    mesh = jax.sharding.get_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.set_mesh(_as_auto(mesh)):
        yield


def _explicit_mesh(leaf: Any) -> Any:
    """Returns the mesh over whose Explicit axes an array is sharded; None if there is none."""
    if isinstance(leaf, jax.core.Tracer):
        mesh = jax.typeof(leaf).sharding.mesh
    else:
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _as_auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names)


# ---- Shardings of a model --------------------------------------------------------------------------------------------


def shardings(model: Any, mesh: Mesh, rules: Mapping[str, str | None]) -> Any:
    """Returns the sharding of each array of a model over a mesh, as a pytree of the model's structure.

    Args:
        model: arrays or quantized weights; leaves may be abstract.
        mesh: the mesh of devices.
        rules: the mesh axis for each letter of an array's axes. `{"F": "model", "Q": "model", "M": "model", "V":
            "model"}` is Megatron's tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053). Other axes stay whole.

    Returns:
        Each array of a quantized weight is sharded like the weight, except along axes that the mesh does not divide (a
        plane of one scale for all, or of fewer groups than there are devices).

    Raises:
        LlamaJaxError: for a letter that no weight has, or an axis that the mesh does not have.
    """
    known = {letter for leaf in leaves(model.config, model.plan).values() for letter in leaf.spec.axes}
    for letter, axis in rules.items():
        if letter not in known or (axis is not None and axis not in mesh.shape):
            raise LlamaJaxError(
                f"rule {letter!r}: {axis!r}: expected a letter of {', '.join(sorted(known))} and an axis of "
                f"{', '.join(mesh.shape)}"
            )

    def one(leaf: Leaf, array: Any) -> NamedSharding:
        of_axes = [rules.get(letter) for letter in leaf.spec.axes]
        names = [*(None for _ in range(len(array.shape) - len(of_axes))), *of_axes]
        fits = [
            name if name is not None and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, array.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    of = leaves(model.config, model.plan)
    spread = {name: jax.tree.map(functools.partial(one, of[name]), w) for name, w in named_weights(model).items()}
    order = names_in_tree_order(model)
    flat = [leaf for name in order for leaf in jax.tree.leaves(spread[name])]
    return jax.tree.unflatten(jax.tree.structure(model), flat)
