"""What a training leaves behind for the report: figures of every step, and some rollouts with what was read on them.

In the output folder: ``recording.json`` (which readouts, the packs that they come from, what the run was started with),
``environment.json``, ``metrics.jsonl`` (a line for each log) and ``trace.jsonl`` (a line for each recorded rollout).
Nothing here draws a random number or touches a model: with and without it, the same seed gives the same weights.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from mechreward import pocket
from mechreward.files import ENVIRONMENT, append, environment, forget_after, read_if_there, write_json
from mechreward.readout import Readings, Request
from mechreward.reward.base import all_within
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch, Scores, plain_text
from mechreward.rollout.sampling import token_texts, untouched_randomness
from mechreward.verifiers.golds import gold, gold_columns

logger = logging.getLogger(__name__)

RECORDING, METRICS, TRACE = "recording.json", "metrics.jsonl", "trace.jsonl"

COLUMNS = 32
"""Columns of a readout that are recorded: those with the largest weights."""

TOKENS = 1024
"""Tokens of a rollout that are recorded; what follows is counted."""

ROLLOUTS = 8
"""Rollouts of one step that are recorded at most: recording must not slow training down."""


def peak_memory() -> tuple[str, int] | None:
    """The most memory that was held so far, in bytes, and whose: a GPU's tensors, or this whole process's."""
    if torch.cuda.is_available():
        return "GPU, tensors", torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return "whole process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- rollouts with their readings --------------------------------------------------------------------------------------


def _held_by(parts: Sequence[Any]) -> Iterator[Any]:
    """Rewards, guards and monitors, what they are made of, and what they keep to measure with."""
    for part in all_within(parts):
        yield part
        yield from getattr(part, "__dict__", {}).values()


def feature_rewards(parts: Sequence[Any]) -> dict[str, FeatureReward]:
    """Every feature reward among rewards, guards and monitors, by the name that the report calls it.

    That is its pack's name where it has one: what an arm is rewarded for and another only watches is the same reading.
    """
    found: dict[str, FeatureReward] = {}
    for reward in _held_by(parts):
        if isinstance(reward, FeatureReward):
            name = reward.__name__ if reward.pack is None else reward.pack.name
            found.setdefault(name + (" on the reference" if reward.request.reads == "reference" else ""), reward)
    return found


def outcome_reward(parts: Sequence[Any]) -> OutcomeReward | None:
    """Who among them knows what is right."""
    return next((part for part in _held_by(parts) if isinstance(part, OutcomeReward)), None)


def columns(reward: FeatureReward) -> list[int]:
    """The recorded columns of its readout, at most :data:`COLUMNS`."""
    order = reward.weights.abs().argsort(descending=True, stable=True)
    return sorted(order[:COLUMNS].tolist())


def described(rewards: Mapping[str, FeatureReward]) -> dict[str, Any]:
    """What the readouts are, and the packs that they come from, for ``recording.json``."""
    readouts = {
        name: {
            "labels": [reward.readout.labels[k] for k in columns(reward)],
            "weights": [round(float(reward.weights[k]), 6) for k in columns(reward)],
            "width": reward.readout.width,
            "hook_point": str(reward.readout.hook_point),
            "reads": reward.request.reads,
            "aggregation": reward.aggregation,
            "pack": None if reward.pack is None else reward.pack.name,
        }
        for name, reward in rewards.items()
    }
    packs = {r.pack.name: r.pack.model_dump(mode="json") for r in rewards.values() if r.pack is not None}
    return {"readouts": readouts, "packs": packs}


@dataclass(frozen=True, eq=False)
class Scored:
    """What a reward function made of a batch: the batch as its own guards left it, and the scores."""

    name: str
    batch: RolloutBatch
    scores: Scores


def traced(
    batch: RolloutBatch,
    rows: Sequence[int],
    tokenizer: Any,
    rewards: Mapping[str, FeatureReward],
    readings: Mapping[Request, Readings],
    outcome: OutcomeReward | None = None,
) -> list[dict[str, Any]]:
    """Rollouts of a batch as they are recorded.

    Args:
        batch: The rollouts, with the gold answers among their columns.
        rows: Which of them.
        tokenizer: For the tokens' texts.
        rewards: The feature rewards whose readings are recorded, from :func:`feature_rewards`.
        readings: For each of their requests.
        outcome: Who says what is right; without it, ``right`` is None.

    Returns:
        A record for each: prompt, gold, right (None if unknown), tokens, how many more there were, which tokens were
        not read, and for each feature reward its r_t (``score``, one a token) and its columns' values where they are
        not 0, ``{label: [tokens, values]}``, all to four significant digits.
    """
    decode = _decoder(tokenizer)
    verdicts = [math.nan] * len(batch) if outcome is None else outcome.score(batch, {}).values.tolist()
    answers = _golds(batch, outcome)
    lengths = [min(len(batch.completion_ids[i]), TOKENS) for i in rows]
    masks = [_chosen_rows(readings[reward.request].mask, rows) for reward in rewards.values()]
    seen = np.any([mask.numpy() for mask in masks] or [np.zeros((len(rows), max(lengths, default=0)))], axis=0)
    found = {name: _traced(reward, readings[reward.request], rows, lengths) for name, reward in rewards.items()}
    return [
        {
            "prompt": plain_text(batch.prompts[i]),
            "gold": None if answers[i] is None else str(answers[i]),
            "right": None if math.isnan(verdicts[i]) else verdicts[i] > 0.5,
            "tokens": token_texts(decode, batch.completion_ids[i][: lengths[k]]),
            "more": len(batch.completion_ids[i]) - lengths[k],
            "unread": np.flatnonzero(~seen[k, : lengths[k]].astype(bool)).tolist(),
            "readings": {name: each[k] for name, each in found.items()},
        }
        for k, i in enumerate(rows)
    ]


def _traced(reward: FeatureReward, read: Readings, rows: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """What a feature reward has read on some rollouts: ``score`` and ``features``, as :func:`traced` records them."""
    # Only what is written leaves the device, and in one piece.
    values, mask = _chosen_rows(read.values, rows), _chosen_rows(read.mask, rows)
    scores = reward.raw(Readings(values, mask)).where(mask, torch.nan).tolist()
    kept = columns(reward)
    texts = [reward.readout.labels[k] for k in kept]
    features: list[dict[str, list[list[float]]]] = [{} for _ in rows]
    chosen = values[..., kept].transpose(1, 2)  # [rows, columns, T]
    where = chosen.nonzero()
    for (row, k, t), value in zip(where.tolist(), chosen[tuple(where.T)].tolist(), strict=True):
        if t < lengths[row]:
            places, numbers = features[row].setdefault(texts[k], [[], []])
            places.append(t)
            numbers.append(_rounded(value))
    return [
        {"score": list(map(_rounded, of[:length])), "features": own}
        for of, own, length in zip(scores, features, lengths, strict=True)
    ]


def _chosen_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, on the CPU."""
    return values[torch.tensor(rows, device=values.device)].cpu() if len(rows) else values[:0].cpu()


@functools.lru_cache(4)
def _decoder(tokenizer: Any) -> Callable[[tuple[int, ...]], str]:
    """Decode tokens; those that were decoded before are remembered, since a training meets them again and again."""
    return functools.lru_cache(100_000)(
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _golds(batch: RolloutBatch, outcome: OutcomeReward | None) -> Sequence[Any]:
    found = gold_columns(batch.columns, None if outcome is None else outcome.gold_column)
    if not found:
        return [None] * len(batch)
    return [gold(cell, found[0], structured=True) for cell in batch.columns[found[0]]]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


# -- in a trainer ------------------------------------------------------------------------------------------------------


class Recording(TrainerCallback):
    """Writes a training's figures at every log, and so many of its rollouts, spread evenly over the steps.

    What goes wrong here ends the recording, never the training.

    Args:
        trainer: Whose training.
        most: Rollouts that are recorded over the whole training; 0 records figures alone.
    """

    def __init__(self, trainer: Any, most: int):
        self.trainer, self.most, self.left = trainer, most, most
        self.folder = Path(trainer.args.output_dir)
        parts = [*trainer.reward_funcs, *trainer.guards, *trainer.monitors]
        self.rewards = feature_rewards(parts)
        self.outcome = outcome_reward(parts)
        self.step_began = self.seconds = self.recording = 0.0
        self.broken: set[str] = set()

    def _safely(self, what: str, act: Callable[[], None]) -> None:
        """Do it; where that goes wrong, leave it from then on: ``figures`` or ``rollouts``."""
        if what in self.broken or not self.trainer.accelerator.is_main_process:
            return
        try:
            act()
        except Exception as error:
            self.broken.add(what)
            logger.warning("No more %s are recorded in %s: %s: %s.", what, self.folder, type(error).__name__, error)

    def on_train_begin(self, args, state, control, **kwargs):
        self._safely("figures", lambda: self._begin(args, state))
        if self.broken:  # without a folder there is nothing to write to
            self.broken.add("rollouts")

    def _begin(self, args: Any, state: Any) -> None:
        """Go on after the checkpoint's step, or begin anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TRACE):
            file = self.folder / name
            if file.exists() and not (self.folder / RECORDING).exists():
                file.replace(file.with_suffix(".jsonl.old"))  # of that name, and not ours
            forget_after(file, state.global_step)
        self.left = self.most - sum(record["set"] == "training" for record in read_if_there(self.folder / TRACE))
        if not (self.folder / ENVIRONMENT).exists() or state.global_step == 0:
            write_json(self.folder / ENVIRONMENT, environment())
        memory = peak_memory()
        about = {
            "model": pocket.named(str(self.trainer.model.config._name_or_path)),
            "seed": args.seed,
            "max_steps": state.max_steps,
            "reward_weights": dict(
                zip(self.trainer.reward_func_names, self.trainer.reward_weights.tolist(), strict=True)
            ),
            "memory": None if memory is None else memory[0],
        }
        write_json(self.folder / RECORDING, {**about, **described(self.rewards)})

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.monotonic() - self.step_began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            memory = peak_memory()
            more = {"seconds": self.seconds, **({} if memory is None else {"peak_memory_bytes": memory[1]})}
            self._safely(
                "figures", lambda: append(self.folder / METRICS, [{"step": state.global_step, **logs, **more}])
            )

    def rollouts(
        self,
        batch: RolloutBatch,
        readings: Mapping[Request, Readings],
        scored: Sequence[Scored],
        rewards: Tensor,
        advantages: Tensor,
    ) -> None:
        """Record some of a step's rollouts.

        Args:
            batch: This process's B rollouts, with the guards' verdicts.
            readings: All of the step's.
            scored: What each reward function of ours made of them.
            rewards: ``[B x processes, reward functions]``, NaN where there is none.
            advantages: ``[B]``, of the whole rollouts.
        """
        self._safely("rollouts", lambda: self._rollouts(batch, readings, scored, rewards, advantages))

    def _rollouts(self, batch, readings, scored, rewards, advantages) -> None:
        began = time.perf_counter()
        step, steps = self.trainer.state.global_step, self.trainer.state.max_steps
        rows = self._chosen(step, steps, len(batch))
        if not rows:
            return
        with untouched_randomness():  # a verifier may draw numbers
            records = traced(batch, rows, self.trainer.processing_class, self.rewards, readings, self.outcome)
        values = torch.stack([batch.local(column.cpu()) for column in rewards.T], dim=1)  # [B, reward functions]
        total = (values * self.trainer.reward_weights.cpu()).nansum(dim=1)
        total = total.masked_fill(values.isnan().all(dim=1), torch.nan)
        for i, record in zip(rows, records, strict=True):
            rewarded = zip(self.trainer.reward_func_names, values[i], strict=True)
            parts = {f"{s.name}/{part}": v[i] for s in scored for part, v in s.scores.parts.items()}
            record |= {
                "reward": _number(total[i]),
                "rewards": {name: _number(value) for name, value in rewarded},
                "parts": {name: _number(value) for name, value in parts.items()},
                "advantage": _number(advantages[i]),
                **_guarded([batch, *(s.batch for s in scored)], i),
            }
        where = [{"step": step + 1, "set": "training", "row": i, "group": i // batch.num_generations} for i in rows]
        append(self.folder / TRACE, [{**w, **record} for w, record in zip(where, records, strict=True)])
        self.left -= len(rows)
        self.trainer._log_metric("mechreward/recording_seconds", time.perf_counter() - began)

    def _chosen(self, step: int, steps: int, count: int) -> list[int]:
        """This step's rollouts to record: spread over the batch, and over the training."""
        if step % max(1, math.ceil(steps / max(self.most, 1))) or self.left <= 0:
            return []
        wanted = min(count, self.left, ROLLOUTS, max(1, self.most // max(steps, 1)))
        return sorted(set(np.linspace(0, count - 1, wanted).round().astype(int).tolist()))


def _guarded(batches: Sequence[RolloutBatch], i: int) -> dict[str, Any]:
    """What the guards of the trainer and of each reward said of rollout i."""
    said = [flag for batch in batches if batch.flags is not None for flag in batch.flags[i]]
    return {
        "trust": min([float(batch.trust[i]) for batch in batches if batch.trust is not None], default=1.0),
        "flags": list(dict.fromkeys(said)),
        "dropped": any(bool(batch.dropped[i]) for batch in batches if batch.dropped is not None),
    }


def _number(value: Any) -> float | None:
    return float(f"{float(value):.6g}") if math.isfinite(value) else None
