"""How one process compares training loops: they take turns, and every second and byte has an owner."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

THEIRS = "trl"
"""Owner of whatever nobody else has claimed."""


class Meter(Protocol):
    """Measures the memory that code takes between :meth:`resume` and :meth:`pause`."""

    peak: int
    """Most bytes that were alive at once, of those allocated meanwhile."""

    def resume(self) -> None: ...

    def pause(self) -> None: ...


class LiveBytes(TorchDispatchMode):
    """Bytes of CPU storages that operations allocate while it is on; each counts until it is freed, on or off.

    Work buffers inside a kernel are not seen, and neither are Python objects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def resume(self) -> None:
        self.__enter__()

    def pause(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # `torch.tensor([...])` allocates unseen, and shows itself as the argument of lift_fresh.
        given = [] if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        views_of = {storage._cdata for storage in given}
        for storage in _storages(result):
            if storage._cdata not in views_of | self._counted:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check_live_bytes() -> None:
    """A hand-made example: views and other people's tensors are free, what is freed no longer counts, peaks stay.

    Raises:
        AssertionError: This version of torch frees or shows storages in another way.
    """
    meter, given = LiveBytes(), torch.zeros(1000)
    meter.resume()
    kept = torch.zeros(256)  # 1,024 bytes
    view = kept.view(16, 16)[1:]
    given.add_(1).view(10, 100)
    passing = kept * 2  # 1,024 more, for a moment
    del passing
    listed = torch.tensor([1.0, 2.0])  # 8
    meter.pause()
    unseen = torch.zeros(10_000)
    assert (meter.live, meter.peak) == (1032, 2048), f"{meter.live} and {meter.peak} bytes, not 1032 and 2048."
    del kept  # its view still holds it
    assert meter.live == 1032, f"{meter.live} bytes, not 1032."
    del view
    assert meter.live == 8, f"{meter.live} bytes, not 8."
    del listed, unseen
    assert meter.live == 0, f"{meter.live} bytes, not 0."


class CudaBytes:
    """Bytes of the CUDA allocator above the level at each :meth:`resume`, on top of what earlier stretches kept."""

    def __init__(self) -> None:
        self.peak = self._kept = self._level = 0

    def resume(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._level = torch.cuda.memory_allocated()

    def pause(self) -> None:
        self.peak = max(self.peak, self._kept + torch.cuda.max_memory_allocated() - self._level)
        self._kept = max(0, self._kept + torch.cuda.memory_allocated() - self._level)


class Ledger:
    """Whose code is running: seconds for each owner, exclusive of other owners' code that it calls.

    On CUDA, every change of owner waits for the device, so that its work is charged to who launched it. This costs
    more than it would in a run without a ledger: what it says of us is an upper bound.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        sides: For each owner whose memory is measured, under which name.
    """

    def __init__(self, device: str, sides: dict[str, str]):
        self.device, self.sides = device, sides
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.meters: dict[str, Meter] = {}
        self._owners = [THEIRS]
        self._since = 0.0

    def charge(self, function: Callable, owner: str) -> Callable:
        """The same function, its time charged to ``owner``."""

        @functools.wraps(function)
        def charged(*args, **kwargs):
            with self.running(owner):
                return function(*args, **kwargs)

        return charged

    @contextmanager
    def running(self, owner: str) -> Iterator[None]:
        caller = self._owners[-1]
        if owner == caller:
            yield
            return
        self._change(caller, owner)
        self._owners.append(owner)
        try:
            yield
        finally:
            self._owners.pop()
            self._change(owner, caller)

    def open(self, with_memory: bool) -> None:
        """Begin a page: nothing spent yet."""
        make = CudaBytes if self.device == "cuda" else LiveBytes
        self.meters = {side: make() for side in set(self.sides.values())} if with_memory else {}
        self.seconds.clear()
        self._since = self._now()

    def close(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds by owner, which add up to the time since :meth:`open`; peak bytes by side."""
        self._change(THEIRS, THEIRS)
        return dict(self.seconds), {side: meter.peak for side, meter in self.meters.items()}

    def _change(self, leaving: str, entering: str) -> None:
        before, after = self.meters.get(self.sides.get(leaving, "")), self.meters.get(self.sides.get(entering, ""))
        if before is not after and before is not None:
            before.pause()
        now = self._now()
        self.seconds[leaving] += now - self._since
        self._since = now
        if before is not after and after is not None:
            after.resume()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class TakingTurns(transformers.TrainerCallback):
    """A real ``trainer.train()`` in a thread of its own, which runs only while it has its turn.

    Args:
        trainer: Not yet started.
        steps: Optimizer steps of one turn: those that one generation serves.
        ledger: Where the turn's time is written.
    """

    def __init__(self, trainer: transformers.Trainer, steps: int, ledger: Ledger):
        self.trainer, self.steps, self.ledger = trainer, steps, ledger
        self.with_memory = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._page: tuple[dict[str, float], dict[str, int]] = {}, {}
        self._error: BaseException | None = None
        trainer.add_callback(self)
        threading.Thread(target=self._train, daemon=True).start()

    def turn(self, with_memory: bool = False) -> tuple[dict[str, float], dict[str, int]]:
        """Let it run for one turn: seconds by owner, and with ``with_memory`` peak bytes by side."""
        self.with_memory = with_memory
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._page

    def _train(self) -> None:
        self._go.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.ledger.open(self.with_memory)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self._page = self.ledger.close()
            # After the last step, the thread's end gives the turn back: logging is still to come.
            if state.global_step < state.max_steps:
                self._done.release()
                self._go.acquire()
