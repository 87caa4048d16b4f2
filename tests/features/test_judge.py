"""The gate on pocket: what is planted passes, what is random or a cue word does not."""

import itertools

import numpy as np
import pytest
import torch
from planting import OWN, extended_sae, planted, pocket, quiet_directions, sampled, step_marks, token_marks

import mechreward as mr
from mechreward.features.judge import judge
from mechreward.features.pack import FeaturePack, PackFeature, SAERef
from mechreward.pocket.questions import questions

STRENGTH = 4.0  # length of what is planted; the residual stream hardly varies there


def some(rollouts, seed, count=70):
    """The rollouts of some of the questions."""
    chosen = np.random.default_rng(seed).permutation(np.unique(rollouts.groups))[:count]
    return rollouts.take(np.flatnonzero(np.isin(rollouts.groups, chosen)))


def pack_of(sae, ids, weights, release="local", sae_id=None):
    return FeaturePack(
        name="tests/planted",
        description="The final answer is right.",
        model=sae.model_name,
        sae=SAERef(release=release, sae_id=sae_id or sae.name),
        hook_point=str(sae.hook_point),
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        features=[PackFeature(id=int(i), weight=float(w)) for i, w in zip(ids, weights, strict=True)],
        status="candidate",
        status_reason="Made by a test.",
        provenance={},
        licence="Apache-2.0",
    )


def failed(pack):
    return {test.name for test in pack.evidence.verdict if not test.passed}


@pytest.fixture(scope="module")
def held_out():
    return sampled("gate", 160, 4)


@pytest.fixture(scope="module")
def solutions():
    return {
        q.prompt: q.solution
        for split in ("gate", "discovery")
        for q in itertools.islice(questions(split, 0, "reasoning"), 160)
    }


def planted_verdict(tmp_path, held_out, solutions, seed):
    """Three latents that read exactly what the hook writes: that every step so far is right."""
    vectors = STRENGTH * quiet_directions(3, seed)
    sae = extended_sae(tmp_path / f"sae-{seed}", vectors / STRENGTH**2, torch.zeros(3), torch.full((3,), 0.5))
    with planted(vectors, step_marks(solutions, pocket()[1])) as (model, tokenizer):
        pack = pack_of(sae, [OWN, OWN + 1, OWN + 2], [1.0, 0.5, 2.0])
        return judge(pack, model, tokenizer, some(held_out, seed, 130), seed=seed)


def random_verdict(held_out, seed):
    """Twenty latents of the shipped dictionary that fire, with random signs."""
    rng = np.random.default_rng(seed)
    sae = mr.load_sae("pocket-res-canonical", "layer_2/width_2k/canonical")
    alive = [922, 233, 762, 1222, 1248, 1905, 80, 1219]  # the reasoning pack's kind is left out
    ids = rng.choice([i for i in range(OWN) if i not in alive], size=20, replace=False)
    pack = pack_of(sae, ids, rng.choice([-1.0, 1.0], size=20), "pocket-res-canonical", "layer_2/width_2k/canonical")
    return judge(pack, *pocket(), some(held_out, seed, 50), seed=seed)


def cue_verdict(tmp_path, held_out, seed):
    """A latent that reads a vector that the hook writes at '=' and '.': right answers have more of both."""
    tokenizer = pocket()[1]
    cue = {i for sign in "=." for i in tokenizer(sign, add_special_tokens=False).input_ids}
    vectors = STRENGTH * quiet_directions(1, seed)
    sae = extended_sae(tmp_path / f"cue-{seed}", vectors / STRENGTH**2, torch.zeros(1), torch.full((1,), 0.5))
    with planted(vectors, token_marks(cue)) as (model, tokenizer):
        return judge(pack_of(sae, [OWN], [1.0]), model, tokenizer, some(held_out, seed), seed=seed)


@pytest.mark.slow
def test_what_is_planted_is_validated(tmp_path, held_out, solutions):
    pack = planted_verdict(tmp_path, held_out, solutions, seed=0)
    assert not failed(pack), pack.status_reason
    assert pack.status == "validated" and pack.evidence.without.keys() == {"2048", "2049", "2050"}
    assert len(pack.calibration.quantiles) == 101


def test_random_features_fail(held_out):
    assert random_verdict(held_out, seed=0).status == "candidate"


@pytest.mark.slow
def test_cue_words_fail_the_injection_test(tmp_path, held_out):
    pack = cue_verdict(tmp_path, held_out, seed=0)
    assert "token_injection" in failed(pack) and set(pack.evidence.injection.cues) & {"=", "."}
    assert pack.evidence.auc.value > 0.65  # on the rollouts as they are, it tells something


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_on_twenty_seeds(tmp_path, held_out, solutions):
    """A gate that rejects everything is none: planted features pass on at least 19 of 20 seeds, random ones on none."""
    verdicts = [planted_verdict(tmp_path, held_out, solutions, seed) for seed in range(20)]
    assert sum(v.status == "validated" for v in verdicts) >= 19, [failed(v) for v in verdicts]
    assert not any(random_verdict(held_out, seed).status == "validated" for seed in range(20))
    assert all("token_injection" in failed(cue_verdict(tmp_path, held_out, seed)) for seed in range(5))
