"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``): hidden states as Gemma-2's output.

vLLM's models hand out their residual stream as an output, for drafters (EAGLE-3), which is what readings use. Gemma-2
lacks it in vLLM 0.32.
"""

from __future__ import annotations

from itertools import islice
from typing import Any


def register() -> None:
    """Give Gemma-2 the interface, where vLLM does not."""
    from vllm.model_executor.models import gemma2  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.interfaces import (  # pyright: ignore[reportMissingImports]
        EagleModelMixin,
        SupportsEagle3,
    )

    if issubclass(gemma2.Gemma2Model, EagleModelMixin):
        return
    alone = gemma2.Gemma2Model.forward

    def forward(self: Any, input_ids: Any, positions: Any, intermediate_tensors: Any, inputs_embeds: Any = None) -> Any:
        if not self.aux_hidden_state_layers:
            return self.forward_alone(input_ids, positions, intermediate_tensors, inputs_embeds)
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual, states = None, []
        self._maybe_add_hidden_state(states, 0, hidden, residual)
        for number, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), start=1):
            hidden, residual = layer(positions, hidden, residual)
            self._maybe_add_hidden_state(states, number, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden, states

    # vLLM's compiler looks at the annotations to find the sizes that change from step to step.
    forward.__annotations__ = dict(alone.__annotations__)
    gemma2.Gemma2Model.forward_alone = alone
    gemma2.Gemma2Model.forward = forward
    gemma2.Gemma2Model.__bases__ += (EagleModelMixin,)
    gemma2.Gemma2ForCausalLM.__bases__ += (SupportsEagle3,)
