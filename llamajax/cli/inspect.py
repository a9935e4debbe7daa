"""`llamajax inspect`: what a checkpoint holds, from its header alone."""

from typing import Any

from absl import flags
from rich.markup import escape
from rich.table import Table

from llamajax.checkpoint import Opened, read_tokenizer
from llamajax.cli.model_flags import define_model, open_named
from llamajax.cli.sizes import memory_bytes, readable_bytes
from llamajax.cli.terminal import as_json, printable, show, write
from llamajax.parameters import leaves, named_weights
from quant import BACKENDS, kinds, lowerings

SUMMARY = "show a checkpoint's architecture, tensors, dtypes, bytes and source format"
EXAMPLES = (
    "llamajax inspect --model=box",
    "llamajax inspect --model=path/to/Llama-3.2-1B --json",
    "llamajax inspect --model=box-int4 --backend=cpu",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    flags.DEFINE_enum(
        "backend",
        None,
        list(BACKENDS),
        "say for each tensor how this backend multiplies with it: in a layout of its own, or by the reference, which "
        "dequantizes the whole weight, and why",
        flag_values=values,
    )
    flags.DEFINE_boolean("json", False, "print one JSON object instead of tables", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Prints tables, or JSON."""
    opened = open_named(values, values.model)
    tokenizer = read_tokenizer(opened, values.tokenizer)
    weights = named_weights(opened.abstract)
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": list(weight.shape), "dtype": ", ".join(kinds(weight)), "bytes": memory_bytes(weight)}
        for name, weight in weights.items()
    ]
    if values.backend:
        for tensor, (name, weight) in zip(tensors, weights.items(), strict=True):
            looked_up = leaves(opened.config)[name].spec.is_only_looked_up
            products = ["none: rows are looked up"] if looked_up else lowerings(weight, values.backend)
            tensor["product"] = ", ".join(products)
    size = sum(tensor["bytes"] for tensor in tensors)
    summary: dict[str, Any] = {
        "model": str(opened.path),
        "format": opened.description,
        "parameters": opened.config.num_parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / opened.config.num_parameters,
        "tokenizer": tokenizer is not None,
        "tokenizer_problem": opened.tokenizer_problem if tokenizer is None else None,
        "words": opened.words.to_dict(),
        "config": opened.config.to_dict(),
        "tensors": tensors,
    }
    if values.json:
        write(as_json(summary, indent=2))
    else:
        _print_tables(opened, summary)


def _tokenizer(summary: dict[str, Any]) -> str:
    """What there is of a tokenizer, for people."""
    if summary["tokenizer_problem"]:
        return f"cannot be read: {summary['tokenizer_problem']}"
    if not summary["tokenizer"]:
        return "none included: give --tokenizer"
    added = len(summary["words"].get("added", ()))
    return f"sentencepiece, included, and {added} added tokens" if added else "sentencepiece, included"


def _print_tables(opened: Opened, summary: dict[str, Any]) -> None:
    head = Table(title=printable(summary["model"]), title_justify="left", show_header=False)
    head.add_row("format", printable(summary["format"]))
    head.add_row("parameters", f"{summary['parameters']:,}")
    head.add_row("in memory", f"{readable_bytes(summary['bytes'])}, {summary['bits_per_weight']:.2f} bits a weight")
    head.add_row("tokenizer", escape(_tokenizer(summary)))
    for name, value in opened.config.to_dict().items():
        head.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    show(head)
    table = Table()
    for column, justify in (("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("bytes", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    products = "product" in summary["tensors"][0]
    if products:
        table.add_column("product")
    for tensor in summary["tensors"]:
        shape = " x ".join(str(size) for size in tensor["shape"])
        row = (tensor["name"], shape, tensor["dtype"], f"{tensor['bytes']:,}")
        table.add_row(*row, *([tensor["product"]] if products else []))
    table.add_section()
    table.add_row("total", "", "", f"{summary['bytes']:,}")
    show(table)
