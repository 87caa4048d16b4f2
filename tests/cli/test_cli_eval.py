"""`mechreward eval`, and the shell's completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from planting import pocket
from typer.testing import CliRunner

import mechreward as mr
from mechreward.cli import app
from mechreward.pocket.questions import step_accuracy
from mechreward.train import evaluation
from mechreward.train.capability import PocketSuite
from mechreward.train.config import ExperimentConfig

N = 12


def run(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder with pocket itself as the model that came out, and what the run recorded of its last step."""
    folder = tmp_path_factory.mktemp("runs") / "sum" / "seed-3"
    folder.mkdir(parents=True)
    sets = {name: [{"path": "mechreward/pocket", "split": name, "rows": 40}] for name in ("train", "discovery", "test")}
    config = ExperimentConfig.model_validate(
        {
            "output": str(folder.parents[1]),
            "model": "mechreward/pocket",
            "data": sets,
            "training": {"max_steps": 1, "max_completion_length": 48},
            "evaluation": {"questions": N},
            "arms": {"sum": {"outcome": 1.0}},
            "seeds": [3],
        }
    )
    model, tokenizer = pocket()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.run("sum", 3)))
    (folder / "summary.json").write_text("{}")
    _, figures = evaluation.evaluate(model, tokenizer, evaluation.test_questions(config, 3), config, [], 3)
    return folder, config, figures


def test_a_run_is_measured_as_it_recorded_itself(finished):
    folder, config, figures = finished
    result = run(folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    sampled = report["questions"]["sampled"]
    assert sampled["n"] == N and {name: sampled[name] for name in figures} == figures
    greedy = report["questions"]["greedy"]
    answers = by_hand(evaluation.test_questions(config, 3))
    assert greedy["accuracy"] == np.mean([right for right, _ in answers])
    assert greedy["right_steps"] == pytest.approx(np.mean([steps for _, steps in answers]))
    assert json.loads((folder / "eval.json").read_text()) == report
    assert not list(folder.glob(".*partial"))


def by_hand(test):
    """Each question alone, without a batch: whether the greedy answer is right, and the share of right steps."""
    model, tokenizer = pocket()
    found = []
    for row in test:
        asked = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        told = model.generate(**asked, do_sample=False, max_new_tokens=48)[0, asked.input_ids.shape[1] :]
        text = tokenizer.decode(told, skip_special_tokens=True)
        (right,) = mr.verifiers.math_boxed([text], [row["answer"]])
        found.append((right is True, step_accuracy(text, row["solution"])))
    return found


def test_a_model_and_its_other_skills(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def measure(model, suites, seed, kept, log):
        asked.append((suites, model))
        right = evaluation.Scores([str(i) for i in range(4)], np.array([1.0, 0, 1, 1]))
        return {"arc_easy": right, "text": evaluation.Scores(["a"], np.array([2.0]), np.array([4]))}

    monkeypatch.setattr("mechreward.train.capability.measure", measure)
    options = ["--questions", "4", "--max-new-tokens", "48", "--tasks", "arc_easy,hellaswag:acc_norm", "--pocket-suite"]
    result = run("mechreward/pocket", *options)
    assert result.exit_code == 0, result.output
    ((suite, *tasks), model), report = asked[0], json.loads((tmp_path / "eval.json").read_text())
    assert [(t.task, t.metric, t.filter) for t in tasks] == [
        ("arc_easy", "acc", "none"),
        ("hellaswag", "acc_norm", "none"),
    ]
    assert isinstance(suite, PocketSuite) and model == "mechreward/pocket"
    assert report["capabilities"]["arc_easy"]["accuracy"] == 0.75
    assert report["capabilities"]["text"]["perplexity"] == pytest.approx(np.exp(0.5))
    assert "eval.json: 4 questions." in result.stdout and "0.750 (" in result.stdout


def test_interrupted_it_goes_on_with_what_is_left(finished, tmp_path, monkeypatch):
    folder, *_ = finished
    true, ways = evaluation.evaluate, []

    def interrupted(*args, do_sample=True):
        ways.append(do_sample)
        if len(ways) == 2:
            raise KeyboardInterrupt
        return true(*args, do_sample=do_sample)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    file = tmp_path / "eval.json"
    first = run(folder, "--out", file)
    assert first.exit_code == 130 and "1 of the evaluations" in first.stderr and not file.exists()
    assert run(folder, "--out", file).exit_code == 0
    assert ways == [True, False, False]
    monkeypatch.setattr(evaluation, "evaluate", true)
    whole = tmp_path / "whole.json"
    assert run(folder, "--out", whole).exit_code == 0
    assert whole.read_text() == file.read_text()


def test_what_cannot_be_measured_is_one_sentence(finished, tmp_path):
    folder, *_ = finished
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("{}")
    for args, said in (
        ([folder, "--questions", "5"], "decides what --questions would"),
        ([begun], "is not finished"),
        (["some/model"], "name them with --data"),
        (["mechreward/pocket", "--tasks", "arc_easy,arc_easy:acc_norm", "--questions", "4"], "'arc_easy' twice"),
        (["mechreward/pocket", "--verifier", "math_box", "--questions", "4"], "verifier"),
        (["mechreward/pocket", "--out", begun / "config.yaml" / "eval.json", "--questions", "4"], "config.yaml"),
    ):
        result = run(*args)
        assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr, result.stderr


def completed(line):
    """What bash offers behind a line, by the script that `mechreward --install-completion` installs."""
    script = f"""
source <(_MECHREWARD_COMPLETE=source_bash mechreward)
COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_mechreward_completion mechreward
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


def test_bash_completes_commands_options_and_packs():
    assert completed("mechreward disc") == ["discover"]
    assert completed("mechreward doctor --mo") == ["--model"]
    assert completed("mechreward packs show pocket/reas") == ["pocket/reasoning_pack"]
