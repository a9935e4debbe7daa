"""Compiles a bundle's programs with XLA for a TPU or GPU that need not be present, and reports their memory and cost.

    python export/targets/ahead_of_time.py BUNDLE FOLDER tpu:v5e:2x2     # needs jax, flatbuffers, libtpu
    python export/targets/ahead_of_time.py BUNDLE FOLDER cuda:h100      # needs jax, flatbuffers, jax-cuda plugin

The programs run on one chip of the topology. A .pjrt file is a serialized PJRT executable: it loads only with the
plugin version that wrote it. report.json has memory and cost as the compiler states them; it needs no plugin.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # attached devices are not used
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.export
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# GpuTargetConfigProto in text, from openxla/xla, xla/backends/gpu/target_config/specs.
_EVERY_CARD = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
  device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
"""
CARDS = {
    "h100": """name: "NVIDIA H100 80GB HBM3" core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }""",
    "a100": """name: "NVIDIA A100-SXM4-40GB" core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040
  memory_bandwidth: 1555200000000 device_memory_size: 42331013120
  cuda_compute_capability { major: 8 feature_extension: NONE }""",
}


def topology_of(target):
    """The topology that a target names after `tpu:` or `cuda:`."""
    platform, _, name = target.partition(":")
    if platform == "tpu":
        return topologies.get_topology_desc(name, platform="tpu")
    if name not in CARDS:
        sys.exit(f"card {name!r}: expected one of {', '.join(CARDS)}")
    config = f'gpu_device_info {{ {_EVERY_CARD} {CARDS[name]} }} platform_name: "CUDA" dnn_version_info {{ major: 9 }}'
    return topologies.get_topology_desc(name, platform="cuda", topology="1x1x1", target_config=config)


def main(path, folder, target):
    """Compiles prefill of every bucket, and decode; prints the target's entry for the manifest."""
    with open(os.path.join(path, "manifest.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    device = topology_of(target).devices[0]
    sharding = SingleDeviceSharding(device)
    report = {}
    for name, program in manifest["programs"].items():
        kind = name.partition("_")[0]
        if kind not in manifest["jax"]:
            continue
        with open(os.path.join(path, manifest["jax"][kind]), "rb") as file:
            exported = jax.export.deserialize(bytearray(file.read()))
        values = [*manifest["weights"], *program["inputs"]]
        arguments = [jax.ShapeDtypeStruct(v["shape"], jax.numpy.dtype(v["dtype"]), sharding=sharding) for v in values]
        returned, first = {value["name"] for value in program["outputs"]}, len(manifest["weights"])
        state = [first + i for i, value in enumerate(program["inputs"]) if value["name"] in returned]
        compiled = jax.jit(exported.call, donate_argnums=state, keep_unused=True).lower(*arguments).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        if memory is None:
            sys.exit(f"{target}: its compiler does not report the memory of a program: expected another version")
        with open(os.path.join(folder, f"{name}.pjrt"), "wb") as file:
            file.write(compiled.runtime_executable().serialize())  # type: ignore[union-attr]
        report[name] = {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "program_bytes": memory.generated_code_size_in_bytes,
            "flops": cost.get("flops"),
            "bytes_accessed": cost.get("bytes accessed"),
        }
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    files = sorted(os.listdir(folder))
    print(
        json.dumps(
            {
                "target": target,
                "device": device.device_kind,
                "versions": {"jax": jax.__version__},
                "files": files,
                "report": report,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
