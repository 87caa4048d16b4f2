"""An experiment's configuration and its questions: what is read, and one sentence with a line about what is wrong."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mechreward as mr
from mechreward.errors import ConfigError
from mechreward.train import data
from mechreward.train.config import ExperimentConfig, QuestionSource, read_config

ROOT = Path(__file__).parents[2]
ONE_TO_THREE = ("baseline", "mechreward_only", "hybrid")  # other experiments' configurations have tests of their own
SHIPPED = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.stem in ONE_TO_THREE)
MODELS = {"pocket": "*.yaml", "gemma-2-2b": "gemma-2-2b/*.yaml", "gemma-2-9b": "gemma-2-9b/*.yaml"}

TEXT = """\
# An experiment as small as it gets.
output: runs/tiny
model: mechreward/pocket
watch: [pocket/reasoning_pack]

data:
  train: [{path: mechreward/pocket, split: train, rows: 40}]
  discovery: [{path: mechreward/pocket, split: discovery, rows: 6}]
  test:
    - path: mechreward/pocket
      split: test
      rows: 40

training:
  max_steps: 4
  prompts_per_step: 2
  num_generations: 2
  learning_rate: 1e-4

arms:
  outcome: {outcome: 1.0}
  sum: {outcome: 1.0, features: {pack: pocket/reasoning_pack, weight: 0.3}}

seeds: [0, 1]
"""

TINY = {
    "model": "mechreward/pocket",
    "watch": ["pocket/reasoning_pack"],
    "data": {s: [{"path": "mechreward/pocket", "split": s, "rows": 40}] for s in ("train", "discovery", "test")},
    "discovery": {"rollouts": 2},
    # A learning rate at which four steps leave a policy that is another one.
    "training": {
        "max_steps": 4, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 48, "learning_rate": 1e-3
    },
    "evaluation": {"every": 2, "questions": 6},
    "arms": {
        "outcome": {"outcome": 1.0},
        "sum": {"outcome": 1.0, "features": {"pack": "pocket/reasoning_pack", "weight": 0.3}},
        "hero": {
            "outcome": 1.0, "features": {"pack": "pocket/reasoning_pack"}, "mode": "hero", "scale_rewards": "none"
        },
    },
    "seeds": [0, 1],
}  # fmt: skip


def tiny(output, **changes) -> ExperimentConfig:
    """A small experiment on pocket; a part that is given replaces only what it names."""
    changed = {k: {**TINY[k], **v} if isinstance(TINY.get(k), dict) else v for k, v in changes.items()}
    return ExperimentConfig.model_validate({"output": str(output), **TINY, **changed})


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 600 and text[-1] in ".?", text
    return text


def read(folder, text: str) -> ExperimentConfig:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return read_config(file)


def refused(folder, text: str) -> str:
    """What is said of a configuration, which names its file."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    said = one_sentence(caught.value)
    assert said.startswith(str(folder / "config.yaml"))
    return said


def line_of(text: str, what: str) -> int:
    """The line of what occurs once."""
    assert text.count(what) == 1, what
    return text[: text.index(what)].count("\n") + 1


def swapped(old: str, new: str, text: str = TEXT) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_configurations_load(file):
    config = read_config(file)
    assert isinstance(config.training.learning_rate, float) and len(config.seeds) == 5
    for arm in config.arms.values():
        assert arm.features is None or mr.load_pack(arm.features.pack).model == config.model
    # The dataset's own brace survives the template.
    for source in config.data.train:
        prompt = source.prompt.format(**dict.fromkeys(source.columns, "Q"))
        assert "Q" in prompt and ("pocket" in config.model or prompt.count("\\boxed{}") == 1)


@pytest.mark.parametrize("model", MODELS)
def test_configurations_of_one_model_can_be_compared(model):
    configs = [read_config(file) for file in sorted((ROOT / "configs").glob(MODELS[model])) if file in SHIPPED]
    assert len(configs) == 3
    assert configs[0].budget() == configs[1].budget() == configs[2].budget()
    assert len({(c.output, c.discovery) for c in configs}) == 1 and len({tuple(c.seeds) for c in configs}) == 1
    names = [arm for c in configs for arm in c.arms]  # they share a folder
    assert len(set(names)) == len(names) == 12


def test_the_budget_is_everything_but_arms_seeds_and_names():
    config = tiny("here")
    assert config.budget() == tiny("there", seeds=[7], arms={"outcome": {"outcome": 2.0}}).budget()
    for part in (
        {"training": {"max_steps": 5}},
        {"evaluation": {"every": 1}},
        {"verifier": "gsm8k"},
        {"watch": []},
        {"model": "another"},
        {"data": {"test": [{"path": "a.jsonl"}]}},
    ):
        assert tiny("here", **part).budget() != config.budget()
    ran = config.run("sum", 1)
    assert ran["arm"]["features"]["weight"] == 0.3 and ran["seed"] == 1 and ran["discovery"]["rollouts"] == 2
    assert yaml.safe_load(yaml.safe_dump(ran)) == ran


# -- mistyped keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "typo", "where"),
    [
        ("model:", "modle:", "modle"),
        ("learning_rate", "lerning_rate", "training.lerning_rate"),
        ("weight: 0.3", "wieght: 0.3", "arms.sum.features.wieght"),
        ("split: test", "splt: test", "data.test[0].splt"),
        ("split: discovery", "spilt: discovery", "data.discovery[0].spilt"),
    ],
)
def test_a_mistyped_key_is_named_with_its_line_and_the_nearest(tmp_path, key, typo, where):
    text = swapped(key, typo)
    right = key.split(":")[0]
    assert refused(tmp_path, text) == (
        f"{tmp_path / 'config.yaml'}, line {line_of(text, typo)}: unknown key '{where}'. Did you mean '{right}'? "
        "Rename or remove it."
    )


def known_keys(file):
    """Every key of a file that the schema knows, with its place in the text. (Arms are named by the user.)"""
    found = []

    def visit(node, inside):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if inside != ["arms"]:
                    found.append((file, key.start_mark.index, key.value))
                visit(value, [*inside, key.value])
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item, [*inside, "-"])

    visit(yaml.compose(file.read_text(encoding="utf-8")), [])
    return found


KEYS = {file: known_keys(file) for file in SHIPPED}
any_key = st.sampled_from(SHIPPED).flatmap(lambda file: st.sampled_from(KEYS[file]))


@settings(max_examples=150, deadline=None)
@given(any_key, st.sampled_from(["delete", "double", "swap"]), st.integers(0, 30))
def test_any_slip_of_one_letter_is_found_where_it_is(tmp_path_factory, key, slip, at):
    file, index, name = key
    at %= len(name) - (slip == "swap")
    a, b, c = name[:at], name[at], name[at + 1 :]
    typo = {"delete": a + c, "double": a + b + b + c, "swap": a + c[:1] + b + c[1:]}[slip]
    assume(typo != name)
    text = file.read_text(encoding="utf-8")
    text = text[:index] + typo + text[index + len(name) :]
    said = refused(tmp_path_factory.getbasetemp(), text)
    assert f", line {text[:index].count(chr(10)) + 1}: unknown key '" in said
    assert re.search(rf"[.'\]]?{typo}'\. Did you mean '{name}'\?", said), said


def test_a_slip_in_an_arm_that_is_called_like_a_key_gets_the_arms_keys(tmp_path):
    text = swapped("  sum: {outcome: 1.0, features: {", "  features: {outcoem: 1.0, features: {")
    assert "unknown key 'arms.features.outcoem'. Did you mean 'outcome'?" in refused(tmp_path, text)


# -- everything else that can be wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "key", "parts"),
    [
        ("max_steps: 4", "max_steps: four", "training.max_steps", ["'four'", "integer"]),
        ("max_steps: 4", "max_steps: 0", "training.max_steps", ["is 0", "greater than 0"]),
        ("max_steps: 4", "max_steps: 4.0", "training.max_steps", ["4.0", "integer"]),
        ("num_generations: 2", "num_generations: 1", "training.num_generations", ["greater than 1"]),
        ("learning_rate: 1e-4", "learning_rate: '1e-4'", "training.learning_rate", ["'1e-4'", "number"]),
        ("learning_rate: 1e-4", "learning_rate: .nan", "training.learning_rate", ["finite"]),
        ("learning_rate: 1e-4", "learning_rate: -1e-4", "training.learning_rate", ["greater than 0"]),
        ("outcome: {outcome: 1.0}", "outcome: {outcome: yes}", "arms.outcome.outcome", ["True", "number"]),
        ("weight: 0.3", "weight: 0.3, control: ranodm", "arms.sum.features.control", ["'ranodm'", "'random'"]),
        ("weight: 0.3", "weight: 0.3, reads: polcy", "arms.sum.features.reads", ["'polcy'", "'policy'"]),
        ("weight: 0.3", "weight: 0.3, aggregation: men", "arms.sum.features.aggregation", ["'men'", "'mean'"]),
        ("weight: 0.3}", "weight: 0.3}, mode: heros", "arms.sum.mode", ["'heros'", "'hero'"]),
        ("{pack: pocket/reasoning_pack, weight: 0.3}", "0.3", "arms.sum.features", ["0.3", "object of named keys"]),
        ("  outcome: {outcome: 1.0}", "  outcome: {}", "arms.outcome", ["rewards nothing"]),
        ("  outcome: {outcome: 1.0}", "  outcome: {outcome: 1.0, mode: hero}", "arms.outcome", ["hero", "give both"]),
        ("{outcome: 1.0, features", "{mode: gated, features", "arms.sum", ["gated", "give both"]),
        ("  sum:", "  a/b:", "arms", ["'a/b'", "folder"]),
        ("  sum:", "  '..':", "arms", ["'..'", "folder"]),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", "seeds", ["twice"]),
        ("seeds: [0, 1]", "seeds: []", "seeds", ["at least 1"]),
        ("seeds: [0, 1]", "seeds: 3", "seeds", ["3", "list"]),
        ("split: train, rows: 40", "split: train, rows: 0", "data.train[0].rows", ["greater than 0"]),
        ("      rows: 40", "      prompt: no columns", "data.test[0].prompt", ["at least one column"]),
        ("      rows: 40", "      prompt: '{question'", "data.test[0].prompt", ["not a template", "{{ for a brace"]),
        ("      rows: 40", "      prompt: 'box{} {question}'", "data.test[0].prompt", ["{question}"]),
        ("      rows: 40", "      prompt: '{0}'", "data.test[0].prompt", ["at least one column"]),
        ("      rows: 40", "      rows: 40\n      rows: 41", "data.test[0].rows", ["given twice"]),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, old, new, key, parts):
    text = swapped(old, new)
    said = refused(tmp_path, text)
    # The line on which what was written begins; a key that is given twice is shown where it is repeated.
    line = text[: text.index(new)].count("\n") + 1 + ("given twice" in said)
    if key == "arms":  # what is wrong is a name among them
        line = line_of(text, "arms:")
    assert f", line {line}: " in said and f"key '{key}' " in said, said
    for part in parts:
        assert part in said, said


def test_a_missing_key_is_named_with_the_line_of_what_lacks_it(tmp_path):
    text = swapped("  max_steps: 4\n", "")
    said = refused(tmp_path, text)
    assert f"line {line_of(text, 'training:')}: key 'training.max_steps' is missing" in said
    assert "key 'seeds' is missing" in refused(tmp_path, swapped("seeds: [0, 1]\n", ""))
    text = swapped("path: mechreward/pocket, split: train, ", "")
    assert f"line {line_of(text, '  train:')}: key 'data.train[0].path' is missing" in refused(tmp_path, text)


def test_a_step_must_divide_into_equal_parts(tmp_path):
    text = swapped("max_steps: 4", "max_steps: 4\n  gradient_accumulation_steps: 3")
    said = refused(tmp_path, text)
    assert f"line {line_of(text, 'training:')}: key 'training' has prompts_per_step x num_generations = 4" in said
    read(tmp_path, swapped("max_steps: 4", "max_steps: 4\n  gradient_accumulation_steps: 4"))


def test_a_key_given_twice_at_the_top(tmp_path):
    said = refused(tmp_path, TEXT + "model: another\n")
    assert f"line {TEXT.count(chr(10)) + 1}: key 'model' is given twice (first in line 3)" in said
    # Elsewhere the same name is another key.
    assert "given twice" not in str(read(tmp_path, TEXT))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds no keys"),
        ("# nothing\n", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("just words", "holds no keys"),
        ("output: a: b\n", "not valid YAML: line 1,"),
        ("output: a\nmodel: [a, b\nseeds: 1\n", "not valid YAML: line 3,"),
        ("output: a\n\tmodel: b\n", "not valid YAML: line 2,"),
        ("output: *nobody\n", "not valid YAML: line 1,"),
        ("output: !!python/name:os.system x\n", "not valid YAML: line 1,"),
        ("output: a\n\x07", "not valid YAML"),
        ("arms: &a {sum: *a}\n", ""),  # a mapping inside itself
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, part):
    assert part in refused(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"output: \xff\xfe\n")
    for file in (tmp_path / "missing.yaml", tmp_path, binary):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            read_config(file)
        assert one_sentence(caught.value).startswith(str(file))


@given(st.floats(1e-300, 1e300))
@settings(max_examples=25, deadline=None)
def test_any_number_as_python_writes_it_is_a_number(tmp_path_factory, rate):
    for written in (repr(rate), f"{rate:.0e}", f"{rate:E}"):
        config = read(tmp_path_factory.getbasetemp(), swapped("1e-4", written))
        assert config.training.learning_rate == float(written)


@pytest.mark.parametrize("word", ["1e", "e5", "1e5x", "1-e4", "a1e5"])
def test_what_is_no_number_stays_text(tmp_path, word):
    assert read(tmp_path, swapped("runs/tiny", word)).output == word


def test_whole_numbers_serve_where_a_fraction_may_stand(tmp_path):
    arm = read(tmp_path, swapped("weight: 0.3", "weight: 2")).arms["sum"]
    assert arm.features.weight == 2.0


# -- questions ---------------------------------------------------------------------------------------------------------

GSM8K = [
    {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "5 apples, 2 eaten. Left?", "answer": "5 - 2 = 3\n#### 3"},
    {"question": "Half of 1,000?", "answer": "#### 500"},
    {"question": "A {brace} in the text?", "answer": "#### 1"},
    {"question": "Twice 6?", "answer": "6 + 6\n#### 12"},
]


@pytest.fixture
def gsm8k(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GSM8K), encoding="utf-8")
    return str(file)


def questions(*sources):
    return data.load([QuestionSource(**source) for source in sources]).to_list()


def refuses(source) -> str:
    with pytest.raises(ConfigError) as caught:
        questions(source)
    return one_sentence(caught.value)


class TestData:
    def test_a_local_file_in_gsm8ks_format(self, gsm8k):
        prompt = "Q: {question}\nAnswer in \\boxed{{}}:"
        assert questions({"path": gsm8k, "prompt": prompt}) == [
            {"prompt": f"Q: {row['question']}\nAnswer in \\boxed{{}}:", "answer": row["answer"]} for row in GSM8K
        ]

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"split": "train[:2]"}, [0, 1]),
            ({"split": "train[3:]"}, [3, 4]),
            ({"split": "train[1:4]", "rows": 2}, [1, 2]),
            ({"rows": 3}, [0, 1, 2]),
            ({"rows": 50}, [0, 1, 2, 3, 4]),
        ],
    )
    def test_parts_of_a_file(self, gsm8k, options, kept):
        rows = questions({"path": gsm8k, "prompt": "{question}", **options})
        assert [row["prompt"] for row in rows] == [GSM8K[k]["question"] for k in kept]

    def test_several_sources_follow_each_other(self, gsm8k):
        rows = questions(
            {"path": "mechreward/pocket", "split": "test", "rows": 2}, {"path": gsm8k, "prompt": "{question}"}
        )
        own = mr.pocket.dataset("test", 2).to_list()
        assert [r["prompt"] for r in rows] == [r["prompt"] for r in own] + [r["question"] for r in GSM8K]
        assert [r["solution"] for r in rows] == [r["solution"] for r in own] + [None] * 5

    def test_several_columns_and_answers_that_are_numbers(self, tmp_path):
        file = tmp_path / "sums.jsonl"
        file.write_text('{"a": 3, "b": 4, "sum": 7}\n{"a": 1, "b": 1, "sum": 2}\n')
        assert questions({"path": str(file), "prompt": "{a}+{b}=", "answer": "sum"}) == [
            {"prompt": "3+4=", "answer": "7"},
            {"prompt": "1+1=", "answer": "2"},
        ]

    def test_a_column_called_prompt_may_be_wrapped(self, tmp_path):
        file = tmp_path / "own.jsonl"
        file.write_text('{"prompt": "1+1=", "answer": 2}\n')
        assert questions({"path": str(file), "prompt": "> {prompt}"}) == [{"prompt": "> 1+1=", "answer": "2"}]

    def test_a_missing_column_is_named_with_the_nearest(self, gsm8k):
        said = refuses({"path": gsm8k, "prompt": "{qestion}"})
        assert said == (
            f"{gsm8k} (train) has no column 'qestion', which is asked for; it has question, answer. Did "
            "you mean 'question'?"
        )
        assert "no column 'gold'" in refuses({"path": gsm8k, "prompt": "{question}", "answer": "gold"})

    def test_a_null_is_not_asked_as_a_word(self, tmp_path):
        file = tmp_path / "own.jsonl"
        file.write_text('{"a": "1+1=", "b": "x", "answer": "2"}\n{"a": "1+2=", "b": null, "answer": "3"}\n')
        said = refuses({"path": str(file), "prompt": "{a} {b}"})
        assert "has a row without 'b', which its prompt names" in said and "1+2=" in said
        assert len(questions({"path": str(file), "prompt": "{a}"})) == 2
        file.write_text('{"prompt": "1+1=", "answer": null}\n{"prompt": "1+2=", "answer": "3"}\n')
        assert "without an answer" in refuses({"path": str(file)})

    def test_what_cannot_be_loaded(self, gsm8k, tmp_path):
        assert f"There is no file {tmp_path}/none.jsonl" in refuses({"path": f"{tmp_path}/none.jsonl"})
        for wrong in ({"split": "test"}, {"split": "train[oops]"}, {"split": "train[5:]"}):
            assert "cannot be loaded" in refuses({"path": gsm8k, "prompt": "{question}", **wrong})
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"question": "a", "answer": \n')
        assert "cannot be loaded" in refuses({"path": str(broken), "prompt": "{question}"})
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        assert str(empty) in refuses({"path": str(empty), "prompt": "{question}"})

    def test_pocket(self):
        rows = questions({"path": "mechreward/pocket", "split": "discovery", "rows": 5})
        assert rows == [
            {k: row[k] for k in ("prompt", "answer", "solution")} for row in mr.pocket.dataset("discovery", 5).to_list()
        ]
        assert "say how many with `rows`" in refuses({"path": "mechreward/pocket"})
        assert "Did you mean 'test'" in refuses({"path": "mechreward/pocket", "split": "tset", "rows": 5})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  beta: 0.04\n", "  beta: 0.04\n  warmup_steps: 2\n", "constant_with_warmup"),
        (", mode: hero, scale_rewards: none", ", mode: hero", "cancels HERO's difficulty weight"),
    ],
)
def test_settings_that_would_silently_do_nothing(tmp_path, old, new, says):
    text = (ROOT / "configs/hybrid.yaml").read_text()
    assert old in text
    file = tmp_path / "config.yaml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        read_config(file)
