"""What the model did not write is context: no verifier, guard, detector, reading or server takes it for its answer."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import mechreward as mr
from mechreward.errors import RewardError
from mechreward.features.interventions import Cues, injected, rewritten, surprise
from mechreward.hacking import RepetitionDetector
from mechreward.hacking.redteam.search import with_suffix
from mechreward.hacking.redteam.templates import attacks
from mechreward.hacking.signs import (
    CueStuffing,
    EmptySteps,
    Filler,
    Inflation,
    Length,
    PromptCopy,
    Repetition,
    Rewarded,
    Template,
)
from mechreward.integrations.protocol import ScoreRequest
from mechreward.integrations.served import Served
from mechreward.integrations.server.scorer import Rollout, Scorer
from mechreward.integrations.trl.trainer import RolloutsInTraining
from mechreward.readout import HookPoint, Readings
from mechreward.rollout.batch import Call, RolloutBatch, own_text, plain_text
from mechreward.rollout.hf import HFSource, load_model
from mechreward.rollout.labelled import Labelled

OTHERS = ("tool", "user", "system", "environment", "function")


def say(role, text):
    return {"role": role, "content": text}


turns = st.tuples(st.sampled_from(["assistant", *OTHERS]), st.sampled_from([r"\boxed{3}", r"\boxed{4}", "", "#### 3"]))


@given(st.lists(turns, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_verdict_is_that_of_the_assistants_messages_alone(conversation):
    whole = [say(role, text) for role, text in conversation]
    own = "\n".join(text for role, text in conversation if role == "assistant")
    verdicts = mr.OutcomeReward(mr.verifiers.gsm8k)
    got = verdicts(["q"] * 2, [whole, own], answer=["3"] * 2)
    assert got[0] == got[1]
    assert plain_text(whole) == "\n".join(text for _, text in conversation)  # a prompt is all that it says


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "image"}, {"type": "text", "text": "How many?"}], "How many?"),
        ([{"type": "image", "text": None}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "image", "text": None}], ""),
        (None, ""),
        ([], ""),
    ],
)
def test_typed_blocks_whose_text_is_missing(content, text):
    assert plain_text([say("user", content)]) == own_text([say("assistant", content)]) == text


# -- token ids and masks -----------------------------------------------------------------------------------------------

EOS = 2


def masked(ids, mask, **options):
    n = len(ids)
    fields = {
        "prompts": ["p"] * n,
        "completions": ["c"] * n,
        "prompt_ids": [[5]] * n,
        "eos_token_ids": frozenset({EOS}),
    }
    return RolloutBatch(**{**fields, **options}, completion_ids=ids, tool_mask=mask)


@given(st.lists(st.lists(st.tuples(st.integers(3, 9), st.integers(0, 1)), max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_lengths_and_written_tokens_follow_the_mask(rows):
    ids, mask = [[t for t, _ in row] for row in rows], [[m for _, m in row] for row in rows]
    batch = masked(ids, mask)
    want = [[t for t, m in row if m] for row in rows]
    assert batch.written == want and batch.lengths == list(map(len, want))
    for row, own in enumerate(mask):
        assert batch.own[row].tolist() == [bool(m) for m in own] + [False] * (batch.own.shape[1] - len(own))
        last = max((t for t, m in enumerate(own) if m), default=None)
        assert batch.last_written()[row].nonzero().flatten().tolist() == ([] if last is None else [last])


def test_a_mask_that_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(RewardError, match="Rollout 1 has 2 completion tokens and a mask of 1"):
        masked([[5, 6], [7, 8]], [[1, 1], [1]])
    with pytest.raises(RewardError, match="1 masks"):
        masked([[5, 6], [7, 8]], [[1, 1]])


def test_text_is_decoded_run_by_run():
    tokenizer = AutoTokenizer.from_pretrained(mr.pocket.path())
    parts = [(" It is 1", 1), (" 2 or \\boxed{3}", 0), (" 4", 1)]
    pieces = [(tokenizer(text, add_special_tokens=False).input_ids, own) for text, own in parts]
    ids = [t for piece, _ in pieces for t in piece] + [tokenizer.eos_token_id]
    mask = [own for piece, own in pieces for _ in piece] + [1]
    (text,) = masked([ids], [mask]).decoded(tokenizer).texts
    assert text.split("\n") == [tokenizer.decode(pieces[0][0]), tokenizer.decode(pieces[2][0])]  # not "It is 14"


# -- guards and detectors ----------------------------------------------------------------------------------------------

PROMPT = "Ana has 12 apples. Ana buys 7 more. How many apples does Ana have?"
TABLE = "| 1 | 1 |\n" * 40 + "Step 1: 2 + 2 = 5. " * 10 + PROMPT * 5 + r" \boxed{19}"


def two_turns(tool_text, tool_ids, own_ids):
    conversation = [say("assistant", "12 + 7 = 19."), say("tool", tool_text), say("assistant", r"So \boxed{19}.")]
    ids = [*own_ids[:6], *tool_ids, *own_ids[6:]]
    mask = [*[1] * 6, *[0] * len(tool_ids), *[1] * len(own_ids[6:])]
    return RolloutBatch(
        [PROMPT] * 4, [conversation] * 4, [[1]] * 4, [ids] * 4, tool_mask=[mask] * 4, columns={"answer": ["19"] * 4}
    )


@pytest.mark.parametrize(
    "kind", [Repetition, Template, Filler, CueStuffing, EmptySteps, PromptCopy, Length, Inflation, RepetitionDetector]
)
def test_what_a_tool_wrote_moves_no_detector(kind):
    reward = mr.FeatureReward(mr.direction("f", torch.ones(4), HookPoint(0)))
    rewarded = Rewarded([reward, mr.OutcomeReward(mr.verifiers.gsm8k)])
    own, found, detector = list(range(20, 40)), [], kind()
    for text, ids in [("ok", [7]), (TABLE, [8, 8, 8, 8] * 30 + own[:5])]:
        batch = two_turns(text, ids, own)
        mask = batch.mask()
        values = torch.zeros(*mask.shape, 1)
        values[mask] = torch.linspace(0, 1, int(mask.sum()))[:, None]
        readings = {reward.request: Readings(values, mask)}
        if kind is RepetitionDetector:
            found.append([detector.repetition(row) for row in batch.written])
            assert not any(detector(batch, readings).flags)
            continue
        detector.attach(rewarded)
        if not found:
            detector.learn(batch, readings)
        found.append(detector.scores(batch, readings).tolist())
    assert found[0] == found[1]


def test_a_tools_table_sets_off_no_guard_where_a_reward_is_called_by_hand():
    tokenizer = AutoTokenizer.from_pretrained(mr.pocket.path())
    conversation = [say("assistant", ""), say("tool", TABLE), say("assistant", r"\boxed{19}")]
    ids = tokenizer(plain_text(conversation), add_special_tokens=False).input_ids
    assert RepetitionDetector().repetition(ids) > 0.5  # it would be
    seen = {}
    reward = mr.CompositeReward([mr.OutcomeReward(mr.verifiers.math_boxed)])
    values = reward([PROMPT], [conversation], [ids], answer=["19"], log_extra=seen.__setitem__)
    assert values == [1.0] and seen["composite/flags"] == [""]


# -- red team, gate ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool_run():
    """A pocket rollout with a tool's text in the middle, by messages and by mask, and its model and tokenizer."""
    model, tokenizer = load_model("mechreward/pocket")

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    parts = [
        (" Ana has 12 + 7 = 19 apples.", 1),
        (" #### 99 apples apples apples", 0),
        (" So there are 19. #### 19", 1),
    ]
    ids = [t for text, _ in parts for t in encode(text)] + [tokenizer.eos_token_id]
    mask = [own for text, own in parts for _ in encode(text)] + [1]
    batch = RolloutBatch(
        prompts=[PROMPT] * 2,
        completions=[""] * 2,
        prompt_ids=[tokenizer(PROMPT).input_ids] * 2,
        completion_ids=[ids] * 2,
        tool_mask=[mask] * 2,
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        columns={"answer": ["19", "19"]},
    )
    return model, tokenizer, batch.decoded(tokenizer)


def test_the_red_team_attacks_the_models_own_text(tool_run):
    _, tokenizer, batch = tool_run
    suffixed = with_suffix(batch, [9, 10], tokenizer)
    ends = batch.eos_token_ids
    own = [token for token in batch.written[0] if token not in ends]
    assert suffixed.completion_ids[0] == [*own, 9, 10, tokenizer.eos_token_id] and "99" not in suffixed.texts[0]
    for name, attacked in attacks(batch, tokenizer).items():
        assert attacked.tool_mask is None
        assert name.endswith("replacing") or not any("99" in text for text in attacked.texts), name


def test_cues_are_put_between_the_models_own_tokens(tool_run):
    _, tokenizer, batch = tool_run
    cues = Cues([11, 12], [[13], [14]], 0.5)
    foreign = [t for t, own in zip(batch.completion_ids[0], batch.tool_mask[0], strict=True) if not own]
    for how in ("interspersed", "in_context", "prepended", "appended"):
        changed = injected(batch, cues, how)
        for ids, mask in zip(changed.completion_ids, changed.tool_mask, strict=True):
            assert [t for t, own in zip(ids, mask, strict=True) if not own] == foreign  # untouched, and in one piece
            runs = "".join(map(str, mask))
            assert runs.strip("1").strip("0") == "" and changed.written[0] != batch.written[0]
    labelled = Labelled(batch, np.array([True, False]), np.array([0, 1]), "here")
    assert rewritten(labelled, tokenizer, ["a", "b"]) is None


def test_surprise_is_that_of_the_models_own_tokens(tool_run):
    model, _, batch = tool_run
    ids = [*batch.prompt_ids[0], *batch.completion_ids[0]]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start, want = len(batch.prompt_ids[0]), 0.0
    for t, own in enumerate(batch.tool_mask[0]):
        if own:
            before = log_p[start + t - 1]
            want += float(-before[ids[start + t]] + (before.exp() * before).sum())
    got = surprise(model, batch)
    assert got[0, 1] == sum(batch.tool_mask[0])
    assert got[0, 0] == pytest.approx(want, abs=1e-3)


# -- the server --------------------------------------------------------------------------------------------------------


def test_the_server_scores_several_turns_by_their_mask(tool_run):
    model, _, batch = tool_run
    scorer = Scorer(Served("mechreward/pocket", ("pocket/reasoning_pack",), verifier="gsm8k"))
    prompt, ids, mask = batch.prompt_ids[0], batch.completion_ids[0], batch.tool_mask[0]
    whole, single = scorer.score([Rollout(prompt, ids, "99", 1, mask), Rollout(prompt, ids[:9], "19")])
    right, _ = scorer.score([Rollout(prompt, ids, "19", 1, mask), Rollout(prompt, ids[:9], "19")])
    assert right.reward - whole.reward == pytest.approx(1.0)  # the tool's 99 is no answer
    assert whole.reward == pytest.approx(sum(r for r in whole.token_rewards if r is not None), abs=1e-5)
    assert [r is None for r in whole.token_rewards] == [not own for own in mask[:-1]] + [False]
    # Features are the mean over the model's own tokens that are fed back: Hugging Face's hidden states, SAE by hand.
    pack = scorer.reward.rewards[0]
    readout = pack.readout
    with torch.no_grad():
        hidden = model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states
    at = [len(prompt) + t for t, own in enumerate(mask[:-1]) if own]
    x = hidden[readout.hook_point.layer + 1][0, at]
    read = readout.nonlinearity(readout.transform(x) @ readout.weight + readout.bias)
    want = (read if readout.keep is None else read[:, readout.keep]).mean(0)
    np.testing.assert_allclose(list(whole.features.values()), want, rtol=1e-4, atol=1e-5)
    # Beside it, a single turn is scored as if it were alone.
    (alone,) = scorer.score([Rollout(prompt, ids[:9], "19")])
    assert alone.reward == pytest.approx(single.reward, abs=1e-5)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([[1]], "1 flags in response_mask for the 2"),
        ([[1, 2]], "less than or equal"),
        ([], "0 resp"),
        ([[0, 0]], "no token in rollout 0 that the model wrote"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_the_protocol(mask, says):
    with pytest.raises(ValueError, match=says):
        ScoreRequest(prompt_ids=[[1]], response_ids=[[3, 4]], response_mask=mask)
    ScoreRequest(prompt_ids=[[1]], response_ids=[[3, 4]], response_mask=[[True, False]])


def test_a_group_in_which_nothing_can_be_read_is_scored_whatever_is_batched_with_it(tool_run):
    _, tokenizer, batch = tool_run
    prompt, end = batch.prompt_ids[0], [tokenizer.eos_token_id]
    full = list(batch.completion_ids[0][:9])
    scorer = Scorer(Served("mechreward/pocket", ("pocket/reasoning_pack",)))
    alone, beside = scorer.score([Rollout(prompt, end)]), scorer.score([Rollout(prompt, end), Rollout(prompt, full)])
    assert alone[0].reward is None and beside[0].reward is None and beside[1].reward is not None
    # In a group, it counts as the least that a rollout of the group has read.
    other = list(reversed(full))
    group = scorer.score([Rollout(prompt, each, None, 3) for each in (end, full, other)])
    assert group[0].reward == pytest.approx(min(group[1].reward, group[2].reward))
    assert group[0].token_rewards == [group[0].reward]
    # The outcome counts as it is.
    scorer = Scorer(Served("mechreward/pocket", ("pocket/reasoning_pack",), verifier="exact_match"))
    seven = tokenizer("7", add_special_tokens=False).input_ids[-1:]
    asked = [Rollout(prompt, seven, "7"), Rollout(prompt, full, "7"), Rollout(prompt, end, "7")]
    right, _, ended = scorer.score(asked)
    assert (right.reward, right.token_rewards) == (1.0, [1.0]) and ended.reward == 0.0
    assert scorer.score(asked[:1])[0].reward == 1.0


# -- sources called by hand --------------------------------------------------------------------------------------------


def test_a_models_readings_leave_out_what_others_wrote(tool_run):
    model, tokenizer, _ = tool_run
    reward = mr.FeatureReward(mr.direction("d", torch.randn(model.config.hidden_size), HookPoint(1)))
    conversation = [say("assistant", " It is 1"), say("tool", " 2 or 3"), say("assistant", " So 4")]
    source = HFSource(model, tokenizer)
    batch = source.batch(Call([PROMPT], [conversation]))
    assert tokenizer.decode(batch.written[0], skip_special_tokens=True).split() == "It is 1 So 4".split()
    readings = source.read(batch, reward.requests)[reward.request]
    assert readings.mask.sum() == len(batch.written[0]) - 1  # all but the last
    moved = copy.deepcopy(conversation)
    moved[1]["content"] = " 5 or 6"
    other = source.batch(Call([PROMPT], [moved]))
    assert other.written == batch.written and other.completion_ids != batch.completion_ids
    under_way = source.batch(Call([PROMPT], [conversation[:2]]))
    assert tokenizer.eos_token_id not in under_way.completion_ids[0]  # nobody has written an end
    with pytest.raises(RewardError, match="completion_ids"):
        reward([PROMPT], [conversation], [[5, 6, 7]], source=source)


def test_a_function_around_a_reward_may_change_texts_but_not_past_a_mask():
    for mask, want in ((None, "changed"), ([[1, 0]], "as decoded")):
        step = SimpleNamespace(batch=masked([[5, 6]], mask, completions=["as decoded"]))
        source = RolloutsInTraining(SimpleNamespace(_step_state=step, rollout_func=lambda: None))
        assert source.batch(Call(["p"], ["changed"])).texts == [want]


# -- through TRL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
def test_a_rollout_functions_mask_in_a_training_step(tmp_path, conversational):
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(mr.pocket.path())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def rollout(prompts, trainer):
        out = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
        for i, _ in enumerate(prompts):
            own, env = encode(" I give up." if i % 2 else r" \boxed{3}"), encode(r" \boxed{3} | 1 | 1" + " | 1" * 60)
            ids = [*own, *env, tokenizer.eos_token_id]
            out["prompt_ids"].append(encode("1+2="))
            out["completion_ids"].append(ids)
            out["logprobs"].append([0.0] * len(ids))
            out["env_mask"].append([1] * len(own) + [0] * len(env) + [1])
        return out

    seen, flags = [], []

    class Spy(mr.OutcomeReward):
        def score(self, batch, readings, sense=1.0):
            scores = super().score(batch, readings, sense)
            seen.extend(scores.values.tolist())
            flags.extend(batch.flags or [])
            return scores

    prompt = [say("user", "1+2=")] if conversational else "1+2="
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": prompt, "answer": "3"}] * 8)
    options = {
        "output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 1,
        "bf16": False, "beta": 0.0, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    common = {
        "model": mr.pocket.path(), "processing_class": tokenizer, "train_dataset": data, "rollout_func": rollout
    }  # fmt: skip
    mr.MechRewardGRPOTrainer(
        **common, reward_funcs=[Spy(mr.verifiers.math_boxed)], args=mr.MechRewardGRPOConfig(**options, record=None)
    ).train()
    assert seen == [1.0, 0.0] * 4 and not any(flags)
    if not conversational:  # a plain trainer shows a reward function no mask
        plain = GRPOTrainer(
            **common, reward_funcs=mr.OutcomeReward(mr.verifiers.math_boxed), args=GRPOConfig(**options)
        )
        with pytest.raises(RewardError, match="MechRewardGRPOTrainer"):
            plain.train()


def test_the_last_token_that_the_model_wrote_gets_what_is_no_tokens_own():
    batch = masked([[5, 6, 7, 8]], [[1, 1, 0, 0]], columns={"answer": ["3"]}, completions=[r"\boxed{3}"])
    got = mr.OutcomeReward(mr.verifiers.math_boxed).per_token(batch, {})[0].tolist()
    assert got[1] == 1.0 and [math.isnan(v) for v in got] == [True, False, True, True]
