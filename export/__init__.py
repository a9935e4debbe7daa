"""Programs and weights for other runtimes: bundles, and targets that are built from them.

    bundle = write(model, tokenizer, "box.bundle", Spec(slots=512))
    for result in verify(bundle):
        print(result.runtime, result.exact)

Depends on `llamajax` and `quant`; neither of them imports it.
"""

from export.bundle import Bundle, open_bundle, read_manifest, write
from export.lowering import Program, Value, lower
from export.profiles import PROFILES, Profile, Spec
from export.targets import add_target
from export.verification import RUNTIMES, Result, Runtime, run, verify

__all__ = [
    "PROFILES",
    "RUNTIMES",
    "Bundle",
    "Profile",
    "Program",
    "Result",
    "Runtime",
    "Spec",
    "Value",
    "add_target",
    "lower",
    "open_bundle",
    "read_manifest",
    "run",
    "verify",
    "write",
]
