"""The strength of the KL penalty: a fixed coefficient, a schedule, or a target that the coefficient follows.

The unit is TRL's own, of its logged ``kl``: nats a token, the mean over completion tokens of Schulman's estimator k3 =
pi_ref / pi - log(pi_ref / pi) - 1 (``GRPOTrainer._compute_loss``), which is never negative. Ziegler et al. count nats a
sequence: divide a target of theirs by the tokens of a completion.
"""

from __future__ import annotations

from typing import Any

from mechreward.errors import ConfigError

GAIN = 0.1
"""K_beta of Ziegler et al."""

CLIP = 0.2
"""Their bound on the relative error, so that one step moves the coefficient by 2 % at most."""


def adapted(beta: float, kl: float, target: float) -> float:
    """Return the next coefficient of the adaptive controller (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2);  beta <- beta (1 + 0.1 e).

    Args:
        beta: The coefficient of the step that has just been taken.
        kl: Its mean KL, nats a token.
        target: What the KL should be, nats a token.
    """
    error = min(max(kl / target - 1, -CLIP), CLIP)
    return beta * (1 + GAIN * error)


def scheduled(start: float, end: float, step: int, steps: int) -> float:
    """Return the coefficient of step 0, 1, ..., steps - 1, on a straight line from ``start`` to ``end``."""
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


def check_options(config: Any) -> None:
    """Refuse options of a MechRewardGRPOConfig that make no sense.

    Raises:
        ConfigError: A coefficient, target or floor is out of range.
    """
    beta, target, end, floor = config.beta, config.kl_target, config.beta_end, config.entropy_floor
    if target is not None and end is not None:
        raise ConfigError("kl_target and beta_end both move beta: give one of them.")
    for name, value in (("kl_target", target), ("beta_end", end)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a positive number, not {value}.")
        if value is not None and not beta > 0:
            raise ConfigError(
                f"{name} needs beta > 0 to begin with, not {beta}: at 0 TRL loads no reference model and has no KL."
            )
    if floor is not None and not 0 < floor < float("inf"):
        raise ConfigError(f"entropy_floor must be a positive number of nats a token, not {floor}.")
    if floor is not None and config.use_adaptive_entropy and config.entropy_target != floor:
        raise ConfigError(
            f"entropy_floor={floor} sets entropy_target, which is {config.entropy_target}: give one of them."
        )
