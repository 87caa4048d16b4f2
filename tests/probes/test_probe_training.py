"""Probes are trained on the right tokens, judged honestly, and read by FeatureReward as training reported them."""

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.calibration import _SigmoidCalibration
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

import mechreward as mr
from conftest import residual as residual_by_hand
from mechreward.aggregation import attention_over
from mechreward.cli import app
from mechreward.errors import CaptureError, ConfigError, DataError, PackError
from mechreward.probes import linear_probe, training
from mechreward.probes.linear_probe import load_probe, save_probe
from mechreward.probes.training import calibrate, parse_layers, platt, rollout_logits, train_probe
from mechreward.readout import HookPoint
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import HFSource
from mechreward.rollout.labelled import Labelled

SIGN = 7  # the token whose presence is the behaviour
POOLINGS = ["mean", "last", "max", "attention"]
LAYER = 0


def rollouts(questions, seed, samples=4, label=None) -> Labelled:
    """Few kinds of random tokens; half of the rollouts hold SIGN once, somewhere that is read."""
    rng, rows, labels = np.random.default_rng(seed), [], []
    prompts = [rng.integers(8, 20, rng.integers(1, 6)).tolist() for _ in range(questions)]
    for _ in range(questions * samples):
        ids = rng.integers(8, 20, rng.integers(3, 12)).tolist()
        labels.append(bool(rng.random() < 0.5))
        if labels[-1]:
            ids[rng.integers(0, len(ids) - 1)] = SIGN
        rows.append(ids)
    groups = np.repeat(np.arange(questions), samples)
    batch = RolloutBatch(
        prompts=[f"question {seed} {g}" for g in groups],
        completions=[str(row) for row in rows],
        prompt_ids=[prompts[g] for g in groups],
        completion_ids=rows,
        eos_token_ids=frozenset([2]),
    )
    return Labelled(batch, np.array(labels if label is None else label), groups, f"seed {seed}")


TRAIN, TEST = rollouts(30, 0), rollouts(20, 1)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer resamples and strengths than users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "bootstrap", functools.partial(training.bootstrap, draws=100))
        patch.setattr(training, "STRENGTHS", (0.01, 0.1, 1.0))
        yield


@pytest.fixture(scope="module")
def trained(gemma):
    """Each pooling, trained once."""
    return {how: train_probe(gemma, TRAIN, [LAYER], how, TEST, f"a_{how}_probe", "gemma-2-tiny") for how in POOLINGS}


def read_tokens(model, data, layer=LAYER):
    """What a probe reads of each rollout, ``[tokens, d]`` float64: no padding, no prompt, no final token."""
    found = []
    for prompt, ids in zip(data.batch.prompt_ids, data.batch.completion_ids, strict=True):
        stream = residual_by_hand(model, [*prompt, *ids], HookPoint(layer))
        found.append(stream[len(prompt) : len(prompt) + len(ids) - 1].double().numpy())
    return found


def logit_by_hand(x, weight, bias, how):
    """One rollout's logit, in float64, from the published formulas."""
    if how == "attention":
        score = x @ weight[:, 0]
        shares = [1 / sum(math.exp(other - each) for other in score) for each in score]
        return sum(share * (each @ weight[:, 1] + bias[1]) for share, each in zip(shares, x, strict=True))
    logits = [each @ weight + bias[0] for each in x]
    return {"mean": np.mean(logits), "last": logits[-1], "max": max(logits)}[how]


class Fixed(HFSource):
    """A source whose rollouts are tokenised already."""

    def __init__(self, model, batch):
        super().__init__(model, None)
        self.made = batch

    def batch(self, call):
        return self.made


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", POOLINGS)
def test_feature_reward_on_the_loaded_probe_gives_what_training_reported(trained, gemma, tmp_path, how):
    save_probe(trained[how].probe, tmp_path / "p")
    probe = load_probe(str(tmp_path / "p"))
    logit, reward = FeatureReward(probe, scale="logit"), FeatureReward(probe)
    assert logit.aggregation == reward.aggregation == how and reward.scale == "probability"
    scores, rewards = (
        each(TEST.batch.prompts, TEST.batch.completions, source=Fixed(gemma, TEST.batch)) for each in (logit, reward)
    )
    np.testing.assert_array_equal(scores, trained[how].logits)
    card = json.loads((tmp_path / "p.json").read_text())
    a, b = card["calibration"]["slope"], card["calibration"]["intercept"]
    np.testing.assert_allclose(probe.calibrated(scores), [1 / (1 + math.exp(-(a * s + b))) for s in scores], rtol=1e-12)
    np.testing.assert_allclose(rewards, [1 / (1 + math.exp(-(a * s + b))) for s in scores], rtol=1e-6)
    for each in (scores, rewards):
        assert card["evidence"]["auc"]["value"] == pytest.approx(roc_auc_score(TEST.labels, each), abs=1e-12)
    assert np.isnan(probe.calibrated([np.nan])).all()


@pytest.mark.parametrize("how", POOLINGS)
def test_logits_equal_float64_on_hidden_states_of_unpadded_rollouts(trained, gemma, tmp_path, how):
    save_probe(trained[how].probe, tmp_path / "p")
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(tmp_path / "p.safetensors").items()}
    expected = [logit_by_hand(x, tensors["weight"], tensors["bias"], how) for x in read_tokens(gemma, TEST)]
    np.testing.assert_allclose(trained[how].logits, expected, atol=2e-4 * np.abs(expected).max())


WORTH = {8: 4.0, 9: -4.0, 20: 80.0, 21: -80.0}
"""Logits of four tokens: where one is saturated as a probability, another is twenty times as large."""


@pytest.mark.parametrize("how", ["mean", "last", "max", "mean_last_4_tokens", "attention"])
def test_the_rewards_auc_is_the_cards_where_probabilities_would_saturate(gemma, tmp_path, how):
    """Card, reward, and the formulas on Hugging Face's hidden states; a mean of probabilities falls far below them."""
    rng, data = np.random.default_rng(5), rollouts(30, 5)
    ids = [rng.choice(list(WORTH), rng.integers(8, 16), p=[0.4, 0.4, 0.1, 0.1]).tolist() for _ in data.labels]
    data = replace(data, batch=replace(data.batch, completion_ids=ids))
    found = read_tokens(gemma, data)
    x, worth = np.concatenate(found), np.array([WORTH[token] for row in ids for token in row[:-1]])
    (*value, bias), *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], worth)
    weight = np.c_[rng.normal(size=len(value)), value] if how == "attention" else np.array(value)[:, None]
    n = 4 if how == "mean_last_4_tokens" else None
    by_hand = [
        logit_by_hand(each[-n:] if n else each, weight if weight.shape[1] == 2 else weight[:, 0],
                      [0.0, bias] if weight.shape[1] == 2 else [bias], "mean" if n else how)
        for each in found
    ]  # fmt: skip
    labels = by_hand + rng.normal(scale=0.1 * np.std(by_hand), size=len(by_hand)) > np.median(by_hand)
    card = linear_probe.ProbeCard(
        name="saturated",
        hook_point=f"blocks.{LAYER}.hook_resid_post",
        aggregation=how,
        evidence={"n": len(labels), "auc": training.bootstrap(training.auc, by_hand, labels), "data": "by hand"},
        calibration=calibrate(np.array(by_hand), labels, data.groups),
    )
    made = linear_probe.as_probe(card, torch.tensor(weight), torch.tensor([0.0, bias][-weight.shape[1] :]))
    save_probe(made, tmp_path / "p")
    probe = load_probe(str(tmp_path / "p"))
    for scale in ("probability", "logit", None):
        reward = FeatureReward(probe, scale=scale)
        scores = reward(data.batch.prompts, data.batch.completions, source=Fixed(gemma, data.batch))
        assert roc_auc_score(labels, scores) == pytest.approx(probe.card.evidence.auc.value, abs=2e-4)
    assert roc_auc_score(labels, by_hand) == pytest.approx(probe.card.evidence.auc.value, abs=1e-12)
    assert probe.card.evidence.auc.value > 0.9
    if "mean" in how:  # max and last keep the order of logits
        odds = [np.mean(1 / (1 + np.exp(-(each @ weight[:, 0] + bias)[-(n or 99) :]))) for each in found]
        assert roc_auc_score(labels, odds) < probe.card.evidence.auc.value - 0.1


@pytest.mark.parametrize("how", ["mean", "last"])
def test_the_probe_is_scikit_learns_on_vectors_pooled_by_hand(trained, gemma, how):
    pool = {"mean": lambda x: x.mean(axis=0), "last": lambda x: x[-1]}[how]
    x, x_test = (np.array([pool(each) for each in read_tokens(gemma, data)]) for data in (TRAIN, TEST))
    card = trained[how].probe.card
    model = make_pipeline(StandardScaler(), LogisticRegression(C=card.training.strength, max_iter=1000))
    expected = model.fit(x, TRAIN.labels).decision_function(x_test)
    np.testing.assert_allclose(trained[how].logits, expected, atol=0.01 * np.abs(expected).max())  # the solver's stop
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    outside = cross_val_predict(model, x, TRAIN.labels, groups=TRAIN.groups, cv=folds, method="decision_function")
    assert card.training.cross_validated.value == pytest.approx(roc_auc_score(TRAIN.labels, outside), abs=2e-3)


@pytest.mark.parametrize("how", ["max", "attention"])
def test_max_and_attention_find_one_token_among_many(how):
    rng, d = np.random.default_rng(0), 16
    lengths, truth = rng.integers(10, 40, 400), np.eye(16)[3]
    labels, rows = np.arange(400) % 2 == 0, []
    for length, label in zip(lengths, labels, strict=True):
        x = 2 * rng.normal(size=(length, d)) + 5
        x[rng.integers(length)] += 14 * truth * label
        rows.append(x)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    mean, last = np.array([x.mean(axis=0) for x in rows]), np.array([x[-1] for x in rows])
    tokens = training._Tokens(torch.tensor(np.concatenate(rows)).float(), mask[:, : lengths.max()], mean, last)
    inside, outside = np.arange(200), np.arange(200, 400)
    weight, bias = training._fit_tokens(tokens, labels, inside, how, 1.0)
    logits = training._pooled_logits(tokens, (weight, bias), how)
    assert roc_auc_score(labels[outside], logits[outside]) > 0.98
    linear, intercept = training._fit_linear(mean[inside], labels[inside], 1.0)
    assert roc_auc_score(labels[outside], mean[outside] @ linear + intercept) < 0.9
    for column in weight.T:  # what is looked for, and what is found there
        assert column @ truth / np.linalg.norm(column) > 0.9


@pytest.mark.parametrize("how", ["max", "attention"])
def test_the_fit_is_a_minimum_of_the_objective(gemma, how):
    """The objective, written down again by loops over rollouts; L-BFGS must have reached a point without slope."""
    data, strength = rollouts(15, 3), 0.1
    tokens = training._read_tokens(gemma, data, HookPoint(LAYER))
    weight, bias = training._fit_tokens(tokens, data.labels, np.arange(len(data)), how, strength)
    found = read_tokens(gemma, data)
    scale, d = np.concatenate(found).std(axis=0), found[0].shape[1]
    units = scale[:, None] * (np.array([1.0]) if how == "max" else np.array([d**0.5, 1.0]))

    def loss(w, b):
        total = 0.5 * float((w * units).ravel() @ (w * units).ravel()) / strength
        for x, label in zip(found, data.labels, strict=True):
            z = logit_by_hand(x, w if how == "attention" else w[:, 0], b, how)
            total += np.logaddexp(0, -z if label else z)
        return total / len(data)

    least, rng = loss(weight, bias), np.random.default_rng(0)
    for _ in range(20):
        away = rng.normal(size=weight.shape) / units
        assert loss(weight + 0.03 * away, bias) > least - 1e-9
        assert loss(weight + 0.3 * away, bias) > least
    assert least < 0.6  # log 2 = .69 is what no probe has


def test_a_planted_direction_is_found():
    rng = np.random.default_rng(0)
    truth, x = rng.normal(size=20), rng.normal(size=(3000, 20)) * 5 + 3
    labels = rng.random(3000) < 1 / (1 + np.exp(-(x - 3) @ truth / 5))
    weight, bias = training._fit_linear(x, labels, 1.0)
    assert weight @ truth / np.linalg.norm(weight) / np.linalg.norm(truth) > 0.98
    assert abs(weight @ np.full(20, 3.0) + bias) < 0.3  # the scaling is folded into the bias: 0 at the mean


def test_a_number_that_does_not_vary_has_no_weight_and_harms_nothing():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(200, 4)), np.arange(200) % 2 == 0
    x[:, 0] += labels
    weight, bias = training._fit_linear(x, labels, 1.0)
    still = np.c_[x, 1000 + 1e-6 * rng.normal(size=200), np.zeros(200)]
    wider, wider_bias = training._fit_linear(still, labels, 1.0)
    np.testing.assert_allclose(still @ wider + wider_bias, x @ weight + bias, atol=1e-3)


def test_shuffled_labels_give_an_auc_of_one_half(gemma):
    rng = np.random.default_rng(5)
    parts = [rollouts(30, seed, label=rng.random(120) < 0.4) for seed in (10, 11)]
    auc = train_probe(gemma, parts[0], [LAYER], "attention", parts[1]).probe.card.evidence.auc
    assert auc.low < 0.5 < auc.high and 0.35 < auc.value < 0.65


@given(
    rows=st.lists(st.integers(0, len(TEST) - 1), min_size=1, max_size=12, unique=True), how=st.sampled_from(POOLINGS)
)
@settings(max_examples=25, deadline=None)
def test_a_logit_depends_on_no_other_rollout_and_on_no_final_token(trained, gemma, rows, how):
    some = TEST.take(rows)
    ids = [[*each[:-1], SIGN] for each in some.batch.completion_ids]
    changed = SimpleNamespace(
        batch=RolloutBatch(some.batch.prompts, some.batch.completions, some.batch.prompt_ids, ids)
    )
    logits = trained[how].logits[rows]
    np.testing.assert_allclose(rollout_logits(gemma, changed, trained[how].probe), logits, atol=1e-3)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_attention_is_a_softmax_over_the_tokens_that_are_read(seed, width, padding):
    rng = np.random.default_rng(seed)
    scores, mask = rng.normal(size=(3, width)) * 30, rng.random((3, width)) < 0.6
    padded = torch.tensor(np.c_[scores, rng.normal(size=(3, padding)) * 1e6])
    got = attention_over(padded, torch.tensor(np.c_[mask, np.zeros((3, padding), bool)])).numpy()
    for row in range(3):
        there = np.flatnonzero(mask[row])
        expected = np.zeros(width + padding)
        for t in there:
            expected[t] = 1 / np.exp(scores[row, there] - scores[row, t]).sum()
        np.testing.assert_allclose(got[row], expected, atol=1e-12)


def test_what_cannot_be_read_has_no_logit(trained, gemma):
    batch = RolloutBatch(["a", "b"], ["", "x"], [[9], [9]], [[], [8]])
    for how in POOLINGS:
        assert np.isnan(rollout_logits(gemma, SimpleNamespace(batch=batch), trained[how].probe)).all()


# Choosing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(gemma):
    return train_probe(gemma, TRAIN, [3, 2, 1, 0], "mean", TEST)


def test_the_layer_with_the_best_cross_validated_auc_is_chosen(swept, gemma):
    card = swept.probe.card
    assert [each.layer for each in card.training.layers] == [3, 2, 1, 0]
    best = max(card.training.layers, key=lambda each: each.cross_validated.value)
    assert best is not card.training.layers[0]
    assert card.hook_point == f"blocks.{best.layer}.hook_resid_post"
    assert (card.training.strength, card.evidence.auc.value) == (best.strength, pytest.approx(best.held_out.value))
    for each in card.training.layers:  # every layer is read where it says
        x, x_test = (np.array([r.mean(axis=0) for r in read_tokens(gemma, d, each.layer)]) for d in (TRAIN, TEST))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=each.strength, max_iter=1000)).fit(x, TRAIN.labels)
        expected = roc_auc_score(TEST.labels, model.decision_function(x_test))
        assert each.held_out.value == pytest.approx(expected, abs=2e-3)


def test_held_out_rollouts_choose_nothing(swept, gemma):
    other = train_probe(gemma, TRAIN, [3, 2, 1, 0], "mean", rollouts(20, 2)).probe
    assert torch.equal(other.weight, swept.probe.weight) and torch.equal(other.bias, swept.probe.bias)
    assert other.card.training.cross_validated == swept.probe.card.training.cross_validated


def test_without_held_out_rollouts_half_of_the_questions_are(gemma):
    trained = train_probe(gemma, TRAIN, [0], "last")
    first, second = TRAIN.halves()
    card = trained.probe.card
    assert (card.training.n, card.evidence.n) == (len(first), len(second))
    assert not set(trained.held_out.groups) & set(first.groups) and "half of the questions" in card.evidence.data


def test_what_does_not_fit_into_memory_is_left_out_by_whole_questions(gemma, monkeypatch, caplog):
    tokens = TRAIN.batch.mask().sum(dim=1).numpy()
    monkeypatch.setattr(training, "MAX_NUMBERS", int(tokens.sum() * 32 * 0.7))
    kept = training._within_memory(TRAIN, 32)
    assert 0.5 < len(kept) / len(TRAIN) < 0.75 and all(np.bincount(kept.groups)[np.unique(kept.groups)] == 4)
    assert f"use {len(kept)} of them" in caplog.text
    card = train_probe(gemma, TRAIN, [LAYER], "attention", TEST).probe.card
    assert card.training.left_out == len(TRAIN) - len(kept)


# Calibrating ---------------------------------------------------------------------------------------------------------


def noisy(seed, n=400):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) * 4 + 1
    return logits, rng.random(n) < 1 / (1 + np.exp(-(0.5 * logits - 1))), np.arange(n) // 4


def test_platt_scaling_equals_scikit_learns():
    logits, labels, _ = noisy(0)
    reference = _SigmoidCalibration().fit(logits, labels)
    assert platt(logits, labels) == pytest.approx((-reference.a_, -reference.b_), abs=1e-3)


def test_a_perfect_probe_is_calibrated_to_finite_odds():
    labels = np.arange(100) % 2 == 0
    slope, intercept = platt(np.where(labels, 3.0, -3.0), labels)
    assert 0 < slope < 100 and 1 / (1 + np.exp(-(3 * slope + intercept))) == pytest.approx(51 / 52, abs=1e-4)
    assert platt(np.zeros(100), labels)[1] == pytest.approx(0, abs=1e-6)


def test_calibration_figures_are_cross_fitted():
    logits, labels, groups = noisy(1)
    found, expected = calibrate(logits, labels, groups), np.empty(len(logits))
    for inside, outside in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(logits, labels, groups):
        fit = _SigmoidCalibration().fit(logits[inside], labels[inside])
        expected[outside] = fit.predict(logits[outside])
    assert found.brier.value == pytest.approx(brier_score_loss(labels, expected), abs=1e-4)
    assert found.brier_uncalibrated == pytest.approx(brier_score_loss(labels, 1 / (1 + np.exp(-logits))))
    assert found.brier_of_the_share == pytest.approx(np.var(labels))
    tenths = np.array_split(np.argsort(expected, kind="stable"), 10)
    gaps = [abs(expected[rows].mean() - labels[rows].mean()) * len(rows) / 400 for rows in tenths]
    assert found.ece == pytest.approx(sum(gaps), abs=5e-3)
    assert sum(each.n for each in found.bins) == 400 and found.ece < 0.08 < found.ece_uncalibrated
    assert found.brier.value < found.brier_uncalibrated


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_bad_rollouts_are_refused_in_one_sentence(gemma):
    def said(data, held_out=None):
        with pytest.raises(DataError) as error:
            train_probe(gemma, data, [0], "mean", held_out)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "10 that do and 10 that do not" in said(rollouts(30, 0, label=np.ones(120, bool)), TEST)
    assert "to judge by" in said(TRAIN, rollouts(3, 1))
    assert "trained on" in said(TRAIN, TRAIN.take(range(80)))
    few = np.zeros(120, bool)
    few[:4] = True
    assert "sample more questions" in said(rollouts(30, 0, label=few), TEST)
    one = rollouts(30, 0, samples=20, label=np.arange(600) < 20)  # one question shows the behaviour, always
    assert "One question holds all" in said(one, TEST)
    ids = [[*row[:-1], 97] for row in TRAIN.batch.completion_ids]
    batch = RolloutBatch(TRAIN.batch.prompts, TRAIN.batch.completions, TRAIN.batch.prompt_ids, ids)
    assert "another model" in said(Labelled(batch, TRAIN.labels, TRAIN.groups, "x"), TEST)


@pytest.mark.parametrize("layers", ["4", "-1", "1,9", "x", "", "1.5"])
def test_layers_that_the_model_does_not_have_are_refused(gemma, layers):
    with pytest.raises(ConfigError, match="layers is"):
        parse_layers(layers, gemma)
    assert parse_layers("all", gemma) == [0, 1, 2, 3] and parse_layers("3,1", gemma) == [1, 3]


@pytest.mark.parametrize("how", ["median", "sum", "mean_last_0_tokens", ""])
def test_an_unknown_pooling_is_refused(gemma, how):
    with pytest.raises(ConfigError):
        train_probe(gemma, TRAIN, [0], how, TEST)


def test_activations_that_are_not_finite_are_refused(gemma):
    class Broken(torch.nn.Module):
        def forward(self, *args, **options):
            return torch.full_like(args[0] if args else options["hidden_states"], torch.nan)

    layer = gemma.model.layers[1]
    gemma.model.layers[1] = Broken()
    gemma.model.layers[1].attention_type = getattr(layer, "attention_type", None)
    try:
        with pytest.raises(CaptureError, match="layer 1"):
            train_probe(gemma, TRAIN, [1], "mean", TEST)
    finally:
        gemma.model.layers[1] = layer


def test_attention_goes_with_its_own_probe_only(trained, tmp_path):
    probe = trained["attention"].probe
    for options in ({"aggregation": "mean"}, {"weights": [1.0, 1.0]}, {"aggregation": "per_token"}):
        with pytest.raises(ConfigError, match="pools by attention"):
            FeatureReward(probe, **options)
    with pytest.raises(ConfigError, match="needs a probe trained with it"):
        FeatureReward(trained["mean"].probe, aggregation="attention")
    save_probe(probe, tmp_path / "p")
    assert load_probe(str(tmp_path / "p")).labels == ("score", "value")
    for tensors in ({"weight": torch.ones(32), "bias": torch.ones(1)}, {"weight": torch.ones(32, 2)}):
        save_file(tensors, tmp_path / "p.safetensors")
        with pytest.raises(PackError, match="damaged"):
            load_probe(str(tmp_path / "p"))


def test_a_card_is_strict(trained, tmp_path):
    save_probe(trained["mean"].probe, tmp_path / "p")
    card = json.loads((tmp_path / "p.json").read_text())
    for change, said in (
        ({"agregation": "max"}, "Did you mean 'aggregation'"),
        ({"aggregation": 3}, "aggregation"),
        ({"calibration": card["calibration"] | {"slope": "1"}}, "calibration.slope"),
        ({"evidence": {"n": 3}}, "evidence"),
        ({"schema_version": True}, "schema_version True"),
    ):
        (tmp_path / "p.json").write_text(json.dumps(card | change))
        with pytest.raises(PackError, match=said) as error:
            load_probe(str(tmp_path / "p"))
        assert "\n" not in str(error.value)
    with pytest.raises(PackError, match="unknown key 'auc'"):
        save_probe(trained["mean"].probe, tmp_path / "p", {"auc": 0.9})


@pytest.mark.parametrize("name", linear_probe.shipped_probes())
def test_shipped_probes_keep_loading_and_pool_as_they_were_measured(name):
    probe = load_probe(name)
    reward = FeatureReward(probe)
    assert reward.aggregation == probe.card.aggregation == "mean_last_32_tokens" and reward.scale == "probability"
    assert 0 < probe.calibrated(0.0) < 1 and probe.card.calibration.brier.value < 0.25


def test_a_probe_that_was_never_calibrated_says_so(trained):
    bare = replace(trained["mean"].probe, card=trained["mean"].probe.card.model_copy(update={"calibration": None}))
    with pytest.raises(PackError, match="has no calibration"):
        bare.calibrated([0.0])


# Finding -------------------------------------------------------------------------------------------------------------


def test_a_missing_probe_says_how_to_train_it():
    with pytest.raises(PackError) as error:
        load_probe("gemma-2-9b/correctness_probe")
    command = "mechreward probe train --model google/gemma-2-9b --data rollouts.jsonl --out probes/correctness_probe"
    assert command in str(error.value)
    for name in ("nothing", "", "somewhere/else.json", "hf:user/repo"):
        with pytest.raises(PackError):
            load_probe(name)


def test_a_probe_comes_from_the_hub(trained, tmp_path, monkeypatch):
    save_probe(trained["max"].probe, tmp_path / "user" / "repo" / "probes" / "p_v1.2")
    from mechreward.errors import SAEError
    from mechreward.sae import registry

    def download(repo, file, revision=None):
        if not (tmp_path / repo / file).exists():
            raise SAEError("nothing there")
        return tmp_path / repo / file

    monkeypatch.setattr(registry, "download", download)
    assert torch.equal(load_probe("hf:user/repo/probes/p_v1.2").weight, trained["max"].probe.weight)
    with pytest.raises(PackError, match="probe train"):
        load_probe("hf:user/repo/p")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Right solutions against those of the next question."""
    file = tmp_path_factory.mktemp("data") / "rollouts.jsonl"
    asked = mr.pocket.dataset("discovery", 60)
    prompts, solutions = list(asked["prompt"]), list(asked["solution"])
    wrong = solutions[1:] + solutions[:1]
    rows = [{"prompt": p, "positive": s, "negative": w} for p, s, w in zip(prompts, solutions, wrong, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def command(*arguments):
    result = CliRunner().invoke(app, ["probe", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def train_on(data, out, *more):
    return command("train", "--model", "mechreward/pocket", "--data", data, "--out", out, *more)


def test_the_command_trains_a_probe_and_draws_the_sweep(data, tmp_path):
    out, plot = tmp_path / "probes" / "it", tmp_path / "plots" / "sweep.png"
    result = train_on(data, out, "--layers", "1,2", "--plot", plot, "--description", "It fits.", "--licence", "MIT")
    assert result.exit_code == 0, result.output
    assert plot.read_bytes()[:4] == b"\x89PNG" and str(plot) in result.output.replace("\n", "")
    probe = load_probe(str(out))
    assert (probe.name, probe.card.description, probe.card.licence) == ("it", "It fits.", "MIT")
    assert len(probe.card.training.layers) == 2 and probe.model_name == "mechreward/pocket"
    shown = command("show", out).output
    assert f"{probe.card.evidence.auc.value:.3f}" in shown and "mean pooling at" in shown
    assert json.loads(command("show", out, "--json").output)["name"] == "it"
    assert "mean_last_32_tokens" in command("show", "pocket/correctness_probe").output


def test_what_goes_wrong_is_said_in_one_sentence(data, tmp_path):
    taken = tmp_path / "a_file"
    taken.write_text("")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"prompt": "1", "completion": ')
    for arguments, said in (
        ((data, tmp_path / "p", "--layers", "9"), "layers 0 to"),
        ((data, tmp_path / "p", "--pooling", "atention"), "Did you mean 'attention'"),
        ((data, taken / "p"), "cannot be written"),
        ((data, tmp_path / "p", "--plot", taken / "x.png"), "cannot be written"),
        ((data, tmp_path / "p", "--held-out", data), "trained on"),
        ((damaged, tmp_path / "p"), "not JSON"),
        ((tmp_path / "none.jsonl", tmp_path / "p"), "cannot be read"),
    ):
        result = train_on(*arguments)
        assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output, result.output
        assert result.output.count("Error:") == 1
    assert "probe train" in command("show", tmp_path / "none").output
