"""What :class:`MechRewardGRPOTrainer` refuses, or warns of, before anything is trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from mechreward.errors import ConfigError, RewardError
from mechreward.hacking.monitor import Monitor, rewarded_columns
from mechreward.integrations.trl.passes import Passes, requests_of
from mechreward.reward.base import guards_of
from mechreward.reward.composition import is_dense, warn_if_weight_cancels
from mechreward.reward.guards import Learns
from mechreward.rollout.capture import check_fits, has_adapters, unwrap
from mechreward.rollout.reference import keep_start, refuse_other_vocabulary

logger = logging.getLogger(__name__)


def check_training(trainer: Any, passes: Passes, came_with_adapter: bool) -> None:
    """Refuse what cannot work, and copy the policy where its start is read and TRL keeps no reference.

    Args:
        trainer: A trainer that is made, but for its hooks.
        passes: Its passes.
        came_with_adapter: Whether the model had an adapter before the trainer was made.

    Raises:
        ModelMismatchError: An SAE or probe was made for another model.
        RewardError: Readings, rewards or weights that cannot be used as they are combined.
        ConfigError: One guard in two places.
    """
    for (reads, _), bank in passes.banks.items():
        check_fits(bank.readouts, trainer.model)
        if reads == "reference" and trainer.args.sync_ref_model:
            raise RewardError('reads="reference" needs a frozen reference: set sync_ref_model=False.')
        # A new adapter is switched off instead: it changes nothing yet.
        to_copy = trainer.beta == 0 and (came_with_adapter or not has_adapters(trainer.model))
        if reads == "reference" and to_copy and trainer.mechreward_reference is None:
            keep_start(trainer)
    if trainer.ref_model is not None:
        refuse_other_vocabulary(trainer.model, unwrap(trainer.ref_model))
    _check_rewards(trainer)
    _check_guards([*trainer.guards, *guards_of(trainer.reward_funcs)])
    if trainer.beta == 0 and passes.banks:
        logger.warning("beta=0: nothing keeps the policy near its start, and feature rewards are easy to game.")
    _warn_of_rewarded_monitors(trainer)


def _check_rewards(trainer: Any) -> None:
    if any(map(is_dense, trainer.reward_funcs)) and trainer.importance_sampling_level == "sequence":
        raise RewardError(
            'aggregation="per_token" gives each token its own advantage, which '
            'importance_sampling_level="sequence" cannot use: choose "token".'
        )
    weights = trainer.reward_weights
    for name, reward, weight in zip(trainer.reward_func_names, trainer.reward_funcs, weights, strict=True):
        if weight < 0 and requests_of([reward]):
            raise RewardError(
                f"reward_weights gives '{name}' {weight:g}: guards must know the sign of a feature reward, so put "
                "a negative weight into a CompositeReward."
            )
        warn_if_weight_cancels(reward, trainer.scale_rewards)


def _check_guards(guards: Sequence[Any]) -> None:
    for guard in guards:
        if isinstance(guard, Learns) and sum(other is guard for other in guards) > 1:
            raise ConfigError(
                f"The same {type(guard).__name__} guards twice, and would learn from every rollout twice: give it "
                "to the trainer, or to one CompositeReward."
            )


def _warn_of_rewarded_monitors(trainer: Any) -> None:
    rewarded = [request.readout for request in requests_of(trainer.reward_funcs)]
    for monitor in trainer.monitors:
        for readout in monitor.held_out if isinstance(monitor, Monitor) else ():
            if shared := rewarded_columns(readout, rewarded):
                warnings.warn(
                    f"'{monitor.name}' holds '{readout.name}' out, but {shared} of its {readout.width} columns "
                    "are rewarded too: what it finds is no longer independent.",
                    stacklevel=5,
                )


@contextmanager
def needing_a_path(model: Any, args: GRPOConfig, given: Sequence[Any]) -> Iterator[None]:
    """Explain where TRL cannot load its reference from where the policy came from.

    Args:
        model: The policy.
        args: With ``beta``.
        given: The trainer's other arguments, among which may be an adapter's configuration.

    Raises:
        RewardError: It cannot.
    """
    adapted = has_adapters(model) or any(hasattr(each, "peft_type") for each in given)
    if args.beta == 0 or adapted or isinstance(model, str):
        yield
        return
    path, so = model.config._name_or_path, "save the policy (save_pretrained) and give the trainer that folder"
    if not path:
        raise RewardError(
            f"The policy has no path from which TRL could load its reference model: {so}, or set beta=0, with which "
            "MechRewardGRPOTrainer copies the policy where it is read."
        )
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split()).split(". ")[0][:200]
        raise RewardError(
            f'TRL cannot load its reference model from "{path}", where the policy came from ({said}): {so}, or set '
            "beta=0."
        ) from error
