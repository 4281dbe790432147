"""A CPU platform for veRL, so that its trainers run on machines without an accelerator.

veRL 0.9.0 ships platforms for CUDA, ROCm and Ascend only, but loads every entry point of the group ``verl.plugins`` on
``import verl``. This module is such an entry point. Loading it registers the platform ``cpu`` and, when no accelerator
is present and the user did not choose one through ``VERL_PLATFORM``, selects it. On a machine with an accelerator it
registers the name and changes nothing else.

The module stays light: it runs inside ``import verl``, in every process that veRL starts.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes: what stands in for peak device memory on a CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def _current_rss_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss_bytes()


class _CpuDeviceModule:
    """The part of the ``torch.cuda`` interface that veRL calls, for host memory.

    Memory figures are those of the process (resident set), since a CPU has no separate allocator to ask.
    """

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def set_device(device: Any) -> None:
        """There is one CPU device: nothing to select."""

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """CPU operators have finished when they return."""

    @staticmethod
    def empty_cache() -> None:
        """The host allocator keeps no cache that could be emptied."""

    @staticmethod
    def ipc_collect() -> None:
        """No IPC handles on a CPU."""

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "cpu"

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return _current_rss_bytes()

    memory_reserved = memory_allocated

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        return peak_rss_bytes()

    max_memory_reserved = max_memory_allocated

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        """The kernel keeps the peak of the whole process and cannot reset it."""

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """veRL's platform interface on plain CPU cores: one device, gloo for communication."""

    _device_module = _CpuDeviceModule()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> Any:
        return self._device_module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:  # type: ignore[override]
        # veRL passes this to Tensor.to(); an int would mean an accelerator index there.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        self._device_module.set_device(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        self._device_module.synchronize(device_index)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The host allocator has no such settings."""

    def empty_cache(self) -> None:
        self._device_module.empty_cache()

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "METASFT_CPU_VISIBLE_DEVICES"  # nothing reads it; veRL only needs a name

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        """No vendor profiler on a CPU."""

    def profiler_stop(self) -> None:
        """No vendor profiler on a CPU."""

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def accelerator_present() -> bool:
    """True when torch sees a device that one of veRL's own platforms drives (CUDA, ROCm or Ascend)."""
    return torch.cuda.is_available() or (hasattr(torch, "npu") and torch.npu.is_available())


def _normalise_backend_string() -> None:
    """Let ``init_process_group`` accept the backend ``"cpu:gloo,cpu:gloo"``.

    veRL composes ``"cpu:gloo,<device>:<backend>"`` when it sets up a process group itself (its Ray workers do). With
    the CPU as the device that names it twice, which torch rejects as a duplicate.
    """
    original = torch.distributed.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend == "cpu:gloo,cpu:gloo":
            backend = "gloo"
        original(backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def activate() -> bool:
    """Select the CPU platform unless an accelerator is present or the user chose another one.

    Returns True when the CPU platform is now veRL's platform.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen not in ("", "cpu") or (not chosen and accelerator_present()):
        return False
    set_platform(PlatformCPU())
    # veRL looks its engines up by device. Its FSDP engine is registered for accelerators only, but runs on a CPU
    # unchanged; this is veRL's own switch for choosing the registration to use.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    # oneDNN keeps the compiled code of 1024 shapes of a product: 300 MB, with batches of ever other sizes. A pass has
    # fewer than 64, and what it does not find again costs no measurable time. Read at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    _normalise_backend_string()
    return True


activate()
