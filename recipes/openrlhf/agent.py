"""What OpenRLHF loads: --train.agent_func_path recipes/openrlhf/agent.py."""

from mechreward.integrations.openrlhf import AgentExecutor

__all__ = ["AgentExecutor"]
