"""Work that was interrupted goes on, and ends like work that was not."""

import json

import pytest
import torch
from planting import pocket
from typer.testing import CliRunner

import mechreward as mr
from mechreward.cli import app
from mechreward.rollout import sampling
from mechreward.unfinished import Steps, Unfinished

DISCOVER = [
    "discover", "--sae", "pocket-res-canonical/layer_2/width_2k/canonical", "--data", "mechreward/pocket",
    "--questions", "12", "--rollouts", "4", "--batch-size", "16", "--max-new-tokens", "48", "--verifier", "gsm8k",
    "--n-positive", "2", "--n-negative", "2", "--min-firing", "0", "--permutations", "3",
]  # fmt: skip


def test_steps_come_back_as_they_were_and_a_line_cut_off_is_done_again(tmp_path):
    first = Unfinished(tmp_path / "kept").steps("rollouts", {"seed": 0})
    assert list(first.each([0.1, 1 / 3], lambda x: [x, "a\n"])) == [[0.1, "a\n"], [1 / 3, "a\n"]]
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(file.read_text() + "[2, 0.1, [0.5")
    again, made = Unfinished(tmp_path / "kept").steps("rollouts", {"seed": 0}), []
    assert list(again.each([0.1, 1 / 3, 0.5], lambda x: made.append(x) or [x])) == [[0.1, "a\n"], [1 / 3, "a\n"], [0.5]]
    assert made == [0.5]


def test_steps_of_another_configuration_are_left_alone(tmp_path):
    Unfinished(tmp_path / "kept").steps("rollouts", {"seed": 0}).add(1)
    said = []
    other = Unfinished(tmp_path / "kept", said.append).steps("rollouts", {"seed": 1})
    assert other.done == [] and "another seed (0, not 1)" in said[0]
    assert Unfinished(tmp_path / "kept").steps("rollouts", {"seed": 0}).done == [1]


@pytest.mark.parametrize("cut", [1, 2])
def test_sampling_goes_on_in_the_same_stream_of_random_numbers(tmp_path, monkeypatch, cut):
    prompts = list(mr.pocket.dataset("discovery", 6)["prompt"])

    def sampled(kept):
        torch.manual_seed(5)
        return sampling.sample(
            *pocket(), prompts, 2, 4, kept, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=24
        )

    whole, own, calls = sampled(None).completion_ids, sampling._completions, []

    def stopped(*args):
        if len(calls) == cut:
            raise KeyboardInterrupt
        calls.append(1)
        return own(*args)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr(sampling, "_completions", stopped)
        sampled(Steps(tmp_path / "a.jsonl", {}))
    kept = Steps(tmp_path / "a.jsonl", {})
    assert len(kept.done) == cut and sampled(kept).completion_ids == whole


def test_discover_is_interrupted_and_goes_on(tmp_path, monkeypatch):
    calls, own = [], sampling._completions

    def counted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(sampling, "_completions", counted)
    cut, whole = tmp_path / "cut" / "a.json", tmp_path / "whole" / "a.json"
    stopped = CliRunner().invoke(app, [*DISCOVER, "--out", str(cut)])
    assert stopped.exit_code == 130 and "goes on from there" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not cut.exists()
    result = CliRunner().invoke(app, [*DISCOVER, "--out", str(cut), "--json"])
    assert result.exit_code == 0, result.output
    assert len(calls) == 4 and str(cut) in result.stderr  # three batches in all, one of which was tried twice
    assert json.loads(result.stdout)["file"] == str(cut)
    assert CliRunner().invoke(app, [*DISCOVER, "--out", str(whole)]).exit_code == 0
    names = sorted(file.name for file in whole.parent.iterdir())
    assert sorted(file.name for file in cut.parent.iterdir()) == names
    for name in names:
        assert (cut.parent / name).read_bytes() == (whole.parent / name).read_bytes(), name
