"""Runs a bundle with iree-base-runtime: IREE_TARGET=iree-vulkan chooses a module, IREE_DRIVER=local-sync a driver."""

import os
import platform
import re
from importlib import metadata

import numpy as np
from iree import runtime

from export.runners.runner import main

# The drivers of all targets. IREE would read another text as the address of a device.
DRIVERS = ("local-task", "cuda", "hip", "metal", "vulkan")


def check_processor(target, processor):
    """Refuses a module for another processor: running it would end the process without a message."""
    here = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    missing = [] if processor["machine"] == here else [processor["machine"]]
    if os.path.exists("/proc/cpuinfo") and not missing:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            have = re.search(r"^(flags|Features)\s*: (.*)$", file.read(), re.MULTILINE)
        missing = sorted(set(processor["features"]) - set(have[2].split())) if have else []
    if missing:
        fault = f"compiled for a processor with {', '.join(missing)}, which this one ({here}) is not"
        raise SystemExit(f"target {target}: {fault}: export it for another target, or here")


class Session:
    """Weights, packed as in the bundle, and the state, on one device."""

    def __init__(self, bundle):
        targets = bundle.manifest["targets"]
        name = os.environ.get("IREE_TARGET") or next((name for name in targets if name.startswith("iree-")), "iree-cpu")
        if name not in targets:
            raise SystemExit(f"{bundle.path}: no target {name}: export it with --profile=unrolled --target={name}")
        if targets[name]["driver"] not in DRIVERS:
            raise SystemExit(f"{bundle.path}: driver {targets[name]['driver']!r}: expected one of {DRIVERS}")
        if "processor" in targets[name]:
            check_processor(name, targets[name]["processor"])
        driver = os.environ.get("IREE_DRIVER", targets[name]["driver"])
        self.name, self._bundle = f"iree {metadata.version('iree-base-runtime')} {name} {driver}", bundle
        config, index = runtime.Config(driver), runtime.ParameterIndex()
        index.load(bundle.file("weights.safetensors"))
        weights = runtime.create_io_parameters_module(config.vm_instance, index.create_provider("model"))
        module = runtime.VmModule.mmap(config.vm_instance, bundle.file(targets[name]["files"][0]))
        self._device, self._module = config.device, runtime.load_vm_modules(weights, module, config=config)[-1]

    def reset(self):
        zeros = (np.zeros(value["shape"], value["dtype"]) for value in self._bundle.state)
        self._state = [runtime.asdevicearray(self._device, value) for value in zeros]

    def run(self, name, inputs):
        logits, *self._state = self._module[name](*inputs.values(), *self._state)
        # Not `to_host`: in IREE 3.13 it imports NumPy's memory into Vulkan, which requires alignment to a page.
        source, memory, usage = logits._buffer_view.get_buffer(), runtime.MemoryType, runtime.BufferUsage
        types = {"memory_type": memory.HOST_LOCAL | memory.DEVICE_VISIBLE}
        types["allowed_usage"] = usage.TRANSFER_TARGET | usage.MAPPING_SCOPED
        host = self._device.allocator.allocate_buffer(**types, allocation_size=source.byte_length())
        before, after = (runtime.HalFence.create_at(self._device.create_semaphore(0), value) for value in (0, 1))
        self._device.queue_copy(source, host, before, after)
        after.wait()
        return np.array(host.map().asarray(logits.shape, logits.dtype))


if __name__ == "__main__":
    main(Session, __doc__)
