"""DualVerifier by hand: who is flagged, what is left, and what is refused."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from planting import sampled

import mechreward as mr
from mechreward.errors import CandidateWarning, ConfigError
from mechreward.features.pack import Calibration
from mechreward.hacking import DualVerifier
from mechreward.probes.linear_probe import ProbeCalibration, as_probe, linear_probe
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import load_model

PLATT = ProbeCalibration(
    slope=2.0,
    intercept=-1.0,
    brier={"value": 0.1, "low": 0.1, "high": 0.1},
    brier_of_the_share=0.2,
    ece=0.0,
    brier_uncalibrated=0.1,
    ece_uncalibrated=0.1,
    bins=[],
)
QUANTILES = Calibration(quantiles=np.linspace(-1, 1, 101).tolist(), aggregation="mean")


def features(**options):
    return FeatureReward(direction("features", torch.ones(4), HookPoint(1)), calibration=QUANTILES, **options)


def probe(calibrated=True):
    made = linear_probe("probe", torch.ones(4), 0.0, HookPoint(2))
    card = made.card.model_copy(update={"calibration": PLATT if calibrated else None})
    return as_probe(card, made.weight, made.bias)


def read(reward, raw, logits):
    """A batch of one-token rollouts, and readings that give these raw rewards and logits."""
    n = len(raw)
    batch = RolloutBatch(["p"] * n, ["c"] * n, [[1]] * n, [[2, 3]] * n)
    mask = torch.tensor([[not math.isnan(r), False] for r in raw])
    values = [torch.tensor([[v, 0.0] for v in column])[..., None].nan_to_num() for column in (raw, logits)]
    return batch, {request: Readings(v, mask) for request, v in zip(reward.requests, values, strict=True)}


RAW, LOGITS = [0.8, 0.8, -0.8, 0.0, math.nan], [-1.0, 2.0, 3.0, 0.5, 0.0]
# q(r) = (r + 1) / 2 = .9, .9, .1, .5;  p = 1 / (1 + exp(1 - 2 l)) = .047, .953, .993, .5
FLAGGED = [True, False, False, False, False]


def test_only_features_that_say_yes_against_the_probe_are_flagged():
    dual = DualVerifier(features(), probe())
    batch, readings = read(dual, RAW, LOGITS)
    yes, agrees = dual.disagreement.said(batch, readings)
    np.testing.assert_allclose(yes[:4], [0.9, 0.9, 0.1, 0.5], atol=1e-6)
    np.testing.assert_allclose(agrees[:4], [1 / (1 + math.exp(1 - 2 * z)) for z in LOGITS[:4]], atol=1e-6)
    guarded = dual.guard(batch, readings)
    assert [bool(flags) for flags in guarded.flags] == FLAGGED and not guarded.dropped.any()
    assert "0.90" in guarded.flags[0][0] and "0.05" in guarded.flags[0][0]
    scores = dual.score(guarded, readings)
    np.testing.assert_allclose(scores.values, [0.0, 0.8, -0.8, 0.0, math.nan], atol=1e-6)
    assert scores.metrics["disagreement"] == 0.25 and scores.parts["raw"][0] == pytest.approx(0.8)


@pytest.mark.parametrize(("threshold", "flags"), [(0.0, 1), (0.85, 1), (0.86, 0), (1.0, 0)])
def test_the_threshold_is_a_difference_of_probabilities(threshold, flags):
    dual = DualVerifier(features(), probe(), disagreement_threshold=threshold)
    batch, readings = read(dual, RAW, LOGITS)
    assert sum(map(bool, dual.guard(batch, readings).flags)) == flags


def test_what_is_left_and_what_is_dropped():
    batch, readings = read(DualVerifier(features(), probe()), RAW, LOGITS)
    for downweight, left in ((0.25, 0.2), (1.0, 0.8)):
        dual = DualVerifier(features(), probe(), downweight=downweight)
        given = dict(zip(dual.requests, readings.values(), strict=True))
        assert dual.score(dual.guard(batch, given), given).values[0] == pytest.approx(left)
    dual = DualVerifier(features(), probe(), downweight="drop")
    given = dict(zip(dual.requests, readings.values(), strict=True))
    assert dual.guard(batch, given).dropped.tolist() == FLAGGED


def test_in_a_composite_the_outcome_is_left_alone_and_a_subtracted_reward_is_not_escaped():
    outcome = mr.OutcomeReward(verifier=lambda completions, golds: [True] * len(completions))
    for weight, expected in ((0.5, 1.0), (-0.5, 1.0 - 0.4)):  # subtracted: a flag does not lift the penalty
        dual = DualVerifier(features(), probe())
        nested = mr.CompositeReward([dual])
        both = mr.CompositeReward([nested, outcome], weights=[weight, 1.0], guards=[])
        batch, readings = read(dual, RAW, LOGITS)
        batch = replace(batch, columns={"answer": ["x"] * 5})
        values = both.score(both.guard(batch, readings), readings).values
        assert values[0] == pytest.approx(expected) and values[1] == pytest.approx(1 + weight * 0.8)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: DualVerifier(FeatureReward(direction("raw", torch.ones(4), HookPoint(1))), probe()),
            "'raw' has no cal",
        ),
        (lambda: DualVerifier(features(aggregation="max"), probe()), "calibrated for aggregation 'mean', not 'max'"),
        (lambda: DualVerifier(features(), probe(False)), "mechreward probe train"),
        (lambda: DualVerifier(features(), probe(), disagreement_threshold=1.5), "0 to 1, not 1.5"),
        (lambda: DualVerifier(features(), probe(), disagreement_threshold=math.nan), "0 to 1, not nan"),
        (lambda: DualVerifier(features(), probe(), downweight=-0.1), "-0.1"),
    ],
)
def test_what_cannot_be_compared_is_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build()


def test_on_pocket_it_equals_the_two_read_apart():
    """The pack's reward and the probe's logit, each by itself, put together by the formula."""
    model, tokenizer = load_model("mechreward/pocket")
    rollouts = sampled("gate", 40, 2).batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)
        reward = FeatureReward.from_pack("pocket/reasoning_pack")
    shipped = mr.load_probe("pocket/correctness_probe")
    calibrated = as_probe(shipped.card.model_copy(update={"calibration": PLATT}), shipped.weight, shipped.bias)
    source = mr.HFSource(model, tokenizer, reference=model)
    call = (rollouts.prompts, rollouts.completions, rollouts.completion_ids)
    dual = DualVerifier(reward, calibrated, downweight=0.0)
    found = np.array(dual(*call, source=source))
    raw = np.array(reward(*call, source=source))
    logits = np.array(FeatureReward(shipped, scale="logit")(*call, source=source))
    assert reward.calibration is not None
    flagged = reward.calibration.to_unit(raw) - 1 / (1 + np.exp(-(2 * logits - 1))) > 0.3
    np.testing.assert_allclose(found, np.where(flagged, np.minimum(raw, 0), raw), rtol=1e-5, atol=1e-6)
    assert 0 < flagged.sum() < len(flagged)
