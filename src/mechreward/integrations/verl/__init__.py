"""verl 0.9: rewards from a reward server, or read from the policy itself in verl's log-prob pass.

verl loads this module in each of its processes where ``VERL_USE_EXTERNAL_MODULES=mechreward.integrations.verl`` is set,
and finds in it, by the names that its configuration gives:

- ``reward.reward_manager``: :class:`RewardManager` has the sampled token ids scored by ``mechreward serve``;
  :class:`NoReward` leaves all to what is read from the policy;
- ``rollout.agent.default_agent_loop=mechreward_dense``: :class:`DenseAgentLoop` keeps that server's rewards per token;
- ``trainer.v1.trainer_mode=mechreward``: :class:`MechRewardTrainer` ends the run where verl would go on without a
  rollout whose reward failed, and adds rewards that :class:`MechRewardEngine` reads from the live policy, where
  ``+mechreward.packs=[...]`` or ``+mechreward.probes=[...]`` names any.

``recipes/verl/`` has launch scripts that explain each flag.
"""

import importlib.util

from mechreward.errors import MissingExtraError

if importlib.util.find_spec("verl") is None:
    raise MissingExtraError("verl", "verl", first="install verl as its documentation says, and then ")

from mechreward.integrations.verl.engine import MechRewardEngine
from mechreward.integrations.verl.trainer import MechRewardTrainer
from mechreward.integrations.verl.workers import DenseAgentLoop, NoReward, RewardManager

__all__ = ["DenseAgentLoop", "MechRewardEngine", "MechRewardTrainer", "NoReward", "RewardManager"]
