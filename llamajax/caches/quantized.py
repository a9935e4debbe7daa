"""A KV cache of 8, 4 or 3 bits: keys and values are `QTensor`s, as quantized weights are.

Keys and values are quantized when they are written, and dequantized one layer at a time when they are read, even by the
tokens of the same call: every token attends to the same codes for any division of a text into chunks, if keys and
values before rounding are equal. With another division their last bits differ, because products of another shape are
summed in another order. This can select the neighbouring code, and then logits differ by more than by rounding.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from llamajax.caches.dense import DensePart, Writes
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from quant import SCHEMES, QTensor, Scheme, quantize_rtn


class Code(NamedTuple):
    """How keys and values become codes.

    Attributes:
        scheme: uint schemes have a zero point, which costs one byte per head and token.
        clip: as in `quantize_rtn`. The search for the scale of least error takes time for every token; it pays where
            codes are few.
    """

    scheme: Scheme
    clip: Literal["mse"] | None = None


# KL divergence that these codes cause in SmolLM2-135M with float weights, rotated: int8 0.0002; int4 0.047, with the
# search 0.044, without a zero point 0.053; int3 0.20, without the search 0.25, with a zero point 0.20.
CODE_OF = {"int8": Code(SCHEMES["uint8"]), "int4": Code(SCHEMES["uint4"]), "int3": Code(SCHEMES["int3"], "mse")}
_BY_SCHEME = {code.scheme: code for code in CODE_OF.values()}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key_LBKSH", "value_LBKSH"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class QuantizedPart(DensePart):
    """Keys and values of some layers as codes; each head of each token is one group.

    Attributes:
        key_LBKSH: `QTensor` of that shape: codes uint8 [L, B, K, S, H], or with 4 bits [L, B, K, S, H/2], elements h
            and h + H/2 in one byte, low bits first; with 3 bits two arrays (quant/FORMAT.md); scale float32 and, with 8
            and 4 bits, zero uint8 [L, B, K, S, 1].
        value_LBKSH: values, likewise.
        layout: as in `DensePart`.
    """

    key_LBKSH: QTensor  # type: ignore[assignment]
    value_LBKSH: QTensor  # type: ignore[assignment]

    @classmethod
    def empty(cls, config: Config, layers: int, batch: int, slots: int, dtype: str, layout: Writes) -> Self:
        """Makes a part of zeros.

        Raises:
            LlamaJaxError: if the codes of a head do not fill whole bytes.
        """
        code, H = CODE_OF[dtype], config.head_size
        if H * code.scheme.bits % 8:
            raise LlamaJaxError(f"a cache in {dtype} for heads of {H}: expected a multiple of 8; int8 takes any heads")
        shape = (layers, batch, config.num_kv_heads, slots, H)
        abstract = jax.eval_shape(lambda x: _quantize(x, code), jax.ShapeDtypeStruct(shape, jnp.float32))
        zeros = lambda: jax.tree.map(lambda plane: jnp.zeros(plane.shape, plane.dtype), abstract)  # noqa: E731
        return cls(zeros(), zeros(), layout)

    def encode(self, x_BTKH: jax.Array) -> QTensor:
        """Quantizes keys or values; a head with NaN or infinity is not finite when it is read, either."""
        return _quantize(x_BTKH, _BY_SCHEME[self.key_LBKSH.scheme])

    def decode(self, stored: QTensor) -> jax.Array:
        """Dequantizes keys or values to float32."""
        return stored.values()


@functools.partial(jax.jit, static_argnames="code")
def _quantize(x: jax.Array, code: Code) -> QTensor:
    """Quantizes [..., H], with a scale for each vector of H numbers.

    Scales are float32, although they take more bytes. With bfloat16 scales the ends of the range would be off by a step
    of 8 bits, and XLA on CPU converts a whole bfloat16 array to update a slice; float16 does not hold every scale. The
    function is compiled even if `write` is not: outside jit `quantize_rtn` refuses NaN, which must stay NaN here
    because it marks invalid results, such as the logits behind an unknown token.
    """
    x = x.astype(jnp.float32)
    return quantize_rtn(x, code.scheme, group_size=x.shape[-1], axis=-1, scale_dtype=jnp.float32, clip=code.clip)
