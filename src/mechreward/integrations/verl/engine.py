"""The policy's forward pass, tapped."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu  # pyright: ignore[reportMissingImports]
from verl.workers.engine import EngineRegistry  # pyright: ignore[reportMissingImports]
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # pyright: ignore[reportMissingImports]

from mechreward.integrations.served import Served, build_reward
from mechreward.readout import HookPoint, ReadoutBank
from mechreward.rollout.capture import ResidualTap, check_fits

READ = "mechreward_read"
"""In a pass's instructions: what to read in it, as JSON of :class:`Served`. Only the policy's log-prob pass has it:
the reference's pass, which would overwrite the readings, and the loss's passes read nothing."""

READINGS = "mechreward_readings"
"""Among a pass's outputs: K numbers for each token, prompt and response."""


# The key of device and vendor goes before verl's own engine, whose key is the device alone.
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"]
)
class MechRewardEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine, which reads the residual stream in passes that ask for it.

    The hooks are put in place by the first such pass: verl does not compile the model.
    """

    _tap: ResidualTap | None = None

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's, in a capture window where readings are asked for.

        Raises:
            ModelMismatchError: A pack or probe was made for another model.
            CaptureError: The pass did not run the layers that are read.
        """
        asked = tu.get_non_tensor_data(micro_batch, READ, None)
        if asked is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        if self._tap is None:
            self._install(asked)
        assert self._tap is not None
        self._reader = _EveryToken(self._bank)
        with self._tap.window(self._reader):
            return super().forward_step(micro_batch, loss_function, forward_only)

    def _install(self, asked: str) -> None:
        readouts = [request.readout for request in build_reward(Served(**json.loads(asked))).requests]
        check_fits(readouts, self.module)
        self._bank = ReadoutBank(readouts)
        self._tap = ResidualTap(self.module, self._bank.hook_points)

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        """verl's, with the readings."""
        outputs = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if tu.get_non_tensor_data(micro_batch, READ, None) is not None:
            offsets, values = micro_batch["input_ids"].offsets(), self._reader.values
            if tu.get_non_tensor_data(micro_batch, "use_remove_padding", True):  # one packed row, perhaps spread out
                values = self._gather_and_unpad_packed(values[0], output_args["pad_size"])
            else:  # a row each, padded on the right
                lengths = offsets.diff()
                values = values[torch.arange(values.shape[1], device=values.device) < lengths[:, None]]
            outputs[READINGS] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return outputs


class _EveryToken:
    """Reads all positions of one pass, padding included."""

    values: Tensor  # [rows, tokens, K] float32

    def __init__(self, bank: ReadoutBank):
        self.bank = bank

    def __call__(self, point: HookPoint, hidden: Tensor) -> None:
        if point == self.bank.hook_points[0]:
            self.values = hidden.new_zeros(*hidden.shape[:2], len(self.bank), dtype=torch.float32)
        self.bank.encode(point, hidden.flatten(0, 1), self.values.view(-1, len(self.bank)))
