"""What makes `verl.trainer.main_ppo` run whole on a CPU: for tests alone.

Loaded into each of verl's processes by VERL_USE_EXTERNAL_MODULES (``verl_bench.platform`` before our plug-in,
``verl_bench.stand_ins`` after it), with ``VERL_PLATFORM=cpu``. Ours is all that verl gets from hardware or from vLLM: a
platform, gloo, and a rollout server that generates with Hugging Face. What is tested runs as it stands: verl's task
runner, TransferQueue, reward workers, agent loops, FSDP2 engine and losses.
"""

RECORDS = "VERL_BENCH_RECORDS"
"""Environment variable: the folder for what tests look at."""
