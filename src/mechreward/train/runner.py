"""Run an experiment: every arm with every seed, each run in a folder of its own, from which it can be resumed.

A run's folder holds ``config.yaml`` (what determines the run), ``environment.json`` (what it ran on, at which commit
and when), ``metrics.jsonl`` (TRL's log of each step), ``evaluations.jsonl``, ``samples.jsonl`` (every evaluated
rollout), what the report shows (``recording.json``, ``trace.jsonl``), and at the end ``model/`` and ``summary.json``.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from mechreward import pocket, progress
from mechreward.errors import ConfigError, MechRewardError, RewardError, nearest
from mechreward.extras import require
from mechreward.features.catalog import load_pack
from mechreward.files import append, forget_after, write, write_json
from mechreward.integrations.trl_grpo import STATE_FILE, MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.recording import METRICS, TRACE, feature_rewards, traced
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.sampling import keeping_softcap
from mechreward.rollout.source import HFSource
from mechreward.schema import shown
from mechreward.train import arms, data
from mechreward.train.config import ExperimentConfig
from mechreward.train.evaluation import evaluate, test_questions

TRACED = 40
"""Test rollouts that are kept with their readings at each evaluation."""

RECORDS = (METRICS, TRACE, "evaluations.jsonl", "samples.jsonl", arms.ROLLOUTS)
"""Files in a run's folder that grow with its steps."""

Log = Callable[[str], None]
"""Called with a line of text."""

Setup = Callable[[Any, str, int, Path], arms.RunSetup]
"""(configuration, arm, seed, folder) -> what the run is trained with."""


# -- one run ----------------------------------------------------------------------------------------------------------


def run(
    config: ExperimentConfig,
    arm: str,
    seed: int,
    log: Log = print,
    setup: Setup = arms.setup,
    report_to: Sequence[str] = (),
) -> Path:
    """Train one arm with one seed, or resume the run; a finished run is left as it is.

    Args:
        config: The experiment.
        arm: Name of one of its arms.
        seed: Determines the order of questions and the sampling.
        log: Called with a line at each evaluation.
        setup: Makes what the arm is trained with.
        report_to: Trackers that TRL logs to, by its names.

    Returns:
        The run's folder.

    Raises:
        ConfigError: The folder holds a run of another configuration, or the run is started on several processes.
        MechRewardError: The model, the data or a pack is unavailable.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Experiments run in one process: start them with python, not with torchrun or accelerate.")
    if torch.cuda.device_count() > 1:
        raise ConfigError("Experiments run on one GPU, and several are visible: set CUDA_VISIBLE_DEVICES=0, say.")
    folder, name = folder_of(config, arm, seed), f"{arm}, seed {seed}"
    if is_finished(folder, config.run(arm, seed)):
        log(f"{name}: finished before, in {folder}")
        return folder

    # Load everything before the folder is made: what cannot be loaded leaves no folder behind.
    torch.manual_seed(seed)
    questions, test = data.load(config.data.train), test_questions(config, seed)
    check_data(config, questions, test)
    watched, made = arms.watched(config), setup(config, arm, seed, folder)
    claim(folder, config.run(arm, seed))
    trainer = MechRewardGRPOTrainer(
        model=pocket.resolve(config.model),
        args=_trl_config(config, arm, seed, folder, made.beta, report_to),
        train_dataset=questions,
        reward_funcs=made.reward,
        guards=made.guards,
        monitors=[*watched, *made.monitors],
        peft_config=_lora(config),
    )
    recording = trainer.recording
    assert recording is not None  # our configuration of TRL asks for it
    # Recorded rollouts have a verdict even where no outcome is rewarded.
    recording.outcome = recording.outcome or arms.outcome_reward(config)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    # Resume from the last whole checkpoint, and drop what was recorded after it.
    checkpoint = _last_checkpoint(folder, config.training.max_steps)
    forget(folder, -1 if checkpoint is None else _step_of(checkpoint))
    done = 0 if checkpoint is None else _step_of(checkpoint)
    with progress.steps(name, config.training.max_steps, done) as advance:
        recorder = Recorder(folder, name, config, trainer, test, watched, log, advance)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step != config.training.max_steps:
        raise RewardError(f"{folder} stopped after {trainer.state.global_step} steps: start it again to go on.")
    if recording.broken:
        raise RewardError(f"Not all of {folder} was recorded, as a warning above says: delete it, and start it again.")
    trainer.save_model(str(folder / "model"))
    write_json(folder / "summary.json", {"steps": trainer.state.global_step, **recorder.last})
    for leftover in folder.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    return folder


def check_data(config: ExperimentConfig, questions: Any, test: Any) -> None:
    """Refuse too few training questions, and test questions that are trained on.

    Raises:
        ConfigError: One of these.
    """
    needed = config.training.prompts_per_step
    if len(questions) < needed:
        raise ConfigError(
            f"data.train has {len(questions)} questions, fewer than one step's prompts_per_step = {needed}."
        )
    if both := set(questions["prompt"]) & set(test["prompt"]):
        raise ConfigError(
            f"{len(both)} of the questions in data.test are in data.train too, e.g. {shown(min(both))}: choose "
            "sets that do not overlap."
        )


def folder_of(config: ExperimentConfig, arm: str, seed: int) -> Path:
    """Return a run's folder."""
    return Path(config.output) / arm / f"seed-{seed}"


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a run's folder holds the finished run.

    Raises:
        ConfigError: It holds a run of other settings.
    """
    if (folder / "config.yaml").exists():
        claim(folder, settings)
    return (folder / "summary.json").exists()


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a run's folder, or check that it holds the run of these settings.

    Raises:
        ConfigError: It holds another run, or other files.
    """
    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds files but no config.yaml: empty it, or choose another `output`.")
        folder.mkdir(parents=True, exist_ok=True)
        write(file, yaml.safe_dump(settings, sort_keys=False))
        return
    try:
        there = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{file} is damaged: delete that folder, or choose another `output`.") from None
    if there != settings:
        key, old, new = first_difference(there, settings)
        raise ConfigError(
            f"{folder} holds a run of another configuration: {key} is {old!r} there and {new!r} here. Choose another "
            "`output`, or delete that folder."
        )


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """Return where two configurations first differ: the key, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(k for k in [*new, *old] if (k in old, old.get(k)) != (k in new, new.get(k)))
        return first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    return key, old, new


def _trl_config(
    config: ExperimentConfig, arm: str, seed: int, folder: Path, beta: float | None, report_to: Sequence[str]
) -> MechRewardGRPOConfig:
    t = config.training
    return MechRewardGRPOConfig(
        output_dir=str(folder),
        seed=seed,
        **t.model_dump(exclude={"prompts_per_step", "lora_rank", "beta"}),
        per_device_train_batch_size=t.prompts_per_step * t.num_generations // t.gradient_accumulation_steps,
        beta=t.beta if beta is None else beta,
        model_init_kwargs={"dtype": arms.dtype_of(config), **keeping_softcap(config.model)},
        scale_rewards=config.arms[arm].scale_rewards,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=config.evaluation.every,
        save_total_limit=2,  # the last may be cut off in the middle
        report_to=list(report_to),
        run_name=f"{arm}-seed-{seed}",
        disable_tqdm=True,
    )


def _lora(config: ExperimentConfig) -> Any:
    if config.training.lora_rank is None:
        return None
    from peft import LoraConfig

    rank = config.training.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _last_checkpoint(folder: Path, max_steps: int) -> Path | None:
    """Return the last whole checkpoint, and delete broken ones; our own file is written last.

    The checkpoint of the last step does not count, since the trainer would take one step too many from there.
    """
    whole = [c for c in folder.glob("checkpoint-*") if (c / STATE_FILE).exists() and _step_of(c) < max_steps]
    for broken in set(folder.glob("checkpoint-*")) - set(whole):
        shutil.rmtree(broken)
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def forget(folder: Path, step: int) -> None:
    """Drop what a run recorded after a step: it is about to be computed again."""
    for name in RECORDS:
        forget_after(folder / name, step)


# -- what is recorded -------------------------------------------------------------------------------------------------


class Recorder(transformers.TrainerCallback):
    """Evaluates before the first step, every few steps, and after the last, and records the results."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: ExperimentConfig,
        trainer: MechRewardGRPOTrainer,
        test: Any,
        watched: Sequence[FeatureReward],
        log: Log,
        advance: Callable[[], None],
    ):
        self.folder, self.name, self.config, self.trainer = folder, name, config, trainer
        self.test, self.watched, self.log, self.advance = test, watched, log, advance
        self.last: dict[str, Any] = {}
        self.began = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.evaluate(0)
        self.began, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step
        if done % self.config.evaluation.every == 0 or done == state.max_steps:
            self.evaluate(done)
        self.advance()
        if progress.in_lines():
            self.log(f"{self.name}, step {done} of {state.max_steps}, about {self._seconds_left(done):.0f} s left")

    def evaluate(self, step: int) -> None:
        """Evaluate by sampling, and at the end greedily, too."""
        model, tokenizer = self._model(), self.trainer.processing_class
        look = partial(self.trace, step)
        rows, figures = evaluate(
            model, tokenizer, self.test, self.config, self.watched, self.trainer.args.seed, look=look
        )
        if step == self.config.training.max_steps:
            _, greedy = evaluate(model, tokenizer, self.test, self.config, [], seed=0, do_sample=False)
            figures["greedy_accuracy"] = greedy["accuracy"]
        append(self.folder / "samples.jsonl", [{"step": step, **row} for row in rows])
        append(self.folder / "evaluations.jsonl", [{"step": step, **figures}])
        self._report(figures)
        self.last = figures
        seconds = self._seconds_left(step)
        left = f", about {seconds / 60:.0f} min left" if seconds else ""
        self.log(f"{self.name}, step {step:>3}: {figures['accuracy']:.3f} right{left}")

    def _report(self, figures: dict[str, float]) -> None:
        """Report an evaluation to the trackers, which call it ``eval/...``.

        ``trainer.log`` would also log the step's training figures, before the step has all of them.
        """
        trainer = self.trainer
        logs = {f"eval_{name}": value for name, value in figures.items()}
        trainer.callback_handler.call_event("on_log", trainer.args, trainer.state, trainer.control, logs=logs)

    def _seconds_left(self, step: int) -> float:
        """Return the time for the remaining steps, by the mean step of this start; 0 before the first."""
        if step == 0 or step <= self.first:
            return 0.0
        per_step = (time.monotonic() - self.began) / (step - self.first)
        return per_step * (self.config.training.max_steps - step)

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def trace(self, step: int, batch: RolloutBatch) -> None:
        """Record some test rollouts with their readings for the report, on the same questions each time."""
        batch = replace(batch, columns={"answer": self.test["answer"]})
        rows = np.linspace(0, len(batch) - 1, min(TRACED, len(batch))).round().astype(int).tolist()
        tokenizer, rewards = self.trainer.processing_class, feature_rewards(self.watched)
        requests = [reward.request for reward in rewards.values()]
        readings = HFSource(self._model(), tokenizer).read(few := batch.take(rows), requests)
        outcome = arms.outcome_reward(self.config)
        records = traced(few, range(len(few)), tokenizer, rewards, readings, outcome)
        where = [{"step": step, "set": "test", "row": row} for row in rows]
        append(self.folder / TRACE, [{**w, **record} for w, record in zip(where, records, strict=True)])


# -- an experiment ----------------------------------------------------------------------------------------------------


def carry_out(
    config: ExperimentConfig,
    grid: Sequence[tuple[str, int]],
    jobs: int,
    command: Sequence[str],
    log: Log = print,
    setup: Setup = arms.setup,
    report_to: Sequence[str] = (),
) -> list[Path]:
    """Make an experiment's runs.

    Args:
        config: The experiment.
        grid: Arm and seed of each run.
        jobs: Runs at a time; more than one run in processes of their own.
        command: Starts such a process; ``--arm`` and ``--seed`` follow.
        log, setup, report_to: As for :func:`run`; processes have their own.

    Returns:
        The runs' folders.

    Raises:
        MechRewardError: A run fails.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs} is not possible: give the number of runs at a time, 1 or more.")
    quiet()
    for pack in map(load_pack, arms.packs_of(config)):
        if pack.status == "candidate":
            log(f"{pack.name} is a candidate pack: {pack.status_reason}")
    if jobs > 1 and len(grid) > 1:
        _in_processes(command, jobs, grid)
        return [folder_of(config, arm, seed) for arm, seed in grid]
    folders = []
    for arm, seed in grid:
        folders.append(run(config, arm, seed, log=log, setup=setup, report_to=report_to))
        if "wandb" in report_to:
            importlib.import_module("wandb").finish()  # else the next run would be logged into this one
        gc.collect()  # a trainer and its model hold each other; on a GPU the next would not fit beside them
        torch.cuda.empty_cache()
    return folders


def quiet() -> None:
    """Silence other libraries' warnings and progress bars; our own warnings are about the experiment."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"mechreward\.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    require("datasets", "trl").disable_progress_bars()


def check_trackers(names: Sequence[str]) -> None:
    """Check before a training that TRL can report to these trackers.

    Raises:
        ConfigError: TRL does not know one, or it is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"TRL cannot report to '{name}'.{nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"The tracker {name} is not installed or is switched off: run pip install {name}, or leave it out of "
                "--report-to."
            )


def chosen_runs(
    names: Collection[str],
    seeds: Sequence[int],
    only: Sequence[str] | None,
    only_seeds: Sequence[int] | None,
    what: str = "arm",
) -> list[tuple[str, int]]:
    """Return the runs to make, each once: all arms of a seed before the next seed.

    Args:
        names: The configuration's arms.
        seeds: Its seeds.
        only: Make only these arms. Default: all.
        only_seeds: Use only these seeds. Default: all.
        what: What an arm is called in an error.

    Raises:
        ConfigError: The configuration has no such arm or seed.
    """
    for name in only or []:
        if name not in names:
            raise ConfigError(f"There is no {what} '{name}'; there are {', '.join(names)}.{nearest(name, names)}")
    for seed in only_seeds or []:
        if seed not in seeds:
            raise ConfigError(f"The configuration has no seed {seed}: it has {', '.join(map(str, seeds))}.")
    return list(dict.fromkeys((name, seed) for seed in only_seeds or seeds for name in only or names))


def _in_processes(command: Sequence[str], jobs: int, grid: Sequence[tuple[str, int]]) -> None:
    """Make each run in a process of its own, ``jobs`` at a time; they share the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def one(which: tuple[str, int]) -> int:
        arm, seed = which
        return subprocess.run([*command, "--arm", arm, "--seed", str(seed)], env=environment).returncode

    with ThreadPoolExecutor(jobs) as pool:
        failed = [which for which, code in zip(grid, pool.map(one, grid), strict=True) if code]
    if failed:
        names = ", ".join(f"{arm} seed {seed}" for arm, seed in failed)
        raise MechRewardError(f"{len(failed)} of {len(grid)} runs failed ({names}): see above.")
