"""The options of :class:`MechRewardGRPOTrainer`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from mechreward.errors import ConfigError, MissingExtraError, nearest
from mechreward.hacking.regularization import check_options

try:
    from trl.trainer.grpo_config import GRPOConfig
except ModuleNotFoundError as error:
    raise MissingExtraError("trl", "trl") from error


@dataclass
class MechRewardGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with a KL penalty by default.

    Attributes:
        beta: KL coefficient. TRL's own default is 0; a feature reward without KL is gamed within tens of steps.
        beta_end: Where beta ends, in a straight line over training. Positive, since without a reference model there is
            no KL.
        kl_target: What the KL should be, in nats a token as TRL logs it (``kl``); after each step, beta moves by up to
            2 % towards it (Ziegler et al. 2019, arXiv 1909.08593). See ``hacking/regularization.py``.
        entropy_floor: Mean token entropy, in nats, below which TRL adds an entropy bonus: short for
            ``use_adaptive_entropy=True, entropy_target=entropy_floor`` (Skywork-OR1, arXiv 2505.22312). Its
            coefficient starts at ``entropy_coef`` and moves by ``entropy_coef_delta`` a step. Look at the logged
            ``entropy`` early in training to choose a floor.
        repetition_guard: Run the repetition detector when the trainer is given no guards.
        vllm_backend: How rollouts are read where vLLM generates them (``use_vllm=True``): ``"aux"``, ``"hook"``,
            ``"second_pass"`` or ``"forward"`` (the trainer's own passes); by default the first that works. See
            `mechreward.rollout.vllm`.
        record: Rollouts to write into the output folder with what was read on them, spread evenly over the training,
            at most 8 per step, for ``mechreward report``; 0 writes the figures alone, None nothing. See
            `mechreward.recording`.

    Raises:
        ConfigError: A coefficient, target or floor that cannot be.
    """

    beta: float = field(default=0.04, metadata={"help": "KL coefficient."})
    beta_end: float | None = field(default=None, metadata={"help": "KL coefficient at the end of training."})
    kl_target: float | None = field(default=None, metadata={"help": "KL, nats a token, that beta adapts to."})
    entropy_floor: float | None = field(default=None, metadata={"help": "Entropy, nats a token, to keep above."})
    repetition_guard: bool = field(default=True, metadata={"help": "Run the repetition detector by default."})
    vllm_backend: str | None = field(default=None, metadata={"help": "How vLLM's rollouts are read."})
    record: int | None = field(default=500, metadata={"help": "Rollouts to record for the report."})

    def __post_init__(self):
        check_options(self)
        if self.entropy_floor is not None:
            self.use_adaptive_entropy, self.entropy_target = True, self.entropy_floor
        super().__post_init__()


def _naming_unknown_options(init):
    """A mistyped option gets one sentence with the nearest name, not a TypeError from generated code."""

    def checked(self, *args, **kwargs):
        known = {f.name for f in fields(self)}
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"{type(self).__name__} has no option '{unknown}'.{nearest(unknown, known)}")
        init(self, *args, **kwargs)

    checked.__signature__ = inspect.signature(init)  # pyright: ignore[reportFunctionMemberAccess]
    return checked


MechRewardGRPOConfig.__init__ = _naming_unknown_options(MechRewardGRPOConfig.__init__)


PLAIN = SimpleNamespace(beta_end=None, kl_target=None, repetition_guard=True, vllm_backend=None, record=None)
"""What holds under a plain `trl.GRPOConfig`."""


def our_options(args: GRPOConfig) -> Any:
    """Return what :class:`MechRewardGRPOConfig` adds to TRL's options."""
    return args if isinstance(args, MechRewardGRPOConfig) else PLAIN
