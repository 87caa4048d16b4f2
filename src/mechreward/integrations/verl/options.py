"""What verl's configuration says of us, and what in it cannot work."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf  # pyright: ignore[reportMissingImports]

from mechreward.errors import ConfigError, nearest
from mechreward.integrations.served import Served

TRAINER = "mechreward"
"""``trainer.v1.trainer_mode``."""

DENSE = "mechreward_dense"
"""``actor_rollout_ref.rollout.agent.default_agent_loop``."""

PER_TOKEN = ("gae", "reinforce_plus_plus")
"""Advantage estimators that look at each token's reward. The others sum a rollout's first."""


def served(config: Any) -> Served | None:
    """What ``+mechreward...`` asks to be read from the policy: the words of ``mechreward serve``; None for nothing.

    Raises:
        ConfigError: An unknown word.
    """
    asked = _asked(config)
    asked.pop("dense", None)
    if not asked:
        return None
    known = {field.name for field in fields(Served)} - {"model", "dtype", "vllm"}
    if unknown := sorted(asked.keys() - known):
        hint = nearest(unknown[0], known | {"dense"})
        raise ConfigError(f"+mechreward.{unknown[0]} is not known: use {', '.join(sorted(known))} or dense.{hint}")
    return Served(config.actor_rollout_ref.model.path, **asked)


def dense_in_process(config: Any) -> bool:
    """Whether what is read becomes rewards per token (``+mechreward.dense=true``)."""
    return bool(_asked(config).get("dense", False))


def dense_over_http(config: Any) -> bool:
    """Whether the server's rewards per token are kept."""
    return config.actor_rollout_ref.rollout.agent.default_agent_loop == DENSE


def check(config: Any) -> None:
    """Refuse what cannot work, before any model is loaded.

    Raises:
        ConfigError: In one sentence, what to set.
    """
    mode, asked = config.trainer.v1.trainer_mode, served(config)
    if mode != TRAINER or not config.trainer.use_v1:
        said = f"trainer.v1.trainer_mode={mode}" if config.trainer.use_v1 else "trainer.use_v1=False"
        raise ConfigError(
            f"{said} goes on without the rollouts whose reward fails, and reads no rewards from the policy: set "
            f"trainer.v1.trainer_mode={TRAINER} and leave trainer.use_v1 on."
        )
    if (config.algorithm.get("filter_groups") or {}).get("enable"):
        raise ConfigError(
            "algorithm.filter_groups drops groups before rewards are read from the policy, and without a word: set "
            "algorithm.filter_groups.enable=False."
        )
    if config.trainer.v1.sampler.custom_sampler.path:
        raise ConfigError(
            "trainer.v1.sampler.custom_sampler would take the place of the sampler that ends a run in which a reward "
            "failed: leave it out."
        )
    estimator = str(config.algorithm.adv_estimator)
    if (dense_in_process(config) or dense_over_http(config)) and estimator not in PER_TOKEN:
        raise ConfigError(
            f"algorithm.adv_estimator={estimator} adds up each rollout's rewards, so that rewards per token are lost: "
            f"use {' or '.join(PER_TOKEN)}, or reward whole rollouts."
        )
    if asked is None:
        return
    if (config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode skips the log-prob pass in which the policy is read: set it to "
            "False, or have rewards from a server."
        )
    if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(
            f"actor_rollout_ref.actor.strategy={config.actor_rollout_ref.actor.strategy} cannot be read from: use fsdp "
            "or fsdp2, or have rewards from a server."
        )
    if asked.aggregation == "per_token":
        raise ConfigError("+mechreward.aggregation=per_token is said otherwise in verl: set +mechreward.dense=true.")


def _asked(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config.get("mechreward") or OmegaConf.create(), resolve=True)  # pyright: ignore
