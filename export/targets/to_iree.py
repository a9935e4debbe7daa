"""Compiles all programs of a bundle with IREE to the functions of one module; weights stay outside the module.

    python export/targets/to_iree.py BUNDLE FOLDER iree-cpu      # writes FOLDER/model.vmfb, prints a JSON object

Needs the program `iree-compile` of the package iree-base-compiler, in the same environment or on PATH; imports nothing
of IREE. Arguments after the target's name are passed to iree-compile and replace the same options of the target:
`iree-cuda --iree-cuda-target=sm_89`.

Weights are parameters of the scope "model": the program that loads the module gives it weights.safetensors, and IREE
finds each weight there by its name. They stay packed. The state, which a program both takes and returns, is consumed:
it is updated in place.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

# With a loop over layers, IREE 3.13 decodes 5 times slower, and prefill of 64 tokens fails at run time:
# "indirect buffer reference slot 0 is out range".
PROFILE = "unrolled"

OPTIONS = (
    # Without this, the products of decode, of a vector and a matrix, take 9 times as long.
    "--iree-opt-level=O2",
    # Without this, a module unpacks its weights when it is loaded and keeps them unpacked: 7 times the memory.
    "--iree-opt-const-expr-hoisting=false",
)
_CPU = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")
_TRIPLE, _CPU_NAME, _FEATURES = (f"--iree-llvmcpu-target-{what}=" for what in ("triple", "cpu", "cpu-features"))

# A processor of this machine's kind, at a level that processors of the last ten years have: bundles run elsewhere too.
_HERE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
_PORTABLE = {"x86_64": "x86-64-v3", "aarch64": "generic"}.get(_HERE, "generic")
# The instructions of x86-64-v3, by the names of /proc/cpuinfo.
_V3 = "abm avx avx2 bmi1 bmi2 cx16 f16c fma movbe pni popcnt sse4_1 sse4_2 ssse3".split()
# The names in /proc/cpuinfo of instructions that a compiler may use; on ARM these are all names.
_INSTRUCTIONS = re.compile(r"(abm|adx|aes|amx|avx|bmi|cx16|f16c|fma|gfni|movbe|pni|popcnt|s?sse|sha|vaes|vpclmul)")

# Each target: its driver in IREE's runtime, and options of iree-compile. Code for a CPU is an ELF file that the runtime
# links itself on every system; systems differ only in their calling conventions.
TARGETS = {
    "iree-cpu": ("local-task", *_CPU, _CPU_NAME + _PORTABLE),
    "iree-cpu-host": ("local-task", *_CPU, _CPU_NAME + "host"),
    "iree-x86-64-v3": ("local-task", *_CPU, _TRIPLE + "x86_64-unknown-linux-gnu", _CPU_NAME + "x86-64-v3"),
    "iree-windows": ("local-task", *_CPU, _TRIPLE + "x86_64-pc-windows-msvc", _CPU_NAME + "x86-64-v3"),
    "iree-pi4": ("local-task", *_CPU, _TRIPLE + "aarch64-unknown-linux-gnu", _CPU_NAME + "cortex-a72"),
    "iree-android": ("local-task", *_CPU, _TRIPLE + "aarch64-unknown-linux-android29", _CPU_NAME + "generic"),
    "iree-apple": ("local-task", *_CPU, _TRIPLE + "arm64-apple-macosx", _CPU_NAME + "apple-m1"),
    "iree-riscv": (
        "local-task",
        *_CPU,
        _TRIPLE + "riscv64-unknown-linux-gnu",
        _CPU_NAME + "generic-rv64",
        _FEATURES + "+m,+a,+f,+d,+c",
        "--iree-llvmcpu-target-abi=lp64d",
    ),
    "iree-cuda": ("cuda", "--iree-hal-target-device=cuda", "--iree-cuda-target=sm_80"),
    "iree-hip": ("hip", "--iree-hal-target-device=hip", "--iree-rocm-target=gfx1100"),
    "iree-metal": ("metal", "--iree-hal-target-device=metal"),
    # On another kind of device, a Vulkan module gives wrong numbers without an error: each kind has a target.
    "iree-vulkan": ("vulkan", "--iree-hal-target-device=vulkan", "--iree-vulkan-target=ada"),
    "iree-vulkan-rdna3": ("vulkan", "--iree-hal-target-device=vulkan", "--iree-vulkan-target=rdna3"),
    "iree-vulkan-valhall": ("vulkan", "--iree-hal-target-device=vulkan", "--iree-vulkan-target=valhall"),
    "iree-vulkan-llvmpipe": ("vulkan", "--iree-hal-target-device=vulkan", "--iree-vulkan-target=llvmpipe"),
}

_ARGUMENT = re.compile(r"(%arg\d+): (tensor<[^>]*>)(?: \{([^}]*)\})?")


def build(bundle: Path, folder: Path, target: str, more: list[str]) -> dict:
    """Compiles a bundle into `folder`.

    Args:
        bundle: the folder of the bundle.
        folder: the folder to write to; must exist.
        target: a key of `TARGETS`.
        more: further options of iree-compile.

    Returns:
        The target's entry for the manifest.

    Raises:
        ValueError: if the bundle has another profile, or does not compile.
    """
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    if manifest["profile"] != PROFILE:
        raise ValueError(f"profile {manifest['profile']!r}: expected {PROFILE!r}: export it with --profile={PROFILE}")
    driver, *chosen = TARGETS[target]
    options = list({option.partition("=")[0]: option for option in (*OPTIONS, *chosen, *more)}.values())
    _compile(["-", "-o", str(folder / "model.vmfb"), *options], merged(bundle, manifest))
    version = re.search(r"compiler version (\S+)", _compile(["--version"]))
    return {
        "target": target,
        "files": ["model.vmfb"],
        "compiler": f"IREE {version[1] if version else 'of unknown version'}",
        "options": options,
        "driver": driver,
        "profile": PROFILE,
        **({"processor": _processor(options)} if driver == "local-task" else {}),
    }


def _processor(options: list[str]) -> dict:
    """The processor that the code needs: machine, LLVM's name, and instructions by the names of /proc/cpuinfo."""
    given = dict(option.split("=", 1) for option in options if "=" in option)
    triple, name = given.get(_TRIPLE[:-1], _HERE), given.get(_CPU_NAME[:-1], "")
    machine = triple.partition("-")[0]
    features = _features() if name == "host" else _V3 if name == "x86-64-v3" else []
    return {"machine": {"arm64": "aarch64"}.get(machine, machine), "name": name, "features": features}


def _features() -> list[str]:
    """Instructions of this machine; none if the system does not list them."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    listed = re.search(r"^(flags|Features)\s*: (.*)$", text, re.MULTILINE)
    names = listed[2].split() if listed else []
    return sorted(name for name in names if _HERE != "x86_64" or _INSTRUCTIONS.match(name))


def merged(bundle: Path, manifest: dict) -> str:
    """One module of all programs, as text in the dialects after IREE's input stage.

    The input stage converts StableHLO to linalg and uint8 to signless bytes, and inlines all functions into `main`, so
    that no names clash. Weights become globals instead of arguments, and `main` gets the program's name.
    """
    weights, types, functions = manifest["weights"], {}, []
    for name, program in manifest["programs"].items():
        text = _compile(["--iree-input-type=stablehlo", "--compile-to=input", str(bundle / program["file"])])
        head = re.search(r"util\.func public @main\((.*)\) -> (.*) \{\n", text)
        if head is None or text.count("util.func ") != 1:
            raise ValueError(f"program {name}: expected one function after IREE's input stage: use IREE 3.13")
        arguments, count = _ARGUMENT.findall(head[1]), len(weights) if program["weights"] == "packed" else 0
        loads = []
        for index, (argument, kind, _) in enumerate(arguments[:count]):
            types[index] = kind
            loads.append(f"    {argument} = util.global.load immutable @weight_{index} : {kind}\n")
        given, returned = [], {value["name"] for value in program["outputs"]}
        for (argument, kind, encoding), value in zip(arguments[count:], program["inputs"], strict=True):
            # Without the attribute for output storage, with which IREE 3.13 writes the result before it has read all of
            # the old value. It updates consumed arguments in place by itself if nothing reads them later.
            encoding = re.sub(r"(, )?iree\.abi\.output = \d+ : index", "", encoding)
            attributes = [encoding] * bool(encoding) + ["iree.abi.consume"] * (value["name"] in returned)
            given.append(f"{argument}: {kind}" + f" {{{', '.join(attributes)}}}" * bool(attributes))
        body = text[head.end() :].rstrip().removesuffix("}")  # the module's brace
        functions.append(f"  util.func public @{name}({', '.join(given)}) -> {head[2]} {{\n{''.join(loads)}{body}")
    named = ((index, json.dumps(weights[index]["name"]), kind) for index, kind in sorted(types.items()))
    parameters = [
        f'  util.global private @weight_{index} = #flow.parameter.named<"model"::{name}> : {kind}\n'
        for index, name, kind in named
    ]
    return "".join(["module @model {\n", *parameters, *functions, "}\n"])


def _compile(arguments: list[str], text: str = "") -> str:
    """Runs iree-compile with `text` as its standard input; returns its standard output."""
    places = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    if (program := shutil.which("iree-compile", path=places)) is None:
        raise ValueError(f"no iree-compile beside {sys.executable} or on PATH: pip install iree-base-compiler")
    made = subprocess.run([program, *arguments], input=text, capture_output=True, text=True)
    if made.returncode:
        lines = [line for line in made.stderr.splitlines() if "rror: " in line] or made.stderr.splitlines() or ["?"]
        raise ValueError(f"iree-compile {' '.join(arguments)}: exit code {made.returncode}: {lines[0][:300]}")
    return made.stdout


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", choices=TARGETS)
    options, more = parser.parse_known_args()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(build(options.bundle, options.folder, options.target, more)))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
