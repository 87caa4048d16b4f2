"""What the arms reward: readings by hand, controls by brute force, and a deal that keeps every group's rewards."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_train_config import one_sentence, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechreward as mr
from mechreward.errors import CandidateWarning, ConfigError, DataError
from mechreward.features.pack import FeaturePack
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout import labelled, source
from mechreward.rollout.batch import RolloutBatch
from mechreward.train import arms
from mechreward.train.arms import Contrast, ShuffledReward
from mechreward.train.config import Features

REASONING = mr.load_pack("pocket/reasoning_pack")
IDS, WEIGHTS = [f.id for f in REASONING.features], [f.weight for f in REASONING.features]


def made_up(seed=0, n=40, latents=150, width=6) -> Contrast:
    """A contrast in which every tenth latent never fires, and many fire about equally often."""
    rng = np.random.default_rng(seed)
    values = rng.exponential(rng.uniform(0.1, 30, latents), (n, latents)) * (rng.random((n, latents)) < 0.7)
    firing = np.round(rng.uniform(0.001, 0.5, latents), 2) + 0.001
    values[:, ::10], firing[::10] = 0, 0
    right = np.arange(n) % 3 == 0
    return Contrast(
        values.astype(np.float32), rng.normal(size=(n, width)).astype(np.float32), firing.astype(np.float32), right
    )


# -- the random control ------------------------------------------------------------------------------------------------

PICKED, SIGNED = [3, 44, 91, 17], [0.5, -2.0, 0.01, -0.3]


def nearest_free(contrast, feature, taken) -> set[int]:
    """The latents within the distance of the 20th nearest, by a loop."""
    logs = np.log(contrast.firing.astype(np.float64) + (contrast.firing == 0) * 1e-9)
    free = [
        k
        for k in range(len(logs))
        if k not in taken and contrast.firing[k] > 0 and contrast.latents[:, k].min() < contrast.latents[:, k].max()
    ]
    distances = sorted(abs(logs[k] - logs[feature]) for k in free)
    furthest = distances[min(20, len(distances)) - 1]
    return {k for k in free if abs(logs[k] - logs[feature]) <= furthest}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 1000))
def test_random_substitutes_fire_as_often_and_count_as_much(drawn, seed):
    contrast = made_up(drawn)
    others, weights = arms.random_like(PICKED, SIGNED, contrast, seed)
    assert not set(others) & set(PICKED) and len(set(others)) == len(PICKED) == len(weights)
    taken = set(PICKED)
    for feature, other in zip(PICKED, others, strict=True):
        assert other in nearest_free(contrast, feature, taken)
        taken.add(other)
    x = contrast.latents.astype(np.float64)
    # Each counts as much as the one that it replaces, but for one factor: that of the rewards' spreads.
    ratios = [
        new * np.std(x[:, other]) / (old * np.std(x[:, feature]))
        for feature, old, other, new in zip(PICKED, SIGNED, others, weights, strict=True)
    ]
    assert min(ratios) > 0 and ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-6)
    assert np.std(x[:, others] @ weights) == pytest.approx(np.std(x[:, PICKED] @ SIGNED), rel=1e-6)


def test_random_substitutes_are_the_seeds_own_and_any_neighbour_can_be_one():
    contrast = made_up()
    draws = [tuple(arms.random_like(PICKED, SIGNED, contrast, seed)[0]) for seed in range(300)]
    assert draws[7] == tuple(arms.random_like(PICKED, SIGNED, contrast, 7)[0])
    assert len(set(draws)) > 290
    first = {draw[0] for draw in draws}
    assert len(first) == 20 and first <= nearest_free(contrast, PICKED[0], set(PICKED))


def test_too_few_latents_for_a_random_control():
    contrast = made_up(latents=12)  # 10 that fire
    ids = list(range(1, 6))
    arms.random_like(ids, [1.0] * 5, contrast, 0)  # 5 for 5
    constant = contrast.latents.copy()
    constant[:, 6] = 1  # it fires, but says nothing
    with pytest.raises(ConfigError, match="Only 4 other latents") as caught:
        arms.random_like(ids, [1.0] * 5, replace(contrast, latents=constant), 0)
    one_sentence(caught.value)


# -- the direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_direction_is_the_difference_of_means_scaled_as_the_packs_reward(seed):
    contrast = made_up(seed)
    sae = SimpleNamespace(hook_point=HookPoint(2), model_name="a-model")
    readout = arms.contrastive_direction(PICKED, SIGNED, contrast, sae, "d")
    x = contrast.residual.astype(np.float64)
    by_hand = np.zeros(x.shape[1])
    for row, right in zip(x, contrast.right, strict=True):
        by_hand += row / contrast.right.sum() if right else -row / (~contrast.right).sum()
    got = readout.weight[:, 0].double().numpy()
    assert got @ by_hand / np.linalg.norm(got) / np.linalg.norm(by_hand) == pytest.approx(1, abs=1e-9)
    rewards = x @ got + readout.bias.item()
    packs = [sum(w * row[k] for k, w in zip(PICKED, SIGNED, strict=True)) for row in contrast.latents.astype(float)]
    assert np.std(rewards) == pytest.approx(np.std(packs), rel=1e-5)
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5 * np.std(rewards))
    assert rewards[contrast.right].mean() > rewards[~contrast.right].mean()
    assert (readout.hook_point, readout.model_name, readout.width) == (HookPoint(2), "a-model", 1)


# -- the deal ----------------------------------------------------------------------------------------------------------

eighths = st.integers(-800, 800).map(lambda n: n / 8)  # sums of these are exact in float32, in whatever order
rollout = st.lists(st.tuples(eighths, st.booleans()), max_size=6)
AGGREGATIONS = ["mean", "max", "last", "sum", "mean_last_2_tokens", "top_2_mean"]


def rollouts(count, size, seed=0) -> RolloutBatch:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 500, 4).tolist() for _ in range(count)]
    return RolloutBatch(["p"] * count, ["c"] * count, [[5]] * count, ids, num_generations=size)


def readings_of(rows) -> Readings:
    width = max((len(row) for row in rows), default=0)
    values, mask = torch.zeros(len(rows), width, 1), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for t, (value, read) in enumerate(row):
            values[i, t, 0], mask[i, t] = value * read, read
    return Readings(values, mask)


def pair(seed=0, **options):
    readout = direction("d", torch.ones(4), HookPoint(1))
    return ShuffledReward(readout, [2.0], seed=seed, **options), FeatureReward(readout, [2.0], **options)


def scores(reward, batch, readings):
    return reward.score(batch, {reward.request: readings}).values.tolist()


def in_order(values):
    return sorted(values, key=lambda v: (v != v, v))


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(rollout, min_size=n, max_size=n), min_size=1, max_size=3)),
    st.sampled_from(AGGREGATIONS),
    st.integers(0, 99),
)
def test_a_groups_rewards_are_the_same_as_a_set(groups, aggregation, seed):
    size, rows = len(groups[0]), [row for group in groups for row in group]
    shuffled, own = pair(seed, aggregation=aggregation)
    batch, readings = rollouts(len(rows), size, seed), readings_of(rows)
    dealt, straight = scores(shuffled, batch, readings), scores(own, batch, readings)
    for start in range(0, len(rows), size):
        a, b = (np.array(in_order(v[start : start + size])) for v in (dealt, straight))
        np.testing.assert_array_equal(a, b)  # NaN, where nothing was read, equals NaN


def test_tokens_are_dealt_with_their_masks():
    rows = [[(float(k + 1), t <= k) for t in range(4)] for k in range(4)]  # rollout k has k + 1 tokens that read k + 1
    shuffled, _ = pair(aggregation="per_token")
    seen = []
    for seed in range(20):
        batch = rollouts(4, 4, seed)
        (dense,) = shuffled.score(batch, {shuffled.request: readings_of(rows)}).dense
        lengths = dense.mask.sum(1)
        for values, mask, length in zip(dense.values, dense.mask, lengths.tolist(), strict=True):
            assert values[mask].tolist() == [2.0 * length] * length
        assert sorted(lengths.tolist()) == [1, 2, 3, 4]
        seen.append(tuple(lengths.tolist()))
    assert len(set(seen)) > 10


def test_the_deal_is_decided_by_seed_and_tokens():
    rows = [[(float(k), True)] for k in range(24)]
    batch, readings = rollouts(24, 12), readings_of(rows)
    deal = scores(pair(3)[0], batch, readings)
    again, same_tokens = pair(3)[0], rollouts(24, 12)
    scores(again, rollouts(24, 12, seed=9), readings)  # what was dealt before does not matter
    assert scores(again, same_tokens, readings) == deal
    # ids as tensors, as a trainer may hold them
    as_tensors = replace(batch, completion_ids=[torch.tensor(ids) for ids in batch.completion_ids])
    assert scores(pair(3)[0], as_tensors, readings) == deal
    assert scores(pair(4)[0], batch, readings) != deal != scores(pair(3)[0], rollouts(24, 12, seed=1), readings)


def test_what_is_dealt_says_nothing_of_its_own_rollout():
    rng = np.random.default_rng(0)
    own, dealt, kept = [], [], 0
    for draw in range(400):
        values = rng.normal(size=8)
        values[:4] += 5  # groups differ; within them nothing may be left
        got = scores(pair()[0], rollouts(8, 4, draw), readings_of([[(v, True)] for v in values.tolist()]))
        for group in (slice(0, 4), slice(4, 8)):
            own += list(values[group] - values[group].mean())
            dealt += list(np.array(got[group]) - np.mean(got[group]))
        kept += sum(abs(g - 2 * v) < 1e-5 for g, v in zip(got, values, strict=True))
    assert abs(np.corrcoef(own, dealt)[0, 1]) < 4 / np.sqrt(len(own) * 3 / 4)
    assert abs(kept / 3200 - 1 / 4) < 4 * np.sqrt(3 / 16 / 3200)  # as often as by chance


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipe(**settings_) -> FeaturePack:
    content = REASONING.model_dump(mode="json") | {"features": [], "evidence": None, "calibration": None}
    content["recipe"] = {"behaviour": "right", "contrast": "right and wrong", "settings": settings_}
    return FeaturePack.model_validate(content)


def planted(d_sae=60, n=300) -> Contrast:
    """Latents 3 and 7 are higher where the rollout is right (3 more so), 11 lower; 20 fires in few rollouts."""
    rng = np.random.default_rng(0)
    right = rng.random(n) < 0.4
    values = np.abs(rng.normal(size=(n, d_sae)))
    values[:, 3] += 3 * right
    values[:, 7] += 2 * right
    values[:, 11] += 2 * ~right
    values[:, 20] = np.where(right & (np.arange(n) % 4 == 0), 50, 0)
    values = values.astype(np.float32)
    return Contrast(values, rng.normal(size=(n, 128)).astype(np.float32), (values > 0).mean(0), right)


class TestRecipes:
    def test_planted_latents_are_found(self):
        contrast = planted()
        pack = arms.carried_out(recipe(n_positive=2, n_negative=1), contrast)
        assert [f.id for f in pack.features] == [3, 7, 11] and pack.status == "candidate"
        spread = contrast.latents.astype(np.float64).std(axis=0)
        for feature, sign in zip(pack.features, (1, 1, -1), strict=True):
            assert feature.weight == pytest.approx(sign / spread[feature.id] / 3)

    def test_ten_of_each_without_settings(self):
        assert len(arms.carried_out(recipe(), planted()).features) == 20

    def test_how_often_a_latent_must_fire_is_the_recipes_choice(self):
        often = arms.carried_out(recipe(n_positive=3, n_negative=1, min_firing=0.5), planted())
        rarely = arms.carried_out(recipe(n_positive=3, n_negative=1, min_firing=0.01), planted())
        assert 20 in [f.id for f in rarely.features]
        assert 20 not in [f.id for f in often.features]

    @pytest.mark.parametrize("control", ["none", "shuffled", "random", "direction"])
    def test_an_arm_with_a_recipe_rewards_what_was_found(self, tmp_path, monkeypatch, control):
        file = tmp_path / "own_pack.json"
        recipe(n_positive=2, n_negative=1).write(file)
        contrast = planted(d_sae=2048)
        monkeypatch.setattr(arms, "cached_contrast", lambda config, pack, sae: contrast)
        reward = arms.feature_reward(tiny(tmp_path), Features(pack=str(file), control=control), seed=0)
        ids = [int(label.split("_")[1]) for label in reward.readout.labels if label.startswith("feature_")]
        x, spread = contrast.residual.astype(np.float64), contrast.latents.astype(np.float64).std(axis=0)
        if control == "direction":
            v = reward.readout.weight[:, 0].double().numpy()
            want = contrast.latents.astype(np.float64)[:, [3, 7, 11]] @ (np.array([1, 1, -1]) / spread[[3, 7, 11]] / 3)
            assert reward.weights.tolist() == [1.0] and (x @ v).std() == pytest.approx(want.std(), rel=1e-5)
        elif control == "random":
            assert len(ids) == 3 and not {3, 7, 11} & set(ids)
        else:
            assert ids == [3, 7, 11]
        assert isinstance(reward, ShuffledReward) == (control == "shuffled")
        assert reward.aggregation == "mean_last_32_tokens"


# -- what an arm is ----------------------------------------------------------------------------------------------------


class TestBuild:
    def test_parts_and_weights(self, tmp_path):
        config = tiny(tmp_path)
        outcome, both, hero = (arms.build(config, config.arms[name], 0) for name in ("outcome", "sum", "hero"))
        assert [type(r) for r in outcome.rewards] == [OutcomeReward] and outcome.weights == [1.0]
        assert [type(r) for r in both.rewards] == [OutcomeReward, FeatureReward] and both.weights == [1.0, 0.3]
        assert hero.mode == "hero" and both.mode == "sum"
        features = both.rewards[1]
        assert [int(label.split("_")[1]) for label in features.readout.labels] == IDS
        assert features.weights.tolist() == pytest.approx(WEIGHTS)
        assert (features.aggregation, features.request.reads) == ("mean_last_32_tokens", "policy")
        assert not list(tmp_path.iterdir())  # no discovery rollouts where none are needed

    def test_options_reach_the_reward(self, tmp_path):
        chosen = Features(pack="pocket/reasoning_pack", aggregation="per_token", reads="reference")
        reward = arms.feature_reward(tiny(tmp_path), chosen, 0)
        assert (reward.aggregation, reward.request.reads) == ("per_token", "reference")

    def test_the_seed_reaches_the_controls(self, tmp_path, monkeypatch):
        monkeypatch.setattr(arms, "cached_contrast", lambda config, pack, sae: planted(d_sae=2048))
        for control, of in (("shuffled", lambda r: r.seed), ("random", lambda r: r.readout.labels)):
            made = [
                of(arms.feature_reward(tiny(tmp_path), Features(pack=REASONING.name, control=control), seed))
                for seed in (1, 1, 2)
            ]
            assert made[0] == made[1] != made[2]

    def test_what_is_watched_is_the_packs_own_reading(self, tmp_path):
        (reward,) = arms.watched(tiny(tmp_path))
        with pytest.warns(CandidateWarning):
            own = FeatureReward.from_pack("pocket/reasoning_pack")
        assert reward.__name__ == "reasoning_pack" and type(reward) is FeatureReward
        assert reward.readout.labels == own.readout.labels and reward.aggregation == own.aggregation
        assert torch.equal(reward.weights, own.weights) and torch.equal(reward.readout.weight, own.readout.weight)


# -- discovery rollouts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket():
    model = AutoModelForCausalLM.from_pretrained(mr.pocket.path()).eval()
    return model, AutoTokenizer.from_pretrained(mr.pocket.path())


@torch.no_grad()
def stream(model, prompt_ids, completion_ids) -> torch.Tensor:
    """HF's own layer 2 output of one unpadded sequence at the tokens that are read: all but the final one."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[3][0]
    return hidden[len(prompt_ids) : -1]


@pytest.fixture(scope="module")
def discovery(tmp_path_factory):
    """A contrast on pocket, in pieces of 5 and batches of 7, and the rollouts that it was made from."""
    folder, batches = tmp_path_factory.mktemp("discovery"), []
    sample = labelled.sample

    def remember(*args, **options):
        batches.append(sample(*args, **options))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "sample", remember)
        patch.setattr(source, "MAX_NUMBERS", 5 * 120 * (2048 + 128))  # about five rollouts
        config = tiny(
            folder,
            data={"discovery": [{"path": "mechreward/pocket", "split": "discovery", "rows": 6}]},
            evaluation={"batch_size": 7},
        )
        torch.manual_seed(123)
        before = torch.get_rng_state()
        sae = mr.load_sae(REASONING.sae.release, REASONING.sae.sae_id)
        contrast = arms.contrast(config, REASONING, sae)
        assert torch.equal(torch.get_rng_state(), before)  # training's random numbers are its own
    return config, contrast, batches[0]


class TestContrast:
    def test_rollouts_are_sampled_from_the_discovery_questions(self, discovery):
        config, contrast, batch = discovery
        asked = mr.pocket.dataset("discovery", 6)["prompt"]
        assert list(batch.prompts) == [p for p in asked for _ in range(2)]
        assert max(map(len, batch.completion_ids)) <= config.training.max_completion_length
        assert (
            len(contrast.right) == 12 and contrast.latents.shape == (12, 2048) and contrast.residual.shape == (12, 128)
        )

    def test_labels_by_hand(self, discovery):
        _, contrast, batch = discovery
        golds = [a for a in mr.pocket.dataset("discovery", 6)["answer"] for _ in range(2)]
        final = [text.rsplit("####", 1)[1].strip() if "####" in text else None for text in batch.texts]
        assert contrast.right.tolist() == [f == g for f, g in zip(final, golds, strict=True)]
        assert 0 < contrast.right.sum() < 12

    def test_latents_equal_saelens_on_hidden_states(self, discovery, pocket):
        from sae_lens import SAE

        _, contrast, batch = discovery
        sae = SAE.load_from_disk(str(mr.pocket.files() / "saes" / "jumprelu"), device="cpu")
        fired, tokens = np.zeros(2048), 0
        for i, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
            x = stream(pocket[0], prompt, completion)
            with torch.no_grad():
                latents = sae.encode(x).double()
            want = latents[-32:].mean(dim=0).numpy()
            # A latent whose pre-activation is at its threshold may fire in one pass and not in another.
            near = np.isclose(contrast.latents[i], want, atol=1e-5 * want.max(), rtol=1e-4)
            assert near.mean() > 0.999, i
            fired += (latents > 0).sum(dim=0).numpy()
            tokens += len(x)
            np.testing.assert_allclose(contrast.residual[i], x[-32:].double().mean(dim=0), rtol=1e-4, atol=1e-4)
        assert tokens > 12 * 8 and max(map(len, batch.completion_ids)) > 33  # some are longer than what is averaged
        assert np.abs(contrast.firing - fired / tokens).max() <= 2 / tokens
        assert (contrast.firing > 0).sum() > 100

    def test_all_right_or_all_wrong_cannot_be_contrasted(self, discovery, monkeypatch):
        config, _, batch = discovery
        monkeypatch.setattr(labelled, "sample", lambda *args, **options: batch)
        for verdict in (True, False):
            monkeypatch.setattr(arms.verifiers, "math_boxed", lambda texts, golds, v=verdict: [v] * len(texts))
            with pytest.raises(DataError, match=f"{12 * verdict} of 12") as caught:
                arms.contrast(config, REASONING, mr.load_sae(REASONING.sae.release, REASONING.sae.sae_id))
            one_sentence(caught.value)


class TestPrepared:
    @pytest.fixture
    def made(self, monkeypatch):
        """Calls of `contrast`, which gives something else each time."""
        calls = []

        def contrast(config, pack, sae):
            calls.append(config)
            return made_up(seed=len(calls))

        monkeypatch.setattr(arms, "contrast", contrast)
        return calls

    def test_it_is_made_once(self, tmp_path, made):
        first, second = (arms.cached_contrast(tiny(tmp_path / "deep" / "er"), REASONING, None) for _ in range(2))
        assert len(made) == 1
        for name, value in vars(first).items():
            np.testing.assert_array_equal(value, vars(second)[name])
            np.testing.assert_array_equal(value, vars(made_up(seed=1))[name])
            assert vars(second)[name].dtype == vars(made_up(seed=1))[name].dtype
        (file,) = (tmp_path / "deep" / "er").iterdir()  # nothing unfinished is left
        assert set(load_file(file)) == {"latents", "residual", "firing", "right"}

    def test_it_is_shared_by_what_it_does_not_depend_on(self, tmp_path, made):
        arms.cached_contrast(tiny(tmp_path), REASONING, None)
        for change in (
            {"seeds": [8]},
            {"arms": {"outcome": {"outcome": 1.0}}},
            {"training": {"max_steps": 9, "learning_rate": 1.0, "beta": 0.0}},
            {"data": {"test": [{"path": "other.jsonl"}], "train": [{"path": "other.jsonl"}]}},
            {"evaluation": {"every": 1, "questions": 3}},
            {"watch": []},
        ):
            arms.cached_contrast(tiny(tmp_path, **change), REASONING, None)
        assert len(made) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "another"},
            {"verifier": "gsm8k"},
            {"data": {"discovery": [{"path": "mechreward/pocket", "split": "discovery", "rows": 41}]}},
            {"discovery": {"rollouts": 3}},
            {"discovery": {"seed": 1}},
            {"training": {"max_completion_length": 49}},
            {"training": {"temperature": 0.9}},
            {"training": {"bf16": True, "lora_rank": 4}},  # the untrained model is loaded in another precision
            {"evaluation": {"batch_size": 7}},  # rollouts are sampled in other batches: other random numbers
        ],
        ids=str,
    )
    def test_another_one_is_made_when_what_decides_it_changes(self, tmp_path, made, change):
        one = arms.cached_contrast(tiny(tmp_path), REASONING, None)
        other = arms.cached_contrast(tiny(tmp_path, **change), REASONING, None)
        assert len(made) == 2 and not np.array_equal(one.latents, other.latents)

    def test_another_pack_makes_another_one_only_if_it_reads_otherwise(self, tmp_path, made):
        config = tiny(tmp_path)
        arms.cached_contrast(config, REASONING, None)
        arms.cached_contrast(config, REASONING.model_copy(update={"name": "mine", "features": []}), None)
        assert len(made) == 1
        arms.cached_contrast(config, REASONING.model_copy(update={"aggregation": "mean"}), None)
        topk = REASONING.sae.model_copy(update={"sae_id": "layer_2/width_2k/topk"})
        arms.cached_contrast(config, REASONING.model_copy(update={"sae": topk}), None)
        assert len(made) == 3

    def test_a_file_that_was_cut_off_is_never_taken_for_a_whole_one(self, tmp_path, made, monkeypatch):
        def cut_off(content, file):
            file.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(arms, "save_file", cut_off)
            arms.cached_contrast(tiny(tmp_path), REASONING, None)
        arms.cached_contrast(tiny(tmp_path), REASONING, None)
        assert len(made) == 2


def test_the_recipes_that_are_shipped_can_be_carried_out():
    for model in ("gemma-2-2b", "gemma-2-9b"):
        pack = mr.load_pack(f"{model}/reasoning_pack")
        assert not pack.features and json.dumps(pack.recipe.settings)
        assert len(arms.carried_out(pack, planted()).features) == 20
