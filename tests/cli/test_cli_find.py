"""`mechreward discover` and `mechreward gate` on pocket, as a user calls them."""

import json
import shutil

import numpy as np
import pytest
from by_hand import rollouts
from planting import pocket
from test_pack import EVIDENCE
from typer.testing import CliRunner

import mechreward as mr
from mechreward.cli import app
from mechreward.errors import CandidateWarning
from mechreward.features.discover import chance_file, read_chance
from mechreward.features.pack import Evidence, read_pack
from mechreward.rollout.hf import HFSource, load_model
from mechreward.rollout.labelled import read_rollouts, write_rollouts

POCKET = "mechreward/pocket"
JUMPRELU, TOPK = (f"pocket-res-canonical/layer_2/width_2k/{name}" for name in ("canonical", "topk"))
FEW = ["--n-positive", "4", "--n-negative", "3", "--permutations", "5"]


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args):
    """The one sentence that a call ends in."""
    result = run(*args)
    assert result.exit_code == 2 and result.exception.__class__ is SystemExit, (result.output, result.exception)
    bars = ("Loading weights", "Generating train split")  # of transformers and datasets
    said = [line for line in result.stderr.splitlines() if not any(bar in line for bar in bars)]
    assert [line[:7] for line in said if line] == ["Error: "], result.stderr
    return result.stderr


def reads(file):
    """What the pack gives for a few rollouts, with no SAE named."""
    batch = rollouts().batch.take(range(4))
    with pytest.warns(CandidateWarning):
        reward = mr.FeatureReward.from_pack(str(file))
    return reward(batch.prompts, batch.completions, batch.completion_ids, source=HFSource(*pocket()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("find")


@pytest.fixture(scope="module")
def halves(folder):
    """Rollouts to discover on and others to gate on, as files."""
    files = folder / "discovery.jsonl", folder / "gate.jsonl"
    for half, file in zip(rollouts().halves(), files, strict=True):
        write_rollouts(half, file)
    return files


@pytest.fixture(scope="module")
def found(folder, halves):
    """A pack from two dictionaries, one of them in a folder, and what was printed."""
    local = folder / "my sae"
    shutil.copytree(mr.pocket.files() / "saes" / "jumprelu", local)
    out = folder / "packs" / "found.json"
    result = run("discover", "--sae", TOPK, "--sae", local, "--data", halves[0], "--out", out, *FEW)
    assert result.exit_code == 0, result.output
    return out, result.stdout, local


# Discovery -----------------------------------------------------------------------------------------------------------


def test_discover_writes_a_pack_and_what_its_gate_needs(found, halves):
    out, printed, local = found
    pack, chance = read_pack(out), read_chance(out)
    assert pack.name == "found" and pack.status == "candidate" and len(pack.features) == 7
    assert pack.model == POCKET and pack.provenance["dictionaries_scanned"] == 2
    assert [(sae.release, sae.sae_id) for sae in chance.saes] == [
        ("pocket-res-canonical", "layer_2/width_2k/topk"), ("local", str(local)),
    ]  # fmt: skip
    assert len(chance.selections) == 5 and pack.sae in chance.saes
    assert all(str(feature.id) in printed for feature in pack.features)
    strengths = dict(line.rsplit(": ", 1) for line in printed.splitlines() if line.endswith(tuple("0123456789")))
    best = max((TOPK, f"local/{local}"), key=lambda name: float(strengths[name]))
    assert f"{pack.sae.release}/{pack.sae.sae_id}" == best
    assert f"mechreward gate {out} --model {POCKET}" in printed
    with np.load(chance_file(out)) as arrays:
        assert arrays["effect"].shape == (4096,)
        first = pack.features[0].id + 2048 * chance.saes.index(pack.sae)
        assert f"{arrays['effect'][first]:.3g}" in printed  # the column of the right dictionary


def test_a_pack_from_a_folder_needs_it_no_more_but_one_of_a_topk_does(folder, halves, tmp_path, monkeypatch):
    local = tmp_path / "sae"
    shutil.copytree(mr.pocket.files() / "saes" / "jumprelu", local)
    monkeypatch.chdir(tmp_path)
    assert run("discover", "--sae", "sae", "--data", halves[0], *FEW).exit_code == 0
    assert run("discover", "--sae", JUMPRELU, "--data", halves[0], "--out", "b.json", *FEW).exit_code == 0
    shutil.rmtree(local)
    monkeypatch.chdir(folder)
    assert read_pack(tmp_path / "pack.json").sae.release == "local" and read_pack(tmp_path / "pack.json").frozen
    assert reads(tmp_path / "pack.json") == reads(tmp_path / "b.json")
    assert run("discover", "--sae", TOPK, "--data", halves[0], "--out", tmp_path / "c.json", *FEW).exit_code == 0
    pack = read_pack(tmp_path / "c.json")
    assert pack.frozen is None and pack.sae.sae_id == "layer_2/width_2k/topk"
    assert not (tmp_path / "c.safetensors").exists() and len(set(reads(tmp_path / "c.json"))) == 4


def test_a_recipe_is_filled_in(halves, tmp_path):
    recipe = {
        "schema_version": 1, "name": "pocket/arithmetic_pack", "description": "Every step is right.",
        "model": POCKET, "sae": {"release": "pocket-res-canonical", "sae_id": "layer_2/width_2k/canonical"},
        "hook_point": "blocks.2.hook_resid_post", "d_model": 128, "d_sae": 2048, "aggregation": "mean_last_8_tokens",
        "features": [], "status": "candidate", "status_reason": "Nobody has looked.", "provenance": {},
        "recipe": {"behaviour": "Right.", "contrast": "Right against wrong.",
                   "settings": {"n_positive": 3, "n_negative": 2, "min_firing": 0.2, "method": "Cohen's d"}},
        "licence": "Apache-2.0",
    }  # fmt: skip
    file, out = tmp_path / "recipe.json", tmp_path / "filled.json"
    file.write_text(json.dumps(recipe))
    result = run("discover", "--recipe", file, "--data", halves[0], "--out", out, "--permutations", "2")
    assert result.exit_code == 0, result.output
    pack = read_pack(out)
    assert (pack.name, pack.description, pack.model) == ("pocket/arithmetic_pack", "Every step is right.", POCKET)
    assert pack.aggregation == "mean_last_8_tokens" and pack.sae.sae_id == "layer_2/width_2k/canonical"
    assert [np.sign(feature.weight) for feature in pack.features] == [1] * 3 + [-1] * 2
    assert pack.provenance["min_firing"] == 0.2
    assert "recipe without features" in refused("gate", file, "--data", halves[1])
    recipe["recipe"]["settings"]["n_positive"] = "three"
    file.write_text(json.dumps(recipe))
    assert "n_positive is 'three', not a number" in refused("discover", "--recipe", file, "--data", halves[0])


def test_questions_are_sampled_labelled_and_kept(tmp_path):
    kept = tmp_path / "kept" / "rollouts.jsonl"
    result = run(
        "discover", "--model", POCKET, "--sae", JUMPRELU, "--data", POCKET, "--questions", 20, "--rollouts", 2,
        "--max-new-tokens", 60, "--verifier", "gsm8k", "--keep-rollouts", kept, "--out", tmp_path / "a.json", *FEW,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    from mechreward import verifiers

    answers = dict(zip(*(mr.pocket.dataset("discovery", 20)[column] for column in ("prompt", "answer")), strict=True))
    back, pack = read_rollouts(kept, *pocket()), read_pack(tmp_path / "a.json")
    assert len(back) == pack.provenance["discovery_rollouts"] == 40 and back.temperature == 1.0
    golds = [answers[prompt] for prompt in back.batch.prompts]
    assert verifiers.gsm8k(back.batch.texts, golds) == back.labels.tolist()
    assert max(map(len, back.batch.completion_ids)) <= 60 and len(set(back.groups)) == 20
    assert "(discovery), seed 0, by gsm8k" in pack.provenance["discovered_on"]
    again = run("discover", "--sae", JUMPRELU, "--data", kept, "--out", tmp_path / "b.json", *FEW)
    assert again.exit_code == 0 and read_pack(tmp_path / "b.json").features == pack.features


# The gate ------------------------------------------------------------------------------------------------------------


def test_the_gate_writes_its_evidence_and_a_failure_is_exit_code_1(found, halves, tmp_path):
    out, _, _ = found
    copied = tmp_path / "gated" / "mine.json"
    result = run("gate", out, "--data", halves[1], "--out", copied)
    assert result.exit_code == 1, result.output
    assert "FAILED  permutation" in result.stdout and "100 are the least" in result.stdout
    assert f"{copied}: candidate." in result.stdout
    pack = read_pack(copied)
    assert pack.evidence is not None and pack.calibration is not None and read_pack(out).evidence is None
    assert pack.evidence.n == len(read_rollouts(halves[1], *pocket())) and pack.evidence.draws == 5
    assert set(pack.evidence.without) == {str(feature.id) for feature in pack.features}
    assert pack.evidence.data.endswith("rollouts of gate.jsonl") and pack.status_reason == pack.evidence.reason()
    assert reads(copied) == reads(out)  # its encoder came along
    shown = run("packs", "show", copied)
    assert shown.exit_code == 0 and "FAILED  permutation" in shown.stdout


def test_a_validated_pack_is_exit_code_0_and_written_to_its_file(found, halves, tmp_path, monkeypatch):
    card = tmp_path / "mine.json"
    for file in found[0].parent.iterdir():
        shutil.copy(file, tmp_path / file.name.replace("found", "mine") if file.suffix == ".json" else tmp_path)
    evidence = Evidence.model_validate(EVIDENCE)

    def passed(pack, model, tokenizer, held_out, chance, seed):
        return pack.model_copy(update={"evidence": evidence, "status": "validated", "status_reason": "Passed."})

    monkeypatch.setattr("mechreward.features.judge.judge", passed)
    result = run("gate", card, "--data", halves[1])
    assert result.exit_code == 0 and "passed  auc" in result.stdout, result.output
    assert read_pack(card).status == "validated" and read_pack(card).evidence == evidence


def test_questions_that_discovery_used_are_refused(found, halves):
    said = refused("gate", found[0], "--data", halves[0])
    assert "20 of the questions of" in said and "gate it on others" in said
    assert read_pack(found[0]).evidence is None


def test_evidence_goes_into_a_json_file(halves, tmp_path):
    assert "ends in .json" in refused("gate", "pocket/reasoning_pack", "--data", halves[1], "--out", tmp_path / "p.txt")


def test_a_pack_of_the_catalogs_or_the_hub_is_gated_into_a_file_here(halves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = mr.features.catalog.CATALOGS / "pocket" / "reasoning_pack.json"
    monkeypatch.setattr("mechreward.sae.registry.download", lambda repo, file: here)
    before = here.read_bytes()
    assert run("gate", "hf:me/packs/reasoning_pack.json", "--data", halves[1]).exit_code in (0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["reasoning_pack.json"] and here.read_bytes() == before


# What is wrong is one sentence ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Another width than pocket's."""
    from conftest import build

    folder = tmp_path_factory.mktemp("other")
    build("gemma2").save_pretrained(folder)
    load_model(POCKET)[1].save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sae", JUMPRELU, "--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--sae", JUMPRELU, "--data", "damaged.jsonl"], "damaged.jsonl, line 2"),
        (["--sae", JUMPRELU, "--data", "questions.jsonl", "--answer", "gold"], "no column 'gold'"),
        (["--sae", JUMPRELU, "--data", "questions.jsonl", "--prompt", "{question}"], "no column 'question'"),
        (["--sae", JUMPRELU, "--data", "questions.jsonl", "--prompt", "nothing"], "should name at least one column"),
        (["--sae", JUMPRELU, "--data", POCKET, "--verifier", "gsm9k"], "Did you mean 'gsm8k'"),
        (["--sae", JUMPRELU, "--data", POCKET, "--split", "discvery"], "Did you mean 'discovery'"),
        (["--sae", JUMPRELU, "--data", POCKET, "--dtype", "float33"], "Did you mean 'float32'"),
        (["--sae", JUMPRELU, "--data", POCKET, "--method", "laso"], "Did you mean 'lasso'"),
        (["--sae", JUMPRELU, "--data", POCKET, "--aggregation", "avg"], "no aggregation 'avg'"),
        (["--sae", JUMPRELU, "--data", POCKET, "--n-positive", "0", "--n-negative", "0"], "at least one"),
        (["--sae", JUMPRELU, "--data", POCKET, "--model", "nowhere/at-all"], "nowhere/at-all cannot be loaded"),
        (["--sae", JUMPRELU, "--data", POCKET, "--model", "OTHER"], "width 32"),
        (["--sae", JUMPRELU, "--data", POCKET, "--out", "my pack.json"], "letters, digits"),
        (["--sae", JUMPRELU, "--data", POCKET, "--out", "pack.txt"], "ends in .json"),
        (["--sae", JUMPRELU, "--data", POCKET, "--out", "damaged.jsonl/pack.json"], "cannot be written"),
        (["--sae", JUMPRELU, "--data", POCKET, "--keep-rollouts", "."], "cannot be written"),
        (["--sae", "pocket-res-canonical/layer_9", "--data", POCKET], "layer_9"),
        (["--sae", "nothing", "--data", POCKET], "'nothing' does not name a sparse autoencoder"),
        (["--data", POCKET], "Name a sparse autoencoder with --sae"),
        (["--recipe", "pocket/nothing", "--data", POCKET], "no pack 'pocket/nothing'"),
    ],
)
def test_discover_refuses(options, says, other_model, tmp_path, monkeypatch):
    """Before anything is sampled: that may take hours."""

    def never(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr("mechreward.rollout.labelled.sample", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n{"prompt": \n')
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n')
    options = [str(other_model) if option == "OTHER" else option for option in options]
    assert says in refused("discover", *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nothing.json"], "nothing.json cannot be read"),
        (["pocket/nothing", "--out", "a.json"], "no pack 'pocket/nothing'"),
        (["pocket/reasoning_pack", "--out", "a.json", "--model", "OTHER"], "width 32"),
        (["pocket/reasoning_pack", "--out", "a.json", "--verifier", "gsm9k"], "Did you mean 'gsm8k'"),
        (["damaged.json"], "is damaged (BadZipFile)"),
    ],
)
def test_gate_refuses(options, says, other_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechreward.rollout.labelled.sample", lambda *_, **__: pytest.fail("sampled"))
    shutil.copy(mr.features.catalog.CATALOGS / "pocket" / "reasoning_pack.json", "damaged.json")
    (tmp_path / "damaged.discovery.npz").write_bytes(b"PK\x03\x04 but nothing more")
    options = [str(other_model) if option == "OTHER" else option for option in options]
    assert says in refused("gate", *options, "--data", POCKET)


def test_a_split_of_ones_own_called_gate_is_asked_for_by_that_name(tmp_path, monkeypatch):
    """Only where no split is named is it chosen: `train`, or pocket's own for discovery and gate."""
    asked = []

    def load(sources):
        asked.append(sources[0].split)
        raise mr.errors.DataError("Enough.")

    monkeypatch.setattr("mechreward.train.sampling.load", load)
    monkeypatch.chdir(tmp_path)
    for data in ("me/questions", POCKET):
        for split in ([], ["--split", "gate"]):
            assert "Enough." in refused("discover", "--sae", JUMPRELU, "--data", data, *split)
            assert "Enough." in refused("gate", "pocket/reasoning_pack", "--out", "a.json", "--data", data, *split)
    assert asked == ["train", "train", "gate", "gate", "discovery", "gate", "gate", "gate"]
