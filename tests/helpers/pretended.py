"""A device that this machine does not have, pretended: tensors on it say so, move only when told, and do not mix."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE, IS_CPU = torch.Tensor.device.__get__, torch.Tensor.is_cpu.__get__
COPIES = ("copy_", "set_", "detach")


class Pretended(TorchFunctionMode):
    """Inside it, ``cuda:1`` (or ``mps``, which has no float64) is a device; all is computed on the CPU."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self._there = torch.device(device), {}

    def has(self, tensor: torch.Tensor) -> bool:
        reference = self._there.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that the tensor, and all that share its memory, is there."""
        self._there[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == DEVICE:
            return self.device if self.has(args[0]) else func(*args)
        if func == IS_CPU:
            return not self.has(args[0])
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = any(map(self.has, tensors))
        if name in ("to", "cpu", "cuda"):
            return self._moved(name, args, kwargs)
        if "device" in kwargs and kwargs["device"] is not None:
            there = torch.device(kwargs["device"]) == self.device
            kwargs["device"] = "cpu" if there else kwargs["device"]
        elif there and name not in COPIES:
            self._refuse_mixing(name, args, tensors)
        if there and self.device.type == "mps" and name == "double":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype: MPS does not support float64.")
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, self.put, result) if there and name not in ("copy_", "numpy") else result

    def _refuse_mixing(self, name, args, tensors):
        indexed = name in ("__getitem__", "__setitem__")  # CPU indices are fine, and slices copy across devices
        if indexed:
            by_tensor = any(isinstance(index, torch.Tensor) for index in tree_leaves(args[1]))
            tensors = [args[0], *args[2:]] if name == "__setitem__" and by_tensor else []
        sides = {self.has(t) for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 0 and t.numel() > 0}
        if len(sides) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}: cpu and {self.device}.")

    def _moved(self, name, args, kwargs):
        tensor, rest = args[0], [*args[1:], *kwargs.values()]
        wanted = [torch.device("cpu")] if name == "cpu" else []
        for each in rest:
            if isinstance(each, torch.device) or (isinstance(each, str) and each != "float64"):
                wanted.append(torch.device(each))
            elif isinstance(each, torch.Tensor):
                wanted.append(self.device if self.has(each) else torch.device("cpu"))
        goes = self.device if self.has(tensor) else torch.device("cpu")
        goes = wanted[0] if wanted else goes
        dtype = next((each for each in rest if isinstance(each, torch.dtype)), tensor.dtype)
        if goes.type == "mps" and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype: MPS does not support float64.")
        if (goes == self.device) == self.has(tensor):
            moved = torch.Tensor.to(tensor, dtype)
            return self.put(moved) if goes == self.device else moved
        moved = tensor.detach().clone().to(dtype)
        return self.put(moved) if goes == self.device else moved
