"""Carrying an experiment out: every arm with every seed, each run in a folder of its own, from which it can go on.

A run's folder holds ``config.yaml`` (what decides the run), ``environment.json`` (what it ran on, at which commit
and when), ``metrics.jsonl`` (TRL's log of each step), ``evaluations.jsonl``, ``samples.jsonl`` (every evaluated
rollout), what the report shows (``recording.json``, ``trace.jsonl``), and at the end ``model/`` and ``summary.json``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from mechreward import pocket, verifiers
from mechreward.errors import ConfigError, MechRewardError, RewardError, nearest
from mechreward.extras import require
from mechreward.features.catalog import load_pack
from mechreward.integrations.recording import (
    METRICS,
    TRACE,
    append,
    feature_rewards,
    forget_after,
    traced,
    write,
    write_json,
)
from mechreward.integrations.trl_grpo import STATE_FILE, MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.pocket.questions import step_accuracy
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import HFSource, keeping_softcap, sample
from mechreward.schema import shown
from mechreward.train import arms, data
from mechreward.train.config import ExperimentConfig, read_config
from mechreward.verifiers.golds import golds, verdicts

TRACED = 40
"""Test rollouts that are kept with their readings at each evaluation."""

Progress = Callable[[str, int, int], None]
"""(run, steps done, of) -> None"""

Outfitter = Callable[[Any, str, int, Path], arms.Outfit]
"""(configuration, arm, seed, folder) -> what the run is trained with."""


# -- one run ----------------------------------------------------------------------------------------------------------


def run(
    config: ExperimentConfig,
    arm: str,
    seed: int,
    tell: Callable[[str], None] = print,
    outfit: Outfitter = arms.outfit,
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Train one arm with one seed, or go on where it was interrupted; a finished run is left as it is.

    Args:
        config: The experiment.
        arm: Name of one of its arms.
        seed: Decides the order of questions and the sampling.
        tell: Called with a line at each evaluation.
        outfit: What the arm is trained with.
        report_to: Trackers that TRL logs to, by its names.
        progress: Called after each step.

    Returns:
        The run's folder.

    Raises:
        ConfigError: The folder holds a run of another configuration, or the run is started on several processes.
        MechRewardError: The model, the data or a pack cannot be had.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Experiments run in one process: start them with python, not with torchrun or accelerate.")
    if torch.cuda.device_count() > 1:
        raise ConfigError("Experiments run on one GPU, and several are visible: set CUDA_VISIBLE_DEVICES=0, say.")
    folder = folder_of(config, arm, seed)
    decides = config.run(arm, seed)
    if (folder / "config.yaml").exists():
        claim(folder, decides)
    if (folder / "summary.json").exists():
        tell(f"{arm}, seed {seed}: finished before, in {folder}")
        return folder
    torch.manual_seed(seed)
    questions, test = data.load(config.data.train), test_questions(config, seed)
    check_data(config, questions, test)
    watched, fitted = arms.watched(config), outfit(config, arm, seed, folder)
    claim(folder, decides)  # only now: what can't be loaded leaves no folder behind
    trainer = MechRewardGRPOTrainer(
        model=pocket.resolve(config.model),
        args=_trl_config(config, arm, seed, folder, fitted.beta, report_to),
        train_dataset=questions,
        reward_funcs=fitted.reward,
        guards=fitted.guards,
        monitors=[*watched, *fitted.monitors],
        peft_config=_lora(config),
    )
    recording = trainer.recording
    assert recording is not None  # it is TRL's configuration of ours
    # Where no outcome is rewarded, recorded rollouts have a verdict all the same.
    recording.outcome = recording.outcome or OutcomeReward(getattr(verifiers, config.verifier), gold_column="answer")
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    checkpoint = _last_checkpoint(folder, config.training.max_steps)
    _forget_after(folder, -1 if checkpoint is None else _step_of(checkpoint))
    recorder = Recorder(folder, f"{arm}, seed {seed}", config, trainer, test, watched, tell)
    trainer.add_callback(recorder)
    if progress is not None:
        trainer.add_callback(_Progress(partial(progress, f"{arm}, seed {seed}")))
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


def test_questions(config: ExperimentConfig, seed: int) -> Any:
    """The seed's own draw of the test questions, with ``number``, by which arms are paired."""
    test = data.load(config.data.test)
    wanted = min(config.evaluation.questions or len(test), len(test))
    numbers = sorted(np.random.default_rng(seed).choice(len(test), wanted, replace=False).tolist())
    return test.select(numbers).add_column("number", numbers)


def check_data(config: ExperimentConfig, questions: Any, test: Any) -> None:
    """Refuse what would train nothing, or test what was trained on."""
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


def claim(folder: Path, decides: dict[str, Any]) -> None:
    """Make the run's folder, or make sure that what lies there is this very run.

    Raises:
        ConfigError: It is another one.
    """
    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds files but no config.yaml: empty it, or choose another `output`.")
        folder.mkdir(parents=True, exist_ok=True)
        write(file, yaml.safe_dump(decides, sort_keys=False))
        return
    try:
        there = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{file} is damaged: delete that folder, or choose another `output`.") from None
    if there != decides:
        key, old, new = first_difference(there, decides)
        raise ConfigError(
            f"{folder} holds a run of another configuration: {key} is {old!r} there and {new!r} here. Choose another "
            "`output`, or delete that folder."
        )


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """Where two configurations first differ."""
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
        max_steps=t.max_steps,
        per_device_train_batch_size=t.prompts_per_step * t.num_generations // t.gradient_accumulation_steps,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        num_generations=t.num_generations,
        max_completion_length=t.max_completion_length,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup_steps,
        beta=t.beta if beta is None else beta,
        temperature=t.temperature,
        gradient_checkpointing=t.gradient_checkpointing,
        bf16=t.bf16,
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
    """The last checkpoint that is whole: our own file is written last.

    The one after the last step is not gone on from, since the trainer would take one step more than it should.
    """
    whole = [c for c in folder.glob("checkpoint-*") if (c / STATE_FILE).exists() and _step_of(c) < max_steps]
    for broken in set(folder.glob("checkpoint-*")) - set(whole):
        shutil.rmtree(broken)
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _forget_after(folder: Path, step: int) -> None:
    """Drop what was recorded after a step: it is about to be computed again."""
    for name in (METRICS, TRACE, "evaluations.jsonl", "samples.jsonl", arms.ROLLOUTS):
        forget_after(folder / name, step)


class _Progress(transformers.TrainerCallback):
    """Says how far a training is."""

    def __init__(self, say: Callable[[int, int], None]):
        self.say = say

    def on_train_begin(self, args, state, control, **kwargs):
        self.say(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.say(state.global_step, state.max_steps)


# -- what is recorded -------------------------------------------------------------------------------------------------


class Recorder(transformers.TrainerCallback):
    """Writes TRL's metrics at every step, and evaluates before the first, every so often, and after the last."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: ExperimentConfig,
        trainer: MechRewardGRPOTrainer,
        test: Any,
        watched: Sequence[FeatureReward],
        tell: Callable[[str], None],
    ):
        self.folder, self.name, self.config, self.trainer = folder, name, config, trainer
        self.test, self.watched, self.tell = test, watched, tell
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

    def evaluate(self, step: int) -> None:
        """Sample on the test questions, and greedily too at the end."""
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
        self.tell(f"{self.name}, step {step:>3}: {figures['accuracy']:.3f} right{self._time_left(step)}")

    def _report(self, figures: dict[str, float]) -> None:
        """Show an evaluation to the trackers, which call it ``eval/...``.

        Not by ``trainer.log``: it would log the step's training figures along, before the step has all of them.
        """
        trainer = self.trainer
        logs = {f"eval_{name}": value for name, value in figures.items()}
        trainer.callback_handler.call_event("on_log", trainer.args, trainer.state, trainer.control, logs=logs)

    def _time_left(self, step: int) -> str:
        if step == 0 or step <= self.first:
            return ""
        per_step = (time.monotonic() - self.began) / (step - self.first)
        left = per_step * (self.config.training.max_steps - step)
        return f", about {left / 60:.0f} min left" if left > 0 else ""

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def trace(self, step: int, batch: RolloutBatch) -> None:
        """Keep some test rollouts for the report, of the same questions each time, with what was read on them."""
        batch = replace(batch, columns={"answer": self.test["answer"]})
        rows = np.linspace(0, len(batch) - 1, min(TRACED, len(batch))).round().astype(int).tolist()
        tokenizer, rewards = self.trainer.processing_class, feature_rewards(self.watched)
        requests = [reward.request for reward in rewards.values()]
        readings = HFSource(self._model(), tokenizer).read(few := batch.take(rows), requests)
        outcome = OutcomeReward(getattr(verifiers, self.config.verifier), gold_column="answer")
        records = traced(few, range(len(few)), tokenizer, rewards, readings, outcome)
        where = [{"step": step, "set": "test", "row": row} for row in rows]
        append(self.folder / TRACE, [{**w, **record} for w, record in zip(where, records, strict=True)])


def evaluate(
    model: Any,
    tokenizer: Any,
    test: Any,
    config: ExperimentConfig,
    watched: Sequence[FeatureReward],
    seed: int,
    do_sample: bool = True,
    look: Callable[[RolloutBatch], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One rollout for each test question.

    The seed is the same at every step and in every arm, and training's own random numbers are left as they were.
    ``look`` is shown the rollouts.

    Returns:
        A record for each rollout (question's number, completion, right, tokens, ended, readings, and where steps can be
        checked right_steps, the share of the solution's steps that it makes), and their means.
    """
    training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = sample(
            model.eval(),
            tokenizer,
            test["prompt"],
            1,
            config.evaluation.batch_size,
            **{**arms.sampling(config), **({} if do_sample else {"do_sample": False, "temperature": None})},
        )
    if look is not None:
        look(batch)
    readings = {
        reward.__name__: reward(
            batch.prompts, batch.completions, batch.completion_ids, source=HFSource(model, tokenizer)
        )
        for reward in watched
    }
    model.train(training)
    verifier = getattr(verifiers, config.verifier)
    said = verdicts(verifier, batch.texts, golds(verifier, test["answer"], "answer"))
    solutions: list[Any] = test["solution"] if "solution" in test.column_names else [None] * len(batch)
    rows = []
    for i, (text, ids) in enumerate(zip(batch.texts, batch.completion_ids, strict=True)):
        row: dict[str, Any] = {
            "question": test["number"][i],
            "completion": text,
            "right": said[i] is True,
            "tokens": len(ids),
            "ended": ids[-1] in batch.eos_token_ids if len(ids) else False,
            **{name: values[i] for name, values in readings.items()},
        }
        if solutions[i] is not None:
            row["right_steps"] = step_accuracy(text, solutions[i])
        rows.append(row)
    figures = {"accuracy": _mean([row["right"] for row in rows]), "tokens": _mean([row["tokens"] for row in rows])}
    figures["truncated"] = 1 - _mean([row["ended"] for row in rows])
    for name in [*readings, "right_steps"]:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            figures[name] = _mean(known)
    return rows, figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- an experiment ----------------------------------------------------------------------------------------------------


def main(
    about: str,
    fits: Callable[[Any], str | None],
    schema: type[ExperimentConfig] = ExperimentConfig,
    outfit: Outfitter = arms.outfit,
    afterwards: str = "Compare them: python experiments/compare.py",
) -> None:
    """The command line of an experiment that trains.

    Args:
        about: The script's docstring.
        fits: What is wrong with a configuration for this experiment, in words, or None.
        schema: Of its configuration.
        outfit: What an arm is trained with.
        afterwards: What to do with the runs; their folder follows.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML file")
    parser.add_argument("--arm", action="append", help="only this arm (may be repeated); default: all")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated); default: all")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, each in a process of its own, all on the same GPU if there is one (default 1)",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    try:
        config = read_config(options.config, schema)
        if (wrong := fits(config)) is not None:
            raise ConfigError(f"{options.config}: {wrong}")
        grid = chosen_runs(config, options.arm, options.seed)
        command = [sys.executable, sys.argv[0], "--config", str(options.config)]
        carry_out(config, grid, options.jobs, [*command, *(["--debug"] if options.debug else [])], outfit=outfit)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoint.")
    print(f"Runs: {Path(config.output).resolve()}. {afterwards} {config.output}")


def carry_out(
    config: ExperimentConfig,
    grid: Sequence[tuple[str, int]],
    jobs: int,
    command: Sequence[str],
    tell: Callable[[str], None] = print,
    outfit: Outfitter = arms.outfit,
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Make an experiment's runs.

    Args:
        config: The experiment.
        grid: Arm and seed of each run.
        jobs: Runs at a time; several are processes of their own.
        command: Starts such a process; ``--arm`` and ``--seed`` follow.
        tell, outfit, report_to, progress: As for :func:`run`; processes have their own.

    Returns:
        The runs' folders.

    Raises:
        MechRewardError: A run cannot be made.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs} is not possible: give the number of runs at a time, 1 or more.")
    quiet()
    for pack in map(load_pack, arms.packs_of(config)):
        if pack.status == "candidate":
            tell(f"{pack.name} is a candidate pack: {pack.status_reason}")
    if jobs > 1 and len(grid) > 1:
        _in_processes(command, jobs, grid)
        return [folder_of(config, arm, seed) for arm, seed in grid]
    folders = []
    for arm, seed in grid:
        folders.append(run(config, arm, seed, tell=tell, outfit=outfit, report_to=report_to, progress=progress))
        if "wandb" in report_to:
            importlib.import_module("wandb").finish()  # else the next run would be logged into this one
        gc.collect()  # a trainer and its model hold each other; on a GPU the next would not fit beside them
        torch.cuda.empty_cache()
    return folders


def quiet() -> None:
    """What other libraries say while they work would hide what is asked for."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"mechreward\.")  # ours are about the experiment
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    require("datasets", "trl").disable_progress_bars()


def check_trackers(names: Sequence[str]) -> None:
    """Find out before a training what it cannot log to.

    Raises:
        ConfigError: TRL does not know it, or it is not installed.
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


def chosen_runs(config: ExperimentConfig, only: list[str] | None, seeds: list[int] | None) -> list[tuple[str, int]]:
    """The runs to make, all arms of a seed before the next seed.

    Raises:
        ConfigError: An arm or a seed that the configuration does not have.
    """
    for arm in only or []:
        if arm not in config.arms:
            raise ConfigError(
                f"There is no arm '{arm}'; there are {', '.join(config.arms)}.{nearest(arm, config.arms)}"
            )
    for seed in seeds or []:
        if seed not in config.seeds:
            raise ConfigError(f"The configuration has no seed {seed}: it has {', '.join(map(str, config.seeds))}.")
    wanted = [(arm, seed) for seed in seeds or config.seeds for arm in only or config.arms]
    return list(dict.fromkeys(wanted))


def folder_of(config: ExperimentConfig, arm: str, seed: int) -> Path:
    """Where a run lies."""
    return Path(config.output) / arm / f"seed-{seed}"


def _in_processes(command: Sequence[str], jobs: int, grid: Sequence[tuple[str, int]]) -> None:
    """Every run in a process of its own, so many at a time; the cores are shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def one(which: tuple[str, int]) -> int:
        arm, seed = which
        return subprocess.run([*command, "--arm", arm, "--seed", str(seed)], env=surroundings).returncode

    with ThreadPoolExecutor(jobs) as pool:
        failed = [which for which, code in zip(grid, pool.map(one, grid), strict=True) if code]
    if failed:
        names = ", ".join(f"{arm} seed {seed}" for arm, seed in failed)
        raise MechRewardError(f"{len(failed)} of {len(grid)} runs failed ({names}): see above.")
