"""`llamajax verify`: checks a bundle's golden prompts on every installed runtime."""

import dataclasses
import math
from typing import Any

from absl import flags
from rich.table import Table

from export.bundle import open_bundle
from export.cli.export import define_python, pythons
from export.verification import RUNTIMES, Result, verify
from llamajax import LlamaJaxError
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.sizes import readable_bytes
from llamajax.cli.terminal import as_json, printable, show, spinner, write

SUMMARY = "check that a bundle gives the expected results on every installed runtime"
EXAMPLES = (
    "llamajax verify box.bundle",
    "llamajax verify box.bundle --runtime=jax,iree --json",
    "llamajax verify box.bundle --python=iree=path/to/env/bin/python",
)
POSITIONAL = "bundle"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    with group(values, COMMON):
        flags.DEFINE_string(
            "bundle", None, "Folder of the bundle, as `BUNDLE`; --bundle= may be left out.", flag_values=values
        )
        flags.DEFINE_list("runtime", list(RUNTIMES), "`RUNTIMES` to try, separated by commas.", flag_values=values)
        flags.DEFINE_boolean("json", False, "Prints JSON instead of a table.", flag_values=values)
    define_python(values)


def run(values: flags.FlagValues) -> None:
    """Prints a table or JSON.

    Raises:
        LlamaJaxError: if the results on a runtime differ from the expected ones, or no runtime ran.
    """
    if not values.bundle:
        raise LlamaJaxError("no bundle is given: expected llamajax verify BUNDLE")
    bundle = open_bundle(values.bundle)
    results = []
    attempts = verify(bundle, values.runtime, pythons(values))
    for name in values.runtime:
        with spinner(f"running on {name}"):
            results.append(next(attempts))
    if values.json:
        write(as_json([_plain(result) for result in results]))
    else:
        _print(results)
    failed = [result.runtime for result in results if not result.skipped and not result.held]
    if failed:
        raise LlamaJaxError(
            f"{bundle.path}: the results on {', '.join(failed)} differ from the expected ones: see the results above"
        )
    if all(result.skipped for result in results):
        raise LlamaJaxError(f"{bundle.path}: no runtime for this bundle is installed: nothing was verified")


def _plain(result: Result) -> dict[str, Any]:
    """The fields of a result for JSON; infinities become None."""
    fields = dataclasses.asdict(result)
    return {key: None if value in (math.inf, -math.inf) else value for key, value in fields.items()}


def _print(results: list[Result]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in (
        "runtime",
        "held",
        "tokens",
        "largest logit error",
        "of at most",
        "load s",
        "tokens/s",
        "resident",
        "",
    ):
        table.add_column(column, justify="left" if column in ("runtime", "held", "") else "right")
    for result in results:
        if result.skipped or result.error:
            state = "-" if result.skipped else "NO"
            table.add_row(result.runtime, state, "", "", "", "", "", "", printable(result.skipped or result.error))
            continue
        error = f"{result.largest_logit_error:.1e}" if math.isfinite(result.largest_logit_error) else "not finite"
        table.add_row(
            result.runtime,
            "yes" if result.held else "NO",
            f"{result.tokens} {'same' if result.exact else 'differ'}",
            error,
            f"{result.tolerance:.1e}",
            f"{result.load_seconds:.2f}",
            f"{result.tokens_per_second:.1f}",
            readable_bytes(result.resident_bytes),
            printable(result.version),
        )
    show(table)
