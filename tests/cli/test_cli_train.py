"""`mechreward train`: a configuration made or taken, handed to the runner, and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_train_config import one_sentence, tiny
from typer.testing import CliRunner

from mechreward import progress
from mechreward.cli import app
from mechreward.train import runner
from mechreward.train.config import read_config

ROOT = Path(__file__).parents[2]
PACK = ["--pack", "pocket/reasoning_pack"]


def run(*args):
    return CliRunner().invoke(app, ["train", *map(str, args)])


def refused(*args):
    result = run(*args)
    assert result.exit_code == 2 and result.exception.__class__ is SystemExit, (result.output, result.exception)
    said = result.stderr.strip()
    assert said.startswith("Error: ")
    return one_sentence(Exception(said))


@pytest.fixture
def runs(monkeypatch):
    """The runs that would have been made, with what the runner was told."""
    made = []

    def stand_in(config, arm, seed, log, setup, report_to):
        made.append((config, arm, seed, list(report_to)))
        return runner.folder_of(config, arm, seed)

    monkeypatch.setattr(runner, "run", stand_in)
    monkeypatch.setattr(runner.warnings, "filterwarnings", lambda *_, **__: None)
    return made


def experiment(folder, **changes) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tiny(folder / "runs", **changes).model_dump(mode="json"), sort_keys=False))
    return file


class TestWithConfig:
    def test_it_makes_the_same_runs_as_the_scripts(self, tmp_path, runs):
        file = experiment(tmp_path)
        result = run("--config", file)
        assert result.exit_code == 0, result.output
        config = read_config(file)
        assert [(c, arm, seed) for c, arm, seed, _ in runs] == [
            (config, arm, seed) for seed in (0, 1) for arm in ("outcome", "sum", "hero")
        ]
        assert result.stdout.splitlines()[-1] == f"Next: mechreward report {tmp_path}/runs"
        assert f"Run: {tmp_path}/runs/hero/seed-1" in result.stdout

    def test_some_arms_and_seeds_and_json(self, tmp_path, runs):
        result = run("--config", experiment(tmp_path), "--arm", "sum", "--seed", 1, "--json")
        assert [each[1:3] for each in runs] == [("sum", 1)]
        assert json.loads(result.stdout) == [f"{tmp_path}/runs/sum/seed-1"]

    def test_several_at_a_time_are_processes_with_the_same_options(self, tmp_path, runs, monkeypatch):
        commands = []
        monkeypatch.setattr(
            runner.subprocess, "run", lambda c, env: commands.append(c) or subprocess.CompletedProcess(c, 0)
        )
        file = experiment(tmp_path)
        result = run("--config", file, "--arm", "sum", "--jobs", 2, "--json")
        assert result.exit_code == 0 and runs == []
        assert sorted(c[c.index("train") :] for c in commands) == [
            ["train", "--config", str(file), "--arm", "sum", "--seed", seed] for seed in ("0", "1")
        ]
        assert json.loads(result.stdout) == [f"{tmp_path}/runs/sum/seed-{seed}" for seed in (0, 1)]

    @pytest.mark.parametrize(
        ("args", "part"),
        [
            (["--weight", "0.3"], "decides what --weight would"),
            (["--steps", "3"], "decides what --steps would"),
            (["--arm", "summ"], "Did you mean 'sum'?"),
            (["--seed", "7"], "no seed 7"),
            (["--jobs", "0"], "--jobs 0 is not possible"),
            (["--report-to", "tensorbord"], "Did you mean 'tensorboard'?"),
        ],
    )
    def test_what_cannot_be(self, tmp_path, runs, args, part):
        assert part in refused("--config", experiment(tmp_path), *args)
        assert runs == []

    def test_a_tracker_that_is_not_there(self, tmp_path, runs, monkeypatch):
        from transformers.integrations import integration_utils

        monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
        output = tmp_path / "mine"
        assert "pip install trackio" in refused(*PACK, "--output", output, "--report-to", "trackio")
        assert not output.exists() and runs == []


class TestByOptions:
    def test_the_configuration_is_written_and_says_what_the_options_said(self, tmp_path, runs):
        output = tmp_path / "mine"
        options = ["--model", "mechreward/pocket", *PACK, "--data", "mechreward/pocket", "--weight", 0.25, "--steps", 7]
        options += ["--learning-rate", "1e-4", "--beta", 0.1, "--num-generations", 4, "--every", 2, "--output", output]
        assert run(*options).exit_code == 0
        ((config, arm, seed, trackers),) = runs
        assert config == read_config(output / "train.yaml") and (arm, seed, trackers) == ("train", 0, [])
        assert config.model == "mechreward/pocket" and config.training.max_steps == 7
        assert config.arms["train"].features.weight == 0.25 and config.arms["train"].outcome == 1.0
        assert (config.training.learning_rate, config.training.beta, config.training.num_generations) == (1e-4, 0.1, 4)
        assert config.evaluation.every == 2 and config.output == str(output)
        assert [source.split for source in config.data.train + config.data.test] == ["train", "test"]
        assert run(*options).exit_code == 0  # goes on
        assert run("--config", output / "train.yaml").exit_code == 0
        assert len(runs) == 3 and runs[2][0] == config
        assert "holds another configuration" in refused(*options, "--weight", 0.5)

    def test_trackers_do_not_decide_the_run(self, tmp_path, runs):
        output = tmp_path / "mine"
        assert run(*PACK, "--output", output).exit_code == 0
        before = (output / "train.yaml").read_text()
        assert run(*PACK, "--output", output, "--report-to", "tensorboard").exit_code == 0
        assert (output / "train.yaml").read_text() == before
        assert runs[0][0] == runs[1][0] and [each[3] for each in runs] == [[], ["tensorboard"]]

    def test_questions_of_a_file(self, tmp_path, runs):
        args = ["--data", "mine.jsonl", "--test-data", "test.jsonl", "--prompt", "Q: {question}", "--answer", "gold"]
        assert run(*PACK, *args, "--output", tmp_path).exit_code == 0
        data = runs[0][0].data
        assert [(s.path, s.split, s.prompt, s.answer) for s in data.train + data.test] == [
            ("mine.jsonl", "train", "Q: {question}", "gold"),
            ("test.jsonl", "train", "Q: {question}", "gold"),
        ]

    def test_hero_gets_the_scaling_that_it_needs(self, tmp_path, runs):
        assert run(*PACK, "--mode", "hero", "--output", tmp_path).exit_code == 0
        assert runs[0][0].arms["train"].scale_rewards == "none"

    @pytest.mark.parametrize(
        ("args", "part"),
        [
            ([], "--config, an experiment's YAML file, or --pack"),
            (["--pack", "pocket/reasoning_pak"], "reasoning_pack"),
            ([*PACK, "--model", "some/model"], "Name questions for some/model with --data"),
            ([*PACK, "--verifier", "math_box"], "verifier"),
            ([*PACK, "--mode", "summ"], "mode"),
            ([*PACK, "--learning-rate", "-1"], "learning_rate"),
            ([*PACK, "--arm", "sum"], "there are train"),
        ],
    )
    def test_what_cannot_be(self, tmp_path, runs, args, part):
        output = tmp_path / "mine"
        assert part in refused(*args, "--output", output)
        assert runs == [] and ("--arm" in args or not output.exists())

    def test_an_output_that_cannot_be_written(self, tmp_path, runs):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in refused(*PACK, "--output", tmp_path / "file")


def test_an_interruption_is_one_line_and_exit_code_130(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr(runner.warnings, "filterwarnings", lambda *_, **__: None)
    result = run("--config", experiment(tmp_path), "--arm", "outcome")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "Interrupted. The same command goes on from the last checkpoint."


def test_without_a_terminal_every_step_is_a_line_with_the_time_left(monkeypatch):
    """By hand: steps 5 and 7 of 9, 10 s apart each, from step 4 on."""
    clock = iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    config = SimpleNamespace(training=SimpleNamespace(max_steps=9), evaluation=SimpleNamespace(every=100))
    lines, advanced = [], []
    recorder = runner.Recorder(
        Path(), "sum, seed 0", config, None, None, [], lines.append, lambda: advanced.append(1)
    )  # fmt: skip
    state = SimpleNamespace(global_step=4, max_steps=9)
    with progress.shown():
        recorder.on_train_begin(None, state, None)
        for state.global_step in (5, 7):
            recorder.on_step_end(None, state, None)
    assert len(advanced) == 2 and lines == [
        "sum, seed 0, step 5 of 9, about 40 s left",  # 10 s a step, 4 to go
        "sum, seed 0, step 7 of 9, about 20 s left",  # 30 s for 3 steps, 2 to go
    ]


def test_help_needs_no_torch_and_has_an_example():
    for command in ([], ["train"], ["watch"]):
        code = (
            "import sys\nfrom mechreward.cli import app\n"
            f"try: app({[*command, '--help']!r})\n"
            "except SystemExit: print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])\n"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]" and (not command or f"Example: mechreward {command[0]}" in out), out


@pytest.mark.slow
def test_tensorboard_gets_reward_and_ours_and_evaluations_and_the_run_is_the_same(tmp_path):
    """The event file against metrics.jsonl and evaluations.jsonl, read by TensorBoard itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = experiment(tmp_path, training={"max_steps": 2}, seeds=[0])
    folder = tmp_path / "runs" / "sum" / "seed-0"
    result = run("--config", file, "--arm", "sum", "--report-to", "tensorboard")
    assert result.exit_code == 0, result.output
    (events,) = folder.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events)).Reload()
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in ("reward", "composite/features", "mechreward/hook_seconds", "guards/flagged", "kl"):
        logged = [(scalar.step, scalar.value) for scalar in read.Scalars(f"train/{key}")]
        assert logged == [(log["step"], pytest.approx(log[key], rel=1e-6)) for log in logs], key
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    logged = [(scalar.step, scalar.value) for scalar in read.Scalars("eval/accuracy")]
    assert logged == [(e["step"], pytest.approx(e["accuracy"], rel=1e-6)) for e in evaluations]
    assert "tensorboard" not in (folder / "config.yaml").read_text()
    assert "finished before" in run("--config", file, "--arm", "sum").stderr  # the same run without it


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ctrl_c_leaves_what_the_same_command_goes_on_from(tmp_path):
    """A real SIGINT after a checkpoint: one line, 130, and then every step is there once, as if nothing had been."""
    output = tmp_path / "mine"
    command = [sys.executable, "-c", "from mechreward.cli import app; app()", "train", *PACK, "--steps", "8"]
    command += ["--every", "2", "--questions", "4", "--prompts-per-step", "2", "--num-generations", "2"]
    command += ["--max-completion-length", "24", "--output", str(output)]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    folder = output / "train" / "seed-0"
    process = subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert err.splitlines()[-1] == "Interrupted. The same command goes on from the last checkpoint."
    assert list(folder.glob("checkpoint-*")) and not (folder / "summary.json").exists()
    again = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True)
    assert "step 1 of 8" not in again.stderr  # not from the beginning
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 9))
    assert json.loads((folder / "summary.json").read_text())["steps"] == 8
    assert again.stdout.splitlines() == [f"Run: {folder}", f"Next: mechreward report {output}"]
