"""vLLM as TRL runs it (``use_vllm=True``), read while it generates.

TRL passes vLLM no worker of ours and drops what requests were called. So our worker is named where TRL builds its
engine, and readings are found by the rollouts' own tokens.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import requests
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mechreward.errors import ConfigError, ServiceError
from mechreward.readout import Readout, ReadoutBank
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.vllm import anatomy, check_anatomy, choose_backend, prefill, reading_options
from mechreward.rollout.wire import match, receive_fed, send_bank

logger = logging.getLogger(__name__)

PATIENCE = 600
"""Seconds for one remote call of vLLM's server."""


class TRLEngine:
    """The engine of one trainer, in its process (``vllm_mode="colocate"``) or behind HTTP (``"server"``).

    Args:
        readouts: What is to be read, of which a summary of a whole dictionary is code that no worker has, and stays
            with the trainer.
        forced: How, or None for the first way that works; see `mechreward.rollout.vllm`.

    Attributes:
        backend: How the rollouts are read: ``"forward"`` leaves it to the trainer's own passes.
        bank: What is read.
    """

    def __init__(self, readouts: Sequence[Readout], forced: str | None):
        self.bank, self.forced = ReadoutBank([r for r in readouts if r.summary is None]), forced
        self.backend = "forward"
        self._trainer: Any = None

    @contextmanager
    def being_built(self) -> Iterator[None]:
        """While TRL builds an engine of its own, give it our worker."""
        module: Any = importlib.import_module("trl.generation.vllm_generation")
        plain = module.LLM

        def reading(model: str, **engine: Any) -> Any:
            found = anatomy(model, engine)
            check_anatomy(self.bank.readouts, found)
            self.backend = choose_backend(engine, found, self.forced)
            if self.backend == "second_pass" and (engine["tensor_parallel_size"] > 1 or engine["enable_sleep_mode"]):
                raise ConfigError(
                    "vllm_backend='second_pass' needs an engine of its own that is awake: leave "
                    "vllm_tensor_parallel_size and vllm_enable_sleep_mode alone, or choose another."
                )
            if self.backend != "forward":
                engine |= reading_options(engine, found, self.bank.hook_points, self.backend)
            return plain(model=model, **engine)

        module.LLM = reading
        try:
            yield
        finally:
            module.LLM = plain

    def connect(self, trainer: Any, bank: ReadoutBank) -> None:
        """Tell the worker what to read of the trainer's bank.

        Raises:
            ConfigError: The requested backend is unavailable, for example because the server runs another worker.
        """
        self._trainer = trainer
        self.bank = ReadoutBank([r for r in bank.readouts if r.summary is None], bank.apart)
        if trainer.vllm_mode == "server":
            self._ask_server()
        elif self.backend != "forward":
            self._call("mechreward_attach", send_bank(self.bank))
        logger.info("vLLM's rollouts are read by: %s.", self.backend)

    def _ask_server(self) -> None:
        if self.forced == "forward":
            return
        if self.forced == "second_pass":
            raise ConfigError(
                "vllm_backend='second_pass' needs vllm_mode='colocate': a server reads while it generates."
            )
        try:
            self.backend = self._call("mechreward_attach", send_bank(self.bank))
        except ServiceError as error:
            said = (
                f"The vLLM server reads no activations ({error}). Start it as recipes/vllm/README.md says, with "
                f"{', '.join(map(str, self.bank.hook_points))}"
            )
            if self.forced is not None:
                raise ConfigError(f"{said}.") from error
            logger.warning("%s; until then, the trainer's own passes are read.", said)

    def begin(self) -> None:
        """Before the rollouts are generated."""
        if self.backend != "second_pass":
            self._call("mechreward_open")

    def readings(self, batch: RolloutBatch) -> Tensor:
        """What was read of these rollouts, ``[B, T, K]`` float32 on the CPU.

        Raises:
            CaptureError: Not every token was.
        """
        if self.backend == "second_pass":
            return prefill(self._trainer.vllm_generation.llm, batch, len(self.bank))
        return match(receive_fed(self._call("mechreward_drain")), batch, len(self.bank))

    def _call(self, method: str, *args: str) -> str:
        generation = self._trainer.vllm_generation
        if self._trainer.vllm_mode == "colocate":
            return generation.llm.collective_rpc(method, args=args)[0]
        # One process asks for all, and each finds its own rollouts in the answer.
        answers: list[Any] = [None]
        if self._trainer.accelerator.is_main_process:
            answers = [_ask(generation.vllm_client.base_url, method, args)]
        broadcast_object_list(answers)
        if isinstance(answers[0], ServiceError):
            raise answers[0]
        return answers[0]


def _ask(url: str, method: str, args: Sequence[str]) -> str | ServiceError:
    """A remote call of vLLM's server; never twice, since what was read is handed over once."""
    try:
        reply = requests.post(f"{url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=PATIENCE)
        if reply.status_code != 200:
            return ServiceError(f"{url} answers {method} with status {reply.status_code}")
        return reply.json()["results"][0]
    except requests.RequestException as error:
        return ServiceError(f"{url} cannot be reached: {type(error).__name__}")
