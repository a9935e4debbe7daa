"""`llamajax inspect`: shows what a checkpoint holds; reads only its header."""

from collections import Counter
from typing import Any

import numpy as np
from absl import flags
from rich.markup import escape
from rich.table import Table

from llamajax.checkpoint import Opened, read_tokenizer
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import define_model, open_named
from llamajax.cli.sizes import memory_bytes, readable_bytes
from llamajax.cli.terminal import as_json, printable, show, write
from llamajax.files import shortened
from llamajax.parameters import leaves, named_weights
from quant import BACKENDS, is_weight, kinds, lowerings

_FIRST, _LONGEST = 3, 90  # numbers of shown array elements, and of shown characters of a value

SUMMARY = "show a checkpoint's architecture, tensors, dtypes, bytes and source format"
EXAMPLES = (
    "llamajax inspect --model=any-llama.gguf",
    "llamajax inspect --model=path/to/Llama-3.2-1B --json",
    "llamajax inspect --model=box-int4 --backend=cpu",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    with group(values, COMMON):
        flags.DEFINE_enum(
            "backend",
            None,
            list(BACKENDS),
            "Shows how `BACKEND` multiplies by each tensor: with a fast layout, or by dequantizing the whole weight, "
            "and the reason.",
            flag_values=values,
        )
        flags.DEFINE_boolean("json", False, "Prints one JSON object instead of tables.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Prints tables or JSON."""
    opened = open_named(values, values.model)
    tokenizer = read_tokenizer(opened, values.tokenizer)
    tensors = _tensors(opened, values.backend)
    size = sum(tensor["bytes"] for tensor in tensors)
    summary: dict[str, Any] = {
        "model": str(opened.path),
        "format": opened.description,
        "parameters": opened.config.num_parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / opened.config.num_parameters,
        **_of_file(opened),
        "tokenizer": tokenizer is not None,
        "tokenizer_form": None if tokenizer is None else tokenizer.form,
        "tokenizer_ids": None if tokenizer is None else tokenizer.vocab_size,
        "tokenizer_problem": opened.tokenizer_problem if tokenizer is None else None,
        "words": opened.words.to_dict(),
        "config": opened.config.to_dict(),
        "tensors": tensors,
    }
    if values.json:
        write(as_json(summary, indent=2))
    else:
        _print_tables(opened, summary)


def _tensors(opened: Opened, backend: str | None) -> list[dict[str, Any]]:
    """Describes each leaf of the model, and its form in the file where that may differ."""
    made = []
    stored = opened.source.stored
    for name, weight in named_weights(opened.abstract).items():
        leaf = leaves(opened.config)[name]
        tensor: dict[str, Any] = {
            "name": name,
            "shape": list(weight.shape),
            "dtype": ", ".join(kinds(weight)),
            "bytes": memory_bytes(weight),
        }
        if stored:
            here = [stored[place] for place in leaf.places]
            tensor["file_types"] = {kind: count for kind, count in Counter(one.type for one in here).items()}
            tensor["file_bytes"] = sum(one.nbytes for one in here)
        if backend:
            looked_up = leaf.spec.is_only_looked_up
            products = ["none: rows are looked up"] if looked_up else lowerings(weight, backend)
            tensor["product"] = ", ".join(products)
        made.append(tensor)
    return made


def _of_file(opened: Opened) -> dict[str, Any]:
    """For a file that stores weights in another form: bytes and bits in the file, how many stay packed, metadata."""
    stored = opened.source.stored
    if not stored:
        return {}
    size = sum(one.nbytes for one in stored.values())
    return {
        "file_bytes": size,
        "file_bits_per_weight": 8 * size / opened.config.num_parameters,
        "packed": sum(is_weight(weight) for weight in opened.source.abstract.values()),
        "weights": len(stored),
        "expanded": opened.source.expanded,
        "metadata": {key: _plain(value) for key, value in opened.source.metadata.items()},
    }


def _plain(value: Any) -> Any:
    """A metadata value for JSON; for an array its type, its number of elements and the first elements."""
    if not isinstance(value, list | np.ndarray):
        return value
    kind = value.dtype.name if isinstance(value, np.ndarray) else type(value[0]).__name__ if value else "nothing"
    return {"array": kind, "count": len(value), "first": [_plain(one) for one in _items(value[:_FIRST])]}


def _items(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _tokenizer(summary: dict[str, Any]) -> str:
    """Describes the tokenizer in words."""
    if summary["tokenizer_problem"]:
        return f"cannot be read: {summary['tokenizer_problem']}"
    if not summary["tokenizer"]:
        return "none included: give --tokenizer"
    form, size, added = summary["tokenizer_form"], summary["tokenizer_ids"], len(summary["words"].get("added", ()))
    whose = "tokenizer.json" if form == "tokenizers" else form
    return f"{whose}, included, of {size:,} ids" + (f", {added} of them added tokens" if added else "")


def _print_tables(opened: Opened, summary: dict[str, Any]) -> None:
    head = Table(title=printable(summary["model"]), title_justify="left", show_header=False)
    head.add_row("format", printable(summary["format"]))
    head.add_row("parameters", f"{summary['parameters']:,}")
    head.add_row("in memory", f"{readable_bytes(summary['bytes'])}, {summary['bits_per_weight']:.2f} bits a weight")
    if "file_bytes" in summary:
        bits = f"{summary['file_bits_per_weight']:.2f} bits a weight"
        head.add_row("in the file", f"{readable_bytes(summary['file_bytes'])}, {bits}")
        head.add_row("packed", _packed(summary))
    head.add_row("tokenizer", escape(_tokenizer(summary)))
    for name, value in opened.config.to_dict().items():
        head.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    show(head)
    if summary.get("metadata"):
        _print_metadata(summary["metadata"])
    columns = {"tensor": "left", "shape": "right", "dtype": "left", "bytes": "right"}
    stored, products = "file_bytes" in summary, "product" in summary["tensors"][0]
    columns |= {"in the file": "left", "bytes there": "right"} if stored else {}
    columns |= {"product": "left"} if products else {}
    table = Table()
    for column, justify in columns.items():
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for tensor in summary["tensors"]:
        shape = " x ".join(str(size) for size in tensor["shape"])
        row = [tensor["name"], shape, tensor["dtype"], f"{tensor['bytes']:,}"]
        row += [_counted(tensor["file_types"]), f"{tensor['file_bytes']:,}"] if stored else []
        table.add_row(*row, *([tensor["product"]] if products else []))
    table.add_section()
    table.add_row("total", "", "", f"{summary['bytes']:,}", *(["", f"{summary['file_bytes']:,}"] if stored else []))
    show(table)


def _packed(summary: dict[str, Any]) -> str:
    """Says how many weights keep the packed form that they have in the file."""
    rest = f"; {summary['expanded']} are read as floats" if summary["expanded"] else ""
    return f"{summary['packed']} of {summary['weights']} weights, as in the file{rest}; the others are floats there"


def _counted(types: dict[str, int]) -> str:
    """The types of a stack of layers; if they differ, with the number of layers of each type."""
    return ", ".join(f"{count} {kind}" if len(types) > 1 else kind for kind, count in types.items())


def _print_metadata(metadata: dict[str, Any]) -> None:
    """Prints a table of the file's metadata, with long values shortened."""
    table = Table(title="metadata", title_justify="left")
    table.add_column("key")
    table.add_column("value")
    for key, value in metadata.items():
        if isinstance(value, dict):
            text = f"{value['count']:,} {value['array']}: {shortened(value['first'], _LONGEST)[1:-1]}"
            text += ", …" if value["count"] > len(value["first"]) else ""
        else:
            text = shortened(value, _LONGEST)[1:-1] if isinstance(value, str) else str(value)
        table.add_row(escape(printable(key)), escape(printable(text)))
    show(table)
