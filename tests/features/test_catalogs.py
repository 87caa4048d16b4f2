"""The packs for published models: what they name exists, nothing is invented, and how they are used says so."""

import re
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from test_sae_formats import LATENTS, WIDTH, snapshot, topk_checkpoint  # noqa: F401 (a fixture)

import mechreward as mr
from mechreward.errors import CandidateWarning, PackError
from mechreward.features.catalog import load_pack, shipped_packs
from supported_models import SUPPORTED, releases, sae_ids

PUBLISHED = [name for name in shipped_packs() if not name.startswith("pocket/")]
RECIPES = [name for name in PUBLISHED if not load_pack(name).features]
QWEN = "qwen3.5-4b/reasoning_pack"
# The catalog of OpenInterpretability/mechreward, commit 63f2738.
HELPFUL = [36405, 27873, 35818, 12399, 2643, 6998, 15360, 25868, 21154, 35842]
HARMFUL = [18654, 36412, 15686, 23272, 13672, 14912, 5863, 29516, 30690, 40589]


def test_what_ships():
    assert {name.split("/")[0] for name in PUBLISHED} == {"gemma-2-2b", "gemma-2-9b", "llama-3.1-8b", "qwen3.5-4b"}
    assert {f"gemma-2-9b/{kind}_pack" for kind in ("reasoning", "confidence", "retrieval")} <= set(PUBLISHED)
    assert set(PUBLISHED) - set(RECIPES) == {QWEN}
    for name in PUBLISHED:
        pack = load_pack(name)
        assert pack.name == name and pack.status == "candidate" and pack.evidence is None
        assert pack.status_reason and pack.provenance["source"] and pack.licence


@pytest.mark.parametrize("name", RECIPES)
def test_the_saes_of_the_recipes_are_in_the_table_of_supported_models(name):
    pack = load_pack(name)
    row = next(row for row in SUPPORTED if pack.sae.release in releases(row))
    assert pack.sae.sae_id in sae_ids(pack.sae.release)
    layer = re.search(r"layer_(\d+)|l(\d+)r", pack.sae.sae_id)
    assert pack.hook_point == f"blocks.{layer[1] or layer[2]}.hook_resid_post"
    assert pack.recipe is not None and pack.recipe.settings["questions"] >= 1000
    if name.startswith("gemma-2-9b"):
        assert (pack.d_model, pack.d_sae) == row.widths


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_its_features_are_found(name):
    with pytest.raises(PackError) as error:
        mr.FeatureReward.from_pack(name)
    assert f"'mechreward discover --recipe {name} --data YOUR_ROLLOUTS.jsonl'" in str(error.value)
    assert "\n" not in str(error.value)


def test_qwens_features_are_the_published_ones():
    pack = load_pack(QWEN)
    assert [feature.id for feature in pack.features] == HELPFUL + HARMFUL
    assert [feature.weight for feature in pack.features] == [1.0] * 10 + [-1.0] * 10
    published = [float(re.search(r"d ([+-]\d\.\d+)", feature.note)[1]) for feature in pack.features]
    assert published == sorted(published[:10], reverse=True) + sorted(published[10:])
    assert (max(published), min(published)) == (2.158, -2.469) and min(map(abs, published)) == 2.06
    said = pack.provenance
    assert said["source_repository"].endswith("OpenInterpretability/mechreward") and len(said["source_commit"]) == 40
    assert (said["published_validation_n"], said["published_validation_n_correct"]) == (100, 89)
    assert (said["published_spearman"], said["published_pearson"]) == (0.54, 0.726)


def test_what_is_said_of_noise_in_qwens_selection():
    """The median of the largest |d| of 40,960 features without effect: from Student's t, and by drawing."""
    remark = load_pack(QWEN).provenance["remark_selection"]
    rng = np.random.default_rng(0)
    for right, wrong in ((25, 25), (40, 10), (45, 5)):
        t = student.isf((1 - 0.5 ** (1 / 40960)) / 2, right + wrong - 2)
        median = t * (1 / right + 1 / wrong) ** 0.5
        assert re.search(rf"\b{median:.2f} for (a split of )?{right} and {wrong}\b", remark), (median, remark)
        largest = []
        for _ in range(7):
            x = rng.standard_normal((40960, right + wrong), dtype=np.float32)
            a, b = x[:, :right], x[:, right:]
            pooled = np.sqrt((a.var(1) * right + b.var(1) * wrong) / (right + wrong - 2))
            largest.append(np.abs((a.mean(1) - b.mean(1)) / pooled).max())
        assert np.median(largest) == pytest.approx(median, rel=0.1)
    assert "1.35 to 2.25" in load_pack(QWEN).status_reason


def test_a_candidates_warning_names_the_command_that_tests_it(snapshot, tmp_path):  # noqa: F811
    """Qwen's pack, on an SAE of its format with fewer latents, from its own repository."""
    stored, _, asked = snapshot
    pack = load_pack(QWEN)
    published = topk_checkpoint(stored(pack.sae.release), at=pack.sae.sae_id)
    features = [feature.model_copy(update={"id": i}) for i, feature in enumerate(pack.features)]
    small = pack.model_copy(update={"d_model": WIDTH, "d_sae": LATENTS, "features": features})
    command = f"'mechreward gate {QWEN} --model Qwen/Qwen3.5-4B --data YOUR_ROLLOUTS.jsonl'"
    with pytest.warns(CandidateWarning) as caught:
        reward = mr.FeatureReward.from_pack(small)
    assert command in str(caught[0].message) and "Nobody has run our gate" in str(caught[0].message)
    assert asked == [(pack.sae.release, None)]
    assert reward.readout.hook_point == mr.readout.HookPoint(18) and reward.readout.nonlinearity.k == 8
    assert reward.weights.tolist() == [1.0] * 10 + [-1.0] * 10 and reward.aggregation == "mean"
    assert torch.equal(reward.readout.weight, published.tensors["W_enc"])
    with pytest.raises(PackError) as error:
        mr.FeatureReward.from_pack(small, strict=True)
    assert command in str(error.value)
    file = tmp_path / "mine.json"
    small.write(file)
    with pytest.warns(CandidateWarning, match=re.escape(f"'mechreward gate {file} --model")):
        mr.FeatureReward.from_pack(str(file))


def test_another_saes_columns_are_not_taken_for_qwens(tmp_path):
    handle = mr.load_sae(path=topk_checkpoint(tmp_path).path)
    with warnings.catch_warnings(), pytest.raises(PackError, match="was made for"):
        warnings.simplefilter("ignore")
        mr.FeatureReward.from_pack(QWEN, sae=handle)
