"""The trainer for `trl`: the names that scripts import."""

from mechreward.integrations.trl.config import MechRewardGRPOConfig
from mechreward.integrations.trl.trainer import STATE_FILE, MechRewardGRPOTrainer

__all__ = ["STATE_FILE", "MechRewardGRPOConfig", "MechRewardGRPOTrainer"]
