"""What is made of finished runs: intervals against other implementations, and comparisons worked by hand."""

import json
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_train_config import TINY, one_sentence, tiny

from common import comparison, page
from common.comparison import steps_to_reach
from mechreward.errors import ConfigError
from mechreward.stats import resampled_interval, t_interval
from mechreward.train.results import DRAWS, Difference, Run, difference

ROOT = Path(__file__).parents[2]
NAN = float("nan")


# -- intervals ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-6))
def test_t_interval_equals_scipys(values):
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((want.low, want.high), rel=1e-9, abs=1e-9)


def test_t_interval_at_its_edges():
    assert t_interval([0.3]) == (-np.inf, np.inf)
    assert t_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def bootstrap(per_question, draws, seed=1):
    """Seeds with replacement, then each one's questions with replacement: one draw at a time."""
    rng, means = random.Random(seed), []
    for _ in range(draws):
        of_seeds = []
        for _ in per_question:
            questions = [v for v in rng.choice(per_question) if v == v]
            of_seeds.append(sum(rng.choice(questions) for _ in questions) / len(questions))
        means.append(sum(of_seeds) / len(of_seeds))
    return means


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_resampled_interval_equals_a_bootstrap_by_hand(spread):
    rng = np.random.default_rng(int(spread * 10))
    per_question = [rng.normal(rng.normal() * spread, 1, n) for n in (12, 20, 15, 9)]
    per_question[1][:5] = NAN
    means = bootstrap([list(v) for v in per_question], 4000)
    found = resampled_interval(per_question, DRAWS)
    # Standard error of a 2.5 % quantile of n draws: sqrt(.025 .975 / n) / density, the density .058 / SD.
    allowed = 4 * (0.025 * 0.975) ** 0.5 * (1 / 4000 + 1 / 10_000) ** 0.5 / 0.058 * np.std(means)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=allowed)
    assert found == resampled_interval(per_question, DRAWS) != resampled_interval(per_question, DRAWS, seed=1)


def coverage(seeds, questions, between, runs=400):
    """How often each interval holds the true mean, 0."""
    rng, hits = np.random.default_rng(0), np.zeros(3)
    for k in range(runs):
        x = rng.normal(size=(seeds, questions)) + between * rng.normal(size=(seeds, 1))
        both = resampled_interval(list(x), draws=400, seed=k), t_interval(x.mean(axis=1))
        held = [low <= 0 <= high for low, high in both]
        shown = Difference(x.mean(), [], *both).shown
        hits += [*held, not shown]
    return hits / runs


def test_coverage_without_variance_between_seeds():
    # One seed: the plain bootstrap of its questions.
    assert coverage(1, 60, 0)[0] == pytest.approx(0.95, abs=0.035)
    # Five: the variance of the seeds' own means, which is that of their questions, is counted a second time:
    # (S - 1) / S more, so that the interval is 1.34 times too wide and holds the mean in 99 % of the cases.
    width = (1 + 4 / 5) ** 0.5
    resampled, student, not_shown = coverage(5, 60, 0)
    assert resampled == pytest.approx(2 * stats.norm.cdf(1.96 * width) - 1, abs=0.02)
    assert student == pytest.approx(0.95, abs=0.035) and not_shown >= max(resampled, student)


def test_where_seeds_differ_resampling_alone_would_show_too_much():
    resampled, student, not_shown = coverage(5, 30, 3)
    assert resampled < 0.92  # five seeds are too few to resample
    assert student == pytest.approx(0.95, abs=0.035) and not_shown >= 0.915


@pytest.mark.parametrize(
    ("resampled", "student", "shown"),
    [
        ((0.1, 0.2), (0.05, 0.3), True),
        ((-0.2, -0.1), (-0.3, -0.05), True),
        ((0.1, 0.2), (-0.05, 0.3), False),
        ((-0.1, 0.2), (0.05, 0.3), False),
        ((0.0, 0.2), (0.05, 0.3), False),
        ((0.0, 0.0), (0.0, 0.0), False),
        ((0.1, 0.2), (-np.inf, np.inf), False),
    ],
)
def test_a_difference_is_shown_only_if_both_intervals_leave_out_0(resampled, student, shown):
    d = Difference(0.1, [0.1], resampled, student)
    assert d.shown is shown is d.report()["shown"]


# -- runs by hand ------------------------------------------------------------------------------------------------------


def run(seed, right, steps=(0, 10, 20), questions=None, **columns):
    """A run from rows of right answers, one for each evaluation."""
    rows = [np.array(row, dtype=float) for row in right]
    asked = np.array(range(len(rows[0])) if questions is None else questions, dtype=float)
    return Run(
        seed,
        list(steps)[: len(rows)],
        [{"right": row, "question": asked, **{n: np.array(v[k]) for n, v in columns.items()}}
         for k, row in enumerate(rows)],
        [{} for _ in rows],
        [],
    )  # fmt: skip


def curve(*shares):
    """A run with these accuracies, in tenths."""
    return run(0, [[1] * round(10 * s) + [0] * (10 - round(10 * s)) for s in shares], steps=(0, 10, 20, 30))


@pytest.mark.parametrize(
    ("shares", "target", "step"),
    [
        ((0.2, 0.4, 0.8), 0.6, 15.0),
        ((0.2, 0.4, 0.8), 0.4, 10.0),
        ((0.2, 0.4, 0.8), 0.3, 5.0),
        ((0.2, 0.4, 0.8), 0.1, 0.0),  # from the start
        ((0.2, 0.4, 0.8), 0.9, None),
        ((0.2, 0.7, 0.3, 0.9), 0.6, 8.0),  # the first time counts
        ((0.5, 0.2, 0.2, 0.7), 0.6, 28.0),
    ],
)
def test_steps_to_reach(shares, target, step):
    assert steps_to_reach(curve(*shares), target) == (None if step is None else pytest.approx(step))


class TestDifference:
    def test_it_is_paired_by_seed_and_question(self):
        arm = [run(0, [[0, 0, 0, 0], [1, 1, 0, 1]]), run(1, [[0, 0, 0, 0], [1, 0, 0, 1]]), run(5, [[0] * 4, [1] * 4])]
        base = [run(2, [[0] * 4, [1] * 4]), run(1, [[0, 0, 0, 0], [0, 0, 1, 1]]), run(0, [[0] * 4, [0, 1, 0, 0]])]
        found = difference(arm, base)
        assert found.per_seed == [0.5, 0.0] and found.mean == 0.25  # seeds 0 and 1 alone
        assert found.student == t_interval([0.5, 0.0])
        assert found.resampled == resampled_interval([np.array([1.0, 0, 0, 1]), np.array([1.0, 0, -1, 0])], DRAWS)

    def test_pairing_by_question_counts(self):
        # The same questions right in both: without pairing the interval would have a width.
        same = [[0, 0, 0, 0], [1, 0, 1, 0]]
        found = difference([run(k, same) for k in range(3)], [run(k, same) for k in range(3)])
        assert found.resampled == found.student == (0, 0) and not found.shown

    def test_over_training(self):
        # Question 0: trapezoids (0+1)/2 10 + (1+1)/2 30 over 40 steps = .875; question 1: (0+1)/2 30 over 40 = .375.
        arm, base = run(0, [[0, 0], [1, 0], [1, 1]], (0, 10, 40)), run(0, [[0, 0], [0, 0], [0, 1]], (0, 10, 40))
        assert difference([arm], [base], area=True).mean == pytest.approx((0.875 + 0.375 - 0.375) / 2)
        assert difference([arm], [base]).mean == 0.5

    def test_other_columns_and_what_is_unknown(self):
        arm = run(0, [[0, 0, 0], [1, 1, 1]], right_steps=[[0, 0, 0], [1.0, NAN, 0.5]])
        base = run(0, [[0, 0, 0], [1, 1, 1]], right_steps=[[0, 0, 0], [0.5, 0.5, NAN]])
        assert difference([arm], [base], "right_steps").mean == 0.5

    def test_different_questions_are_refused(self):
        with pytest.raises(ConfigError, match="Seed 3 was evaluated on different questions") as caught:
            difference([run(3, [[0, 1]])], [run(3, [[0, 1]], questions=[0, 2])])
        one_sentence(caught.value)
        with pytest.raises(ConfigError, match="different questions"):
            difference([run(3, [[0, 1]])], [run(3, [[0, 1, 1]])])

    def test_without_a_seed_in_common(self):
        with pytest.raises(ConfigError, match="share no seed"):
            difference([run(0, [[0, 1]])], [run(1, [[0, 1]])])


# -- folders of runs ---------------------------------------------------------------------------------------------------

STEPS = (0, 2, 4)
# Four test questions a seed, at three evaluations, for two arms and three seeds.
RIGHT = {
    "outcome": {
        0: [[0, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0]],
        1: [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
        2: [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]],
    },
    "sum": {
        0: [[0, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]],
        1: [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
        2: [[0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]],
    },
}


def write_run(output, arm, seed, right, config=None, rows=None):
    """A finished run's folder, as the runner leaves it."""
    config = config or tiny(output, arms={arm: TINY["arms"].get(arm, {"outcome": 1.0})})
    folder = output / arm / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.run(arm, seed)))
    (folder / "environment.json").write_text(json.dumps({"commit": f"{seed}" * 7, "date": f"2026-11-{20 + seed}"}))
    samples, evaluations = [], []
    for step, row in zip(STEPS, right, strict=True):
        for k, verdict in enumerate(row):
            samples.append(
                {"step": step, "question": 10 * seed + k, "completion": "c", "right": bool(verdict), "tokens": 10 + k,
                 "ended": True, "reasoning_pack": verdict + 0.1 * k + step, "right_steps": 0.5 * verdict,
                 **({} if rows is None else rows(step, k))}
            )  # fmt: skip
        evaluations.append({"step": step, "accuracy": sum(row) / len(row), "tokens": 11.5, "truncated": 0.0})
    evaluations[-1]["greedy_accuracy"] = 0.75
    metrics = [
        {"step": step, "reward": step / 10 + seed, "kl": 0.01 * step, "guards/flagged": 0.25, "seconds": 2.0,
         "mechreward/hook_seconds": 0.1, "composite/seconds": 0.3,
         **({"composite/features/raw": step / 100} if arm != "outcome" else {})}
        for step in range(1, 5)
    ]  # fmt: skip
    for name, records in (("samples", samples), ("evaluations", evaluations), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps({"steps": 4, "accuracy": evaluations[-1]["accuracy"]}))
    return folder


@pytest.fixture
def output(tmp_path):
    """Two arms with three seeds each."""
    for arm, of_arm in RIGHT.items():
        for seed, right in of_arm.items():
            write_run(tmp_path / "runs", arm, seed, right)
    return tmp_path / "runs"


@pytest.fixture
def report(output):
    return comparison.compare(output, "outcome", 0.6)


class TestCompare:
    def test_accuracies_by_hand(self, report):
        base, arm = report["arms"]["outcome"], report["arms"]["sum"]
        assert report["made"] == {"commit": "0000000, 1111111 and 2222222", "date": "2026-11-20 to 2026-11-22"}
        assert base["seeds"] == arm["seeds"] == [0, 1, 2] and base["steps"] == [0, 2, 4]
        assert base["curves"]["right"]["per_seed"] == [[0.25, 0.5, 0.5], [0.25, 0.5, 0.5], [0.25, 0.25, 0.5]]
        assert arm["curves"]["right"]["per_seed"] == [[0.25, 0.75, 1.0], [0.25, 0.5, 0.75], [0.25, 0.5, 0.75]]
        assert arm["curves"]["right"]["mean"] == pytest.approx([1 / 4, 7 / 12, 10 / 12])
        # t(.975, 2) = 4.3027; SD of (1, .75, .75) = .14434
        half = 4.30265 * 0.144338 / 3**0.5
        assert arm["curves"]["right"]["interval"][2] == pytest.approx((10 / 12 - half, 10 / 12 + half), abs=1e-5)
        assert arm["curves"]["tokens"]["mean"] == [11.5] * 3
        assert arm["curves"]["right_steps"]["mean"] == pytest.approx([1 / 8, 7 / 24, 10 / 24])
        assert arm["greedy_accuracy"]["per_seed"] == [0.75] * 3

    def test_differences_by_hand(self, report):
        assert "difference" not in report["arms"]["outcome"]
        found = report["arms"]["sum"]["difference"]
        assert found["right"]["per_seed"] == [0.5, 0.25, 0.25] and found["right"]["mean"] == pytest.approx(1 / 3)
        assert found["right_steps"]["mean"] == pytest.approx(1 / 6)
        assert tuple(found["right"]["student"]) == t_interval([0.5, 0.25, 0.25])
        # Trapezoids over steps 0, 2, 4 weigh the evaluations 1/4, 1/2, 1/4.
        assert found["right_over_training"]["per_seed"] == pytest.approx(
            [0.25 / 2 + 0.5 / 4, 0.25 / 4, 0.25 / 2 + 0.25 / 4]
        )

    def test_what_else_is_reported_by_hand(self, report):
        arm, base = report["arms"]["sum"], report["arms"]["outcome"]
        # .6 between .25 and .75 at steps 0 and 2: 2 x .35 / .5; between .5 and .75 at steps 2 and 4: 2 + 2 x .1 / .25
        assert arm["steps_to_target"]["per_seed"] == pytest.approx([1.4, 2.8, 2.8])
        assert (arm["steps_to_target"]["median"], arm["steps_to_target"]["reached"]) == (pytest.approx(2.8), 3)
        assert base["steps_to_target"] == {"per_seed": [None] * 3, "reached": 0, "median": None}
        assert arm["kl"]["mean"] == pytest.approx(0.025)
        assert arm["reward"]["first"]["per_seed"] == pytest.approx([0.25, 1.25, 2.25])
        assert arm["own_reading"]["last"]["mean"] == pytest.approx(0.025) and base["own_reading"] is None
        assert arm["flagged"] == 0.25 and arm["our_share_of_time"]["mean"] == pytest.approx(0.2)
        # The reading is right + .1 k + step: it moved 4 and what the right answers add, in SDs of the start.
        start = np.array([0, 0.1, 1.2, 0.3])
        moved = (np.array([5, 5.1, 5.2, 5.3]).mean() - start.mean()) / start.std()
        assert arm["readings"]["reasoning_pack"]["moved"][2]["per_seed"][0] == pytest.approx(moved)
        assert arm["readings"]["reasoning_pack"]["moved"][0]["mean"] == 0
        assert base["readings"]["reasoning_pack"]["auc"][0]["mean"] == 1.0

    def test_the_median_counts_those_that_never_arrive(self):
        assert comparison._median([1.0, None, 3.0]) == 3.0 and comparison._median([1.0, None, None]) is None

    def test_unequal_budgets_are_refused(self, output):
        config = tiny(output, training={"learning_rate": 2e-3})
        folder = write_run(output, "hero", 0, RIGHT["sum"][0], config)
        with pytest.raises(ConfigError, match="not run at equal budget") as caught:
            comparison.compare(output, "outcome", 0.6)
        assert str(folder) in one_sentence(caught.value)

    def test_two_rewards_under_one_name_are_refused(self, output):
        weaker = {"sum": {"outcome": 1.0, "features": {"pack": "pocket/reasoning_pack", "weight": 0.1}}}
        folder = write_run(output, "sum", 3, RIGHT["sum"][0], tiny(output, arms=weaker))
        with pytest.raises(ConfigError) as caught:
            comparison.compare(output, "outcome", 0.6)
        assert str(folder) in one_sentence(caught.value)

    def test_unfinished_runs_are_left_out(self, output):
        (write_run(output, "sum", 3, RIGHT["sum"][0]) / "summary.json").unlink()
        assert comparison.compare(output, "outcome", 0.6)["arms"]["sum"]["seeds"] == [0, 1, 2]

    def test_nothing_to_compare(self, tmp_path, output):
        with pytest.raises(ConfigError, match="holds no finished run"):
            comparison.compare(tmp_path / "nothing", "outcome", 0.6)
        with pytest.raises(ConfigError, match="Did you mean 'outcome'") as caught:
            comparison.compare(output, "outcom", 0.6)
        assert "only outcome, sum" in one_sentence(caught.value)

    def test_steps_that_only_some_answers_have(self, output):
        """Questions of two kinds: pocket's, whose steps can be checked, and another file's."""
        for arm, of_arm in RIGHT.items():
            for seed in (7, 8):
                folder = write_run(output / "mixed", arm, seed, of_arm[0])
                file = folder / "samples.jsonl"
                records = [json.loads(line) for line in file.read_text().splitlines()]
                for record in records:
                    if record["question"] % 10 == 2 * (seed - 7):  # the first question or a later one
                        del record["right_steps"]
                    elif record["question"] % 10 == 1:
                        record["right_steps"] = None
                file.write_text("".join(json.dumps(r) + "\n" for r in records))
        found = comparison.compare(output / "mixed", "outcome", 0.6)["arms"]["sum"]
        # Seed 7 knows questions 2 and 3, seed 8 questions 0 and 3; half of the right answers' steps are right.
        assert found["curves"]["right_steps"]["per_seed"] == [[0.25, 0.5, 0.5], [0.0, 0.5, 0.5]]


# -- the page ----------------------------------------------------------------------------------------------------------


def cells(text, heading, arm):
    """An arm's row in the table under a heading."""
    table = text[text.index(heading) :]
    row = next(line for line in table.splitlines() if line.startswith(f"| {arm} |"))
    header = next(line for line in table.splitlines() if line.startswith("| arm |"))
    assert row.count("|") == header.count("|")
    return [cell.strip() for cell in row.strip("|").split("|")]


class TestPage:
    def test_the_right_figures(self, report):
        text = page.markdown(report)
        assert cells(text, "### Accuracy", "outcome")[1:] == [
            "0.250 (0.250-0.250)", "0.417 (0.058-0.775)", "0.500 (0.500-0.500)", "0.750 (0.750 to 0.750)"
        ]  # fmt: skip
        minus = cells(text, "### Minus `outcome`", "sum")
        assert minus[1] == "+0.333" and minus[4] == "+0.500 +0.250 +0.250" and minus[3] == "-0.025 to +0.692"
        assert minus[5].startswith("+0.167 (") and minus[6].startswith("+0.167 (")
        else_ = cells(text, "### What else", "sum")
        assert else_[1] == "3 (3 of 3)" and else_[4] == "0.0250" and else_[6:] == ["25.00%", "20.00%"]
        assert cells(text, "### What else", "outcome")[1] == "not reached (0 of 3)"
        assert "steps to 60%" in text and "4 steps of 4 rollouts" in text and "seeds an arm: 3" in text
        assert cells(text, "### The reading of `reasoning_pack`", "sum")[4] == "+0.583"
        # One of the two intervals holds 0.
        assert "- `sum`: no difference shown. Anything from -0.025 to +0.692" in text

    def test_an_equal_arm_shows_no_difference_and_a_better_one_does(self, tmp_path):
        better = [[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]
        worse = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
        for seed in range(3):
            for arm, right in (("outcome", worse), ("equal", worse), ("sum", better)):
                write_run(tmp_path, arm, seed, right)
        text = page.markdown(comparison.compare(tmp_path, "outcome", 0.6))
        assert "- `sum` is more accurate: +1.000 (+1.000 to +1.000)." in text
        assert "- `equal`: no difference shown. Anything from +0.000 to +0.000" in text
        assert "Arms compared: 2, without correction" in text
        text = page.markdown(comparison.compare(tmp_path, "sum", 0.6))
        assert "- `outcome` is less accurate: -1.000" in text

    def test_an_arm_that_trains_nothing_has_no_log(self, output):
        for file in output.glob("sum/seed-*/metrics.jsonl"):
            file.write_text("")
        text = page.markdown(comparison.compare(output, "outcome", 0.6))
        assert cells(text, "### What else", "sum")[4:] == ["?", "", "?", "?"]

    def test_the_figure_shows_every_arm(self, report, tmp_path):
        from matplotlib.image import imread

        page.draw(report, tmp_path / "figure.png")
        pixels = imread(tmp_path / "figure.png")[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 1200
        assert 0.005 < (pixels < 0.9).any(axis=-1).mean() < 0.5
        width = pixels.shape[1]
        for colour in ("#000000", "#0072b2"):  # outcome, sum
            rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            drawn = (np.abs(pixels - rgb) < 0.02).all(axis=-1)
            assert drawn[:, : width // 3].sum() > 50
            assert colour == "#000000" or drawn[:, width // 3 :].sum() > 50


# -- the script --------------------------------------------------------------------------------------------------------


def compare_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "experiments" / "compare.py"), run_name="__main__")


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class TestScript:
    def test_it_writes_what_it_says(self, output, tmp_path, monkeypatch, capsys):
        compare_script(monkeypatch, output, "--out", tmp_path / "out", "--target", "0.5")
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["runs.json", "runs.md", "runs.png"]
        written = json.loads((tmp_path / "out" / "runs.json").read_text())
        assert written["target"] == 0.5 and written["arms"]["sum"]["difference"]["right"]["per_seed"] == [
            0.5,
            0.25,
            0.25,
        ]
        text = (tmp_path / "out" / "runs.md").read_text()
        assert text == page.markdown(comparison.compare(output, "outcome", 0.5)) and text in capsys.readouterr().out

    def test_a_folder_with_a_dot_in_its_name(self, output, tmp_path, monkeypatch):
        dotted = output.rename(tmp_path / "qwen2.5")
        monkeypatch.setattr(page, "draw", lambda report, file: file.write_bytes(b"drawn"))
        compare_script(monkeypatch, dotted, "--out", tmp_path / "out")
        names = ["qwen2.5.json", "qwen2.5.md", "qwen2.5.png"]
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names

    def test_a_single_seed(self, tmp_path, monkeypatch):
        """No interval over seeds can be had, and the page and the figure say so instead of failing."""
        for arm in RIGHT:
            write_run(tmp_path / "runs", arm, 0, RIGHT[arm][0])
        compare_script(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
        text = (tmp_path / "out" / "runs.md").read_text()
        assert "`sum`: +0.500 with one seed, of which no interval can be given" in text

    @pytest.mark.parametrize("case", ["no interval over a single seed", "no AUC where all are right"])
    def test_its_json_is_json(self, tmp_path, monkeypatch, case):
        for arm in RIGHT:
            for seed in (0,) if "seed" in case else (0, 1):
                write_run(tmp_path / "runs", arm, seed, RIGHT["sum" if "right" in case else "outcome"][seed])
        monkeypatch.setattr(page, "draw", lambda report, file: None)
        compare_script(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
        strictly((tmp_path / "out" / "runs.json").read_text())

    def test_errors_are_one_sentence(self, output, tmp_path, monkeypatch):
        for arguments, part in (([tmp_path / "none"], "no finished run"), ([output, "--baseline", "sun"], "'sum'")):
            with pytest.raises(SystemExit) as caught:
                compare_script(monkeypatch, *arguments)
            assert str(caught.value.code).startswith("Error: ") and part in one_sentence(caught.value)
            with pytest.raises(ConfigError):
                compare_script(monkeypatch, *arguments, "--debug")
