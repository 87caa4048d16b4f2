"""ReadingWorker: a vLLM worker that reads features while it generates, K floats a token.

Named to vLLM as ``worker_cls``, with ``additional_config={"mechreward": {"backend": ..., "points": [...]}}``;
`mechreward.rollout.vllm` does both. It holds after each step of the engine what the step fed to the model, and hands
it over when asked. Two ways to see the residual stream:

* ``"aux"``: the model itself returns it, as drafters of speculative decoding need it; works in compiled graphs.
* ``"hook"``: forward hooks on decoder layers; a compiled model never runs them, so only with ``enforce_eager=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from mechreward.errors import CaptureError
from mechreward.readout import HookPoint, ReadoutBank
from mechreward.rollout.wire import receive_bank, send_fed, send_problem

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]


class ReadingWorker(Worker):
    """Reads the tokens after each request's prompt, while a window is open.

    Methods whose names begin with ``mechreward`` are called by RPC; they take and give text.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        options = self.vllm_config.additional_config["mechreward"]
        points = [HookPoint.parse(name) for name in options["points"]]
        self._how = options["backend"]
        self._states = (_AuxStates if self._how == "aux" else _HookedStates)(self.model_runner, points)
        self._bank: ReadoutBank | None = None
        self._window: _Window | None = None

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of the engine, and what it fed to the model."""
        if self._window is None or not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output)
        self._states.begin()
        output = super().execute_model(scheduler_output)
        try:
            states = self._states.end()
            self._window.take(scheduler_output, _order(self.model_runner), _fed(self.model_runner), states)
        except CaptureError as error:
            self._window.problem = str(error)
        return output

    def mechreward_attach(self, text: str) -> str:
        """Take what is to be read, at hook points that the engine was started with; returns how it is read."""
        bank = receive_bank(text)
        if unknown := set(bank.hook_points) - set(self._states.points):
            raise CaptureError(f"This engine was not started to read {', '.join(map(str, sorted(unknown)))}.")
        self._bank = bank
        return self._how

    def mechreward_open(self, prompts: str = "") -> str:
        """Read from now on; with ``prompts="too"`` also what requests begin with."""
        assert self._bank is not None  # attached before
        self._window = _Window(self._bank, prompts == "too")
        return "open"

    def mechreward_drain(self) -> str:
        """What was read since the window was opened, which is closed."""
        assert self._window is not None
        window, self._window = self._window, None
        return send_problem(window.problem) if window.problem else window.sent()


def _order(runner: Any) -> list[str]:
    """The requests of the step that ran, in the order of their tokens."""
    # Model runner V1 keeps its batch; V2 makes one for each step, which stays until tokens are sampled.
    batch = runner.input_batch if hasattr(runner, "input_batch") else runner.execute_model_state.input_batch
    return list(batch.req_ids)


def _fed(runner: Any) -> Tensor:
    """The step's token ids, in a buffer that the next step overwrites."""
    return runner.input_ids.gpu if hasattr(runner, "input_batch") else runner.execute_model_state.input_batch.input_ids


class _AuxStates:
    """The residual stream as an output of the model."""

    def __init__(self, runner: Any, points: list[HookPoint]):
        self.points, self._runner = points, runner
        # vLLM counts what goes into a layer: the output of layer L is number L + 1.
        self._numbers = sorted({_number(point) for point in points})
        runner.get_model().set_aux_hidden_state_layers(tuple(self._numbers))
        runner.use_aux_hidden_state_outputs = True

    def begin(self) -> None:
        pass

    def end(self) -> dict[HookPoint, Tensor]:
        state = self._runner.execute_model_state
        states = None if state is None else state.aux_hidden_states
        if states is None or len(states) != len(self._numbers):
            raise CaptureError("The model returned no hidden states: read with backend='forward'.")
        by_number = dict(zip(self._numbers, states, strict=True))
        return {point: by_number[_number(point)] for point in self.points}


class _HookedStates:
    """The residual stream as hooks on decoder layers see it, in eager mode."""

    def __init__(self, runner: Any, points: list[HookPoint]):
        self.points = points
        self._states: dict[HookPoint, Tensor] | None = None
        layers = _decoder_layers(runner.get_model(), runner.model_config.hf_text_config.num_hidden_layers)
        for point in points:
            # The input of a layer is the output of the one before; only the first has none before it.
            if (number := _number(point)) == 0:
                layers[0].register_forward_pre_hook(
                    lambda _, args, kwargs, p=point: self._before(p, args, kwargs), with_kwargs=True
                )
            else:
                layers[number - 1].register_forward_hook(lambda _, args, output, p=point: self._keep(p, output))

    def _before(self, point: HookPoint, args: tuple, kwargs: dict[str, Any]) -> None:
        self._keep(point, kwargs["hidden_states"] if "hidden_states" in kwargs else args[1])

    def _keep(self, point: HookPoint, output: Any) -> None:
        if self._states is None:
            return
        # Layers hand on (hidden, residual), whose sum is the stream; the next norm overwrites both in place.
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        self._states[point] = hidden.clone() if residual is None else hidden + residual

    def begin(self) -> None:
        self._states = {}

    def end(self) -> dict[HookPoint, Tensor]:
        states, self._states = self._states or {}, None
        if len(states) < len(self.points):
            raise CaptureError(
                "The hooks never ran: the model is compiled. Start the engine with enforce_eager=True, or read with "
                "backend='forward'."
            )
        return states


def _number(point: HookPoint) -> int:
    return point.layer + (point.site == "resid_post")


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(found) != 1:
        raise CaptureError(f"{type(model).__name__} holds {len(found)} lists of {count} layers where one was expected.")
    return found[0]


@dataclass
class _Step:
    """What was read of one step: for each stretch, whose it is, its first position behind the prompt, its length."""

    stretches: list[tuple[str, int, int]]
    tokens: Tensor  # [n]
    values: Tensor  # [n, K]


class _Window:
    """What was fed to the model while it was open. Positions come from the scheduler, which is on the CPU."""

    def __init__(self, bank: ReadoutBank, prompts: bool):
        self._bank, self._with_prompts = bank, prompts
        self._prompts: dict[str, list[int]] = {}
        self._steps: list[_Step] = []
        self.problem: str | None = None

    def take(self, step: Any, order: list[str], fed: Tensor, states: dict[HookPoint, Tensor]) -> None:
        """One step: which rows to read, and their readings."""
        for new in step.scheduled_new_reqs:
            self._prompts[new.req_id] = [] if self._with_prompts else list(new.prompt_token_ids or [])
        done = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        done |= zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True)
        rows: list[int] = []
        stretches: list[tuple[str, int, int]] = []
        row = 0
        for request in order:
            count = step.num_scheduled_tokens.get(request, 0)
            if count and request in self._prompts:  # one that came before the window is not ours
                start = done[request] - len(self._prompts[request])
                skipped = max(-start, 0)  # of the prompt
                if skipped < count:
                    rows += range(row + skipped, row + count)
                    stretches.append((request, start + skipped, count - skipped))
            row += count
        if rows:
            chosen = torch.tensor(rows).to(fed.device, non_blocking=True)
            values = torch.zeros(len(rows), len(self._bank), device=fed.device)
            for point in self._bank.hook_points:
                self._bank.encode(point, states[point], values, chosen)
            self._steps.append(_Step(stretches, fed[chosen], values))

    def sent(self) -> str:
        """Each request's tokens and readings; a position that was fed twice (preemption) counts the last time."""
        stretches = [stretch for step in self._steps for stretch in step.stretches]
        lengths: dict[str, int] = {}
        for request, start, count in stretches:
            lengths[request] = max(lengths.get(request, 0), start + count)
        first = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))
        tokens = np.full(sum(lengths.values()), -1, dtype=np.int32)
        values = np.zeros((len(tokens), len(self._bank)), dtype=np.float32)
        if stretches:
            where = np.concatenate([np.arange(count) + first[request] + start for request, start, count in stretches])
            # NumPy keeps the last of several values for one place.
            tokens[where] = torch.cat([step.tokens for step in self._steps]).cpu().numpy()
            values[where] = torch.cat([step.values for step in self._steps]).cpu().numpy()
        prompts = [self._prompts[request] for request in lengths]
        return send_fed(prompts, list(lengths.values()), torch.from_numpy(tokens), torch.from_numpy(values))
