"""Speed of the product of one row with the types of GGUF files and of recipes, beside recipes of about the same size.

    python benchmarks/packed_types.py [--types=Q4_K,Q6_K] [--rounds=40] [--rows=1]

Measures every ggml type that stays packed, and int codes with int8 scales under one float16 per output ("int4-int8",
compared with int4 in groups of 32 with float16 scales). For each type and each shape of TinyLlama-1.1B there is a stack
of random matrices in the type's codes and scales, in the layout of this machine, and a stack in the recipe with the
nearest bits per weight. The two are multiplied in turn, layer after layer, as in decoding. The rate counts the bytes in
the file. The ratio of two rates is the median over the rounds, for all shapes together. The table also shows the bits
per weight in the file and in memory.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import quant
from quant.packing import PLANE_BITS, plane_bits

flags.DEFINE_list("types", None, "types to measure; all unless given")
flags.DEFINE_integer("rounds", 40, "number of rounds", lower_bound=1)
flags.DEFINE_integer("rows", 1, "rows of activations", lower_bound=1)
flags.DEFINE_integer("megabytes", 64, "packed weights of one shape; more than the caches hold", lower_bound=1)
flags.DEFINE_list("shapes", ["2048x2048", "2048x5632", "5632x2048", "2048x32000"], "shapes as inputs x outputs")
flags.DEFINE_bool("processor_time", False, "measure processor time, for a machine that others use too")
flags.DEFINE_bool("json", False, "print JSON instead of a table")


@dataclasses.dataclass(frozen=True)
class Form:
    """Codes and scales of a type, as in the table of `quant/FORMAT.md`."""

    scheme: str
    group: int
    peer: str  # scheme and group size of the recipe that it is compared with
    levels: str | None = None  # scheme of the codes of scales, in groups of `span`
    span: int | None = 8  # None: one group per output
    offset: bool = False
    scale_dtype: Any = np.float16
    peer_dtype: Any = jnp.bfloat16  # as in recipes


FORMS = {
    "Q4_0": Form("int4", 32, "int4-32"),
    "Q4_1": Form("uint4", 32, "int4-32", offset=True),
    "Q5_0": Form("int5", 32, "int5-32"),
    "Q5_1": Form("uint5", 32, "int5-32", offset=True),
    "Q8_0": Form("int8", 32, "int8-32"),
    "Q2_K": Form("uint2", 16, "int2-32", "uint4", 16, offset=True),
    "Q3_K": Form("int3", 16, "int3-32", "int6", 16),
    "Q4_K": Form("uint4", 32, "int4-32", "uint6", offset=True),
    "Q5_K": Form("uint5", 32, "int5-32", "uint6", offset=True),
    "Q6_K": Form("int6", 16, "int6-32", "int8", 16),
    "IQ4_NL": Form("iq4_nl", 32, "int4-32"),
    "IQ4_XS": Form("iq4_nl", 32, "int4-64", "int6"),
    "TQ2_0": Form("ternary", 256, "ternary-256"),
    "MXFP4": Form("mxfp4", 32, "int4-64"),
    "NVFP4": Form("nvfp4", 16, "int4-32"),
    "NF4": Form("nf4", 64, "int4-64"),
    **{
        f"int{bits}-int8": Form(f"int{bits}", 32, "int4-32", "int8", None, peer_dtype=np.float16) for bits in PLANE_BITS
    },
}


def weight(form: Form, count: int, length: int, outputs: int, generator: np.random.Generator) -> quant.QTensor:
    """Makes a stack [count, length, outputs] of random codes with small scales."""
    scheme, groups = quant.SCHEMES[form.scheme], length // form.group

    def planes(rows: int, bits: int) -> tuple[Any, ...]:
        shapes = [(count, rows * width // 8, outputs) for width in plane_bits(bits)]
        return tuple(np.frombuffer(generator.bytes(int(np.prod(shape))), np.uint8).reshape(shape) for shape in shapes)

    def scales() -> Any:
        if scheme.scale_code:
            return np.full((count, groups, outputs), 100 if scheme.scale_code == "e8m0" else 20, np.uint8)
        if form.levels is None:
            return np.full((count, groups, outputs), 2.0**-8, form.scale_dtype)
        levels = quant.SCHEMES[form.levels]
        outer: Any = np.full((count, groups // (form.span or groups), outputs), 2.0**-12, np.float16)
        return quant.QTensor(planes(groups, levels.bits), outer, scheme=levels)

    offset = scales() if form.offset else None
    return quant.QTensor(planes(length, scheme.bits), scales(), offset=offset, scheme=scheme).validate()


def peer_of(form: Form) -> Form:
    """Returns the form of the recipe that a type is compared with."""
    scheme, group = form.peer.split("-")
    return Form(scheme, int(group), form.peer, scale_dtype=form.peer_dtype)


def program(x_RK: jax.Array, stack: Any) -> Callable[[], Any]:
    """Compiles products with one layer after the other; each input depends on the output before it."""

    def step(x_RK: jax.Array, layer: Any, *_: Any) -> tuple[jax.Array, None]:
        y_RM = quant.product(x_RK, layer)
        width = min(x_RK.shape[1], y_RM.shape[1])
        return x_RK.at[:, :width].add(1e-9 * y_RM[:, :width]), None

    options = quant.compiler_options(jax.default_backend())
    run = jax.jit(lambda x, w: quant.scan_layers(step, x, w)[0], compiler_options=options).lower(x_RK, stack).compile()
    return lambda: jax.block_until_ready(run(x_RK, stack))


def measure(form: Form, generator: np.random.Generator) -> dict[str, Any]:
    """Measures rates and bits of a type and of its peer."""
    values = flags.FLAGS
    clock = time.process_time if values.processor_time else time.perf_counter
    bits, memory, size = {}, {}, {"type": 0, "peer": 0}
    turns = np.zeros((2, values.rounds))
    for shape in values.shapes:
        length, outputs = map(int, shape.split("x"))
        programs = {}
        x_RK = jnp.asarray(generator.normal(size=(values.rows, length)), jnp.float32)
        for name, one in (("type", form), ("peer", peer_of(form))):
            count = max(2, (values.megabytes << 20) * 2 // (length * outputs))
            made = weight(one, count, length, outputs, generator)
            laid_out = quant.prepare(jax.tree.map(jnp.asarray, made), jax.default_backend(), donate=True)
            bits[name], memory[name] = 8 * made.nbytes / made.size, 8 * laid_out.nbytes / made.size
            size[name] += made.nbytes
            programs[name] = program(x_RK, laid_out)
            programs[name]()
        for turn in range(values.rounds):
            for number, name in enumerate(("type", "peer")):
                begin = clock()
                programs[name]()
                turns[number, turn] += clock() - begin
    rates = {name: size[name] / turns[number] / 1e9 for number, name in enumerate(("type", "peer"))}
    return {
        "peer": form.peer,
        "bits": bits["type"],
        "bits_in_memory": memory["type"],
        "peer_bits": bits["peer"],
        "rate": statistics.median(rates["type"]),
        "peer_rate": statistics.median(rates["peer"]),
        "ratio": statistics.median(rates["type"] / rates["peer"]),
        "ratio_of_best": float(rates["type"].max() / rates["peer"].max()),
    }


def main(argv: list[str]) -> None:
    """Measures all types and prints the table."""
    del argv
    values, generator = flags.FLAGS, np.random.default_rng(0)
    found = {name: measure(FORMS[name], generator) for name in values.types or FORMS}
    if values.json:
        print(json.dumps(found))
        return
    print("| type | bits in the file | in memory | GB/s | recipe | its bits | GB/s | ratio | ratio of the best |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['bits']:.4g} | {row['bits_in_memory']:.4g} | {row['rate']:.1f} | {row['peer']} "
            f"| {row['peer_bits']:.4g} | {row['peer_rate']:.1f} | {row['ratio']:.2f} | {row['ratio_of_best']:.2f} |"
        )


if __name__ == "__main__":
    app.run(main)
