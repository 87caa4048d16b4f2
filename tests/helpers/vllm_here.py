"""A real vLLM (0.32, CPU build) in this process; conftest.py says what makes it small."""

import gc


def shut(holder):
    """End the engine ``holder.llm``, so that another one can be built."""
    from vllm.distributed import cleanup_dist_env_and_memory

    holder.llm.llm_engine.engine_core.shutdown()
    del holder.llm
    gc.collect()
    cleanup_dist_env_and_memory()
