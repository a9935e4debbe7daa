"""A quantized model as float weights that lie on no quantizer's lattice, and predict what the original predicts.

    LLAMAJAX_SHARED=... python benchmarks/distil.py --model=smollm2
    LLAMAJAX_SHARED=... python benchmarks/distil.py --model=gemma3 --batch=2

The files of SmolLM2 (Q4_1) and Gemma 3 270M (Q4_K_M) hold codes on a lattice, which a quantizer with the same lattice
can hit exactly: figures on such weights flatter it. This script breaks the lattice. It dequantizes the weights, and
adds uniform noise as wide as one quantization step of each group to each packed matrix. Then it distils the original on
the first half of WikiText-2's test text, in two stages:

1. The products of each layer, in closed form: a ridge regression on the inputs of the original's matrices takes away
   noise in the directions that the inputs use, with the ridge at which a share of --kept of the noise remains.
2. The logits: AdamW on the mean of KL(original || student), until the perplexity on the held-out end of that half is
   within 1% of the original's.

The second half, which `yardstick.py` measures on, is not read. The script continues where it was stopped, from
`OUTPUT.work`. The result is a llamajax checkpoint in float32 with its tokenizer, and beside it `OUTPUT.json`: the
SHA-256 of the weights, the seed, steps, perplexities and the machine.
"""

import datetime
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from yardstick_inputs import (
    DISTILLED,
    distilled,
    in_floats,
    machine,
    original_file,
    run_script,
    say,
    weights_sha256,
    wikitext,
    with_bos,
)

import llamajax
import quant
from llamajax.evaluation.evaluate import Comparison, compare
from llamajax.evaluation.windows import Windows, gptq_windows
from llamajax.files import check_absent, new_file
from llamajax.model import model_from
from llamajax.parameters import Place, inputs, weights_of
from llamajax.quantization import calibrate
from llamajax.quantization.resume import PartsOnDisk
from llamajax.train import TrainOptions, sample_batch, schedule
from quant.qtensor import scale_values

_MOST_AWAY = 0.01  # of the perplexity of the original: where the distillation ends
_KEPT = 2  # checkpoints
_STEP, _REGRESSED = "step-", "regressed"


def noisy(packed: llamajax.Llama, seed: int) -> llamajax.Llama:
    """Returns the weights in float32, each packed one with uniform noise from -1/2 to 1/2 of its group's step.

    Raises:
        LlamaJaxError: for codes that stand for unevenly spaced values, which have no step.
    """
    generator = np.random.default_rng(seed)

    def moved(weight: quant.QTensor) -> jax.Array:
        if weight.scheme.kind not in ("int", "uint"):
            raise llamajax.LlamaJaxError(f"codes in {weight.scheme.name}: expected evenly spaced values")
        noise = generator.uniform(-0.5, 0.5, weight.shape).astype(np.float32)
        step = jnp.repeat(scale_values(weight.scale, weight.scheme), weight.group_size, axis=weight.axis)
        return quant.dequantize(weight) + noise * step

    return in_floats(quant.map_quantized(moved, packed))


def regressed(
    student: llamajax.Llama, teacher: llamajax.Llama, tokens: np.ndarray, kept: float, bos_id: int | None = None
) -> tuple[llamajax.Llama, float]:
    """Returns the student with each layer's matrices changed so that their outputs are closer to the teacher's.

    Of the noise N of a matrix [K, M], whose inputs have the mean H of x x', N minus the ridge regression's change is
    r (H + r)^-1 N: noise stays along directions that inputs rarely have, and is removed along the others.

    Args:
        student: the teacher with noise.
        teacher: in floats.
        tokens: the text on which the inputs are computed.
        kept: the share of squared noise that stays if noise is equal in all directions; it determines r.
        bos_id: replaces the first token of each window, unless it is None.

    Returns:
        The student, and the share of the squared noise that is left in the layers' matrices.
    """
    config = teacher.config
    rows = calibrate.calibration_windows(tokens, config, 512, bos_id)
    x_WTD = np.array(jax.jit(llamajax.Llama.embed)(teacher, rows))
    noise = {place: np.array(weight) for place, weight in weights_of(student).items() if place.layer is not None}
    original = weights_of(teacher)
    before = after = 0.0
    for layer in range(config.num_layers):
        block, numbers, groups = teacher.layer(layer), config.numbers(layer), inputs(config, layer)
        first = {group: members[0] for group, members in groups.items()}
        seen = calibrate.observe(block, x_WTD, first, hessians=True, numbers=numbers)
        for group, members in groups.items():
            values_K, vectors_KK = np.linalg.eigh(np.asarray(seen[group].hessian_KK, np.float32))
            left_K = left_by_ridge(np.maximum(values_K, 0), kept)
            for place in (Place(name, layer) for name in members):
                change_KM = noise[place] - np.asarray(original[place])
                rest_KM = vectors_KK @ (left_K[:, None] * (vectors_KK.T @ change_KM))
                before, after = before + float(np.vdot(change_KM, change_KM)), after + float(np.vdot(rest_KM, rest_KM))
                noise[place] = np.asarray(original[place]) + rest_KM
        x_WTD = calibrate.advance(block, x_WTD, numbers)
        say(f"regression: layer {layer + 1} of {config.num_layers}")
    stacked = {
        name: weight
        if leaf.layers is None or not leaf.spec.is_matrix
        else jnp.stack([noise[place] for place in leaf.places])
        for (name, leaf), weight in zip(
            llamajax.leaves(config).items(), llamajax.named_weights(student).values(), strict=True
        )
    }
    return model_from(stacked, config), after / before


def left_by_ridge(values_K: np.ndarray, kept: float) -> np.ndarray:
    """Returns the factors r / (value + r) of all eigenvalues, with r such that their squares have the mean `kept`."""
    low, high = -40.0, 40.0  # log r
    for _ in range(60):
        middle = (low + high) / 2
        ridge = math.exp(middle)
        low, high = (low, middle) if np.mean((ridge / (values_K + ridge)) ** 2) > kept else (middle, high)
    return (math.exp(low) / (values_K + math.exp(low))).astype(np.float32)


def divergence(student: llamajax.Llama, teacher: llamajax.Llama, tokens_BT: jax.Array) -> jax.Array:
    """Returns the mean of KL(teacher || student) over all positions, in nats."""
    theirs_BTV = jax.nn.log_softmax(jax.lax.stop_gradient(teacher(tokens_BT)[0]))
    ours_BTV = jax.nn.log_softmax(student(tokens_BT)[0])
    return jnp.mean(jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1))


class Distillation:
    """The state of one run: the teacher, the student's matrices and the optimizer's state."""

    def __init__(self, student: llamajax.Llama, teacher: llamajax.Llama, options: TrainOptions):
        """Begins a run."""
        self.teacher = teacher
        specs = llamajax.leaves(student.config)
        arrays = llamajax.named_arrays(student)
        # These are copies because each step reuses the memory of the arrays before it.
        self.matrices = {name: jnp.array(array) for name, array in arrays.items() if specs[name].spec.is_matrix}
        _, _, merge = llamajax.trainable(student)
        self._rest = {name: array for name, array in arrays.items() if name not in self.matrices}
        self._merge = merge
        optimizer = optax.chain(
            optax.clip_by_global_norm(options.clip), optax.adamw(schedule(options), b1=0.9, b2=0.95, weight_decay=0.0)
        )
        self.state = jax.jit(optimizer.init)(self.matrices)

        def step(matrices, state, teacher, rest, tokens_BT):
            loss, gradient = jax.value_and_grad(lambda m: divergence(merge(m, rest), teacher, tokens_BT))(matrices)
            with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and multiplies with floats
                updates, state = optimizer.update(gradient, state, matrices)
            return optax.apply_updates(matrices, updates), state, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))

    @property
    def student(self) -> llamajax.Llama:
        """The student with its current weights."""
        return self._merge(self.matrices, self._rest)

    def step(self, tokens_BT: np.ndarray) -> float:
        """Makes one update and returns the loss before it."""
        self.matrices, self.state, loss = self._step(self.matrices, self.state, self.teacher, self._rest, tokens_BT)
        return float(loss)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that a checkpoint holds."""
        flat = jax.tree_util.tree_flatten_with_path((self.matrices, self.state))[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets the state to the arrays of a checkpoint."""
        flat, tree = jax.tree_util.tree_flatten_with_path((self.matrices, self.state))
        loaded = [jnp.asarray(arrays[jax.tree_util.keystr(path)]) for path, _ in flat]
        self.matrices, self.state = jax.tree.unflatten(tree, loaded)


def begin(
    student: llamajax.Llama,
    teacher: llamajax.Llama,
    tokens: np.ndarray,
    kept: float,
    parts: PartsOnDisk,
    bos_id: int | None = None,
) -> tuple[llamajax.Llama, float]:
    """Returns the student after regression, computed or as an earlier start stored it, and the share of noise left."""
    if kept >= 1:
        return student, 1.0
    if loaded := parts.load_arrays(_REGRESSED):
        arrays, description = loaded
        return model_from({name: jnp.asarray(array) for name, array in arrays.items()}, student.config), float(
            description
        )
    student, left = regressed(student, teacher, tokens, kept, bos_id)
    arrays = {name: np.asarray(array) for name, array in llamajax.named_arrays(student).items()}
    parts.store_arrays(_REGRESSED, arrays, str(left))
    return student, left


def excess(result: Comparison) -> float:
    """Returns the increase of the perplexity over the original's, relative to the original's."""
    return math.expm1(result.cross_entropy - result.reference_cross_entropy)


def train(
    run: Distillation,
    seen: np.ndarray,
    heldout: Windows,
    options: TrainOptions,
    parts: PartsOnDisk,
    bos_id: int | None = None,
) -> tuple[Comparison, int]:
    """Trains until the perplexity is near enough to the original's, or all steps are done.

    Returns:
        The last comparison on the held-out windows, and the number of steps done.
    """
    first = 0
    if stored := steps_of(parts):
        first = stored[-1]
        loaded = parts.load_arrays(f"{_STEP}{first:06}")
        assert loaded is not None  # it was listed
        run.restore(loaded[0])
    result = measure(run, heldout, first)
    for step in range(first + 1, options.steps + 1):
        if abs(excess(result)) <= _MOST_AWAY:
            return result, step - 1
        start = time.perf_counter()
        loss = run.step(with_bos(sample_batch(seen, step, options)[:, :-1], bos_id))
        if not math.isfinite(loss):
            raise llamajax.LlamaJaxError(f"the loss is {loss} at step {step}: lower --learning_rate")
        say(f"step {step} of {options.steps}: KL divergence {loss:.4f} nats, {time.perf_counter() - start:.1f} s")
        if step % options.eval_every == 0 or step == options.steps:
            parts.store_arrays(f"{_STEP}{step:06}", run.arrays())
            for old in steps_of(parts)[:-_KEPT]:
                parts.discard(f"{_STEP}{old:06}")
            result = measure(run, heldout, step)
    return result, options.steps


def steps_of(parts: PartsOnDisk) -> list[int]:
    """Returns the steps that have a checkpoint, ascending."""
    return [int(name.removeprefix(_STEP)) for name in parts.names() if name.startswith(_STEP)]


def measure(run: Distillation, heldout: Windows, step: int) -> Comparison:
    """Compares the student with the original on text that it does not learn from, and prints a line."""
    result = compare(run.student, run.teacher, heldout, batch=1)
    say(
        f"after step {step}: KL divergence {result.kl_divergence:.4f} nats, "
        f"perplexity {math.exp(result.cross_entropy):.3f}, {excess(result):+.2%} beside the original's "
        f"{math.exp(result.reference_cross_entropy):.3f}, top-1 agreement {result.top1_agreement:.2%}"
    )
    return result


def run(values: flags.FlagValues) -> None:
    """Distils the model and saves the result.

    Raises:
        LlamaJaxError: if the original is not available, or a result exists already.
    """
    output = Path(values.output).expanduser() if values.output else distilled(values.model)
    check_absent(output)
    options = TrainOptions(
        steps=values.steps,
        batch=values.batch,
        sequence_length=values.length,
        learning_rate=values.learning_rate,
        warmup=values.warmup,
        weight_decay=0.0,
        seed=values.seed,
        eval_every=values.eval_every,
    )
    path = original_file(values.model)
    packed, tokenizer = llamajax.load(path)
    assert tokenizer is not None  # both files have one
    seen = wikitext(tokenizer).seen
    cut = len(seen) - values.heldout * 512
    bos_id = tokenizer.first_id
    heldout, seen = Windows(with_bos(gptq_windows(seen[cut:], 512).rows, bos_id)), seen[:cut]
    key = {"file": hashlib.sha256(path.read_bytes()).hexdigest(), **vars(options), "heldout": values.heldout}
    key |= {"kept": values.kept, "regression_tokens": values.regression_tokens, "bos_id": bos_id}
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f"{output.name}.work")
    parts = PartsOnDisk(work, key)
    begun = time.perf_counter()
    teacher, student = in_floats(packed), noisy(packed, options.seed)
    student, left = begin(student, teacher, seen[: values.regression_tokens], values.kept, parts, bos_id)
    distillation = Distillation(student, teacher, options)
    result, steps = train(distillation, seen, heldout, options, parts, bos_id)
    model = distillation.student
    record = {
        "sha256": weights_sha256(model),
        **key,
        "noise_left": left,
        "steps_done": steps,
        "converged": abs(excess(result)) <= _MOST_AWAY,
        "heldout_result": result._asdict(),
        "perplexity": math.exp(result.cross_entropy),
        "original_perplexity": math.exp(result.reference_cross_entropy),
        "seconds_of_this_start": time.perf_counter() - begun,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    llamajax.save_checkpoint(model, output, tokenizer=tokenizer, source=f"distilled from {path.name}")
    with new_file(output.with_name(f"{output.name}.json")) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    print(json.dumps(record))


if __name__ == "__main__":
    flags.DEFINE_enum("model", "smollm2", sorted(DISTILLED), "whose weights")
    flags.DEFINE_string(
        "output", None, "folder of the checkpoint, which must not exist; by default one that yardstick.py finds"
    )
    flags.DEFINE_integer("steps", 40, "at most; the learning rate falls over them")
    flags.DEFINE_float("kept", 0.3, "of the squares of the noise, where the layers' products are distilled; 1 for not")
    flags.DEFINE_integer("regression_tokens", 8192, "of the text, for that")
    flags.DEFINE_integer("batch", 4, "windows a step")
    flags.DEFINE_integer("length", 256, "tokens of a window")
    flags.DEFINE_float("learning_rate", 3e-5, "at its peak")
    flags.DEFINE_integer("warmup", 4, "steps")
    flags.DEFINE_integer("seed", 0, "of the noise and of the order of the text")
    flags.DEFINE_integer("eval_every", 8, "steps between measurements; a checkpoint is stored at each")
    flags.DEFINE_integer("heldout", 8, "windows of 512 tokens at the end of the half that are not learnt from")
    run_script(run)
