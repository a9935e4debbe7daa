"""Noise for sampling: the numbers of `jax.random`, computed faster on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np


def gumbel_noise(key_B: jax.Array, V: int, id_BC: jax.Array | None = None) -> jax.Array:
    """Returns Gumbel noise [B, V], equal to `jax.random.gumbel(key, (V,))` for each row's key.

    With `id_BC` it returns only the values at these ids, [B, C]. The numbers come from Threefry (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"), which JAX computes on a CPU by a loop over arrays; written as one
    expression it takes a quarter of the time.
    """
    if jax.random.key_impl(key_B) != "threefry2x32" or not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(key_B)
        return noise_BV if id_BC is None else jnp.take_along_axis(noise_BV, id_BC, axis=1, mode="clip")
    key_B2 = jax.random.key_data(key_B)
    if id_BC is None:
        id_BC = jax.lax.broadcasted_iota(jnp.uint32, (key_B2.shape[0], V), 1)
    bits_BV = _threefry(key_B2[:, :1], key_B2[:, 1:], id_BC.astype(jnp.uint32))
    # The upper 23 bits are the fraction of a float32 in [1, 2), which is mapped to a number above 0, at most 1.
    fraction_BV = jax.lax.bitcast_convert_type((bits_BV >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1
    tiny = jnp.finfo(jnp.float32).tiny
    return -jnp.log(-jnp.log(jnp.maximum(fraction_BV * (1 - tiny) + tiny, tiny)))


def _threefry(first_B1: jax.Array, second_B1: jax.Array, count_BV: jax.Array) -> jax.Array:
    """Threefry-2x32, 20 rounds, of the counts (0, count) under a key of two words; returns the XOR of both results."""
    keys = (first_B1, second_B1, first_B1 ^ second_B1 ^ np.uint32(0x1BD11BDA))
    x_BV, y_BV = jnp.broadcast_to(keys[0], count_BV.shape), count_BV + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x_BV = x_BV + y_BV
            y_BV = x_BV ^ ((y_BV << np.uint32(turn)) | (y_BV >> np.uint32(32 - turn)))
        x_BV, y_BV = x_BV + keys[(i + 1) % 3], y_BV + (keys[(i + 2) % 3] + np.uint32(i + 1))
    return x_BV ^ y_BV
