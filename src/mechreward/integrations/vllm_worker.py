"""ReadingWorker: a vLLM worker that reads features while it generates, K floats a token.

Named to vLLM as ``worker_cls``, with ``additional_config={"mechreward": {"backend": ..., "points": [...]}}``;
`mechreward.rollout.vllm` does both. It holds after each step of the engine what the step fed to the model, and hands
it over when asked. Two ways to see the residual stream:

* ``"aux"``: the model itself returns it, as drafters of speculative decoding need it; works in compiled graphs.
* ``"hook"``: forward hooks on decoder layers; a compiled model never runs them, so only with ``enforce_eager=True``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from mechreward.errors import CaptureError
from mechreward.readout import HookPoint, ReadoutBank
from mechreward.rollout.wire import Fed, receive_bank, send_fed, send_problem

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
        assert self._window is not None and self._bank is not None
        window, self._window = self._window, None
        return send_problem(window.problem) if window.problem else send_fed(list(window.requests()), len(self._bank))


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
        states = self._runner.execute_model_state.aux_hidden_states
        if states is None or len(states) != len(self._numbers):
            raise CaptureError("The model returned no hidden states: read with backend='forward'.")
        by_number = dict(zip(self._numbers, states, strict=True))
        return {point: by_number[_number(point)] for point in self.points}


class _HookedStates:
    """The residual stream as hooks on decoder layers see it, in eager mode."""

    def __init__(self, runner: Any, points: list[HookPoint]):
        self.points = points
        self._states: dict[HookPoint, Tensor] | None = None
        layers = _decoder_layers(runner.get_model())
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


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith("layers") and isinstance(module, nn.ModuleList)
    ]
    if len(found) != 1:
        raise CaptureError(f"{type(model).__name__} holds {len(found)} lists of layers where one was expected.")
    return found[0]


@dataclass
class _Run:
    """A stretch of one request's tokens in one step."""

    request: str
    start: int  # position, from the prompt's end on
    tokens: Tensor  # [n]
    values: Tensor  # [n, K]


class _Window:
    """What was fed to the model while it was open. Positions come from the scheduler, which is on the CPU."""

    def __init__(self, bank: ReadoutBank, prompts: bool):
        self._bank, self._with_prompts = bank, prompts
        self._prompts: dict[str, list[int]] = {}
        self._runs: list[_Run] = []
        self.problem: str | None = None

    def take(self, step: Any, order: list[str], fed: Tensor, states: dict[HookPoint, Tensor]) -> None:
        """One step: which rows to read, and their readings."""
        for new in step.scheduled_new_reqs:
            self._prompts[new.req_id] = [] if self._with_prompts else list(new.prompt_token_ids or [])
        done = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        done |= zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True)
        rows, stretches, row = [], [], 0
        for request in order:
            count = step.num_scheduled_tokens.get(request, 0)
            prompt = self._prompts.get(request)
            if count and prompt is not None:  # a request that came before the window is not ours
                skipped = min(max(len(prompt) - done[request], 0), count)
                if skipped < count:
                    rows.append(torch.arange(row + skipped, row + count))
                    stretches.append((request, done[request] + skipped - len(prompt), count - skipped))
            row += count
        if not rows:
            return
        chosen = torch.cat(rows).to(fed.device, non_blocking=True)
        values = torch.zeros(len(chosen), len(self._bank), device=fed.device)
        for point in self._bank.hook_points:
            self._bank.encode(point, states[point], values, chosen)
        tokens, at = fed[chosen], 0
        for request, start, count in stretches:
            self._runs.append(_Run(request, start, tokens[at : at + count], values[at : at + count]))
            at += count

    def requests(self) -> Iterator[Fed]:
        """Each request's tokens and readings; a position that was fed twice (preemption) counts the last time."""
        of_request: dict[str, list[_Run]] = {}
        for run in self._runs:
            of_request.setdefault(run.request, []).append(run)
        for request, runs in of_request.items():
            length = max(run.start + len(run.tokens) for run in runs)
            tokens = torch.full((length,), -1, dtype=torch.int32)
            values = torch.zeros(length, len(self._bank))
            read = torch.zeros(length, dtype=torch.bool)
            for run in runs:
                own = slice(run.start, run.start + len(run.tokens))
                tokens[own], values[own], read[own] = run.tokens.cpu().int(), run.values.cpu(), True
            yield Fed(tuple(self._prompts[request]), tuple(tokens.tolist()), values, read)
