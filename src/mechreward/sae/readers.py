"""Named tensors out of files: only what is asked for is read, as float32, and nothing is unpickled but tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechreward.errors import SAEError

BLOCK_BYTES = 1 << 20
"""How much of a numpy archive is read at once."""


def brief(error: Exception) -> str:
    """An error in one line: some quote the whole file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class Reader(Protocol):
    """Reads named tensors, or some of their rows (axis 0) or columns (axis 1), as float32."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor: ...


class SafetensorsReader:
    """Memory-maps the file: only the slices that are asked for are read."""

    def __init__(self, file: Path):
        self.file = file
        with self._open() as tensors:
            self.names = set(tensors.keys())

    @contextmanager
    def _open(self):
        if not self.file.exists():
            raise SAEError(f"{self.file} is missing: fetch the SAE again.")
        try:
            with safe_open(self.file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise SAEError(
                f"{self.file} is not a readable safetensors file ({brief(error)}): fetch it again."
            ) from error

    def _slice(self, tensors: Any, name: str) -> Any:
        if name not in self.names:
            raise SAEError(f"{self.file} has no tensor '{name}' (it has {', '.join(sorted(self.names))}).")
        return tensors.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open() as tensors:
            return tuple(self._slice(tensors, name).get_shape())

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        with self._open() as tensors:
            stored = self._slice(tensors, name)
            if ids is None:
                return _float(tensors.get_tensor(name), name, self.file)
            pieces = [stored[i : i + 1] if axis == 0 else stored[:, i : i + 1] for i in ids]
            return _float(torch.cat(pieces, dim=axis), name, self.file)


class NpzReader:
    """numpy archives, a block of rows at a time: W_enc may be gigabytes, and its checksum covers all of it."""

    def __init__(self, file: Path):
        self.file = file

    @contextmanager
    def _open(self, name: str):
        try:
            with zipfile.ZipFile(self.file) as members, members.open(f"{name}.npy") as member:
                yield member
        except FileNotFoundError as error:
            raise SAEError(f"{self.file} is missing: fetch the SAE again.") from error
        except KeyError as error:
            raise SAEError(f"{self.file} has no array '{name}': it is not a Gemma Scope params.npz.") from error
        except SAEError:
            raise
        except Exception as error:  # zipfile, zlib and numpy each raise their own on a damaged file
            raise SAEError(f"{self.file} is not a readable npz file ({brief(error)}): fetch it again.") from error

    def _header(self, member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as member:
            return self._header(member)[0]

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        with self._open(name) as member:
            shape, fortran, dtype = self._header(member)
            if dtype.kind != "f" or fortran:
                raise SAEError(f"{name} in {self.file} is {dtype} in an unexpected order, not floating point rows.")
            if ids is not None and max(ids, default=0) >= (shape[axis] if axis < len(shape) else 0):
                raise SAEError(
                    f"{name} in {self.file} has shape {shape}, which lacks latent {max(ids)}: it is damaged."
                )
            width = int(np.prod(shape[1:]))
            rows = max(1, BLOCK_BYTES // max(1, width * dtype.itemsize))
            kept = []
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = member.read(count * width * dtype.itemsize)
                if len(data) < count * width * dtype.itemsize:
                    raise SAEError(f"{name} in {self.file} is cut off: fetch it again.")
                block = np.frombuffer(data, dtype=dtype).reshape(count, *shape[1:])
                if ids is not None and axis == 1:
                    block = block[:, ids]
                elif ids is not None:
                    block = block[[i - start for i in sorted(ids) if start <= i < start + count]]
                kept.append(block.astype(np.float32))
            member.read()  # to the end, where zipfile compares the checksum
            found = torch.tensor(np.concatenate(kept) if kept else np.zeros(shape, np.float32))
        in_file_order = ids is None or axis == 1
        return found if in_file_order else found[torch.tensor(ids).argsort().argsort()]


class TorchReader:
    """``torch.save`` files: memory-mapped, and nothing but tensors is unpickled (``weights_only=True``)."""

    def __init__(self, file: Path):
        self.file = file
        self.names = set(self._load())

    def _load(self) -> Mapping[str, Any]:
        if not self.file.exists():
            raise SAEError(f"{self.file} is missing: fetch the SAE again.")
        try:
            # Files from before torch 1.6 are no zip archives and can't be mapped.
            state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.file))
        except pickle.UnpicklingError as error:
            raise SAEError(
                f"{self.file} holds more than tensors, or is damaged, and was not loaded, since a pickle can run code: "
                "convert it to safetensors where you trust it."
            ) from error
        except Exception as error:  # RuntimeError, EOFError, ValueError ...: torch has no class for a damaged file
            raise SAEError(f"{self.file} is not a readable PyTorch file ({brief(error)}): fetch it again.") from error
        if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
            raise SAEError(
                f"{self.file} holds a {type(state).__name__}, not named tensors: it is no SAE that is known."
            )
        return state

    def _tensor(self, name: str) -> Tensor:
        found = self._load().get(name)
        if not isinstance(found, Tensor):
            raise SAEError(f"{self.file} has no tensor '{name}' (it has {', '.join(sorted(map(str, self.names)))}).")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def number(self, name: str) -> int:
        """A whole number, stored as such or as a tensor."""
        found = self._load().get(name)
        found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        if type(found) is not int:
            said = "nothing" if found is None else " ".join(str(found).split())[:40]
            raise SAEError(f"{self.file} should hold the whole number {name}, not {said}: it is damaged.")
        return found

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        stored = self._tensor(name)
        if ids is None:
            return _float(stored.clone(), name, self.file)
        pieces = [stored.narrow(axis, i, 1) for i in ids]
        return _float(torch.cat(pieces, dim=axis), name, self.file)


class Renamed:
    """A reader of tensors under other names, and of matrices that are stored the other way round.

    Args:
        read: The file.
        names: Ours to the file's; what is not listed keeps its name.
        transposed: Those of our names that the file stores transposed.
    """

    def __init__(self, read: Reader, names: Mapping[str, str], transposed: tuple[str, ...] = ()):
        self.read, self.ours, self.transposed = read, names, transposed

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.read.shape(self.ours.get(name, name))
        return shape[::-1] if name in self.transposed else shape

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        if name in self.transposed:
            return self.read(self.ours.get(name, name), ids, 1 - axis).T.contiguous()
        return self.read(self.ours.get(name, name), ids, axis)


def _float(tensor: Tensor, name: str, file: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise SAEError(f"{name} in {file} is {tensor.dtype}, not floating point: quantised files can't be read.")
    return tensor.float()
