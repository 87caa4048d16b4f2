"""CRL: steering against forward passes by hand, PPO against its definition, and the experiment around them."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train_config import one_sentence
from torch import nn

import mechreward as mr
from conftest import WIDTH, build
from crl import experiment as crl
from crl import method
from crl import results as crl_results
from crl.experiment import CRLConfig, SteeringArm
from crl.method import ActorCritic, Clipped, Directions, Steering, Trajectories, draw, log_prob
from mechreward.errors import CaptureError, ConfigError, ModelMismatchError, SAEError
from mechreward.files import read_jsonl
from mechreward.readout import HookPoint, InputTransform
from mechreward.rollout.capture import decoder_layers
from mechreward.sae.handle import SAEHandle
from mechreward.train import runner
from mechreward.train.config import read_config

ROOT = Path(__file__).parents[2]
LAYER, FEATURES, C = 1, 40, 6.0
PROMPTS = [[5, 9, 11, 30, 31, 8], [7], [12, 13, 40]]


def directions(site="resid_post", layer=LAYER):
    vectors = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(3))
    return Directions(vectors / vectors.norm(dim=-1, keepdim=True), HookPoint(layer, site))


class Words:
    """A tokenizer of numbers: the prompt "5 9" is the ids [5, 9]."""

    eos_token_id = 2

    def __call__(self, texts, **_):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[[int(word) for word in text.split()] for text in texts])

    def batch_decode(self, ids, **_):
        return [" ".join(map(str, row)) for row in ids]


def prompts(rows=PROMPTS):
    return [" ".join(map(str, row)) for row in rows]


GREEDY = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0}


def by_state(states, previous):
    """A deterministic choice that depends on the state alone."""
    return (states[:, :1].abs() * 1000).long() % FEATURES


def by_hand(model, prompt, site, count, k=1):
    """Greedy decoding without a cache or a padding, steered by an own hook: tokens, states and actions.

    The hook changes the last prompt position and all later ones of a whole sequence at once.
    """
    d, ids, states, actions = directions(site), list(prompt), [], []
    layer = decoder_layers(model)[LAYER]

    def steered(hidden):
        out = hidden.clone()
        for place in range(len(prompt) - 1, hidden.shape[1]):
            chosen = by_state(hidden[:, place], None)[0]
            out[0, place] = hidden[0, place] + C * d.vectors[chosen].sum(dim=0)
        states[:] = list(hidden[0, len(prompt) - 1 :])
        actions[:] = [by_state(h[None], None)[0].tolist() for h in states]
        return out

    def post(module, args, output):
        return (steered(output[0]), *output[1:]) if isinstance(output, tuple) else steered(output)

    def pre(module, args, kwargs):
        if args:
            return (steered(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": steered(kwargs["hidden_states"])}

    for _ in range(count):
        handle = (
            layer.register_forward_hook(post)
            if site == "resid_post"
            else layer.register_forward_pre_hook(pre, with_kwargs=True)
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        handle.remove()
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == Words.eos_token_id:
            break
    return ids[len(prompt) :], torch.stack(states), actions


# -- steering ----------------------------------------------------------------------------------------------------------


class TestSteering:
    @pytest.mark.parametrize("layout", ["gemma2", "llama", "gpt2"])
    @pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
    def test_generation_equals_a_forward_pass_by_hand(self, layout, site):
        """Batched, padded on the left, with a cache; against whole sequences, one at a time."""
        model = build(layout)
        steering = Steering(model, directions(site), C, by_state)
        batch, done = method.steered_rollouts(model, Words(), prompts(), steering, **GREEDY)
        plain, _ = method.steered_rollouts(
            model, Words(), prompts(), Steering(model, directions(site), 0.0, by_state), **GREEDY
        )
        assert batch.completion_ids != plain.completion_ids  # steering does something
        for row, prompt in enumerate(PROMPTS):
            tokens, states, actions = by_hand(model, prompt, site, GREEDY["max_new_tokens"])
            assert batch.completion_ids[row] == tokens
            mine = done.rollout == row
            torch.testing.assert_close(done.states[mine], states, rtol=1e-4, atol=1e-4)
            assert done.actions[mine].tolist() == actions

    def test_the_hook_is_on_the_side_where_the_sae_was_trained(self):
        """resid_post of layer L is HF's hidden_states[L + 1]; the proof of concept hooked the layer's input."""
        model = build("gemma2")
        for site, index in (("resid_post", LAYER + 1), ("resid_pre", LAYER)):
            steering = Steering(model, directions(site), C, by_state)
            batch, done = method.steered_rollouts(model, Words(), prompts(), steering, **GREEDY)
            for row, prompt in enumerate(PROMPTS):
                ids = torch.tensor([[*prompt, *batch.completion_ids[row]]])
                with torch.no_grad():  # layers up to the hook see no steering
                    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[index][0]
                want = hidden[len(prompt) - 1 : -1]  # the last token is never fed back
                torch.testing.assert_close(done.states[done.rollout == row], want, rtol=1e-4, atol=1e-4)

    def test_the_decoders_bias_is_not_added(self):
        """x' - x is c W_dec[a], whatever b_dec is; the proof of concept added the decoder's whole output."""
        model, d = build("gemma2"), directions()
        sae = SAEHandle(
            "sae", None, HookPoint(LAYER), WIDTH, FEATURES, "relu", lambda ids: None,  # pyright: ignore
            lambda: (d.vectors, torch.full((WIDTH,), 100.0)),
        )  # fmt: skip
        seen = []
        layer = decoder_layers(model)[LAYER]
        before = layer.register_forward_hook(lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).clone()))
        chosen = torch.tensor([[4, 7]])
        with Steering(model, method.decoder_directions(sae), C, lambda s, p: chosen, k=2):
            after = layer.register_forward_hook(
                lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).clone())
            )
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
        before.remove(), after.remove()
        added = seen[1] - seen[0]
        torch.testing.assert_close(added[0, -1], C * (d.vectors[4] + d.vectors[7]), rtol=1e-4, atol=1e-4)
        assert not added[0, :-1].any()

    def test_in_the_scale_of_the_residual_stream(self):
        """An SAE that reads s x writes s x: its rows divided by s."""
        d = directions()
        sae = SAEHandle(
            "sae", None, HookPoint(LAYER), WIDTH, FEATURES, "relu", lambda ids: None,  # pyright: ignore
            lambda: (d.vectors, torch.zeros(WIDTH)), InputTransform(scale=4.0),
        )  # fmt: skip
        torch.testing.assert_close(method.decoder_directions(sae).vectors, d.vectors / 4)
        per_token = SAEHandle(
            "sae", None, HookPoint(LAYER), WIDTH, FEATURES, "relu", lambda ids: None,  # pyright: ignore
            lambda: (d.vectors, torch.zeros(WIDTH)), InputTransform("layer_norm"),
        )  # fmt: skip
        with pytest.raises(SAEError) as caught:
            method.decoder_directions(per_token)
        assert "layer_norm" in one_sentence(caught.value)

    def test_it_does_not_depend_on_who_else_is_in_the_batch(self):
        model = build("gemma2")

        def alone(rows):
            return method.steered_rollouts(
                model, Words(), prompts(rows), Steering(model, directions(), C, by_state), **GREEDY
            )

        together, done = alone(PROMPTS)
        for row, prompt in enumerate(PROMPTS):
            single, own = alone([prompt])
            assert single.completion_ids[0] == together.completion_ids[row]
            mine = done.rollout == row
            assert torch.equal(own.actions, done.actions[mine]) and torch.equal(own.previous, done.previous[mine])
            torch.testing.assert_close(own.states, done.states[mine], rtol=1e-4, atol=1e-4)

    def test_switched_off_the_model_is_what_it_was(self):
        model = build("gemma2")
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with Steering(model, directions(), C, by_state):
                assert not torch.equal(model(input_ids=ids).logits, before)
            assert torch.equal(model(input_ids=ids).logits, before)
        assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())

    def test_it_lets_go_when_something_fails(self):
        model = build("gemma2")
        hooks = len(decoder_layers(model)[LAYER]._forward_hooks)
        with pytest.raises(ZeroDivisionError), Steering(model, directions(), C, by_state):
            _ = 1 / 0
        assert len(decoder_layers(model)[LAYER]._forward_hooks) == hooks

    def test_in_bfloat16_the_sum_is_rounded_once(self):
        model, d = build("gemma2").bfloat16(), directions()
        seen = []
        layer = decoder_layers(model)[LAYER]
        with Steering(model, d, C, lambda s, p: torch.tensor([[4]])) as steering:
            layer.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
        want = (steering.texts[0][0].states + C * d.vectors[4]).bfloat16()
        assert torch.equal(seen[0][:, -1], want)

    def test_what_was_made_for_another_model_is_refused(self):
        model = build("gemma2")
        for wrong in (directions(layer=9), Directions(torch.ones(3, WIDTH + 1), HookPoint(LAYER))):
            with pytest.raises(ModelMismatchError) as caught:
                Steering(model, wrong, C, by_state)
            one_sentence(caught.value)

    def test_generation_without_a_cache_is_refused(self):
        model = build("gemma2")
        with pytest.raises(CaptureError) as caught:
            steering = Steering(model, directions(), C, by_state)
            method.steered_rollouts(model, Words(), prompts(), steering, use_cache=False, **GREEDY)
        one_sentence(caught.value)

    def test_tokens_after_the_end_are_not_learned_from(self):
        """An EOS ends a row; the others go on, and what is fed to the ended row is no choice of anyone's."""
        model = build("gemma2")
        with torch.no_grad():
            model.lm_head.weight[Words.eos_token_id] *= 3  # some rows end early
        torch.manual_seed(1)
        sampled = {**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 30}
        batch, done = method.steered_rollouts(
            model, Words(), prompts() * 8, Steering(model, directions(), C, by_state), **sampled
        )
        lengths = batch.lengths
        assert min(lengths) < max(lengths)
        assert torch.bincount(done.rollout, minlength=len(batch)).tolist() == lengths
        for row in range(len(batch)):
            mine = done.rollout == row
            assert done.previous[mine][0].tolist() == [-1]
            assert torch.equal(done.previous[mine][1:], done.actions[mine][:-1])


def test_random_directions_are_as_long():
    d = directions()
    d.vectors.mul_(torch.arange(1, FEATURES + 1)[:, None])
    other = method.random_directions(d, 0)
    torch.testing.assert_close(other.vectors.norm(dim=-1), d.vectors.norm(dim=-1))
    assert other.hook_point == d.hook_point and not torch.equal(other.vectors, method.random_directions(d, 1).vectors)
    cosine = nn.functional.cosine_similarity(other.vectors, d.vectors)
    assert cosine.abs().max() < 0.8 and cosine.mean().abs() < 3 / math.sqrt(FEATURES * WIDTH)


# -- the distribution over actions -------------------------------------------------------------------------------------


class TestLogProb:
    def test_for_one_feature_it_is_the_categorical_distribution(self):
        logits = torch.randn(6, 11)
        actions = torch.randint(11, (6, 1))
        want = torch.distributions.Categorical(logits=logits).log_prob(actions[:, 0])
        torch.testing.assert_close(log_prob(logits, actions), want)

    def test_two_of_three_by_hand(self):
        """Weights 1, 2, 3: p(2 then 0) = 3/6 * 1/3."""
        logits = torch.tensor([[1.0, 2.0, 3.0]]).log()
        assert log_prob(logits, torch.tensor([[2, 0]])).exp().item() == pytest.approx(1 / 6)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.floats(-4, 4), min_size=3, max_size=5), st.integers(1, 3))
    def test_it_sums_to_one_over_all_ordered_choices(self, logits, k):
        orders = torch.tensor(list(itertools.permutations(range(len(logits)), k)))
        row = torch.tensor([logits]).expand(len(orders), -1)
        assert log_prob(row, orders).exp().sum().item() == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("k", [1, 2])
    def test_draws_have_these_probabilities(self, k):
        torch.manual_seed(0)
        logits, n = torch.tensor([0.3, -1.0, 1.2, 0.0]), 40_000
        drawn = draw(logits.expand(n, -1), k)
        for order in itertools.permutations(range(4), k):
            p = float(log_prob(logits[None], torch.tensor([order])).exp())
            seen = float((drawn == torch.tensor(order)).all(dim=1).float().mean())
            assert abs(seen - p) < 4.5 * math.sqrt(p * (1 - p) / n)


class TestMasking:
    def test_none_masks_nothing_and_no_repeat_what_was_just_added(self):
        states, previous = torch.randn(3, 8), torch.tensor([[4], [-1], [0]])
        free, blocked = ActorCritic(8, 6), ActorCritic(8, 6, masking="no_repeat")
        assert free.logits(states, previous).isfinite().all()
        assert (~blocked.logits(states, previous).isfinite()).nonzero().tolist() == [[0, 4], [2, 0]]

    def test_in_generation_nothing_is_added_twice_running(self):
        model = build("gemma2")
        for masking, repeats in (("none", True), ("no_repeat", False)):
            torch.manual_seed(0)
            agent = ActorCritic(WIDTH, 3, masking=masking)
            few = Directions(directions().vectors[:3], HookPoint(LAYER))
            steering = Steering(model, few, C, agent.sampled)
            _, done = method.steered_rollouts(model, Words(), prompts() * 4, steering, **GREEDY)
            assert bool((done.actions == done.previous).any()) is repeats

    def test_what_cannot_be_chosen_is_refused(self):
        for features, k, masking in ((3, 4, "none"), (3, 2, "no_repeat"), (3, 0, "none")):
            with pytest.raises(ConfigError) as caught:
                ActorCritic(8, features, k, masking)
            one_sentence(caught.value)


# -- PPO ---------------------------------------------------------------------------------------------------------------


def some_rollouts(agent, n=60, rollouts=12, width=8, seed=0):
    torch.manual_seed(seed)
    states = torch.randn(n, width)
    rollout = torch.arange(n) * rollouts // n
    previous = torch.full((n, agent.k), -1)
    return Trajectories(states, agent.sampled(states, previous), previous, rollout), (
        torch.rand(rollouts) > 0.5
    ).float()


class TestUpdate:
    @pytest.mark.parametrize(("k", "masking"), [(1, "none"), (3, "none"), (1, "no_repeat")])
    def test_old_and_new_log_probabilities_are_of_one_distribution(self, k, masking):
        """The ratio is exactly 1 before the first step; the proof of concept's was softmax over Normal."""
        torch.manual_seed(0)
        agent = ActorCritic(8, 20, k, masking)
        done, rewards = some_rollouts(agent)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        whole = method.update(agent, optimizer, done, rewards, Clipped(epochs=1, minibatches=1))
        assert whole["first_ratio"] < 1e-6 and whole["clipped"] == 0
        assert method.update(agent, optimizer, done, rewards, Clipped())["first_ratio"] < 1e-5

    def test_the_first_step_is_the_policy_gradient(self):
        """With rho = 1: -mean A grad ln pi, plus half the critic's squared error; written with torch's own classes."""
        torch.manual_seed(0)
        agent = ActorCritic(8, 20)
        done, rewards = some_rollouts(agent)
        copy = ActorCritic(8, 20)
        copy.load_state_dict(agent.state_dict())
        method.update(
            agent, torch.optim.SGD(agent.parameters(), lr=0.5), done, rewards, Clipped(epochs=1, minibatches=1)
        )
        r = rewards[done.rollout]
        value = copy.critic(done.states).squeeze(1)
        a = (r - value).detach()
        a = (a - a.mean()) / a.std()
        ln = torch.distributions.Categorical(logits=copy.policy(done.states)).log_prob(done.actions[:, 0])
        (-(a * ln).mean() + 0.5 * ((value - r) ** 2).mean()).backward()
        with torch.no_grad():
            for mine, theirs in zip(agent.parameters(), copy.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs - 0.5 * theirs.grad, rtol=1e-4, atol=1e-5)

    def test_what_is_clipped_has_no_gradient(self):
        """A second pass over the same data with eps tiny: nearly every ratio that should grow is left alone."""
        torch.manual_seed(0)
        agent = ActorCritic(8, 20)
        done, rewards = some_rollouts(agent)
        log = method.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), done, rewards, Clipped(1e-6, 2, 1))
        assert log["clipped"] > 0.4  # half of the steps: the first of two has ratios of 1

    @pytest.mark.parametrize("k", [1, 2])
    def test_it_learns_which_feature_pays_in_which_state(self, k):
        """Feature 3 pays where x_0 > 0, feature 5 elsewhere."""
        torch.manual_seed(0)
        agent = ActorCritic(4, 8, k)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        none = torch.full((200, k), -1)
        for _ in range(40):
            states = torch.randn(200, 4)
            actions = agent.sampled(states, none)
            pays = torch.where(states[:, 0] > 0, 3, 5)
            rewards = (actions == pays[:, None]).any(dim=1).float()
            method.update(agent, optimizer, Trajectories(states, actions, none, torch.arange(200)), rewards, Clipped())
        best = agent.best(states, none)
        assert (best == pays[:, None]).any(dim=1).float().mean() > 0.9


# -- the experiment ----------------------------------------------------------------------------------------------------


def tiny_text(output):
    text = (ROOT / "configs" / "crl.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text.replace("1e-3", "0.001").replace("3e-3", "0.003"))
    raw |= {
        "output": str(output),
        "training": raw["training"]
        | {"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "minibatches": 2}
        | {"max_completion_length": 16},
        "evaluation": {"every": 1, "questions": 6, "batch_size": 512},
        "data": {name: [{**raw["data"][name][0], "rows": 12}] for name in raw["data"]},
        "tuning": raw["tuning"] | {"coefficients": [2], "learning_rates": [0.001, 0.003]},
        "seeds": [0, 1],
    }
    raw["arms"]["constant"]["search"] = [{"questions": 1, "keep": 1}]
    return yaml.safe_dump(raw)


def tiny(tmp_path):
    file = tmp_path / "crl.yaml"
    file.write_text(tiny_text(tmp_path / "runs"), encoding="utf-8")
    return read_config(file, CRLConfig)


class TestConfig:
    @pytest.mark.parametrize("file", ["crl.yaml", "gemma-2-2b/crl.yaml"])
    def test_those_that_are_shipped(self, file):
        config = read_config(ROOT / "configs" / file, CRLConfig)
        assert {"none", "crl", "constant", "shuffled", "random_directions", "random_features", "format"} <= set(
            config.arms
        )
        assert len(config.seeds) >= 3 and config.tuning.seed not in config.seeds
        assert config.arms["crl"] == SteeringArm()
        if file.startswith("gemma"):
            assert config.sae.release == "gemma-scope-2b-pt-res-canonical"
            assert config.sae.sae_id == "layer_20/width_16k/canonical" and config.model == "google/gemma-2-2b"
            assert "not been run" in (ROOT / "configs" / file).read_text(encoding="utf-8")

    def test_the_budget_is_experiment_03s(self):
        ours = read_config(ROOT / "configs" / "crl.yaml", CRLConfig)
        theirs = read_config(ROOT / "configs" / "hybrid.yaml")
        same = ("max_steps", "prompts_per_step", "num_generations", "max_completion_length", "temperature")
        assert all(getattr(ours.training, key) == getattr(theirs.training, key) for key in same)
        assert ours.data == theirs.data and ours.evaluation.questions == theirs.evaluation.questions
        assert ours.model == theirs.model and ours.verifier == theirs.verifier

    @pytest.mark.parametrize(
        ("old", "new", "part"),
        [
            ("crl: {}", "crl: {steer: substitute}", "`of`"),
            ("crl: {}", "crl: {search: [{questions: 1, keep: 1}]}", "`search`"),
            ("of: crl", "of: format", "'format'"),
            ("of: crl", "of: crk", "'crk'"),
            ("crl: {}", "crl: {steer: none, masking: no_repeat}", "settings of a policy"),
            ("crl: {}", 'crl: {begin_without: ["a"]}', "begin_without"),
            ("crl: {}", "crl: {steer: constant, search: [{questions: 1, keep: 2}]}", "1 feature"),
            ("masking: no_repeat", "masking: afm", "masking"),
            ("max_steps: 30", "beta: 0.04", "beta"),
        ],
    )
    def test_mistakes_are_told_in_one_sentence(self, tmp_path, old, new, part):
        text = (ROOT / "configs" / "crl.yaml").read_text(encoding="utf-8")
        assert text.count(old) == 1
        file = tmp_path / "crl.yaml"
        file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read_config(file, CRLConfig)
        assert part in one_sentence(caught.value)


class TestScores:
    @pytest.mark.parametrize(
        ("text", "marked", "same"),
        [
            (" 12+7=19.\n#### 19", True, True),
            ("So it is \\boxed{19}", True, True),
            ("The answer is 19.", False, True),
            ("19 apples, or 20", False, False),
            ("#### nineteen", True, False),
            ("####", False, False),
            ("1,019 and then 19.0", False, True),
            ("\u221219", False, False),
        ],
    )
    def test_format_and_number(self, text, marked, same):
        assert crl.formatted(text) is marked and crl.same_number(text, "19") is same

    def test_signs_and_solutions(self):
        assert crl.same_number("#### \u221219", "3-22=-19\n#### -19") and not crl.same_number("19", "unknown")


class TestControls:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=30, max_size=60), st.integers(0, 5))
    def test_a_substitute_fires_about_as_often(self, rates, seed):
        firing = torch.tensor(rates)
        other = crl.substitutes(firing, seed)
        log = np.log(np.maximum(np.float64(firing.numpy()), 1e-9))
        for latent, chosen in enumerate(other.tolist()):
            assert chosen != latent
            nearer = sum(
                abs(log[i] - log[latent]) < abs(log[chosen] - log[latent]) for i in range(len(log)) if i != latent
            )
            assert nearer < 20

    def test_strangers_say_nothing_of_the_token(self):
        bank = torch.randn(1000, 4)
        read = crl.strangers(bank, 0)
        first, second = read(torch.zeros(500, 4)), read(torch.zeros(500, 4))
        assert not torch.equal(first, second)
        assert all((bank == row).all(dim=1).any() for row in first[:20])
        assert torch.equal(crl.strangers(bank, 0)(torch.ones(500, 4)), first)

    def test_usage_by_hand(self):
        model = build("gemma2")
        steering = Steering(model, directions(), C, by_state)
        rows = [[1, 5, 5, 9], [2, 6, 8, 8]]
        steering.texts = [
            [method.Choice(torch.zeros(2, WIDTH), torch.tensor([[r[t]] for r in rows])) for t in range(4)]
        ]
        assert crl.usage(steering, [3, 1]) == {"tokens": {"5": 2, "1": 1, "2": 1}, "first": {"1": 1, "2": 1}}


class TestFeatures:
    def test_concentration_and_overlap_by_hand(self):
        used = [
            {"tokens": {"1": 3, "2": 1}, "first": {"1": 4}},
            {"tokens": {"1": 1, "3": 1}, "first": {"2": 4}},
        ]
        found = crl_results._features(used, 1)
        assert found is not None
        assert found["tokens"]["overlap"]["mean"] == pytest.approx(0.5) and found["tokens"]["top"]["mean"] == 1
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert found["tokens"]["effective"]["per_seed"] == pytest.approx([math.exp(entropy), 2])
        assert found["first"]["overlap"]["mean"] == 0 and found["first"]["largest"]["mean"] == 1
        assert found["tokens"]["most_used"] == [[1, 0.75], [1, 0.5]]

    def test_none_where_nothing_was_added(self):
        assert crl_results._features([{}, {}], 1) is None


class TestRun:
    def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(self, tmp_path, monkeypatch):
        config = tiny(tmp_path)
        bench = crl.bench(config)
        said = []
        folder = crl.run(bench, "no_repeat", 0, said.append)
        again = crl.bench(config.model_copy(update={"output": str(tmp_path / "again")}))
        step = crl.one_step

        def cut(*arguments):
            if arguments[-1] == 2:
                raise KeyboardInterrupt
            return step(*arguments)

        monkeypatch.setattr(crl, "one_step", cut)
        with pytest.raises(KeyboardInterrupt):
            crl.run(again, "no_repeat", 0, said.append)
        monkeypatch.setattr(crl, "one_step", step)
        environment = tmp_path / "again" / "no_repeat" / "seed-0" / "environment.json"
        assert {"commit", "date"} <= set(json.loads(environment.read_text()))
        environment.write_text('{"commit": "first"}')
        resumed = crl.run(again, "no_repeat", 0, said.append)
        assert json.loads(environment.read_text()) == {"commit": "first"}
        for name in ("samples.jsonl", "evaluations.jsonl", "features.json"):
            assert (folder / name).read_text() == (resumed / name).read_text()
        ours, theirs = (load_file(f / "model" / "agent.safetensors") for f in (folder, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert [log["step"] for log in read_jsonl(resumed / "metrics.jsonl")] == [1, 2]
        assert not list(resumed.glob("checkpoint*")) and "finished before" not in "".join(said)
        crl.run(again, "no_repeat", 0, said.append)
        assert "finished before" in said[-1]
        rows = read_jsonl(folder / "samples.jsonl")
        assert {row["step"] for row in rows} == {0, 1, 2} and len(rows) == 18
        unsteered = [row["right"] for row in runner.evaluate(
            bench.model, bench.tokenizer, runner.test_questions(config, 0), config, [], 0
        )[0]]  # fmt: skip
        assert [row["off"] for row in rows if row["step"] == 2] == unsteered

    def test_a_substitute_needs_its_policy(self, tmp_path):
        with pytest.raises(ConfigError) as caught:
            crl.run(crl.bench(tiny(tmp_path)), "random_features", 0)
        assert "--arm crl --seed 0" in one_sentence(caught.value)
        assert not (tmp_path / "runs" / "random_features").exists()

    def test_a_substitute_makes_the_policys_choices_with_other_features(self, tmp_path):
        config = tiny(tmp_path)
        bench = crl.bench(config)
        folder = tmp_path / "runs" / "crl" / "seed-0"
        (folder / "model").mkdir(parents=True)
        agent = crl.new_agent(bench, config.arms["crl"], 7)
        save_file(agent.state_dict(), folder / "model" / "agent.safetensors")
        (folder / "summary.json").write_text("{}")
        made = crl.steerer(bench, config.arms["random_features"], 0).testing
        assert made is not None
        other = crl.substitutes(bench.discovery()["firing"], 0)
        _, done = bench.answered(mr.pocket.dataset("train", 5)["prompt"], made())
        assert torch.equal(done.actions, other[agent.best(done.states, done.previous)])

    def test_the_search_finds_the_feature_that_pays(self, tmp_path, monkeypatch):
        bench = crl.bench(tiny(tmp_path))
        pays = 17

        def answered(prompts, steering):
            chosen = steering.choose(torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1))
            from types import SimpleNamespace

            return SimpleNamespace(texts=[f"#### {int(f)}" for f in chosen]), None

        object.__setattr__(bench, "directions", Directions(torch.ones(50, 128), HookPoint(2)))
        monkeypatch.setattr(crl.Bench, "answered", lambda self, prompts, steering: answered(prompts, steering))
        monkeypatch.setattr(
            crl.Bench, "right", lambda self, texts, golds: torch.tensor([float(t == f"#### {pays}") for t in texts])
        )
        rounds = [crl.Round(questions=2, keep=5), crl.Round(questions=3, keep=1)]
        found = bench.search(rounds)
        assert (
            int(found["feature"]) == pays and float(found["accuracy"]) == 1 and int(found["rollouts"]) == 50 * 2 + 5 * 3
        )


@pytest.mark.slow
def test_the_script_from_tuning_to_tables(tmp_path, monkeypatch, capsys):
    tiny(tmp_path)
    script = str(ROOT / "experiments" / "05_crl_reproduction.py")

    def start(*more):
        monkeypatch.setattr(sys, "argv", [script, "--config", str(tmp_path / "crl.yaml"), *more])
        runpy.run_path(script, run_name="__main__")

    start("--tune")
    assert len(json.loads((tmp_path / "runs" / "tuning.json").read_text())["pilots"]) == 2
    start()
    start("--tables", "--out", str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert list(report["arms"]) == list(read_config(tmp_path / "crl.yaml", CRLConfig).arms)
    assert (tmp_path / "out" / "runs.md").read_text() == crl_results.markdown(report)
    for arm in report["arms"].values():
        assert arm["seeds"] == [0, 1] and arm["steps"] == [0, 1, 2]
    assert report["arms"]["crl"]["off"] == report["arms"]["none"]["right"]  # the model is what it was
    compare = str(ROOT / "experiments" / "compare.py")  # the runs are in the format that other tools read
    monkeypatch.setattr(
        sys, "argv", [compare, str(tmp_path / "runs"), "--baseline", "none", "--out", str(tmp_path / "compared")]
    )
    runpy.run_path(compare, run_name="__main__")
    compared = json.loads((tmp_path / "compared" / "runs.json").read_text())
    assert compared["arms"]["crl"]["curves"]["right"]["mean"][-1] == pytest.approx(
        report["arms"]["crl"]["right"]["mean"]
    )


# -- what is written about it ------------------------------------------------------------------------------------------


def written(name):
    return json.loads((ROOT / "experiments" / "results" / name).read_text(encoding="utf-8"))


class TestWhatIsWritten:
    def test_the_page_is_the_reports(self):
        assert (ROOT / "experiments" / "results" / "crl.md").read_text("utf-8") == crl_results.markdown(
            written("crl.json")
        )

    def test_researchs_figures_are_the_reports(self):
        text = (ROOT / "RESEARCH.md").read_text(encoding="utf-8")
        section = text.split("### Experiment 05 on `pocket`")[1].split("\n### ")[0].split("\n## ")[0]
        said, found = " ".join(section.split()), written("crl.json")
        arms, minus = found["arms"], found["minus"]
        for name in ("none", "crl", "constant", "format"):
            assert f"{arms[name]['right']['mean']:.3f}" in said, name
        for pair, d in minus.items():
            if pair.startswith("crl - "):
                low, high = (
                    end([d["right"]["resampled"][i], d["right"]["student"][i]]) for i, end in ((0, min), (1, max))
                )
                other = pair.removeprefix("crl - ")
                assert f"`{other}` {d['right']['mean']:+.3f} ({low:+.3f} to {high:+.3f})" in said, pair
        log = arms["crl"]["training"]
        assert f"{log['first']['mean']:.3f}" in said and f"{log['last']['mean']:.3f}" in said
        assert f"{arms['crl']['greedy']['mean']:.3f}" in said and f"{arms['none']['greedy']['mean']:.3f}" in said
        assert (
            f"{found['search']['rollouts']:,}" in said
            and f"{arms['crl']['features']['tokens']['overlap']['mean']:.2f}" in said
        )
        assert f"{found['outcome']['end']['mean']:.3f}" in said

    def test_switched_off_nothing_is_left(self):
        arms = written("crl.json")["arms"]
        assert arms["crl"]["off"]["per_seed"] == arms["none"]["right"]["per_seed"]
