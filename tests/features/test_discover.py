"""Discovery against brute force: SAELens' activations, two-pass effect sizes, scikit-learn, explicit permutations."""

import contextlib
import io
import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from by_hand import SAES, means, ours, rollouts, tokens
from planting import effect_sizes, pocket
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

import mechreward as mr
from mechreward.errors import ConfigError, ModelMismatchError, PackError
from mechreward.features.discover import (
    Search,
    chance_file,
    check_models,
    digests,
    discover,
    read_chance,
    recorded_as,
    select,
    sparse_logistic,
    write_discovery,
)
from mechreward.features.pack import read_pack
from mechreward.features.scan import permuted

DRAWS = 12


def found_by(method, kinds=("jumprelu",), permutations=DRAWS, **options):
    settings = {"n_positive": 5, "n_negative": 4, "min_firing": 0.05, "seed": 3} | options
    saes = [ours(kind) for kind in kinds]
    search = Search(method, permutations=permutations, **settings)
    return discover(*pocket(), rollouts(), saes, "tests/found", "It is right.", search)


def labellings(seed=3, draws=DRAWS):
    """The labels, and the permutations of them that a discovery makes."""
    labels, groups = rollouts().labels, rollouts().groups
    return [labels, *permuted(labels, groups, draws, np.random.default_rng(seed))]


@pytest.fixture(scope="module")
def by_effect():
    return found_by("effect", ("topk", "jumprelu"))


# Effect and firing ---------------------------------------------------------------------------------------------------


def test_the_scan_reads_what_saelens_encodes(by_effect):
    """Dictionaries one after the other. A latent at its threshold may flip: at most one in a thousand."""
    acts, labels = np.concatenate([means("topk"), means("jumprelu")], axis=1), rollouts().labels
    scan, effects = by_effect.scan, effect_sizes(acts, labels)
    assert np.isclose(scan.effect, effects, rtol=1e-3, atol=1e-4).mean() > 0.999
    fires = (acts > 0).mean(axis=0)
    assert np.isclose(scan.firing, fires).mean() > 0.999
    gap = (acts[labels] > 0).mean(axis=0) - (acts[~labels] > 0).mean(axis=0)
    assert np.isclose(scan.firing_gap, gap).mean() > 0.999
    assert np.isclose(scan.spread, acts.std(axis=0), rtol=1e-3, atol=1e-5).mean() > 0.999


def test_effect_is_select_on_each_dictionary_and_the_strongest_makes_the_pack(by_effect):
    strengths = []
    for number, kind in enumerate(("topk", "jumprelu")):
        ids, weights = select(means(kind), rollouts().labels, 5, 4, min_firing=0.05)
        chosen = by_effect.per_sae[number]
        assert chosen.sae == number and chosen.ids.tolist() == ids.tolist()
        np.testing.assert_allclose(chosen.weights, weights, rtol=1e-3)
        strengths.append(np.abs(effect_sizes(means(kind), rollouts().labels)[ids]).mean())
        assert chosen.strength == pytest.approx(strengths[-1], rel=1e-3)
    best = int(np.argmax(strengths))
    assert by_effect.pack.sae.sae_id == SAES[("topk", "jumprelu")[best]]
    assert [f.id for f in by_effect.pack.features] == by_effect.per_sae[best].ids.tolist()
    assert [f.weight for f in by_effect.pack.features] == by_effect.per_sae[best].weights.tolist()
    assert np.sign(by_effect.per_sae[best].weights).tolist() == [1] * 5 + [-1] * 4


def test_what_is_found_by_chance_is_the_selection_repeated_on_each_permutation(by_effect):
    assert len(by_effect.chance) == DRAWS
    dictionaries = set()
    for labels, chance in zip(labellings()[1:], by_effect.chance, strict=True):
        tried = []
        for number, kind in enumerate(("topk", "jumprelu")):
            ids, weights = select(means(kind), labels, 5, 4, min_firing=0.05)
            tried.append((np.abs(effect_sizes(means(kind), labels)[ids]).mean(), number, ids, weights))
        strength, number, ids, weights = max(tried, key=lambda each: each[0])
        assert chance.sae == number and chance.ids.tolist() == ids.tolist()
        assert chance.strength == pytest.approx(strength, rel=1e-3)
        np.testing.assert_allclose(chance.weights, weights, rtol=1e-3)
        dictionaries.add(number)
    assert dictionaries == {0, 1}  # else the choice between the two was not tested


def test_the_pack_says_how_it_was_found(by_effect):
    pack, labels = by_effect.pack, rollouts().labels
    assert pack.status == "candidate" and pack.evidence is None and pack.description == "It is right."
    assert (pack.model, pack.hook_point, pack.d_model, pack.d_sae) == (
        "mechreward/pocket", "blocks.2.hook_resid_post", pocket()[0].config.hidden_size, 2048,
    )  # fmt: skip
    said = pack.provenance
    assert said["discovery_rollouts"] == len(labels) and said["discovery_with_behaviour"] == labels.sum()
    assert (said["method"], said["permutations"], said["seed"], said["dictionaries_scanned"]) == ("effect", 12, 3, 2)
    best = by_effect.saes.index(pack.sae)
    ids = [2048 * best + f.id for f in pack.features]
    acts = np.concatenate([means("topk"), means("jumprelu")], axis=1)
    largest = [np.abs(effect_sizes(acts, perm)).max() for perm in labellings()[1:]]
    assert said["largest_effect_by_chance"] == pytest.approx(max(largest), rel=1e-3)
    assert said["largest_effect"] == pytest.approx(np.abs(effect_sizes(acts, labels))[ids].max(), rel=1e-3)
    adjusted = [(1 + sum(c >= abs(d) for c in largest)) / (1 + DRAWS) for d in effect_sizes(acts, labels)[ids]]
    assert said["latents_significant"] == sum(p <= 0.05 for p in adjusted)
    assert by_effect.asked == digests(rollouts()) and len(by_effect.asked) == len(set(rollouts().batch.prompts))


@pytest.mark.parametrize("draw", [0, 1])
def test_firing_takes_the_widest_gaps(draw):
    found = found_by("firing", permutations=2)
    chosen, labels = [*found.per_sae, *found.chance][draw], labellings(draws=2)[draw]
    acts = means("jumprelu")
    gap = (acts[labels] > 0).mean(axis=0) - (acts[~labels] > 0).mean(axis=0)
    gap[(acts > 0).mean(axis=0) < 0.05] = 0
    order = np.sort(gap)
    np.testing.assert_allclose(gap[chosen.ids], [*order[::-1][:5], *order[:4]], atol=1e-9)
    assert chosen.strength == pytest.approx(np.abs(gap[chosen.ids]).mean())
    np.testing.assert_allclose(chosen.weights, np.repeat([1, -1], [5, 4]) / acts[:, chosen.ids].std(axis=0) / 9, 1e-3)


def test_the_aggregation_is_that_of_the_pack():
    found = found_by("effect", permutations=1, aggregation="mean_last_3_tokens")
    acts = np.stack([tokens(row, "jumprelu")[-3:].mean(axis=0) for row in range(len(rollouts()))])
    ids, weights = select(acts, rollouts().labels, 5, 4, min_firing=0.05)
    assert found.per_sae[0].ids.tolist() == ids.tolist() and found.pack.aggregation == "mean_last_3_tokens"
    np.testing.assert_allclose(found.per_sae[0].weights, weights, rtol=1e-3)


# Lasso ---------------------------------------------------------------------------------------------------------------


def regression(x, labels, groups):
    """Scikit-learn's own cross-validation of the same three penalties; the KKT conditions of the best one."""
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    signs = np.where(labels, 1.0, -1.0)
    # Below it all is 0: the gradient of the log loss at 0 has no column beyond 1 / C; the intercept is one of them.
    least = 2 / max(np.abs(z.T @ signs).max(), np.abs(signs.sum()))
    best = (None, 0.5)
    for times in (2.0, 5.0, 15.0):
        model = LogisticRegression(
            C=times * least, l1_ratio=1, solver="liblinear", random_state=0, intercept_scaling=10
        )
        folds = GroupKFold(min(5, len(set(groups))))
        odds = cross_val_predict(model, z, labels, groups=groups, cv=folds, method="decision_function")
        area = roc_auc_score(labels, odds)
        if area > best[1]:
            best = (times * least, area)
    return z, best


def assert_optimal(z, labels, coefficients, penalty):
    """sum_i C log(1 + exp(-y_i f_i)) + |w|_1 is least: C times the gradient is -sign(w), or within [-1, 1] at 0."""
    from scipy.optimize import minimize_scalar

    def loss(intercept):
        odds = z @ coefficients + intercept
        return penalty * np.logaddexp(0, np.where(labels, -odds, odds)).sum() + abs(intercept) / 10

    intercept = minimize_scalar(loss, bounds=(-20, 20), method="bounded").x
    p = 1 / (1 + np.exp(-(z @ coefficients + intercept)))
    gradient = penalty * z.T @ (p - labels)
    used = coefficients != 0
    np.testing.assert_allclose(gradient[used], -np.sign(coefficients[used]), atol=0.05)  # liblinear's tolerance
    assert (np.abs(gradient[~used]) <= 1.05).all()


def test_lasso_is_the_regression_on_the_latents_of_largest_effect():
    found = found_by("lasso", ("topk", "jumprelu"), permutations=2)
    others = []
    for number, labels in enumerate(labellings(draws=2)):
        tried = []
        for i, kind in enumerate(("topk", "jumprelu")):
            acts = means(kind)
            size = np.abs(effect_sizes(acts, labels))
            size[(acts > 0).mean(axis=0) < 0.05] = 0
            screened = np.argsort(-size, kind="stable")[:64]
            z, (penalty, area) = regression(acts[:, screened], labels, rollouts().groups)
            tried.append((area, i))
            if number == 0:
                chosen = found.per_sae[i]
                assert set(chosen.ids) <= set(screened) and chosen.strength == pytest.approx(area, abs=0.005)
                signs = np.sign(chosen.weights).tolist()
                assert signs == sorted(signs, reverse=True) and signs.count(1) <= 5 and signs.count(-1) <= 4
                coefficients, _ = sparse_logistic(acts[:, screened], labels, rollouts().groups)
                assert_optimal(z, labels, coefficients, penalty)
                order = sorted(np.flatnonzero(coefficients), key=lambda j: -coefficients[j])
                wanted = [j for j in order if coefficients[j] > 0][:5]
                wanted += [j for j in order[::-1] if coefficients[j] < 0][:4]
                assert chosen.ids.tolist() == screened[wanted].tolist()
                expected = coefficients[wanted] / acts[:, screened[wanted]].std(axis=0)
                np.testing.assert_allclose(chosen.weights, expected, rtol=0.02)
        others.append(max(tried))
    for (area, i), chance in zip(others[1:], found.chance, strict=True):
        assert chance.strength == pytest.approx(area, abs=0.005)
        assert chance.sae == i or area == pytest.approx(0.5, abs=0.01)
    assert found.pack.sae.sae_id == SAES[("topk", "jumprelu")[others[0][1]]]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_column_is_found_among_others(seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), 3)
    hidden = rng.normal(size=180)
    labels = hidden + 0.5 * rng.normal(size=180) > 0
    x = rng.normal(size=(180, 40)) * np.logspace(-3, 3, 40)
    x[:, 17] = (hidden + 0.3 * rng.normal(size=180)) * 1e-4 + 5
    x[:, 18] = 3.0  # never varies
    coefficients, area = sparse_logistic(x, labels, groups)
    assert np.argmax(np.abs(coefficients)) == 17 and coefficients[17] > 0 and coefficients[18] == 0
    assert (coefficients != 0).sum() < 25 and 0.85 < area < 1
    assert sparse_logistic(-x, labels, groups)[0][17] < 0


def test_a_regression_on_nothing_says_nothing():
    labels, groups = np.arange(40) % 2 == 0, np.repeat(np.arange(20), 2)
    for x in (np.zeros((40, 0)), np.ones((40, 3))):
        coefficients, area = sparse_logistic(x, labels, groups)
        assert coefficients.shape == (x.shape[1],) and not coefficients.any() and area == 0.5
    x = labels[:, None].astype(float)
    assert sparse_logistic(x, labels, np.zeros(40))[1] == 0.5  # one question cannot be cross-validated
    noise = [sparse_logistic(np.random.default_rng(s).normal(size=(40, 30)), labels, groups)[1] for s in range(10)]
    assert np.mean(noise) < 0.62


# ReasonScore ---------------------------------------------------------------------------------------------------------


def test_reasonscore_takes_the_latents_of_greatest_score(monkeypatch):
    rng, asked = np.random.default_rng(0), []
    given = {ours(kind): rng.normal(size=2048) for kind in ("topk", "jumprelu")}

    def score(model, tokenizer, batch, sae):
        asked.append((model, tokenizer, batch))
        return given[sae].copy()

    monkeypatch.setattr("mechreward.features.discover.reason_scores", score)
    found = found_by("reasonscore", ("topk", "jumprelu"))
    assert found.scan is None and found.chance == [] and asked == [(*pocket(), rollouts().batch)] * 2
    np.testing.assert_array_equal(found.scores, np.concatenate(list(given.values())))
    for i, kind in enumerate(("topk", "jumprelu")):
        scores = given[ours(kind)].copy()
        scores[(means(kind) > 0).mean(axis=0) < 0.05] = 0
        assert found.per_sae[i].ids.tolist() == np.argsort(-scores, kind="stable")[:5].tolist()
        spread = means(kind)[:, found.per_sae[i].ids].std(axis=0)
        np.testing.assert_allclose(found.per_sae[i].weights, 1 / spread / 5, rtol=1e-3)
    assert found.pack.provenance["n_negative"] == 0 and "largest_effect" not in found.pack.provenance


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("efect", {}, "'efect': use effect, firing, lasso, reasonscore. Did you mean 'effect'"),
        ("effect", {"aggregation": "per_token"}, "use 'mean'"),
        ("effect", {"aggregation": "avg"}, "no aggregation 'avg'"),
        ("effect", {"n_positive": 0, "n_negative": 0}, "ask for at least one"),
        ("effect", {"n_positive": -1}, "ask for at least one"),
        ("reasonscore", {"n_positive": 0}, "knows no negative ones"),
    ],
)
def test_settings_are_refused_in_one_sentence(method, options, says):
    with pytest.raises(ConfigError, match=says) as error:
        found_by(method, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["effect", "lasso"])
def test_nothing_to_select_is_one_sentence(method):
    with pytest.raises(PackError, match="lower min_firing, or contrast more rollouts"):
        found_by(method, min_firing=1.1, permutations=1)


def test_dictionaries_of_other_models_are_refused(saved_sae):
    with pytest.raises(ConfigError, match="name one"):
        check_models([])
    _, other = saved_sae("jumprelu")
    with pytest.raises(ConfigError, match=r"pocket.* and .* reads a-model"):
        check_models([ours("topk"), other])
    with pytest.raises(ModelMismatchError, match="width 32"):
        discover(*pocket(), rollouts(), [other], "tests/found", "It is right.")


def test_the_model_that_can_be_loaded_is_recorded(by_effect):
    def recorded(named, model):
        pack = by_effect.pack.model_copy(update={"model": named})
        return recorded_as(type(by_effect)(**{**vars(by_effect), "pack": pack}), model).pack.model

    assert recorded("unknown", "google/gemma-2-9b") == "google/gemma-2-9b"
    assert recorded("gemma-2-9b", "google/gemma-2-9b") == "google/gemma-2-9b"
    assert recorded("gemma-2-9b", "somewhere/else") == "gemma-2-9b"


# On disk -------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(by_effect, tmp_path):
    file = tmp_path / "new" / "found.json"
    write_discovery(by_effect, file)
    assert read_pack(file).model_dump() == by_effect.pack.model_dump()
    chance = read_chance(file)
    assert chance.saes == by_effect.saes and chance.asked == by_effect.asked
    assert len(chance.selections) == DRAWS
    for a, b in zip(chance.selections, by_effect.chance, strict=True):
        assert a.sae == b.sae and a.ids.tolist() == b.ids.tolist() and a.weights.tolist() == b.weights.tolist()
    with np.load(chance_file(file), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["effect"], by_effect.scan.effect)
        np.testing.assert_array_equal(arrays["adjusted_p"], by_effect.scan.adjusted_p)
    assert read_chance(tmp_path / "another.json") is None


def test_selections_of_different_size_survive(by_effect, tmp_path):
    short = [s._replace(ids=s.ids[:n], weights=s.weights[:n]) for n, s in enumerate(by_effect.chance)]
    write_discovery(type(by_effect)(**{**vars(by_effect), "chance": short}), tmp_path / "a.json")
    back = read_chance(tmp_path / "a.json").selections
    assert [s.ids.tolist() for s in back] == [s.ids.tolist() for s in short]
    write_discovery(type(by_effect)(**{**vars(by_effect), "chance": [], "scan": None}), tmp_path / "b.json")
    assert read_chance(tmp_path / "b.json").selections == []


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_damaged_file_is_one_sentence_and_nothing_is_unpickled(by_effect, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "found.json"
    write_discovery(by_effect, file)
    beside = chance_file(file)
    assert beside.name == "found.discovery.npz"
    whole = beside.read_bytes()
    with np.load(beside) as arrays:
        parts = dict(arrays)

    def saved(**changed):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{k: v for k, v in (parts | changed).items() if v is not None})
        return buffer.getvalue()

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    pickled = io.BytesIO()
    with zipfile.ZipFile(pickled, "w") as archive:
        archive.writestr("saes.npy", pickle.dumps(Bomb()))
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not an archive",
        "a pickle": pickle.dumps(Bomb()),
        "a pickle inside": pickled.getvalue(),
        "objects": saved(asked=np.array([Bomb()], dtype=object)),
        "missing": saved(chance_ids=None),
        "other names": saved(saes=np.array(["no json"])),
        "names of no SAE": saved(saes=np.array([json.dumps([1, 2])])),
        "fewer rows": saved(chance_sae=parts["chance_sae"][1:]),
        "another dictionary": saved(chance_sae=parts["chance_sae"] + 2),
    }
    for what, content in damaged.items():
        beside.write_bytes(content)
        with pytest.raises(PackError, match=r"is damaged .*discover the pack again") as error:
            read_chance(file)
        assert "\n" not in str(error.value) and not (tmp_path / "exploded").exists(), what
    beside.write_bytes(bytes(flipped))
    with contextlib.suppress(PackError):  # a flip in an array that is not read does no harm
        assert read_chance(file).asked == by_effect.asked


def test_a_question_is_known_by_its_prompt_and_a_text_without_one_by_itself():
    import hashlib

    some = rollouts().take(range(4))
    short = [hashlib.sha256(p.encode()).hexdigest()[:16] for p in some.batch.prompts]
    assert digests(some) == sorted(set(short)) and len(set(short)) == 2
    bare = replace(some, batch=replace(some.batch, prompts=[""] * 4))
    assert len(digests(bare)) == len(set(some.batch.texts))
    assert not set(digests(some)) & set(digests(rollouts().take(range(10, 20))))


def test_the_reward_of_a_found_pack_is_its_weighted_sum(by_effect, tmp_path):
    """Through the file and FeatureReward, as a user would, against SAELens."""
    from mechreward.errors import CandidateWarning
    from mechreward.rollout.hf import HFSource

    write_discovery(by_effect, tmp_path / "found.json")
    with pytest.warns(CandidateWarning):
        reward = mr.FeatureReward.from_pack(str(tmp_path / "found.json"))
    batch = rollouts().batch.take(range(6))
    got = reward(batch.prompts, batch.completions, batch.completion_ids, source=HFSource(*pocket()))
    kind = next(kind for kind, sae_id in SAES.items() if sae_id == by_effect.pack.sae.sae_id)
    pack = by_effect.pack
    expected = means(kind)[:6, [f.id for f in pack.features]] @ np.array([f.weight for f in pack.features])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
