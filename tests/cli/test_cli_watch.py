"""`mechreward watch`: a run's folder as it grows, figures and frames by hand."""

import io
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from report_runs import rollout, write_run
from rich.console import Console
from typer.testing import CliRunner

from mechreward.cli import app
from mechreward.cli.watch import frame, sparkline
from mechreward.report import live


def run(*args):
    return CliRunner().invoke(app, ["watch", *map(str, args)])


def text_of(now, width=120) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(frame(now))
    return console.export_text()


def log(step, **figures):
    return {"step": step, "reward": step / 10, "kl": 0.01 * step, "guards/flagged": 0.0, "seconds": 2.0, **figures}


def add(file, *records, cut=None):
    with file.open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
        if cut is not None:
            lines.write(cut)


@pytest.fixture
def folder(tmp_path):
    """A run of 8 steps that has just begun."""
    run = tmp_path / "runs" / "sum" / "seed-0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("training: {max_steps: 8}\n")
    return run


class TestSnapshot:
    def test_before_the_first_step(self, folder):
        now = live.snapshot(folder)
        assert (now.step, now.steps, now.left, now.finished, now.curves) == (0, 8, None, False, {})
        assert text_of(now).strip().endswith("step 0 of 8")

    def test_a_growing_file_whose_last_line_is_half_written(self, folder):
        metrics = folder / "metrics.jsonl"
        add(metrics, log(1), log(2, seconds=4.0), log(3, seconds=3.0), cut='{"step": 4, "rew')
        add(folder / "evaluations.jsonl", {"step": 0, "accuracy": 0.25}, {"step": 2, "accuracy": 0.5}, cut="{")
        add(folder / "trace.jsonl", cut='{"st')
        now = live.snapshot(folder)
        assert now.step == 3 and now.left == 15.0  # median of 2, 4, 3 seconds, for 5 steps
        assert now.curves["reward"] == [0.1, 0.2, 0.3] and now.curves["test/accuracy"] == [0.25, 0.5]
        with metrics.open("a") as lines:
            lines.write('ard": 0.4, "seconds": 3.0}\n')
        now = live.snapshot(folder)
        assert now.step == 4 and now.left == 12.0 and now.curves["reward"] == [0.1, 0.2, 0.3, 0.4]

    def test_an_experiments_run_ends_with_its_summary_and_any_other_with_its_last_step(self, folder):
        add(folder / "metrics.jsonl", log(7), log(8))
        assert not live.snapshot(folder).finished and live.snapshot(folder).left == 0.0
        (folder / "summary.json").write_text("{}")
        assert live.snapshot(folder).finished and live.snapshot(folder).left is None
        for name in ("config.yaml", "summary.json"):
            (folder / name).unlink()
        (folder / "recording.json").write_text('{"max_steps": 9}')
        assert not live.snapshot(folder).finished
        (folder / "recording.json").write_text('{"max_steps": 8}')
        assert live.snapshot(folder).finished

    def test_an_alarm_that_ended_the_training(self, folder):
        rang = {"monitor/alarm/flagged/high": 1.0}
        add(folder / "metrics.jsonl", log(1, **{"monitor/alarm/flagged/high": 0.0}), log(2, **rang), log(3, **rang))
        assert live.snapshot(folder).alarms == {"flagged/high": 2} and not live.snapshot(folder).finished
        add(folder / "metrics.jsonl", log(4, stopped_because="Training ends at step 4: too many flags."))
        now = live.snapshot(folder)
        assert now.finished and "Training ends at step 4" in text_of(now)
        assert "Alarms: flagged/high (first at step 2)" in text_of(now)

    def test_which_figures_and_in_which_order(self):
        logs = [
            {"step": 1, "loss": 1.0, "monitor/pack": 2.0, "guards/flagged": 0.0, "guards/flagged/repetition": 0.0,
             "guards/flagged/length": 0.0, "composite/features": 3.0, "composite/seconds": 0.1, "reward": 1.0,
             "rewards/composite/mean": 1.0, "completions/mean_length": 20.0, "composite/dual/disagreement": 0.5,
             "monitor/alarm/x": 0.0, "step_time": 3.0},
            {"step": 2, "reward": 2.0, "guards/flagged/length": 0.5, "kl": 0.1},
        ]  # fmt: skip
        found = live.series(logs, [{"step": 0, "accuracy": 0.5, "tokens": 9.0}])
        assert list(found) == [
            "test/accuracy", "test/tokens", "reward", "composite/features", "kl", "completions/mean_length",
            "composite/dual/disagreement", "guards/flagged", "guards/flagged/length", "monitor/pack",
        ]  # fmt: skip
        assert found["reward"] == [1.0, 2.0] and found["guards/flagged/length"] == [0.0, 0.5]

    def test_the_most_rewarded_wrong_rollout_of_those_recorded_lately(self):
        old = rollout(1, 0, False, 99.0, ["old"])
        recent = [rollout(2, k, k % 2 == 0, float(k), ["x"]) for k in range(live.LATELY)]
        test = {**rollout(2, 0, False, 0.0, ["test"]), "set": "test", "reward": None}
        assert live.worst([old, *recent, test])["reward"] == live.LATELY - 1
        assert live.worst([rollout(1, 0, True, 1.0, ["x"])]) is None and live.worst([]) is None


class TestFrame:
    def test_what_is_on_it(self, tmp_path):
        trace = [
            rollout(1, 0, False, 2.5, ["The ", "answer\n", "is ", "\x1b[2J41"], flags=["repetition: 3 times"]),
            rollout(1, 1, True, 9.0, ["right"]),
        ]
        folder = write_run(tmp_path, "sum", 1, {0: [0, 1], 2: [1, 1]}, trace)
        add(folder / "evaluations.jsonl", {"step": 2, "accuracy": 1.0})
        shown = text_of(live.snapshot(folder))
        lines = shown.splitlines()
        assert lines[0].endswith("sum/seed-1: step 2 of 2, finished")
        row = next(line for line in lines if line.startswith("reward "))
        assert row.split() == ["reward", "2", "3", "▁█"]
        assert "Most rewarded wrong answer lately: 2.500 at step 1, gold 42, flagged: repetition: 3 times" in shown
        assert "The answer\nis \ufffd[2J41" in shown and "\x1b" not in shown  # nothing that rewrites a terminal
        assert "flagged/high (first at step 2)" in shown

    @pytest.mark.parametrize(
        ("left", "said"),
        [(5.4, "about 5 s left"), (600.0, "about 10 min left"), (9000.0, "about 2.5 h left")],
    )
    def test_the_time_left(self, folder, left, said):
        now = live.Snapshot(folder, 1, 8, left, 0.0, {}, {}, None, None, False)
        assert said in text_of(now)

    def test_a_run_that_has_gone_quiet(self, folder):
        now = live.Snapshot(folder, 1, 8, 60.0, 600.0, {}, {}, None, None, False)
        assert "nothing was written for 10 min" in " ".join(text_of(now).split())

    def test_sparklines_by_hand(self):
        assert sparkline([0.0, 1.0, 0.4, float("nan"), 7.0]) == "▁▂▁ █"  # 0, 1, 0.4 -> 0, none, 7
        assert sparkline([3.0, 3.0]) == "▁▁" and sparkline([]) == ""
        assert sparkline([float("nan")]) == " "
        assert sparkline([0.0, 0.0, 7.0, 7.0], width=2) == "▁█"
        assert len(sparkline(list(range(1000)))) == 30


class TestCommand:
    def test_once(self, folder):
        add(folder / "metrics.jsonl", log(1))
        result = run(folder, "--once")
        assert result.exit_code == 0 and "step 1 of 8" in result.output.replace("\n", "")

    def test_an_experiment_shows_the_run_that_was_written_last(self, folder):
        other = folder.parent / "seed-1"
        other.mkdir()
        (other / "config.yaml").write_text("training: {max_steps: 8}\n")
        os.utime(other, (1, 1))
        os.utime(other / "config.yaml", (1, 1))
        assert live.run_in(folder.parent.parent) == folder

    def test_it_ends_when_the_run_ends(self, folder):
        def train():
            for step in range(1, 9):
                add(folder / "metrics.jsonl", log(step))
                time.sleep(0.05)
            (folder / "summary.json").write_text("{}")

        writer = threading.Thread(target=train)
        writer.start()
        result = run(folder, "--every", 0.1)
        writer.join()
        assert result.exit_code == 0 and "step 8 of 8, finished" in result.output.replace("\n", "")

    def test_ctrl_c(self, folder, monkeypatch):
        def interrupted(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["mechreward.cli.watch"], "time", SimpleNamespace(sleep=interrupted))
        assert run(folder).exit_code == 130

    def test_a_folder_without_a_run_is_one_sentence(self, tmp_path):
        for where in (tmp_path, tmp_path / "none"):
            result = run(where)
            assert result.exit_code == 2
            assert (
                result.stderr
                == f"Error: {where} holds no run: give the output folder of a training, or of an experiment.\n"
            )
