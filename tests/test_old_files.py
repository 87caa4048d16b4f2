"""Files that version 0.1.0.dev0 wrote at commit 5d226ef, before modules moved, are read."""

import json
import shutil
from pathlib import Path

import pytest
import snapshot

import mechreward as mr
from mechreward.features.pack import read_pack
from mechreward.integrations.trl.trainer import STATE_FILE
from mechreward.report.runs import find

OLD = Path(__file__).parent / "data" / "version_0_1"


def test_a_training_resumes_from_an_old_state(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    snapshot.trainer("guards and monitors", tmp_path, **options).train()
    shutil.copy(OLD / STATE_FILE, tmp_path / "checkpoint-3" / STATE_FILE)
    resumed = snapshot.trainer("guards and monitors", tmp_path, **options, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    stored = json.loads((OLD / STATE_FILE).read_text())
    suite = resumed.guards[1]
    assert stored["guards"]["AdversarialSuite"]["seen"] == 48 and suite.seen == 64, "it learns on behind the old state"
    gap = next(monitor for monitor in resumed.monitors if monitor.name == "proxy_gold_gap")
    assert gap.first == stored["monitors"]["proxy_gold_gap"]["first"]


def test_an_old_run_is_reported(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    (found,) = find([run])
    assert [record["step"] for record in found.metrics if "reward" in record] == [1, 2, 3] and len(found.trace) == 6


def test_old_packs_and_probes_are_read():
    with pytest.warns(UserWarning):
        reward = mr.FeatureReward.from_pack(read_pack(OLD / "reasoning_pack.json"))
    assert len(reward.weights) == len(json.loads((OLD / "reasoning_pack.json").read_text())["features"])
    assert mr.load_probe(str(OLD / "correctness_probe.json")).probability is not None
