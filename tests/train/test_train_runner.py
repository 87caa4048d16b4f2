"""Running an experiment: what is recorded, that nothing is lost or doubled by an interruption, and the command line."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_train_config import TEXT, one_sentence, swapped, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechreward as mr
from mechreward import files
from mechreward.errors import ConfigError, MechRewardError
from mechreward.train import arms, data, evaluation, runner
from mechreward.train.config import read_config

ROOT = Path(__file__).parents[2]
REASONING = mr.load_pack("pocket/reasoning_pack")


# -- the folder --------------------------------------------------------------------------------------------------------


class TestClaim:
    def test_the_same_run_may_go_on(self, tmp_path):
        folder, decides = tmp_path / "sum" / "seed-0", tiny(tmp_path).run("sum", 0)
        runner.claim(folder, decides)
        runner.claim(folder, decides)
        assert yaml.safe_load((folder / "config.yaml").read_text()) == decides

    @pytest.mark.parametrize(
        ("change", "key", "old", "new"),
        [
            ({"training": {"learning_rate": 2e-5}}, "training.learning_rate", "0.001", "2e-05"),
            ({"training": {"lora_rank": 8}}, "training.lora_rank", "None", "8"),
            ({"discovery": {"seed": 3}}, "discovery.seed", "0", "3"),
            ({"arms": {"sum": {"outcome": 1.0}}}, "arm.features", "weight", "None"),
            ({"model": "another"}, "model", "'mechreward/pocket'", "'another'"),
            ({"watch": []}, "watch", "['pocket/reasoning_pack']", "[]"),
        ],
    )
    def test_another_run_is_refused_with_what_differs(self, tmp_path, change, key, old, new):
        runner.claim(tmp_path / "run", tiny(tmp_path).run("sum", 0))
        with pytest.raises(ConfigError) as caught:
            runner.claim(tmp_path / "run", tiny(tmp_path, **change).run("sum", 0))
        said = one_sentence(caught.value)
        before, after = said.split(" there and ")
        assert f"configuration: {key} is " in before and old in before and new in after
        assert str(tmp_path / "run") in said

    @settings(max_examples=40, deadline=None)
    @given(st.floats(1e-12, 1e12), st.floats(-1e9, 1e9), st.text(max_size=20))
    def test_whatever_the_values_a_run_knows_itself_again(self, tmp_path_factory, rate, weight, prompt):
        config = tiny(
            "out",
            training={"learning_rate": rate},
            data={"test": [{"path": "a.jsonl", "prompt": prompt.replace("{", "").replace("}", "") + "{x}"}]},
            arms={"sum": {"features": {"pack": "p", "weight": weight}}},
        )
        folder = tmp_path_factory.mktemp("claim")
        for _ in range(2):
            runner.claim(folder, config.run("sum", 0))

    @pytest.mark.parametrize(("there", "here"), [({}, {"b": 2}), ({}, {"b": None}), ({"b": None}, {})], ids=str)
    def test_a_key_that_only_one_of_them_has(self, tmp_path, there, here):
        """As after an update that brings another option."""
        runner.claim(tmp_path / "run", {"a": 1} | there)
        with pytest.raises(ConfigError, match="another configuration: b is"):
            runner.claim(tmp_path / "run", {"a": 1} | here)

    def test_foreign_files_are_left_alone(self, tmp_path):
        (tmp_path / "thesis.doc").write_text("mine")
        with pytest.raises(ConfigError, match=r"holds files but no config\.yaml") as caught:
            runner.claim(tmp_path, {"seed": 0})
        one_sentence(caught.value)
        assert [f.name for f in tmp_path.iterdir()] == ["thesis.doc"]

    def test_an_empty_folder_may_be_used(self, tmp_path):
        runner.claim(tmp_path, {"seed": 0})
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 0}


class TestCheckpoints:
    def test_a_half_written_one_is_removed(self, tmp_path):
        for step, whole in ((8, True), (10, True), (12, False)):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"x")
            if whole:
                (folder / "mechreward.json").write_text("[]")
        assert runner._last_checkpoint(tmp_path, 100) == tmp_path / "checkpoint-10"  # 10 is later than 8, not before it
        assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"]

    def test_without_any(self, tmp_path):
        assert runner._last_checkpoint(tmp_path, 100) is None


class TestRecords:
    def test_a_last_line_that_was_cut_off_is_left_out(self, tmp_path):
        file, records = tmp_path / "a.jsonl", [{"step": 1, "completion": "two\nlines   here"}, {"step": 2}]
        whole = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        file.write_text(whole, encoding="utf-8")
        assert files.read_jsonl(file) == records
        for cut in ('{"st', '{"step": 3', "{", "nul"):
            file.write_text(whole + cut, encoding="utf-8")
            assert files.read_jsonl(file) == records
        file.write_text("")
        assert files.read_jsonl(file) == []

    def test_what_came_after_the_checkpoint_is_forgotten(self, tmp_path):
        rows = [{"step": step, "k": k} for step in (0, 1, 2, 2, 3, 4) for k in range(2)]
        for name in ("metrics.jsonl", "samples.jsonl"):
            (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5, ')
        runner.forget(tmp_path, 2)
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert files.read_jsonl(tmp_path / name) == [r for r in rows if r["step"] <= 2]
        assert len(list(tmp_path.iterdir())) == 2
        runner.forget(tmp_path, -1)  # no checkpoint: the start is evaluated again, too
        assert files.read_jsonl(tmp_path / "samples.jsonl") == []


# -- evaluation --------------------------------------------------------------------------------------------------------


class TestTestQuestions:
    def test_every_seed_draws_its_own(self, tmp_path):
        config = tiny(tmp_path)
        everything = mr.pocket.dataset("test", 40).to_list()
        drawn = [evaluation.test_questions(config, seed).to_list() for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        for rows in drawn:
            numbers = [row["number"] for row in rows]
            assert len(set(numbers)) == 6 and numbers == sorted(numbers)
            for row in rows:
                assert all(row[k] == everything[row["number"]][k] for k in ("prompt", "answer", "solution"))

    def test_no_more_than_there_are(self, tmp_path):
        for questions in (None, 40, 1000):
            rows = evaluation.test_questions(tiny(tmp_path, evaluation={"questions": questions}), 3)
            assert rows["number"] == list(range(40))


@pytest.fixture(scope="module")
def pocket():
    model = AutoModelForCausalLM.from_pretrained(mr.pocket.path()).eval()
    return model, AutoTokenizer.from_pretrained(mr.pocket.path())


@pytest.fixture(scope="module")
def evaluated(pocket, tmp_path_factory):
    """Two evaluations with one seed, of a model in training mode, and the rollouts behind them."""
    config = tiny(tmp_path_factory.mktemp("evaluated"), evaluation={"questions": 12, "batch_size": 8})
    test, watched, batches = evaluation.test_questions(config, 0), arms.watched(config), []
    sample = evaluation.sample

    def remember(*args, **options):
        batches.append(sample(*args, **options))
        return batches[-1]

    model, tokenizer = pocket
    torch.manual_seed(99)
    before = torch.get_rng_state()
    model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sample", remember)
        results = [evaluation.evaluate(model, tokenizer, test, config, watched, seed=5)]
        kept = torch.equal(torch.get_rng_state(), before) and model.training
        torch.manual_seed(1)  # training has gone on
        model.eval()
        results.append(evaluation.evaluate(model, tokenizer, test, config, watched, seed=5))
        kept = kept and not model.training
    return SimpleNamespace(config=config, test=test, results=results, batch=batches[0], kept=kept)


@torch.no_grad()
def reading_by_hand(model, prompt_ids, completion_ids) -> float:
    """The pack's reading: HF's own hidden states, and the JumpReLU SAE's formula in float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[3][0].double().numpy()
    folder = mr.pocket.files() / "saes" / "jumprelu"
    sae = {name: value.astype(np.float64) for name, value in load_file(folder / "sae_weights.safetensors").items()}
    shift = sae["b_dec"] if json.loads((folder / "cfg.json").read_text())["apply_b_dec_to_input"] else 0
    z = (hidden[len(prompt_ids) : -1][-32:] - shift) @ sae["W_enc"] + sae["b_enc"]
    latents = np.where(z > sae["threshold"], np.maximum(z, 0), 0).mean(axis=0)
    return sum(f.weight * latents[f.id] for f in REASONING.features)


class TestEvaluate:
    def test_it_leaves_training_as_it_was_and_repeats_itself(self, evaluated):
        assert evaluated.kept
        assert evaluated.results[0] == evaluated.results[1]

    def test_verdicts_by_hand(self, evaluated):
        rows, figures = evaluated.results[0]
        final = [row["completion"].rsplit("####", 1)[1].strip() if "####" in row["completion"] else "" for row in rows]
        right = [f == a for f, a in zip(final, evaluated.test["answer"], strict=True)]
        assert [row["right"] for row in rows] == right and 0 < sum(right) < 12
        assert figures["accuracy"] == sum(right) / 12
        assert [row["question"] for row in rows] == list(evaluated.test["number"])

    def test_tokens_and_ends_by_hand(self, evaluated, pocket):
        rows, figures = evaluated.results[0]
        end = pocket[1].eos_token_id
        for row, ids in zip(rows, evaluated.batch.completion_ids, strict=True):
            assert row["tokens"] == len(ids) <= 48 and row["ended"] == (end in ids) and end not in ids[:-1]
            assert row["completion"] == pocket[1].decode(ids, skip_special_tokens=True)
        assert figures["tokens"] == np.mean([len(ids) for ids in evaluated.batch.completion_ids])
        assert figures["truncated"] == pytest.approx(np.mean([end not in i for i in evaluated.batch.completion_ids]))

    def test_steps_by_hand(self, evaluated):
        rows, figures = evaluated.results[0]
        for row, solution in zip(rows, evaluated.test["solution"], strict=True):
            wanted = solution.split("\n")[0].rstrip(".").split(". ")
            written = row["completion"].split("\n")[0].rstrip(".").split(". ")
            made = sum(step.strip() in {w.strip() for w in written} for step in wanted) / len(wanted)
            assert row["right_steps"] == pytest.approx(made)
        assert figures["right_steps"] == pytest.approx(np.mean([row["right_steps"] for row in rows]))

    def test_watched_readings_by_hand(self, evaluated, pocket):
        rows, figures = evaluated.results[0]
        for row, prompt, ids in zip(rows[:8], evaluated.batch.prompt_ids, evaluated.batch.completion_ids, strict=False):
            assert row["reasoning_pack"] == pytest.approx(reading_by_hand(pocket[0], prompt, ids), rel=1e-3, abs=1e-3)
        assert figures["reasoning_pack"] == pytest.approx(np.mean([row["reasoning_pack"] for row in rows]))

    def test_another_seed_gives_other_completions_and_greedy_none(self, evaluated, pocket):
        few = evaluated.test.select(range(6))
        options = (*pocket, few, evaluated.config, [])
        texts = [
            [row["completion"] for row in evaluation.evaluate(*options, seed=seed, do_sample=sampled)[0]]
            for seed, sampled in ((6, True), (7, True), (6, False), (7, False))
        ]
        assert texts[0] != texts[1] and texts[2] == texts[3] != texts[0]
        ids = pocket[1](few["prompt"][0], return_tensors="pt").input_ids
        with torch.no_grad():  # greedy by hand
            for _ in range(8):
                ids = torch.cat([ids, pocket[0](input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert texts[2][0].startswith(pocket[1].decode(ids[0, -8:], skip_special_tokens=True))

    def test_questions_without_steps(self, pocket, tmp_path):
        file = tmp_path / "own.jsonl"
        file.write_text('{"question": "Ann has 3 apples. She gets 4 more. How many?", "answer": "#### 7"}\n')
        config = tiny(
            tmp_path,
            data={
                "test": [
                    {"path": "mechreward/pocket", "split": "test", "rows": 1},
                    {"path": str(file), "prompt": "{question}"},
                ]
            },
        )
        rows, figures = evaluation.evaluate(*pocket, evaluation.test_questions(config, 0), config, [], seed=0)
        assert ["right_steps" in row for row in rows] == [True, False]
        assert figures["right_steps"] == rows[0]["right_steps"]


# -- runs --------------------------------------------------------------------------------------------------------------

FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "trace.jsonl")


def recorded(folder) -> dict:
    """What a run wrote, without what depends on the clock."""
    kept = {}
    for name in FILES:
        kept[name] = [
            {k: v for k, v in record.items() if "seconds" not in k and k not in ("step_time", "peak_memory_bytes")}
            for record in map(json.loads, (folder / name).read_text().splitlines())
        ]
    return kept | {"summary": json.loads((folder / "summary.json").read_text())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of HERO, whose running mean a checkpoint must carry along."""
    config = tiny(tmp_path_factory.mktemp("finished"))
    said = []
    return config, runner.run(config, "hero", 0, said.append), said


class TestRun:
    def test_it_leaves_what_it_promises(self, finished):
        config, folder, said = finished
        assert folder == Path(config.output) / "hero" / "seed-0"
        assert {"config.yaml", "environment.json", "model", "summary.json", *FILES} <= {
            f.name for f in folder.iterdir()
        }
        assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("*.part"))
        assert yaml.safe_load((folder / "config.yaml").read_text()) == config.run("hero", 0)
        got = recorded(folder)
        assert [r["step"] for r in got["metrics.jsonl"]] == [1, 2, 3, 4]
        assert [r["step"] for r in got["evaluations.jsonl"]] == [0, 2, 4]
        assert [r["step"] for r in got["samples.jsonl"]] == [0] * 6 + [2] * 6 + [4] * 6
        for name in (
            "kl",
            "composite/math_boxed",
            "composite/features/raw",
            "monitor/reasoning_pack",
            "guards/flagged",
        ):
            assert all(name in r for r in got["metrics.jsonl"])
        assert len(said) == 3 and all("hero, seed 0, step" in line and "right" in line for line in said)

    def test_evaluations_are_the_means_of_the_samples(self, finished):
        got = recorded(finished[1])
        numbers = [row["number"] for row in evaluation.test_questions(finished[0], 0)]
        for record in got["evaluations.jsonl"]:
            rows = [r for r in got["samples.jsonl"] if r["step"] == record["step"]]
            assert [r["question"] for r in rows] == numbers  # the same at every step
            assert record["accuracy"] == np.mean([r["right"] for r in rows])
            assert record["reasoning_pack"] == pytest.approx(np.mean([r["reasoning_pack"] for r in rows]))
        assert got["summary"] == {"steps": 4} | {k: v for k, v in got["evaluations.jsonl"][-1].items() if k != "step"}
        assert ["greedy_accuracy" in r for r in got["evaluations.jsonl"]] == [False, False, True]

    def test_the_start_is_the_untrained_model_and_the_end_the_saved_one(self, finished, pocket):
        config, folder, _ = finished
        trained = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        test, got = evaluation.test_questions(config, 0), recorded(folder)
        for step, model in ((0, pocket[0]), (4, trained)):
            rows, _ = evaluation.evaluate(model, pocket[1], test, config, arms.watched(config), seed=0)
            there = [r for r in got["samples.jsonl"] if r["step"] == step]
            assert [r["completion"] for r in rows] == [r["completion"] for r in there]
        assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, pocket[0].model.layers[0].mlp.up_proj.weight)

    def test_a_finished_run_is_left_as_it_is(self, finished):
        config, folder, _ = finished
        before, said = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}, []
        assert runner.run(config, "hero", 0, said.append) == folder
        assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
        assert len(said) == 1 and "finished before" in said[0]

    def test_the_environment_names_versions_and_nobody(self, finished):
        text = (finished[1] / "environment.json").read_text()
        environment = json.loads(text)
        assert environment["packages"]["torch"] == torch.__version__ and {"trl", "transformers"} <= set(
            environment["packages"]
        )
        node = os.uname().nodename
        assert node not in text and str(Path.home()) not in text

    def test_several_processes_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="Experiments run in one process") as caught:
            runner.run(tiny(tmp_path / "out"), "outcome", 0)
        one_sentence(caught.value)
        assert not (tmp_path / "out").exists()


class Stop:
    """Interrupts a run at a certain place, once."""

    def __init__(self, monkeypatch, where):
        self.where, self.done = where, False
        step_end, write = runner.Recorder.on_step_end, runner.write_json

        def on_step_end(recorder, args, state, control, **kwargs):
            if where == "during step 3" and state.global_step == 3:
                self.stop()
            return step_end(recorder, args, state, control, **kwargs)

        def write_json(file, content):
            if where == "before the summary" and file.name == "summary.json":
                self.stop()
            write(file, content)

        monkeypatch.setattr(runner.Recorder, "on_step_end", on_step_end)
        monkeypatch.setattr(runner, "write_json", write_json)

    def log(self, line):
        if self.where == "at the evaluation of step 2" and "step   2" in line:
            self.stop()

    def stop(self):
        if not self.done:
            self.done = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["at the evaluation of step 2", "during step 3", "before the summary"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, finished, where):
    config, whole, _ = finished
    config = config.model_copy(update={"output": str(tmp_path)})
    stop = Stop(monkeypatch, where)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, "hero", 0, stop.log)
    folder = tmp_path / "hero" / "seed-0"
    reached = sorted(c.name for c in folder.glob("checkpoint-*"))
    assert stop.done and not (folder / "summary.json").exists()
    # The evaluation of a step comes before its checkpoint.
    assert reached == {"at the evaluation of step 2": [], "during step 3": ["checkpoint-2"]}.get(where, reached)
    if where == "during step 3":  # what a kill in the middle of writing leaves behind
        with (folder / "samples.jsonl").open("a") as file:
            file.write('{"step": 4, "question": 1, "comple')
        (folder / "checkpoint-4").mkdir()
        (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    (folder / "environment.json").write_text('{"commit": "first"}')
    runner.run(config, "hero", 0, lambda line: None)
    assert recorded(folder) == recorded(whole)
    # What goes on from a checkpoint keeps the commit and date at which it began.
    assert (json.loads((folder / "environment.json").read_text())["commit"] == "first") is bool(reached)
    end, want = (load_file(f / "model" / "model.safetensors") for f in (folder, whole))
    for name in want:
        np.testing.assert_array_equal(end[name], want[name])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_killed_process_goes_on_when_it_is_started_again(tmp_path):
    """SIGKILL in the middle, through the script: the end is that of a process that was left alone."""
    folders = {}
    for name in ("alone", "killed"):
        content = tiny(tmp_path / name, training={"max_steps": 6}).model_dump(mode="json")
        content["arms"] = {"sum": content["arms"]["sum"]}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        script = ROOT / "experiments" / "03_hybrid_outcome_plus_mech.py"
        command = [sys.executable, str(script), "--config", str(file), "--seed", "1"]
        folders[name] = tmp_path / name / "sum" / "seed-1"
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        if name == "killed":
            process = subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            metrics = folders[name] / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL and not (folders[name] / "summary.json").exists()
        subprocess.run(command, env=surroundings, check=True, capture_output=True)
    assert recorded(folders["killed"]) == recorded(folders["alone"])
    assert not list(folders["killed"].glob("checkpoint-*"))


# -- the command line --------------------------------------------------------------------------------------------------

SCRIPTS = {
    "01_baseline_outcome_only.py": "baseline.yaml",
    "02_mechreward_only.py": "mechreward_only.yaml",
    "03_hybrid_outcome_plus_mech.py": "hybrid.yaml",
}


@pytest.fixture
def script(monkeypatch):
    """Runs one of the scripts in this process."""
    logger, verbosity = logging.getLogger("mechreward"), transformers.utils.logging.get_verbosity()
    level = logger.level

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")

    yield call
    logger.setLevel(level)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def runs(monkeypatch):
    """The runs that would have been made."""
    made = []
    monkeypatch.setattr(runner, "run", lambda config, arm, seed, **_: made.append((arm, seed)))
    return made


def error_of(caught) -> str:
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("Error: ")
    return one_sentence(caught.value)


class TestScripts:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_each_takes_its_own_configuration_and_no_other(self, script, runs, name, capsys):
        for other in SCRIPTS.values():
            file = ROOT / "configs" / other
            if other == SCRIPTS[name]:
                script(name, "--config", file)
                continue
            before = len(runs)
            with pytest.raises(SystemExit) as caught:
                script(name, "--config", file)
            assert error_of(caught).startswith(f"Error: {file}: arm '") and len(runs) == before
        config = read_config(ROOT / "configs" / SCRIPTS[name])
        assert runs == [(arm, seed) for seed in range(5) for arm in config.arms]  # all arms of a seed first
        assert "python experiments/compare.py runs/pocket" in capsys.readouterr().out

    def test_only_some_arms_and_seeds(self, script, runs):
        file = ROOT / "configs" / "hybrid.yaml"
        script("03_hybrid_outcome_plus_mech.py", "--config", file, "--arm", "hero", "--arm", "sum", "--seed", "3")
        assert runs == [("hero", 3), ("sum", 3)]

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--arm", "herro"], "There is no arm 'herro'; there are sum, hero, per_token, random, direction, "
             "shuffled, reference. Did you mean 'hero'?"),
            (["--seed", "5"], "no seed 5: it has 0, 1, 2, 3, 4"),
        ],
    )  # fmt: skip
    def test_unknown_arms_and_seeds(self, script, runs, arguments, part):
        with pytest.raises(SystemExit) as caught:
            script("03_hybrid_outcome_plus_mech.py", "--config", ROOT / "configs" / "hybrid.yaml", *arguments)
        assert part in error_of(caught) and runs == []

    def test_an_error_is_a_sentence_or_the_exception_itself(self, script, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text(swapped("learning_rate", "lerning_rate", TEXT))
        with pytest.raises(SystemExit) as caught:
            script("01_baseline_outcome_only.py", "--config", file)
        assert "Did you mean 'learning_rate'?" in error_of(caught) and caught.value.__cause__ is None
        with pytest.raises(ConfigError, match="lerning_rate"):
            script("01_baseline_outcome_only.py", "--config", file, "--debug")
        with pytest.raises(SystemExit) as caught:
            script("01_baseline_outcome_only.py", "--config", tmp_path / "none.yaml")
        assert "cannot be read" in error_of(caught)

    def test_an_interruption_says_how_to_go_on(self, script, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "run", interrupted)
        with pytest.raises(SystemExit, match="The same command goes on"):
            script("01_baseline_outcome_only.py", "--config", ROOT / "configs" / "baseline.yaml")

    @pytest.mark.parametrize("jobs", ["0", "-1"])
    def test_an_impossible_number_of_jobs(self, script, runs, jobs, capsys):
        with pytest.raises(SystemExit) as caught:
            script("01_baseline_outcome_only.py", "--config", ROOT / "configs" / "baseline.yaml", "--jobs", jobs)
        assert caught.value.code == 2 or error_of(caught)

    def test_several_at_a_time(self, script, runs, monkeypatch):
        commands = []

        def one(command, env):
            commands.append(command)
            assert int(env["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
            return SimpleNamespace(returncode=int("sum" in command))

        monkeypatch.setattr(runner.subprocess, "run", one)
        file = ROOT / "configs" / "hybrid.yaml"
        arguments = ["--config", file, "--arm", "sum", "--arm", "hero", "--seed", "0", "--seed", "4", "--jobs", "2"]
        with pytest.raises(SystemExit) as caught:
            script("03_hybrid_outcome_plus_mech.py", *arguments)
        assert "2 of 4 runs failed (sum seed 0, sum seed 4)" in error_of(caught) and runs == []
        ends = sorted(tuple(command[2:]) for command in commands)
        assert ends == sorted(
            ("--config", str(file), "--arm", arm, "--seed", seed) for arm in ("sum", "hero") for seed in ("0", "4")
        )
        with pytest.raises(MechRewardError):
            script("03_hybrid_outcome_plus_mech.py", *arguments, "--debug")


class TestChosenRuns:
    def test_all_arms_of_a_seed_come_before_the_next_seed(self):
        arms = ("outcome", "sum", "hero")
        assert runner.chosen_runs(arms, [0, 1], None, None) == [(a, s) for s in (0, 1) for a in arms]
        assert runner.chosen_runs(arms, [0, 1], ["hero"], None) == [("hero", 0), ("hero", 1)]
        assert runner.chosen_runs(arms, [0, 1], None, [1]) == [(a, 1) for a in arms]

    def test_what_is_named_twice_is_run_once(self):
        # With --jobs two processes would write into one folder.
        assert runner.chosen_runs(["outcome", "sum"], [0, 1], ["sum", "sum"], [1, 1]) == [("sum", 1)]


def test_a_source_that_cannot_be_loaded_says_so_before_training(tmp_path):
    config = tiny(tmp_path, data={"train": [{"path": f"{tmp_path}/none.jsonl"}]})
    with pytest.raises(ConfigError, match="There is no file"):
        runner.run(config, "outcome", 0)
    with pytest.raises(ConfigError, match="There is no file"):
        data.load(config.data.train)


class TestData:
    def test_fewer_questions_than_a_step_needs(self):
        config = read_config(ROOT / "configs/baseline.yaml")
        few, test = mr.pocket.dataset("train", 11), mr.pocket.dataset("test", 5)
        with pytest.raises(ConfigError, match="11 questions, fewer than one step's prompts_per_step = 12"):
            runner.check_data(config, few, test)
        runner.check_data(config, mr.pocket.dataset("train", 12), test)

    def test_testing_on_what_was_trained_on(self):
        config = read_config(ROOT / "configs/baseline.yaml")
        train = mr.pocket.dataset("train", 20)
        with pytest.raises(ConfigError, match=r"3 of the questions in data\.test are in data\.train"):
            runner.check_data(config, train, train.select([1, 5, 7]))
