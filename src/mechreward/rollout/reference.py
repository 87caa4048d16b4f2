"""The frozen model that training started from: which one it is, and that it really is that one."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mechreward.errors import RewardError
from mechreward.readout import HookPoint, Readings, ReadoutBank, projection
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import is_sharded, text_config, transformer, unwrap
from mechreward.rollout.source import read_forward

logger = logging.getLogger(__name__)


COMPARED = 2
"""Rollouts of each process on which the policy and its reference are compared before training."""


SKETCH = 32
"""Random directions onto which the residual streams are projected for that: d_model of them would cost memory."""


@contextmanager
def reference_model(trainer: Any) -> Iterator[nn.Module]:
    """The frozen model that training started from: a copy of ours, TRL's own, or the policy without its adapter.

    Raises:
        RewardError: ``sync_ref_model`` moves the reference, or it is too late to copy it.
    """
    if trainer.args.sync_ref_model:
        raise RewardError('reads="reference" needs a frozen reference: set sync_ref_model=False.')
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if vars(trainer).get("mechreward_reference") is None and not _trl_has_one(trainer):
        if trainer.state.global_step > 0:
            raise RewardError(
                'reads="reference" with beta=0 needs a copy of the policy as it starts, and this training is under '
                "way: use MechRewardGRPOTrainer, which copies it when it is made, or set beta > 0."
            )
        keep_start(trainer)
    if vars(trainer).get("mechreward_reference") is not None:
        yield trainer.mechreward_reference
    elif trainer.ref_model is not None:
        yield unwrap(trainer.ref_model)
    else:
        from trl.trainer.utils import use_adapter

        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            yield unwrap(trainer.model)


def _trl_has_one(trainer: Any) -> bool:
    """A model of its own where ``beta > 0``, or an adapter to switch off."""
    from accelerate.utils import is_peft_model  # where there is a trainer, there is accelerate

    return trainer.ref_model is not None or bool(is_peft_model(trainer.accelerator.unwrap_model(trainer.model)))


def keep_start(trainer: Any) -> None:
    """Copy the policy, adapter included, before anything is trained, and keep the copy on the trainer.

    What is loaded again by its name may be another model: other weights after training or merging in the same script,
    other options of loading, or none at all for a model without a path.

    Raises:
        RewardError: Each process holds a part of the policy.
    """
    policy = unwrap(trainer.accelerator.unwrap_model(trainer.model))
    if is_sharded(policy):
        raise RewardError(
            'reads="reference" with beta=0 needs a copy of the policy, of which each process holds a part: set '
            "beta > 0, for which TRL loads a reference, or under FSDP use MechRewardGRPOTrainer, which copies it whole."
        )
    logger.warning('beta=0 keeps no reference model: copying the policy as it starts for reads="reference".')
    kept: Any = copy.deepcopy(policy)
    for model in (kept, transformer(kept)):
        vars(model).pop("forward", None)  # TRL's and accelerate's wrappers would go on calling the policy
    if not hasattr(kept, "hf_device_map"):
        kept.to(trainer.accelerator.device)
    if trainer.is_fsdp_enabled and trainer.accelerator.num_processes > 1:
        # fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights.
        for tensor in [*kept.parameters(), *kept.buffers()]:
            torch.distributed.broadcast(tensor.data, src=0)
    trainer.mechreward_reference = kept.eval().requires_grad_(False)


def refuse_other_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Refuse a reference that lacks tokens which the policy may write.

    Raises:
        RewardError: Tokens were added to the policy after it was loaded.
    """
    ours, theirs = (text_config(model).vocab_size for model in (policy, reference))
    if ours != theirs:
        raise RewardError(
            f"The policy has {ours} tokens and TRL's reference model, which is loaded anew, has {theirs}: save the "
            "policy and its tokenizer with the added tokens (save_pretrained) and give the trainer that folder, or set "
            "beta=0, with which MechRewardGRPOTrainer copies the policy."
        )


def check_reference(trainer: Any, batch: RolloutBatch, points: Sequence[HookPoint]) -> None:
    """Before anything is trained, once: the policy and its reference must be the same model.

    Both run forwards of ours on the first rollouts, on the same tokens in the same shape, so that the same weights give
    the same numbers but for rounding. The measure is ||x - x'|| / ||x'|| of the residual streams in a few random
    directions, over all tokens of a hook point, the largest of all points and processes. It is kept on the trainer as
    ``mechreward_gap``.

    Raises:
        RewardError: They differ by more than rounding explains.
    """
    gap, compared = (vars(trainer).get(f"mechreward_{what}") for what in ("gap", "compared"))
    compared = compared or frozenset()
    points = sorted(set(points) - compared)  # a plain trainer's rewards come one after the other
    if not points or (gap is not None and trainer.state.global_step > 0):
        return
    if trainer.state.global_step > 0:
        trainer.mechreward_gap = math.nan
        logger.warning(
            'This training is under way, so that the model of reads="reference" could not be compared with the one '
            "that it started from."
        )
        return
    policy = unwrap(trainer.model)
    written = [i for i, length in enumerate(batch.lengths) if length]
    few = batch.take(written[:COMPARED] or [0])
    if {"image", "images"} & set(few.columns):  # the tokens of the completions alone compare the weights as well
        few = replace(few, prompt_ids=[[]] * len(few))
    bank = ReadoutBank([projection(point, text_config(policy).hidden_size, SKETCH) for point in points])
    with reference_model(trainer) as reference:
        refuse_other_vocabulary(policy, reference)
        tolerance = _rounding(trainer.accelerator.mixed_precision, policy, reference)
        theirs = read_forward(reference, few, bank, True, trainer.accelerator.autocast)
    ours = read_forward(policy, few, bank, True, trainer.accelerator.autocast)
    tokens = float(few.mask(read_last=True).sum())
    everyone = batch.gather(torch.tensor([[max(_apart(ours[r], theirs[r]) for r in bank.readouts), tokens]]))
    if not everyone[:, 1].any():
        return  # nothing was read: the next batch will tell
    gap = max(float(everyone[:, 0].max()), gap or 0.0)
    if not gap <= tolerance:  # NaN too
        raise RewardError(
            'reads="reference" would read another model than the one that training starts from: on the first rollouts '
            f"their residual streams differ by {gap:.2%} ({tolerance:.2%} is rounding), {_why(trainer)}."
        )
    trainer.mechreward_gap, trainer.mechreward_compared = gap, compared | set(points)


def _apart(ours: Readings, theirs: Readings) -> float:
    """||x - x'|| / ||x'|| over all tokens that are read."""
    x, other = (each.values.masked_fill(~each.mask[..., None], 0.0).cpu() for each in (ours, theirs))
    return float((x - other).norm() / other.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _rounding(mixed_precision: str, policy: nn.Module, reference: nn.Module) -> float:
    """How far the same weights may lie apart.

    In float32, 1e-4. In lower precision one rounding of bfloat16 (2^-8), since the same kernels run on the same shapes;
    3 % where they do not: one model is sharded and the other is not, their dtypes differ, or an adapter such as DoRA
    computes in other steps than the model without it.
    """
    dtypes = [{p.dtype for p in model.parameters()} for model in (policy, reference)]
    if mixed_precision not in ("bf16", "fp16", "fp8") and dtypes[0] | dtypes[1] <= {torch.float32, torch.float64}:
        return 1e-4
    adapters = getattr(policy, "peft_config", {}).values() if policy is reference else ()
    other_steps = any(getattr(a, "use_dora", False) or type(a).__name__ != "LoraConfig" for a in adapters)
    same = dtypes[0] == dtypes[1] and is_sharded(policy) == is_sharded(reference) and not other_steps
    return 2**-8 if same else 0.03


def _why(trainer: Any) -> str:
    """What is likely, and what to do."""
    if vars(trainer).get("mechreward_reference") is not None:
        return "although one is a copy of the other: its forward pass is not deterministic in eval mode"
    if trainer.ref_model is not None:
        return (
            f'since TRL has loaded its reference from "{trainer.model.config._name_or_path}" with model_init_kwargs, '
            "and the policy was trained, merged or loaded otherwise: save the policy (save_pretrained) and give the "
            "trainer that folder, or set beta=0, with which MechRewardGRPOTrainer copies the policy"
        )
    return (
        "since the adapter, which is switched off for it, was trained before or does not start at zero: give "
        "MechRewardGRPOTrainer the PeftModel itself (get_peft_model), without a peft_config"
    )
