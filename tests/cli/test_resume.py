"""Commands that are interrupted, whatever they are at, end like commands that are not."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import mechreward as mr
from mechreward.cli import app
from mechreward.features.pack import read_pack
from mechreward.hacking.redteam import campaign
from mechreward.hacking.redteam.target import Target
from mechreward.rollout import sampling as sampling_module

SAMPLED = [
    "--verifier", "gsm8k", "--questions", "12", "--rollouts", "4", "--batch-size", "16", "--max-new-tokens", "48",
]  # fmt: skip
GATE = ["gate", "pocket/reasoning_pack", "--data", "mechreward/pocket", *SAMPLED]
REDTEAM = [
    "redteam", "pocket/reasoning_pack", *SAMPLED, "--suite", "none", "--attack", "templates", "--attack",
    "best-of-n", "--family", "word_salad", "--instances", "4", "--best-of", "4", "--best-of-questions", "3",
]  # fmt: skip


class Stop:
    """Ctrl-C in a certain call of a function, once; counts the calls."""

    def __init__(self, monkeypatch, owner, name, at):
        self.own, self.calls, self.at = getattr(owner, name), 0, at
        # A function, and not this object, so that a method is given its own.
        monkeypatch.setattr(owner, name, lambda *args, **options: self(*args, **options))

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.own(*args, **options)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def interrupted(*args):
    """What is said on stderr when Ctrl-C ends a call: one sentence on what is kept."""
    result = run(*args)
    assert result.exit_code == 130 and "Traceback" not in result.output, (result.output, result.exception)
    said = [line for line in result.stderr.splitlines() if line.startswith("Interrupted")]
    assert len(said) == 1 and result.stdout == "", result.output
    return said[0]


def finished(*args, codes=(0,)):
    result = run(*args)
    assert result.exit_code in codes, (result.output, result.exception)
    return result


def same_files(one, other):
    """Byte by byte, and nothing is left of what was unfinished."""
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_gate_goes_on_in_its_sampling_and_behind_it(tmp_path, monkeypatch):
    cut, whole = tmp_path / "cut" / "a.json", tmp_path / "whole" / "a.json"
    code = finished(*GATE, "--out", whole, codes=(0, 1)).exit_code  # 1: it stays a candidate
    sampled = Stop(monkeypatch, sampling_module, "_completions", 2)
    assert "1 of the rollouts" in interrupted(*GATE, "--out", cut)
    assert not cut.exists()
    Stop(monkeypatch, mr.features.judge, "surprise", 1)
    assert "3 of the rollouts" in interrupted(*GATE, "--out", cut)
    last = finished(*GATE, "--out", cut, "--json", codes=(code,))
    assert sampled.calls == 4  # three batches in all, one of which was tried twice
    assert "Going on behind what is kept of the rollouts" in last.stderr
    assert json.loads(last.stdout) == {"file": str(cut), "pack": read_pack(cut).model_dump(mode="json")}
    same_files(cut.parent, whole.parent)


def test_a_red_team_keeps_what_it_has_sampled(tmp_path, monkeypatch):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    finished(*REDTEAM, "--out", whole)
    # Two batches each of calibration and clean rollouts; then one of best-of-N, behind the templates.
    sampling = Stop(monkeypatch, sampling_module, "_completions", 2)
    assert "1 of the calibration rollouts" in interrupted(*REDTEAM, "--out", cut)
    Stop(monkeypatch, Target, "judged", 2)
    said = interrupted(*REDTEAM, "--out", cut)
    assert "2 of the calibration rollouts, 2 of the clean rollouts" in said and str(cut / ".partial") in said
    Stop(monkeypatch, Target, "judged", 4)
    assert "1 of the best-of-n rollouts" in interrupted(*REDTEAM, "--out", cut)
    finished(*REDTEAM, "--out", cut)
    assert sampling.calls == 6  # five batches in all, one of which was tried twice
    assert sorted(file.name for file in cut.iterdir()) == ["redteam.json", "redteam.md"]
    told, expected = (json.loads((folder / "redteam.json").read_text()) for folder in (cut, whole))
    # A duration is the only thing that differs; the earlier starts' share of it is counted in.
    assert told.pop("seconds") > 0 and expected.pop("seconds") > 0
    assert told == expected
    pages = [re.sub(r"[\d.]+ s\b", "", (folder / "redteam.md").read_text()) for folder in (cut, whole)]
    assert pages[0] == pages[1]


def test_a_red_team_keeps_the_policies_that_it_has_trained(tmp_path, monkeypatch):
    command = [*REDTEAM, "--attack", "policy", "--train", "both", "--steps", "1", "--prompts-per-step", "1"]
    command = [*command, "--num-generations", "2", "--out", tmp_path]
    trained = Stop(monkeypatch, campaign, "attack_policy", 2)
    said = interrupted(*command)
    assert "1 of the lora policies" in said
    finished(*command)
    assert trained.calls == 3  # the second was tried twice
    names = [attack["name"] for attack in json.loads((tmp_path / "redteam.json").read_text())["attacks"]]
    assert names[-2:] == ["policy/lora", "policy/full"]


@pytest.mark.slow
def test_the_training_of_a_probe_goes_on_in_its_layers_and_strengths(tmp_path, monkeypatch):
    from mechreward.probes import training

    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"prompt": row["prompt"], "positive": row["solution"], "negative": "No idea."})
            for row in mr.pocket.dataset("discovery", 24)
        )
    )
    command = ["probe", "train", "--model", "mechreward/pocket", "--data", data, "--layers", "1"]
    Stop(monkeypatch, training, "_choose", 1)
    assert interrupted(*command, "--out", tmp_path / "it") == "Interrupted: the same command starts again."
    assert not list(tmp_path.glob("*it*"))
    finished(*command, "--out", tmp_path / "it")


@pytest.mark.slow
def test_a_real_ctrl_c_ends_discover_with_one_sentence(tmp_path):
    """SIGINT to a process that samples; then the same command."""
    command = [
        sys.executable, "-c", "from mechreward.cli import app; app()", "discover", "--sae",
        "pocket-res-canonical/layer_2/width_2k/canonical", "--data", "mechreward/pocket", "--n-positive", "2",
        "--n-negative", "2", "--min-firing", "0", "--permutations", "3", *SAMPLED, "--questions", "40",
    ]  # fmt: skip
    cut, whole = tmp_path / "cut" / "a.json", tmp_path / "whole" / "a.json"
    with subprocess.Popen([*command, "--out", str(cut)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        while not list(cut.parent.glob(".a.discover.partial/*")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = (each.decode() for each in process.communicate(timeout=60))
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert re.findall("^Interrupted.*", err, re.MULTILINE) == [err.splitlines()[-1]]
    assert re.search(r"\d of the rollouts\. The same command goes on from there\.", err) and not cut.exists()
    for file in (cut, whole):
        subprocess.run([*command, "--out", str(file)], check=True, capture_output=True)
    same_files(cut.parent, whole.parent)
