"""Readouts and readings on their way to an engine's worker and back, and the choice of a way to read."""

import sys
from dataclasses import replace

import by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mechreward.cli import app
from mechreward.errors import CaptureError, ConfigError, ModelMismatchError
from mechreward.readout import HookPoint, ReadoutBank, direction
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.vllm import Anatomy, check_anatomy, choose_backend
from mechreward.rollout.wire import Fed, match, receive_bank, receive_fed, send_bank, send_fed, send_problem

EOS = 9


def batch_of(prompts, completions):
    n = len(prompts)
    return RolloutBatch([""] * n, [""] * n, prompts, completions, eos_token_ids=frozenset([EOS]))


def told(prompt, token, position):
    """A reading that says where it was taken."""
    return 1000.0 * sum(prompt) + 10.0 * position + token


def fed(prompt, tokens):
    values = torch.tensor([[told(prompt, token, t)] for t, token in enumerate(tokens)]).view(-1, 1)
    return Fed(tuple(prompt), tuple(tokens), values)


def sent(requests):
    """As a worker sends them: all requests' tokens and readings, one request after the other."""
    tokens = torch.tensor([token for request in requests for token in request.tokens], dtype=torch.int32)
    values = torch.cat([request.values for request in requests])
    return send_fed([r.prompt for r in requests], [len(r.tokens) for r in requests], tokens, values)


@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_readouts_arrive_as_they_were(name):
    sae = by_hand.ours(name)
    probe = direction("probe", torch.randn(sae.d_model), sae.hook_point, bias=0.5)
    sent = [sae.features([3, 700, 1500]), sae.features([5], name="other"), probe]
    x = torch.randn(50, sae.d_model) * 5
    bank = ReadoutBank(sent, apart=sent[1:2])
    arrived = receive_bank(send_bank(bank))
    assert [r.labels for r in arrived.readouts] == [r.labels for r in sent]
    assert [r in arrived.apart for r in arrived.readouts] == [False, True, False]
    before, after = torch.zeros(50, 5), torch.zeros(50, 5)
    bank.encode(sae.hook_point, x, before)
    arrived.encode(sae.hook_point, x, after)
    assert torch.equal(before, after)
    assert before.abs().sum() > 0


def test_a_shared_dictionary_crosses_once():
    sae = by_hand.ours("topk")
    one = send_bank(ReadoutBank([sae.features([1])]))
    two = send_bank(ReadoutBank([sae.features([1]), sae.features([2], name="two")]))
    assert len(two) < 1.1 * len(one)
    first, second = receive_bank(two).readouts
    assert first.weight is second.weight


def test_a_summary_does_not_cross():
    sae = by_hand.ours("jumprelu")
    with pytest.raises(CaptureError, match="'health'"):
        send_bank(ReadoutBank([sae.health()]))


ids = st.lists(st.integers(3, 5), min_size=1, max_size=3)  # few tokens, so that many rollouts share a beginning


@given(
    st.lists(st.tuples(ids, st.lists(st.integers(3, 5), max_size=5), st.booleans()), min_size=1, max_size=8),
    st.randoms(),
)
def test_each_rollout_finds_its_own_tokens(rollouts, random):
    prompts = [prompt for prompt, _, _ in rollouts]
    completions = [[*tokens, EOS] if ends else tokens for _, tokens, ends in rollouts]
    # Engines feed all but the last token, and sometimes one more.
    requests = [
        fed(p, c[: len(c) - random.choice([0, 1])] if c else []) for p, c in zip(prompts, completions, strict=True)
    ]
    random.shuffle(requests)
    batch = batch_of(prompts, completions)
    values = match(receive_fed(sent(requests)), batch, 1)
    mask = batch.mask()
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for t, token in enumerate(completion):
            expected = told(prompt, token, t) if t < len(completion) - 1 else 0.0
            assert values[row, t, 0] == expected
            assert bool(mask[row, t]) == (t < len(completion) - 1)


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [fed([4], [5, 6])],  # another prompt
        [fed([3], [5, 7])],  # another token
        [fed([3], [5])],  # too short
        [fed([3], [5, -1])],  # a position that no pass ran
    ],
)
def test_what_was_not_read_is_an_error(requests):
    with pytest.raises(CaptureError, match=r"not read all tokens of rollout 0 \(1 \+ 3 tokens\)"):
        match(requests, batch_of([[3]], [[5, 6, EOS]]), 1)


def test_a_worker_s_problem_is_raised_here():
    with pytest.raises(CaptureError, match="The hooks never ran"):
        receive_fed(send_problem("The hooks never ran."))


EAGER, DRAFTS, SPLIT = (
    {"enforce_eager": True},
    {"speculative_config": {"method": "ngram"}},
    {"pipeline_parallel_size": 2},
)
COPIES = {"data_parallel_size": 2}
LLAMA = Anatomy(returns_states=True, adds=True, layers=4, width=8, longest=64)
GEMMA3 = replace(LLAMA, returns_states=False)
COMMANDR = replace(GEMMA3, adds=False)


def test_engines_refuse_readouts_of_another_architecture():
    engine = replace(LLAMA, name="somebody/tuned", model_types=("llama", "llama"))
    for name in (None, "meta-llama/Llama-3.1-8B", "somebody/tuned", "unheard-of-by-vllm"):
        check_anatomy([replace(direction("d", torch.ones(8), HookPoint(1)), model_name=name)], engine)
    for name in ("mistral-7b", "gpt-oss-20b", "gemma-2-2b"):
        readout = replace(direction("d", torch.ones(8), HookPoint(1)), model_name=name)
        with pytest.raises(ModelMismatchError, match=f"made for {name}, but the model is a llama"):
            check_anatomy([readout], engine)


@pytest.mark.parametrize(
    "engine, model, chosen",
    [
        ({}, LLAMA, "aux"),
        (EAGER, LLAMA, "aux"),
        (EAGER, GEMMA3, "hook"),
        ({}, GEMMA3, "forward"),
        (EAGER, COMMANDR, "forward"),
        (EAGER | DRAFTS, LLAMA, "second_pass"),
        (DRAFTS, LLAMA, "forward"),
        (EAGER | SPLIT, LLAMA, "forward"),
        (EAGER | COPIES, LLAMA, "forward"),
    ],
)
def test_the_first_way_that_works_is_chosen(engine, model, chosen):
    assert choose_backend(engine, model) == chosen


@pytest.mark.parametrize(
    "engine, model, forced, message",
    [
        ({}, LLAMA, "hook", "enforce_eager=True"),
        (EAGER, GEMMA3, "aux", "cannot return its hidden states"),
        (EAGER, COMMANDR, "hook", "right for gemma, gemma2"),
        ({}, GEMMA3, "second_pass", "enforce_eager=True"),
        (EAGER | DRAFTS, LLAMA, "hook", "backend='second_pass'"),
        (EAGER | SPLIT, LLAMA, "aux", "several processes"),
        ({}, LLAMA, "hooks", "Did you mean 'hook'"),
    ],
)
def test_a_way_that_cannot_work_is_refused(engine, model, forced, message):
    with pytest.raises(ConfigError, match=message):
        choose_backend(engine, model, forced)


@pytest.mark.parametrize("forced", ["aux", "hook", "second_pass", "forward"])
def test_a_way_can_be_forced(forced):
    assert choose_backend(EAGER, LLAMA, forced) == forced


@pytest.mark.parametrize(
    "given, says",
    [
        ("{", "not JSON"),
        ("[]", "needs a JSON object"),
        ('{"dtype": "bfloat16"}', "cannot set 'dtype'"),
        ('{"tensor_parallel_size": 2}', "one process"),
        ("{}", "'vllm', which is not installed"),
    ],
)
def test_what_a_server_cannot_do_with_vllm_is_one_sentence(given, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    arguments = ["serve", "--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--vllm", given]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0 and says in " ".join(done.output.split())
