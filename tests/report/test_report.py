"""What the report is made of: figures against hand calculation, what is missing, and what must not be said."""

import base64
import gzip
import html
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HARM, lines, rollout, write_run
from test_train_config import one_sentence
from typer.testing import CliRunner

from mechreward.cli import app
from mechreward.errors import ConfigError, DataError
from mechreward.report.comparison import compare
from mechreward.report.curves import alarms, cost, curves
from mechreward.report.page import page
from mechreward.report.rollouts import rollouts
from mechreward.report.runs import find

EASY = {0: [0] * 20, 2: [1] * 20}
HALF = {0: [0] * 20, 2: [1, 0] * 10}


@pytest.fixture
def runs(tmp_path):
    """Two arms with three seeds: the baseline learns half of the questions, the other all but one or two."""
    for seed in range(3):
        write_run(tmp_path, "outcome", seed, HALF)
        write_run(tmp_path, "sum", seed, {0: [0] * 20, 2: [1] * (18 + seed % 2) + [0] * (2 - seed % 2)})
    return tmp_path


class TestComparison:
    def test_figures_by_hand(self, runs):
        said = compare(find([runs]))
        assert said["baseline"] == "outcome" and list(said["arms"]) == ["outcome", "sum"] and said["compared"] == 1
        row = said["arms"]["sum"]
        ends = [0.9, 0.95, 0.9]
        assert row["accuracy"]["end"]["per_seed"] == pytest.approx(ends)
        assert row["difference"]["mean"] == pytest.approx(np.mean(ends) - 0.5)
        assert row["difference"]["shown"] and row["verdict"].startswith("sum is more accurate: +0.417 (")
        assert row["gained"]["mean"] == pytest.approx(np.mean(ends)) and row["seeds"] == [0, 1, 2]
        # Rewards are step + seed: at both ends the mean over two steps and three seeds.
        assert row["training"]["reward"]["last"]["mean"] == pytest.approx(1.5 + 1.0)
        assert said["arms"]["outcome"]["difference"] is None

    def test_no_difference_is_called_a_gain(self, tmp_path):
        rng = np.random.default_rng(0)
        for seed in range(3):
            for arm in ("outcome", "sum"):
                write_run(tmp_path, arm, seed, {0: [0] * 20, 2: rng.integers(0, 2, 20).tolist()})
        row = compare(find([tmp_path]))["arms"]["sum"]
        assert not row["difference"]["shown"] and "no difference shown" in row["verdict"]

    @settings(max_examples=10)
    @given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=4, max_size=4))
    def test_what_the_words_say_is_what_the_intervals_say(self, tmp_path_factory, answers):
        root = tmp_path_factory.mktemp("words")
        for place, right in enumerate(answers):
            write_run(root, ("outcome", "sum")[place % 2], place // 2, {0: [0] * 8, 2: list(map(int, right))})
        row = compare(find([root]))["arms"]["sum"]
        d = row["difference"]
        both = [d["student"], d["resampled"]]
        apart = all(low > 0 for low, _ in both) or all(high < 0 for _, high in both)
        assert ("accurate" in row["verdict"]) is apart is d["shown"]
        shutil.rmtree(root)

    def test_one_seed_has_no_interval(self, tmp_path):
        write_run(tmp_path, "outcome", 0, HALF)
        write_run(tmp_path, "sum", 0, EASY)
        assert "with one seed, of which no interval can be given" in compare(find([tmp_path]))["arms"]["sum"]["verdict"]

    def test_what_was_not_trained_alike_is_not_compared(self, tmp_path):
        write_run(tmp_path, "outcome", 0, HALF)
        write_run(tmp_path, "sum", 0, EASY, learning_rate=2.0)
        row = compare(find([tmp_path]))["arms"]["sum"]
        assert (
            row["difference"] is None and "not trained alike (training.learning_rate: 2.0 and None)" in row["verdict"]
        )

    def test_unfinished_runs_do_not_count(self, runs):
        write_run(runs, "sum", 3, {0: [0] * 20, 2: [0] * 20}, finished=False)
        row = compare(find([runs]))["arms"]["sum"]
        assert (
            row["finished"] == 3 and row["runs"] == 4 and row["difference"]["mean"] == pytest.approx(0.41667, abs=1e-4)
        )

    def test_another_baseline(self, runs):
        row = compare(find([runs]), "sum")["arms"]["outcome"]
        assert row["verdict"].startswith("outcome is less accurate: -0.417")
        with pytest.raises(ConfigError, match="no arm 'outcom', only outcome, sum") as caught:
            compare(find([runs]), "outcom")
        one_sentence(caught.value)


class TestCurves:
    def test_mean_and_spread_over_seeds(self, runs):
        write_run(runs, "outcome", 7, HALF)
        (runs / "outcome" / "seed-7" / "metrics.jsonl").write_text(lines([{"step": 1, "reward": 100.0}]))
        found = {chart["key"]: chart for group in curves(find([runs])) for chart in group["charts"]}
        series = found["reward"]["arms"]["outcome"]
        assert series["steps"] == [1, 2] and series["runs"] == [4, 3]
        assert series["mean"] == pytest.approx([(1 + 2 + 3 + 100) / 4, 3.0])
        assert series["low"] == [1, 2] and series["high"] == [100, 4]
        assert found["test/right"]["arms"]["sum"]["mean"] == pytest.approx([0, np.mean([0.9, 0.95, 0.9])])
        groups = {chart["key"]: group["group"] for group in curves(find([runs])) for chart in group["charts"]}
        assert groups["kl"] == "KL, entropy, length" and groups["guards/flagged"] == "Guards and alarms"
        assert groups["composite/seconds"] == "Time and memory"

    def test_alarms(self, runs):
        assert alarms(find([runs])) == [
            {"run": f"{arm}, seed 1", "alarm": "flagged/high", "steps": [2]} for arm in ("outcome", "sum")
        ]

    def test_cost(self, runs):
        row = cost(find([runs]))[0]
        assert row["whole"] == 2.0 and row["ours"] == pytest.approx((0.1 + 0.3) / 2)
        assert row["parts"]["verifiers"] == pytest.approx(0.05) and row["parts"]["scoring"] == 0.3
        assert row["peak_memory_bytes"] == 1_500_000_002 and row["reading_bytes"] == 2048


class TestRollouts:
    def test_nothing_is_lost_on_the_way(self, tmp_path):
        trace = [
            rollout(step, row, row % 2 == 0, row, ["a", " b", f" {row}", "<eos>"])
            for step in (1, 2)
            for row in range(4)
        ]
        write_run(tmp_path, "sum", 0, HALF, trace)
        data = rollouts(find([tmp_path]), 100)
        assert data["recorded"] == 8
        for row, record in zip(data["rows"], trace, strict=True):
            assert [data["tokens"][token] for token in row["tokens"]] == record["tokens"]
            assert data["prompts"][row["prompt"]] == record["prompt"]
            labels = data["readouts"][0]["labels"]
            features = {labels[k]: where for k, where in row["readings"][0]["features"].items()}
            assert features == record["readings"]["a/pack"]["features"]
            assert {k: row[k] for k in ("right", "reward", "flags", "gold", "unread")} == {
                k: record[k] for k in ("right", "reward", "flags", "gold", "unread")
            }
        assert data["readouts"][0]["weights"] == [1.5, -0.5]

    def test_bounded_and_even(self, tmp_path):
        for seed in range(2):
            write_run(tmp_path, "sum", seed, HALF, [rollout(step, 0, True, 1, ["a", "b"]) for step in range(100)])
        rows = rollouts(find([tmp_path]), 20)["rows"]
        assert [row["run"] for row in rows] == [0] * 10 + [1] * 10
        assert [row["step"] for row in rows[:10]] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


class TestMissing:
    def test_a_run_from_before_rollouts_were_recorded(self, tmp_path):
        folder = write_run(tmp_path, "sum", 0, HALF)
        for name in ("trace.jsonl", "recording.json"):
            (folder / name).unlink()
        (run,) = find([folder])
        assert any("No rollouts with readings" in said for said in run.missing)
        assert len(run.trace) == 40 and run.trace[0]["tokens"] == ["answer 0"] and run.trace[0]["right"] is False
        assert "No rollouts with readings" in page([run])

    def test_a_plain_training_has_no_verdict(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "metrics.jsonl").write_text(lines([{"step": 1, "reward": 0.5}]))
        (run,) = find([tmp_path / "out"])
        assert run.arm == "out" and any("No evaluation on test questions" in said for said in run.missing)
        text = html.unescape(page([run]))
        assert "out: no finished run with an evaluation on test questions" in text
        assert "No rollouts were recorded" in text and "These runs read no pack" in text

    def test_the_history_of_any_trainers_checkpoint(self, tmp_path):
        for step in (2, 10):
            (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
            history = [{"step": s, "reward": float(s)} for s in range(1, step + 1)] + [
                {"step": step, "train_runtime": 1.0}
            ]
            (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text(
                json.dumps({"log_history": history})
            )
        (run,) = find([tmp_path / "out"])
        assert [log["reward"] for log in run.metrics] == [float(s) for s in range(1, 11)]

    def test_no_run_is_one_sentence(self, tmp_path):
        for path, what in ((tmp_path / "no", "is no folder"), (tmp_path, "holds no run")):
            with pytest.raises(DataError, match=what) as caught:
                find([path])
            one_sentence(caught.value)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "metrics.jsonl").write_text("")
        (tmp_path / "a" / "recording.json").write_text("{")
        with pytest.raises(DataError, match=r"recording\.json is damaged") as caught:
            find([tmp_path])
        one_sentence(caught.value)

    def test_arms_of_one_name_in_two_experiments_are_kept_apart(self, tmp_path):
        for name in ("one", "two"):
            write_run(tmp_path / name, "sum", 0, HALF)
        assert [run.arm for run in find([tmp_path / "one", tmp_path / "two"])] == ["one/sum", "two/sum"]


class TestPage:
    def test_nothing_from_a_run_is_markup(self, tmp_path):
        write_run(tmp_path, "sum", 0, HALF, [rollout(1, 0, False, 1, [HARM, "</script>"], flags=[HARM])])
        folder = tmp_path / "sum" / "seed-0"
        about = json.loads((folder / "recording.json").read_text())
        about["packs"]["a/pack"]["description"] = HARM
        (folder / "recording.json").write_text(json.dumps(about))
        (folder / "metrics.jsonl").write_text(lines([{"step": 1, "reward": 0.5, HARM: 1.0}]))
        text = page(find([tmp_path]), title=HARM)
        assert "window.harmed" in html.unescape(text) and "<img" not in text
        assert text.count("<script") == 3 and text.count("</script") == 3
        packed = re.search(r'id="data">([^<]*)<', text)[1]
        data = json.loads(gzip.decompress(base64.b64decode(packed)))
        assert HARM in data["rollouts"]["tokens"]

    def test_nothing_is_fetched(self, runs):
        text = page(find([runs]))
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text) and "default-src 'none'" in text
        assert str(runs) not in text

    def test_figures_that_json_cannot_hold(self, tmp_path):
        folder = write_run(tmp_path, "sum", 0, HALF, [rollout(1, 0, None, float("nan"), ["a", "b"])])
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward": NaN, "kl": Infinity, "seconds": 1.0}\n')
        packed = re.search(r'id="data">([^<]*)<', page(find([tmp_path])))[1]
        data = json.loads(gzip.decompress(base64.b64decode(packed)), parse_constant=pytest.fail)
        assert data["rollouts"]["rows"][0]["reward"] is None


class TestCommand:
    def test_page_and_path(self, runs):
        out = runs / "r.html"
        result = CliRunner().invoke(app, ["report", str(runs / "outcome" / "seed-0"), str(runs), "-o", str(out)])
        assert result.exit_code == 0 and "Report of 6 runs" in result.output and out.name in result.output
        assert out.read_text().startswith("<!doctype html>") and out.stat().st_size < 3_000_000

    def test_json(self, runs):
        result = CliRunner().invoke(app, ["report", str(runs), "--json"])
        assert json.loads(result.stdout)["arms"]["sum"]["difference"]["shown"] is True

    def test_errors(self, runs):
        result = CliRunner().invoke(app, ["report", str(runs / "none")])
        assert result.exit_code == 2 and result.stderr.startswith("Error: ") and "is no folder" in result.stderr
        result = CliRunner().invoke(app, ["report", str(runs), "-o", str(runs / "no" / "r.html")])
        assert result.exit_code == 2 and "cannot be written" in result.stderr
