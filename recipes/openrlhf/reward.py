"""What OpenRLHF loads with --reward.remote_url recipes/openrlhf/reward.py: text, where agent.py sends token ids."""

from mechreward.integrations.openrlhf import reward_func

__all__ = ["reward_func"]
