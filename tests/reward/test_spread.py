"""The part of a reward that varies most within groups is what GRPO follows: the trainer says so once."""

import logging
import math

import numpy as np
import pytest
import torch

import mechreward as mr
from mechreward.reward import spread as spread_module
from mechreward.reward.spread import STEPS, SpreadWatch
from mechreward.rollout.batch import Scores

GROUP = 4


def feature(name, **options):
    return mr.FeatureReward(mr.direction(name, torch.ones(128), mr.HookPoint(1)), name=name, **options)


def outcome():
    return mr.OutcomeReward(verifier=mr.verifiers.math_boxed, name="right")


def accuracy(completions, **_):
    return [0.0] * len(completions)


def seen(rewards, weights, columns, parts=None, steps=STEPS):
    """What is said after some steps whose rewards are ``columns``, one ``[steps, B]`` for each function."""
    watch = SpreadWatch()
    for step in range(steps):
        values = torch.tensor(np.stack([column[step] for column in columns], axis=1))
        said = {}
        if parts is not None:
            inside = {name: torch.tensor(part[step]) for name, part in parts.items()}
            said = {rewards[0]: Scores(values[:, 0], parts=inside)}
        watch.see(rewards, weights, values, said, GROUP)


def spread(values):
    """By hand: the mean over steps and groups of the unbiased standard deviation, NaN left out."""
    stds = [
        [np.std(known, ddof=1) for known in (g[~np.isnan(g)] for g in np.split(row, range(GROUP, len(row), GROUP)))
         if len(known) > 1]
        for row in values
    ]  # fmt: skip
    return np.mean([np.mean(row) for row in stds])


def drawn(scale, rows=12, seed=0):
    return np.random.default_rng(seed).normal(size=(STEPS, rows)) * scale


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("rows", [12, 10, 3])  # whole groups, one that another process has the rest of, part of one
def test_the_figures_are_weighted_mean_deviations_within_groups(caplog, rows):
    wide, narrow, right = drawn(3.0, rows, 1), drawn(0.5, rows, 2), drawn(1.0, rows, 3)
    wide[2, 0] = right[4, 1] = math.nan
    wide += 50 * np.arange(STEPS)[:, None]  # between steps, and between groups, is not within a group
    right[:, GROUP:] += 100
    composite = mr.CompositeReward([outcome(), feature("wide"), feature("narrow")], [2.0, 1.5, 0.5])
    seen([composite], [0.5], [right], {"right": right, "wide": wide, "narrow": narrow})
    (said,) = warnings_of(caplog)
    assert f"'wide' times its weight had a mean standard deviation of {0.75 * spread(wide):.3g} " in said
    assert f"the outcome's {spread(right):.3g}" in said and 'normalize="group"' in said and "\n" not in said


def test_top_level_functions_are_compared_by_the_trainers_weights(caplog):
    columns = [drawn(1.0, seed=1), drawn(1.0, seed=2)]
    seen([accuracy, feature("f")], [1.0, 0.3], columns)
    assert not warnings_of(caplog)
    seen([accuracy, feature("f")], [0.3, 1.0], columns)
    (said,) = warnings_of(caplog)
    assert "'f'" in said and f"{0.3 * spread(columns[0]):.3g}" in said


def test_nested_parts_and_several_outcomes(caplog):
    right, form, inner = drawn(1.0, seed=1), drawn(1.0, seed=2), drawn(1.0, seed=3)
    nested = mr.CompositeReward([feature("inner")], [3.0], name="nested")
    composite = mr.CompositeReward([outcome(), nested], [1.0, 1.0])
    parts = {"right": right, "nested": 3 * inner, "nested/inner": inner}
    seen([composite, accuracy], [1.0, 0.1], [right, form], parts)
    (said,) = warnings_of(caplog)
    assert "'nested/inner'" in said and f"{3 * spread(inner):.3g}" in said
    assert f"{spread(right + 0.1 * form):.3g}" in said


@pytest.mark.parametrize(
    "rewards",
    [
        [feature("f")],
        [feature("f"), feature("g")],
        [mr.CompositeReward([feature("f")])],
        [mr.CompositeReward([outcome(), feature("f")], mode="hero")],
        [mr.CompositeReward([outcome(), feature("f")], mode="gated")],
    ],
)
def test_without_an_outcome_to_compare_with_nothing_is_said(caplog, rewards):
    columns = [drawn(5.0, seed=i) for i in range(len(rewards))]
    seen(rewards, [1.0] * len(rewards), columns, {"right": columns[0] / 9, "f": columns[0]})
    assert not warnings_of(caplog)


def test_it_speaks_after_ten_steps_and_once(caplog):
    columns = [np.tile(drawn(1.0, seed=i), (3, 1)) * (1 + i) for i in range(2)]
    seen([accuracy, feature("f")], [1.0, 1.0], columns, steps=STEPS - 1)
    assert not warnings_of(caplog)
    seen([accuracy, feature("f")], [1.0, 1.0], columns, steps=3 * STEPS)
    assert len(warnings_of(caplog)) == 1


def test_the_trainer_says_it_once(tmp_path, caplog, monkeypatch):
    """One part with a spread above the outcome's, and one below it, in the same training."""

    def length(completions, **_):
        return [len(text) / 10 for text in completions]

    from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer

    monkeypatch.setattr(spread_module, "STEPS", 3)
    vector = torch.randn(128, generator=torch.Generator().manual_seed(0))
    parts = [mr.FeatureReward(mr.direction(name, vector, mr.HookPoint(1)), name=name) for name in ("wide", "narrow")]
    trainer = MechRewardGRPOTrainer(
        model="mechreward/pocket",
        reward_funcs=[mr.CompositeReward(parts, [10.0, 1e-4]), length],
        args=MechRewardGRPOConfig(
            output_dir=str(tmp_path),
            num_generations=GROUP,
            per_device_train_batch_size=2 * GROUP,
            max_completion_length=8,
            max_steps=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=mr.pocket.dataset("train", 64),
    )
    with caplog.at_level(logging.WARNING, logger="mechreward.reward.spread"):
        trainer.train()
    (said,) = [r.getMessage() for r in caplog.records if r.name == "mechreward.reward.spread"]
    assert "'wide'" in said and "first 3 steps" in said
