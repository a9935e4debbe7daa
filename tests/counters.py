"""A bundle whose state is no keys and values but three arrays of other names, shapes, dtypes; NumPy gives tokens."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from export.bundle import Bundle, open_bundle, seal
from export.lowering import lower_program
from export.profiles import PROFILES

V, T, SLOTS = 8, 4, 32
PROMPTS = ([3, 1, 4, 1, 5], [7, 2])
# The state arrays, in the order in which programs take and return them.
STATE = {"trace": ((1, V), "float32"), "seen": ((V,), "uint8"), "ticks": ((1,), "int32")}


def tables() -> dict[str, np.ndarray]:
    table_VV = np.random.default_rng(5).normal(size=(V, V)).astype(np.float32)
    return {"norm.weight_D": np.ones(1, np.float32), "table_VV": table_VV}


def _step(table_VV, is_token_V, trace_1V, seen_V, ticks_1):
    """Logits also depend on the state before the token: a runtime that overwrites it early gives others."""
    # A sum in which all terms but one are zero. In a product with booleans, IREE 3.13 takes true as -1.
    row_V = jnp.sum(jnp.where(is_token_V[:, None], table_VV, 0), axis=0)
    decayed_1V = trace_1V * 0.5 + row_V
    logits_1V = (
        decayed_1V - 2 * trace_1V - 1.5 * seen_V.astype(jnp.float32) * (1 + jnp.minimum(ticks_1, 3)).astype(jnp.float32)
    )
    return logits_1V, (decayed_1V, jnp.maximum(seen_V, is_token_V.astype(jnp.uint8)), ticks_1 + 1)


def _decode(norm_D, table_VV, token_B, length_B, *state):
    logits_1V, state = _step(table_VV, jnp.arange(V) == token_B, *state)
    return logits_1V, *state


def _prefill(norm_D, table_VV, tokens_BT, count_B, length_B, *state):
    logits_1V = jnp.zeros((1, V), jnp.float32)
    for t in range(T):
        made_1V, made = _step(table_VV, jnp.arange(V) == tokens_BT[0, t], *state)
        logits_1V = jnp.where(t < count_B, made_1V, logits_1V)
        state = tuple(jnp.where(t < count_B, new, old) for new, old in zip(made, state, strict=True))
    return logits_1V, *state


def expected_tokens(prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Returns greedy tokens and the logits after the prompt, in float64."""
    table_VV, trace_V, seen, ticks = tables()["table_VV"].astype(float), np.zeros(V), set(), 0
    tokens, first_V, todo = [], None, list(prompt)
    while len(tokens) < count:
        token = todo.pop(0) if todo else tokens[-1]
        penalty_V = np.asarray([1.5 * (v in seen) * (1 + min(ticks, 3)) for v in range(V)])
        logits_V = trace_V * 0.5 + table_VV[token] - 2 * trace_V - penalty_V
        trace_V, ticks = trace_V * 0.5 + table_VV[token], ticks + 1
        seen.add(token)
        if not todo:
            first_V = logits_V if first_V is None else first_V
            tokens.append(int(np.argmax(logits_V)))
    return tokens, first_V


def write_counters(folder: Path) -> Bundle:
    """Writes the bundle in the profile "unrolled"."""
    (folder / "programs").mkdir(parents=True)
    weights, golden = tables(), {}
    int32 = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    state = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in STATE.items()}
    inputs = {
        f"prefill_{T}": (_prefill, {"tokens": int32((1, T)), "count": int32((1,)), "length": int32((1,)), **state}),
        "decode": (_decode, {"token": int32((1,)), "length": int32((1,)), **state}),
    }
    programs, described = {}, lambda value: {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
    for name, (function, given) in inputs.items():
        outputs = ("logits", *STATE)
        made = lower_program(name, function, weights, given, outputs, "packed", PROFILES["unrolled"])
        (folder / f"programs/{name}.mlirbc").write_bytes(made.artifact)
        twin = jax.export.export(jax.jit(function, keep_unused=True))(*weights.values(), *given.values())
        (folder / f"programs/{name.partition('_')[0]}.jax").write_bytes(twin.serialize())
        values = {kind: [described(value) for value in getattr(made, kind)] for kind in ("inputs", "outputs")}
        programs[name] = {"file": f"programs/{name}.mlirbc", "weights": "packed", "operations": {}, **values}
    for index, prompt in enumerate(PROMPTS):
        tokens, logits_V = expected_tokens(prompt, 20)
        golden[f"prompt_{index}"] = np.asarray(prompt, np.int32)
        golden[f"tokens_{index}"] = np.asarray(tokens, np.int32)
        golden[f"logits_{index}"] = logits_V.astype(np.float32)
    for name, arrays in {"weights": weights, "golden": golden}.items():
        safetensors.numpy.save_file(arrays, folder / f"{name}.safetensors")
    manifest = {
        **{"format": "llamajax-bundle", "version": 1, "producer": "a test", "source": "random", "schemes": {}},
        "config": {"vocab_size": V, "width": V, "num_layers": 1},
        **{"profile": "unrolled", "stablehlo_version": "1.1.0", "validity": {}, "chat_template": None},
        "cache": {"batch": 1, "slots": SLOTS, "dtype": "float32", "layout": "none", "state": None},
        **{"buckets": [T], "tokens": {}, "compiler_options": {}, "programs": programs, "targets": {}},
        "weights": [{"name": name, "dtype": str(a.dtype), "shape": list(a.shape)} for name, a in weights.items()],
        "jax": {name: f"programs/{name}.jax" for name in ("prefill", "decode")},
        "golden": {"file": "golden.safetensors", "prompts": len(PROMPTS)},
    }
    manifest["cache"]["state"] = programs["decode"]["inputs"][-len(STATE) :]
    seal(folder, manifest)
    return open_bundle(folder)
