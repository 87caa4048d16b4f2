"""verl's platform interface on a CPU. Ray is told of a GPU that is not there, since verl's pools ask for one."""

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


class Cpu:
    """`torch.cpu` with what verl asks of `torch.cuda`."""

    def __getattr__(self, name):
        numbers = {"memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"}
        if name in numbers:
            return lambda *_: 0
        if name in {"empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "ipc_collect"}:
            return lambda *_: None
        if name == "get_device_name":
            return lambda *_: "CPU"
        if name == "mem_get_info":
            return lambda *_: (1 << 34, 1 << 34)
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: Cpu())

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def communication_backend_name(self):
        return "gloo"

    def ray_noset_envvars(self):
        return []
