"""Our curve and llama.cpp's, with and without importance matrix: KL divergence to the float reference against bits.

    python benchmarks/yardstick.py --model=box --ours=int8,int4-g32,mixed-4.5bpw --json=figures.json --plot=curves.svg
    python benchmarks/yardstick.py --model=smollm2-distilled --ours=bits=4.5,bits=3.5 --types=Q4_K_M --json=figures.json
    python benchmarks/yardstick.py --ours=int4-g32 --types= --context=512,2048 --cache=float32,int8,int4 --json=…
    python benchmarks/yardstick.py --draw=benchmarks/yardstick_box.json,benchmarks/yardstick_gemma3.json --plot=all.svg

All rows are measured by one code: a model is quantized, laid out as `generate` runs it, and run over the same windows
of a text that nothing was calibrated on, in pieces of 512 tokens behind a cache; its log probabilities are compared
with those of the float32 weights. llama.cpp's rows are its own quantizer's blocks (`yardstick_llamacpp.py`),
multiplied by our products: what differs is the weights. KL divergence (reference || row) comes first, top-1 agreement
and perplexity beside it, each with the standard error of tokens taken for independent. Bits a weight are the bytes of
all tensors, norms included, over the parameters, for both.

Models are `box`, `smollm2` (the Q4_1 file dequantized: it lies on the lattice of 4-bit formats and flatters them),
`gemma3` (a Q4_K_M file dequantized, which flatters likewise), `smollm2-distilled` and `gemma3-distilled` (`distil.py`
makes them of these), or a checkpoint's path. The text is WikiText-2's test text in the folder that LLAMAJAX_SHARED
names, calibration on its first half and figures on its second (--swap: the other way); of the box its own stories.
If the model's tokenizer begins texts with BOS, each window does.

A row of ours is a recipe's name or path, and options joined by "+": `bits=3.5` (of the recipe `calibrated` where none
is named), `calibration=self` (the model generates the text; otherwise it is the first half), keys of a recipe
(`propagation=0`) and of its rules that quantize (`method=rtn`), `types=ggml` and others of `llamajax.quantize`.
`checkpoint=PATH` is a model that was quantized before, by other code perhaps. --json keeps every figure, which is
not measured again until the model's weights, windows, calibration or recipe change; for other code remove the file, or
name the row with --again. A file with figures of other weights is refused.
"""

import dataclasses
import datetime
import functools
import hashlib
import inspect
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from yardstick_inputs import (
    MODELS,
    Halves,
    Subject,
    commit,
    machine,
    run_script,
    say,
    subject,
    weights_sha256,
    with_bos,
)
from yardstick_llamacpp import TYPES, check_types, importance_matrix, quantize_file

import llamajax
import quant
from llamajax.caches import CACHE_DTYPES, STEP_SLOTS, empty_cache
from llamajax.cli.terminal import progress
from llamajax.evaluation.evaluate import standard_error
from llamajax.evaluation.plots import Point, check_picture, quality_panels
from llamajax.evaluation.windows import Windows, document_windows
from llamajax.files import new_file, read_json
from llamajax.prepare import ACTIVATIONS
from llamajax.quantization.calibrate import calibration_windows
from llamajax.quantization.own_text import own_text
from llamajax.quantization.quantize import read_recipe

_PIECE = 512  # tokens of one call, as a prompt is prefilled
_WINDOW = 512  # at which --windows counts: longer contexts have as many tokens
_SEARCHED = "calibrated"  # of which bits=… sets the target
_IMATRIX = "+imatrix"
_FAMILIES = ("llamajax", "llama.cpp", "llama.cpp, importance matrix")
_UNCALIBRATED = "llamajax, no text"  # in the picture


class Setting(NamedTuple):
    """The settings in which a quantized model is run.

    Attributes:
        context: tokens of a window.
        activations: the dtype of activations that packed weights are multiplied by, or "recipe" for the recipe's.
        cache: the dtype of keys and values.
    """

    context: int
    activations: str
    cache: str


PLAIN = Setting(_WINDOW, "recipe", "float32")


# ---- Measuring ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnames="cache")
def _log_probabilities(model: llamajax.Llama, tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    logits_BTV, cache = model(tokens_BT, cache)
    return jax.nn.log_softmax(logits_BTV[0]), cache


@jax.jit
def _compared(ours_TV: jax.Array, theirs_TV: jax.Array, target_T: jax.Array) -> jax.Array:
    """Returns KL(theirs || ours), whether both predict the same token, our loss and theirs: float32 [4, T]."""
    divergence_T = jnp.sum(jnp.exp(theirs_TV) * (theirs_TV - ours_TV), axis=-1)
    agreement_T = (jnp.argmax(ours_TV, axis=-1) == jnp.argmax(theirs_TV, axis=-1)).astype(jnp.float32)
    losses = [-jnp.take_along_axis(each, target_T[:, None], axis=-1)[:, 0] for each in (ours_TV, theirs_TV)]
    return jnp.stack([divergence_T, agreement_T, *losses])


def pieces(model: llamajax.Llama, windows: Windows, cache_dtype: str) -> Iterator[tuple[slice, jax.Array]]:
    """Yields log probabilities of all windows in pieces: the rows among all predictions, and [T, V]."""
    length = windows.rows.shape[1] - 1
    slots = -(-length // STEP_SLOTS) * STEP_SLOTS
    for number, row in enumerate(windows.rows):
        cache = empty_cache(model.config, 1, slots, cache_dtype)
        for start in range(0, length, _PIECE):
            end = min(start + _PIECE, length)
            log_TV, cache = _log_probabilities(model, jnp.asarray(row[None, start:end]), cache)
            yield slice(number * length + start, number * length + end), log_TV


class Reference:
    """Log probabilities of the float model on some windows, in a file that is mapped into memory."""

    def __init__(self, model: llamajax.Llama, windows: Windows, file: Path):
        """Runs the model, with a float32 cache."""
        self.windows = windows
        self.targets = windows.rows[:, 1:].reshape(-1)
        shape = (windows.predictions, model.config.vocab_size)
        self._log = np.memmap(file, np.float32, "w+", shape=shape)
        for rows, log_TV in pieces(model, windows, "float32"):
            self._log[rows] = log_TV

    def compare(self, model: llamajax.Llama, cache: str, name: str) -> dict[str, float]:
        """Returns the figures of a model."""
        parts = []
        with progress(name) as show:
            for rows, log_TV in pieces(model, self.windows, cache):
                parts.append(np.asarray(_compared(log_TV, self._log[rows], self.targets[rows])))
                show(rows.stop, len(self.targets))
        divergence, agreement, losses, reference_losses = np.concatenate(parts, axis=1)
        if not np.isfinite(divergence).all():
            raise llamajax.LlamaJaxError(f"{name}: its logits are not finite")
        loss, error = float(np.mean(losses, dtype=np.float64)), standard_error(losses)
        return {
            "kl_divergence": float(np.mean(divergence, dtype=np.float64)),
            "kl_standard_error": standard_error(divergence),
            "top1_agreement": float(np.mean(agreement, dtype=np.float64)),
            "top1_standard_error": standard_error(agreement),
            "perplexity": math.exp(loss),
            "perplexity_standard_error": math.exp(loss) * error,
            "reference_perplexity": math.exp(float(np.mean(reference_losses, dtype=np.float64))),
        }


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ours:
    """A row that llamajax quantizes.

    Attributes:
        name: the row's name at the command line.
        recipe: the recipe.
        own: whether the model generates its calibration text.
        options: other arguments of `llamajax.quantize`.
        checkpoint: the path of a quantized model, which is measured instead, or None.
    """

    name: str
    recipe: Any
    own: bool
    options: dict[str, Any]
    checkpoint: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Ours":
        """Reads a row from the command line.

        Raises:
            LlamaJaxError: for an unknown recipe or option.
        """
        recipe, target, own, options = None, None, False, {}
        of_recipe, of_rules = {}, {}
        known = inspect.signature(llamajax.quantize).parameters
        kinds = [(of_recipe, quant.Recipe), (of_rules, quant.Rule)]
        fields = [(changes, {field.name for field in dataclasses.fields(kind)}) for changes, kind in kinds]
        for part in name.split("+"):
            key, equals, value = part.partition("=")
            if key == "bits":
                target = _value(value)
                continue
            into = next(
                (changes for changes, names in fields if key in names and key not in ("rules", "weights")), None
            )
            if key == "checkpoint" and part == name:
                return cls(name, None, False, {"bytes": _digest(Path(value))}, value)
            if key == "calibration" and value in ("", "self"):
                own = value == "self"
            elif equals and into is not None:
                into[key] = _value(value)
            elif equals and key in known:
                options[key] = _value(value)
            elif equals or recipe is not None:
                raise llamajax.LlamaJaxError(
                    f"--ours={name}: {part}: expected a recipe, or KEY=VALUE of it, of its rules or of "
                    f"llamajax.quantize ({', '.join(known)})"
                )
            else:
                recipe = read_recipe(part)
        recipe = read_recipe(_SEARCHED) if recipe is None else recipe
        try:
            recipe = recipe if target is None else recipe.with_target(target)
            rules = tuple(rule if rule.keep else dataclasses.replace(rule, **of_rules) for rule in recipe.rules)
            return cls(name, dataclasses.replace(recipe, rules=rules, **of_recipe), own, options)
        except (TypeError, ValueError) as error:
            raise llamajax.LlamaJaxError(f"--ours={name}: {error}") from None


def _digest(folder: Path) -> str:
    """Returns the SHA-256 of a checkpoint's files."""
    if not folder.exists():
        raise llamajax.LlamaJaxError(f"--ours=checkpoint={folder}: there is no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(path for path in [folder, *folder.rglob("*")] if path.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _value(text: str) -> Any:
    """Returns a number, a boolean or None if the text is one, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Bench:
    """A model with everything that its rows need; each part is made when it is first used.

    Attributes:
        of: the model and its text.
        weights: SHA-256 of its weights.
        calibration: windows of the calibration text, int32 [W, T].
    """

    def __init__(self, of: Subject, values: flags.FlagValues, scratch: Path):
        """Stores where files belong."""
        self.of, self.scratch = of, scratch
        self.weights = weights_sha256(of.model)
        self._calibration_tokens, self._windows, self._references = values.calibration_tokens, values.windows, {}
        self.calibration = self._calibrating(of.text.seen)

    def _calibrating(self, ids: np.ndarray) -> np.ndarray:
        """Cuts a calibration text into windows, as `llamajax quantize` does."""
        config = self.of.model.config
        window = min(_WINDOW, config.context_length)
        windows_WT = calibration_windows(ids, config, window, self.of.tokenizer.first_id)
        return windows_WT[: max(1, self._calibration_tokens // window)]

    def windows(self, context: int) -> Windows:
        """Returns windows of the unseen half; their tokens are as many for every context."""
        if context > self.of.model.config.context_length:
            raise llamajax.LlamaJaxError(
                f"--context={context}: {self.of.name} is made for {self.of.model.config.context_length}"
            )
        windows = document_windows(self.of.text.unseen, context)
        rows = windows.rows[: max(1, self._windows * _WINDOW // context)]
        return Windows(with_bos(rows, self.of.bos_id))

    def reference(self, context: int) -> Reference:
        """Returns the log probabilities of the float model."""
        if context not in self._references:
            say(f"{self.of.name}: the reference at {context} tokens")
            file = self.scratch / f"{self.of.name.replace('/', '-')}-{context}.float32"
            self._references[context] = Reference(self.of.model, self.windows(context), file)
        return self._references[context]

    @functools.cached_property
    def importance(self) -> dict[str, np.ndarray]:
        """Returns the importance matrix."""
        say(f"{self.of.name}: importance matrix of {self.calibration.size} tokens")
        return importance_matrix(self.of.model, self.calibration)

    @functools.cached_property
    def own_text(self) -> np.ndarray:
        """Returns a calibration text that the model generates, as long as the other one."""
        say(f"{self.of.name}: {self.calibration.size} tokens of its own text")
        length = self.calibration.shape[1]
        return self._calibrating(own_text(self.of.model, self.of.tokenizer, self.calibration.size, length=length))

    @functools.cached_property
    def floats(self) -> Path:
        """Returns the path of the model as GGUF in float32."""
        path = self.scratch / f"{self.of.name.replace('/', '-')}.gguf"
        llamajax.save_checkpoint(self.of.model, path, tokenizer=self.of.tokenizer, form="gguf", dtype="float32")
        return path

    def key(self, row: "Ours | str", setting: Setting) -> dict[str, Any]:
        """Returns everything that determines a row's figures."""
        name = row if isinstance(row, str) else row.name
        rows = np.ascontiguousarray(self.windows(setting.context).rows)
        key = {"model": self.of.name, "weights": self.weights, "row": name, **setting._asdict()}
        key |= {"windows": len(rows), "text": hashlib.sha256(rows.tobytes()).hexdigest()[:16]}
        key["calibration"] = hashlib.sha256(self.calibration.tobytes()).hexdigest()[:16]
        if isinstance(row, Ours):
            key["recipe"] = hashlib.sha256(repr((row.recipe, sorted(row.options.items()))).encode()).hexdigest()[:16]
        return key

    def figures(self, row: "Ours | str", settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
        """Quantizes once and returns the figures in each setting."""
        start = time.perf_counter()
        path = self.scratch / "row.gguf"
        if isinstance(row, Ours):
            calibration = self.own_text if row.own else self.calibration
            start = time.perf_counter()
            if row.checkpoint is None:
                options = {"calibration": calibration, "bos_id": self.of.bos_id} | row.options
                packed = llamajax.quantize(self.of.model, row.recipe, **options)
            else:
                packed = llamajax.load(row.checkpoint)[0]
            size, family = sum(leaf.nbytes for leaf in jax.tree.leaves(packed)), _FAMILIES[0]
        else:
            kind, _, weighed = row.partition(_IMATRIX[0])
            importance, source = self.importance if weighed else None, self.floats
            start = time.perf_counter()
            size = quantize_file(source, path, kind, importance)
            packed, family = llamajax.open_checkpoint(path).read("float32"), _FAMILIES[2 if weighed else 1]
        head = {"family": family, "bytes": size, "bits_per_weight": 8 * size / self.of.model.config.num_parameters}
        head["quantization_seconds"] = time.perf_counter() - start
        for setting in settings:
            start = time.perf_counter()
            model = packed
            if setting.activations != "recipe":
                model = llamajax.with_activations(model, setting.activations)
            figures = self.reference(setting.context).compare(llamajax.prepare(model), setting.cache, name_of(row))
            yield setting, head | figures | {"evaluation_seconds": time.perf_counter() - start}
        path.unlink(missing_ok=True)


def name_of(row: "Ours | str") -> str:
    """Returns the name of a row, for people."""
    return row if isinstance(row, str) else row.name


# ---- The file -------------------------------------------------------------------------------------------------------


# The fields of every row that tables show, and the fields of its key.
_SHOWN = {"family", "bits_per_weight", "kl_divergence", "kl_standard_error", "top1_agreement", "top1_standard_error"}
_SHOWN |= {"perplexity", "perplexity_standard_error", "reference_perplexity"}
_SHOWN_OF_KEY = {"model", "row", "windows", *Setting._fields}


def _is_row(row: Any) -> bool:
    """Whether a row of a file has every field that tables show."""
    key = row.get("key") if isinstance(row, dict) else None
    return isinstance(key, dict) and _SHOWN_OF_KEY <= key.keys() and _SHOWN <= row.keys()


class Record:
    """The JSON file of measured rows; it is written again after each row."""

    def __init__(self, path: Path | None):
        """Reads the file if it exists."""
        self.path = path
        self.content: dict[str, Any] = {"models": {}, "rows": []}
        if path is not None and path.exists():
            content = read_json(path)
            if not (
                isinstance(content, dict)
                and isinstance(content.get("models"), dict)
                and isinstance(content.get("rows"), list)
                and all(map(_is_row, content["rows"]))
            ):
                raise llamajax.LlamaJaxError(f"{path}: is no file of this script: remove it or choose another path")
            self.content = content

    def begin(self, bench: Bench) -> None:
        """Adds a model to the file.

        Raises:
            LlamaJaxError: if the file has figures of other weights of that name.
        """
        here = {"weights_sha256": bench.weights, "made": bench.of.made}
        there = self.content["models"].setdefault(bench.of.name, here)
        if there["weights_sha256"] != bench.weights:
            raise llamajax.LlamaJaxError(
                f"{self.path}: holds figures of {bench.of.name} with other weights ({there['weights_sha256'][:12]}… "
                f"there, {bench.weights[:12]}… here): remove it or choose another path"
            )

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a row that was measured before, or None."""
        return next((row for row in self.content["rows"] if row["key"] == key), None)

    def add(self, key: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Adds a row; it replaces a row with the same key."""
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"key": key, **figures, "commit": commit(), "machine": machine(), "date": when}
        self.content["rows"] = [other for other in self.content["rows"] if other["key"] != key] + [row]
        if self.path is not None:
            with new_file(self.path) as partial:
                partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        return row


def measure(bench: Bench, rows: list["Ours | str"], settings: list[Setting], record: Record, again: list[str]):
    """Returns all rows of a model in all settings, those of the file included."""
    record.begin(bench)
    found = []
    for row in rows:
        keys = {setting: bench.key(row, setting) for setting in settings}
        missing = [setting for setting in settings if name_of(row) in again or not record.find(keys[setting])]
        for setting, figures in bench.figures(row, missing) if missing else ():
            added = record.add(keys[setting], figures)
            say(f"{bench.of.name}: {name_of(row)}{_said(setting)}: {_line(added)}")
        found += [record.find(keys[setting]) for setting in settings]
    return found


# ---- What is shown --------------------------------------------------------------------------------------------------


def _said(setting: Setting) -> str:
    return "" if setting == PLAIN else f" ({setting.context} tokens, {setting.activations}, cache {setting.cache})"


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['bits_per_weight']:.3f} bits, KL {row['kl_divergence']:.5f} ± {row['kl_standard_error']:.5f}, "
        f"perplexity {row['perplexity']:.3f}, quantized in {row['quantization_seconds']:.0f} s, evaluated in "
        f"{row['evaluation_seconds']:.0f} s"
    )


def table(rows: list[dict[str, Any]], plain: bool) -> str:
    """Returns a table with aligned columns; settings other than the plain one have columns of their own."""
    heads = ["row", "bits", "KL divergence, nats", "top-1 agreement", "perplexity", "float32"]
    heads[1:1] = [] if plain else ["context", "activations", "cache"]
    lines = [heads]
    for row in sorted(rows, key=lambda row: (row["key"]["context"], -row["bits_per_weight"], row["kl_divergence"])):
        key = row["key"]
        name = f"llama.cpp {key['row']}" if row["family"] != _FAMILIES[0] else key["row"]
        cells = [name, *([] if plain else [str(key["context"]), key["activations"], key["cache"]])]
        cells += [
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl_divergence']:.5f} ± {row['kl_standard_error']:.5f}",
            f"{row['top1_agreement']:.2%} ± {row['top1_standard_error']:.2%}",
            f"{row['perplexity']:.3f} ± {row['perplexity_standard_error']:.3f}",
            f"{row['reference_perplexity']:.3f}",
        ]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    turn = lambda number, cell, width: cell.rjust(width) if number else cell.ljust(width)  # noqa: E731
    aligned = ([turn(i, *pair) for i, pair in enumerate(zip(line, widths, strict=True))] for line in ruled)
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def is_plain(row: dict[str, Any]) -> bool:
    """Whether a row was measured in the plain setting."""
    return all(row["key"][name] == value for name, value in PLAIN._asdict().items())


def show(model: str, rows: list[dict[str, Any]]) -> None:
    """Prints the tables of a model."""
    plain = [row for row in rows if is_plain(row)]
    for some, title in ((plain, "weights"), ([row for row in rows if row not in plain], "as it runs")):
        if some:
            print(f"\n{model}, {title}: {some[0]['key']['windows']} windows\n\n{table(some, some is plain)}")


def show_files(paths: list[Path], plot: str | None) -> None:
    """Shows and draws what earlier runs kept: a panel for each model, in the order of the files.

    Raises:
        LlamaJaxError: if a file is missing, or holds no figures.
    """
    rows = []
    for path in paths:
        if not path.exists():
            raise llamajax.LlamaJaxError(f"--draw={path}: there is no such file")
        rows += Record(path).content["rows"]
    models = dict.fromkeys(row["key"]["model"] for row in rows)
    for model in models:
        show(model, [row for row in rows if row["key"]["model"] == model])
    if plot:
        draw([row for row in rows if is_plain(row)], plot)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draws a panel for each model, with all rows of the plain setting."""
    panels: dict[str, list[Point]] = {}
    for row in rows:
        key = row["key"]
        label = "" if row["family"] == _FAMILIES[2] else key["row"]
        family = row["family"]
        if family == _FAMILIES[0] and not getattr(Ours.parse(key["row"]).recipe, "needs_calibration", True):
            family, label = _UNCALIBRATED, label.replace("uncalibrated+", "")
        point = Point(family, label, row["bits_per_weight"], row["kl_divergence"])
        panels.setdefault(key["model"], []).append(point)
    order = {family: i for i, family in enumerate((*_FAMILIES, _UNCALIBRATED))}
    quality_panels(
        {name: sorted(points, key=lambda point: order[point.family]) for name, points in panels.items()}, path
    )


# ---- The command ----------------------------------------------------------------------------------------------------


def run(values: flags.FlagValues) -> None:
    """Measures the rows, prints the tables and draws the picture."""
    if values.plot:
        check_picture(values.plot)
    if values.draw:
        show_files([Path(path) for path in values.draw], values.plot)
        return
    check_types(values.types)
    record = Record(Path(values.json) if values.json else None)
    weighed = (False, True) if values.imatrix else (False,)
    rows: list[Ours | str] = [Ours.parse(name) for name in values.ours]
    rows += [f"{kind}{_IMATRIX if more else ''}" for kind in values.types for more in weighed]
    settings = [
        Setting(context, activations, cache)
        for context in map(int, values.context)
        for activations in values.activations
        for cache in values.cache
    ]
    shown = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in values.model:
            of = subject(name, values.text)
            if values.swap:
                of = of._replace(text=Halves(of.text.unseen, of.text.seen))
            bench = Bench(of, values, Path(scratch))
            shown.append((name, measure(bench, rows, settings, record, values.again)))
            del of, bench  # before the next one is read
    for name, found in shown:
        show(name, found)
    if values.plot:
        plain = [row for _, found in shown for row in found]
        draw(
            [row for row in plain if row["key"]["cache"] == "float32" and row["key"]["activations"] == "recipe"],
            values.plot,
        )


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    lists = {
        "model": (["box"], f"some of {', '.join(MODELS)}, or paths of checkpoints"),
        "ours": (["int8", "int4-g32", "mixed-4.5bpw"], "rows of ours: recipes, or options joined by +"),
        "types": (list(TYPES), "llama.cpp's file types; empty for none"),
        "context": (["512"], "tokens of a window: 512, 2048, 8192"),
        "activations": (["recipe"], f"what meets packed weights: recipe, {', '.join(ACTIVATIONS)}"),
        "cache": (["float32"], f"dtypes of keys and values: {', '.join(CACHE_DTYPES)}"),
        "again": ([], "rows to measure again"),
        "draw": ([], "files of --json: measures nothing, prints their tables, and draws them with --plot"),
    }
    for name, (default, meaning) in lists.items():
        flags.DEFINE_list(name, default, meaning, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    integer("windows", 16, "windows of 512 tokens; longer contexts have as many tokens")
    integer("calibration_tokens", 8192, "of the half that is not measured on")
    flags.DEFINE_bool("imatrix", True, "llama.cpp's types with an importance matrix, too", flag_values=values)
    flags.DEFINE_bool(
        "swap", False, "figures on the first half of the text, the rest on the second", flag_values=values
    )
    flags.DEFINE_string("text", None, "UTF-8 file instead of the model's own text", flag_values=values)
    flags.DEFINE_string(
        "json", None, "file of all figures; rows that are in it are not measured again", flag_values=values
    )
    flags.DEFINE_string("plot", None, "picture to draw, .svg or .png", flag_values=values)


if __name__ == "__main__":
    define(flags.FLAGS)
    run_script(run)
