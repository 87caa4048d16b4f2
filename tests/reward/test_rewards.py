"""Rewards against plain loops in float64: aggregation, normalisation, features, outcomes, and how TRL calls them."""

import copy
import math
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mechreward as mr
from conftest import VOCAB, WIDTH, build
from mechreward.aggregation import aggregation
from mechreward.errors import CandidateWarning, ConfigError, MechRewardError, ModelMismatchError, PackError, RewardError
from mechreward.features.pack import Calibration, FeaturePack
from mechreward.readout import HookPoint, Readings, Readout, Request, direction
from mechreward.reward.base import Reward
from mechreward.reward.feature_reward import FeatureReward, lowered
from mechreward.reward.normalization import EPS, dense_zscore, zscore_in_batch, zscore_in_group
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import Call, RolloutBatch, Scores
from mechreward.rollout.hf import HFSource
from mechreward.sae import formats

NAN = math.nan
POINT = HookPoint(1)
GARBAGE = -777.25

finite = st.floats(-1000, 1000, width=32)
maybe = st.one_of(finite, st.just(NAN))
rows_of_tokens = st.lists(st.lists(st.tuples(finite, st.booleans()), max_size=8), min_size=1, max_size=6)


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message of an error that this library raises: one line that ends a sentence."""
    text = str(error.value)
    assert isinstance(error.value, MechRewardError) and "\n" not in text and text[-1] in ".?)", text
    return text


def tensor_of(rows, garbage=GARBAGE, extra=0):
    """Ragged rows of (value, is it read) as values and mask ``[B, T]``; what is not read holds garbage."""
    width = max(map(len, rows), default=0) + extra
    values, mask = torch.full((len(rows), width), garbage), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for t, (value, read) in enumerate(row):
            if read:
                values[i, t], mask[i, t] = value, True
    return values, mask


def readings_of(rows, columns=1):
    """Readings with the same value in each column: 0 where nothing is read, as sources promise."""
    values, mask = tensor_of(rows, garbage=0.0)
    return Readings(values[..., None].expand(*values.shape, columns), mask)


def rollouts(count, num_generations=None, **options):
    return RolloutBatch(
        ["p"] * count, ["c"] * count, [[5]] * count, [[7, 8]] * count, num_generations=num_generations or count,
        **options,
    )  # fmt: skip


class World:
    """Processes as threads: ``gather`` waits for everybody's rows, as a collective does."""

    def __init__(self, size):
        self.rows, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def gather(self, rank):
        def gather(rows):
            self.rows[rank] = rows
            self.barrier.wait()
            everyone = torch.cat(self.rows)
            self.barrier.wait()
            return everyone

        return gather

    def run(self, work):
        """``work(rank, gather)`` on every process."""
        with ThreadPoolExecutor(len(self.rows)) as pool:
            return list(pool.map(lambda rank: work(rank, self.gather(rank)), range(len(self.rows))))


class Told:
    """A source that has read what it was told, and remembers what it was handed."""

    def __init__(self, readings=None, **options):
        self.readings, self.options, self.accepted = readings, options, []

    def batch(self, call):
        n = len(call.prompts)
        ids = call.completion_ids or [[7, 8]] * n
        told = {"num_generations": n} | self.options
        return RolloutBatch(call.prompts, call.completions, [[5]] * n, ids, call.columns, **told)

    def read(self, batch, requests):
        return dict.fromkeys(requests, self.readings)

    def accept(self, reward, batch, scores):
        self.accepted.append((reward, batch, scores))


def scored(reward, rows, batch=None, columns=1):
    """A feature reward's scores of ragged rows."""
    return reward.score(batch or rollouts(len(rows)), {reward.request: readings_of(rows, columns)})


def one_column(name="d"):
    return direction(name, torch.ones(WIDTH), POINT)


def two_columns():
    return Readout("pair", ("a", "b"), POINT, torch.ones(WIDTH, 2), torch.zeros(2))


# -- aggregation -------------------------------------------------------------------------------------------------------


def by_loop(name, tokens):
    if not tokens:
        return NAN
    if name.startswith("mean_last_"):
        tokens = tokens[-int(name.split("_")[2]) :]
    if name.startswith("top_"):
        tokens = sorted(tokens, reverse=True)[: int(name.split("_")[1])]
    if name == "max":
        return max(tokens)
    if name == "last":
        return tokens[-1]
    total = 0.0
    for token in tokens:
        total += token
    return total if name == "sum" else total / len(tokens)


@pytest.mark.parametrize(
    "name",
    ["mean", "max", "last", "sum", "mean_last_1_tokens", "mean_last_3_tokens", "mean_last_32_tokens", "top_1_mean",
     "top_2_mean", "top_40_mean"],
)  # fmt: skip
@given(rows=rows_of_tokens, garbage=st.floats(-(2.0**100), 2.0**100, width=32), extra=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_aggregations_equal_a_loop_over_the_tokens_that_were_read(name, rows, garbage, extra):
    got = aggregation(name)(*tensor_of(rows, garbage, extra)).tolist()
    want = [by_loop(name, [value for value, read in row if read]) for row in rows]
    assert got == pytest.approx(want, rel=1e-5, abs=1e-2, nan_ok=True)
    exact = name in ("max", "last", "top_1_mean", "mean_last_1_tokens")
    assert not exact or np.array_equal(got, want, equal_nan=True)


def test_aggregations_of_a_worked_example():
    rows = [[(1.0, True), (9.0, False), (4.0, True), (-2.0, True)], [(5.0, False)], []]
    values, mask = tensor_of(rows)
    for name, want in {
        "mean": 1, "max": 4, "last": -2, "sum": 3, "mean_last_2_tokens": 1, "top_2_mean": 2.5, "per_token": 0,
    }.items():  # fmt: skip
        assert aggregation(name)(values, mask).tolist() == pytest.approx([want, NAN, NAN], nan_ok=True)


@pytest.mark.parametrize("name", ["mean", "max", "last", "sum", "mean_last_3_tokens", "top_2_mean", "per_token"])
def test_a_batch_without_any_token_is_all_nan(name):
    got = aggregation(name)(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert got.shape == (2,) and got.isnan().all()


@pytest.mark.parametrize(
    ("typo", "hint"),
    [("meen", "'mean'"), ("mean_last_0_tokens", "mean_last_32_tokens"), ("top_0_mean", "top_4_mean"), ("lats", "last"),
     ("mean_last_-3_tokens", "mean_last"), ("mean_last_3_token", "mean_last_32_tokens"), ("per_tokn", "per_token")],
)  # fmt: skip
def test_unknown_aggregations_are_refused_with_the_nearest_name(typo, hint):
    with pytest.raises(ConfigError) as error:
        FeatureReward(one_column(), aggregation=typo)
    assert hint in sentence(error).split("Did you mean")[1] and typo in str(error.value)


# -- normalisation -----------------------------------------------------------------------------------------------------


def numpy_zscore(values):
    """(r - mean) / (std + eps) over the entries that are not NaN, float64, unbiased."""
    values = np.asarray(values, dtype=np.float64)
    kept = values[~np.isnan(values)]
    if not len(kept):
        return values
    std = kept.std(ddof=1) if len(kept) > 1 else 0.0
    return (values - kept.mean()) / (std + EPS)


def same(got, want, tolerance=2e-3):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), np.asarray(want), rtol=tolerance, atol=tolerance)


@given(st.lists(st.lists(maybe, min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_zscores_equal_numpy_with_nan_rows_left_out(groups):
    values = torch.tensor(groups).flatten()
    same(zscore_in_group(values, rollouts(len(values), 4)), np.concatenate([numpy_zscore(g) for g in groups]))
    same(zscore_in_batch(values, rollouts(len(values), 4)), numpy_zscore(np.concatenate(groups)))


@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678, -3e7])
def test_a_constant_group_has_zscore_zero_whatever_its_scale(constant):
    values = torch.full((7,), constant)
    for zscore in (zscore_in_group, zscore_in_batch):
        same(zscore(values, rollouts(7)), np.zeros(7))


def test_a_lone_rollout_has_zscore_zero():
    same(zscore_in_group(torch.tensor([5.0, NAN, 2.0]), rollouts(3, 1)), [0, NAN, 0])
    same(zscore_in_batch(torch.tensor([NAN, 7.0]), rollouts(2, 2)), [NAN, 0])


@given(st.lists(maybe, min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6, 12]), st.sampled_from([2, 3, 4]))
@settings(max_examples=25, deadline=None)
def test_zscores_over_processes_equal_one_process(values, group, processes):
    values = torch.tensor(values)
    mine = values.view(processes, -1)  # groups of 4 on 3 processes of 4; groups of 6 or 12 span processes
    for zscore in (zscore_in_group, zscore_in_batch):
        parts = World(processes).run(
            lambda rank, gather, zscore=zscore: zscore(
                mine[rank], rollouts(mine.shape[1], group, gather=gather, process_index=rank)
            )
        )
        same(torch.cat(parts), zscore(values, rollouts(12, group)), 1e-6)


def test_broken_groups_are_refused():
    with pytest.raises(RewardError) as error:
        zscore_in_group(torch.ones(5), rollouts(5, 4))
    assert "num_generations=4" in sentence(error)


def loop_dense(rows, group):
    """z(r_t) with moments over the tokens of the group, one token at a time in float64."""
    out = []
    for start in range(0, len(rows), group):
        members = rows[start : start + group]
        tokens = [float(value) for row in members for value, read in row if read]
        mean = sum(tokens) / len(tokens) if tokens else 0.0
        m2 = 0.0
        for token in tokens:
            m2 += (token - mean) ** 2
        std = math.sqrt(m2 / max(len(tokens) - 1, 1))
        out += [[(value - mean) / (std + EPS) if read else 0.0 for value, read in row] for row in members]
    return out


six_rows = st.lists(st.lists(st.tuples(finite, st.booleans()), max_size=6), min_size=6, max_size=6)


@given(six_rows, st.sampled_from([1, 2, 3, 6]), st.floats(-(2.0**60), 2.0**60, width=32))
@settings(max_examples=100, deadline=None)
def test_dense_zscores_equal_a_loop_over_real_tokens_whatever_the_padding_holds(rows, group, garbage):
    values, mask = tensor_of(rows, garbage, extra=2)
    got = dense_zscore(values, mask, rollouts(6, group))
    for i, row in enumerate(loop_dense(rows, group)):
        same(got[i, : len(row)], row, 1e-4)
    assert (got[~mask] == 0).all() and got.dtype == torch.float32


@given(six_rows, st.sampled_from([2, 3, 6]), st.sampled_from([2, 3]))
@settings(max_examples=25, deadline=None)
def test_dense_zscores_over_processes_equal_one_process(rows, group, processes):
    per = 6 // processes

    def work(rank, gather):  # each process pads to its own longest completion
        values, mask = tensor_of(rows[rank * per : (rank + 1) * per], extra=rank)
        return dense_zscore(values, mask, rollouts(per, group, gather=gather, process_index=rank)).tolist()

    together = [row for part in World(processes).run(work) for row in part]
    for i, row in enumerate(loop_dense(rows, group)):
        same(together[i][: len(row)], row, 1e-4)
        assert not any(together[i][len(row) :])


def test_quantiles_are_the_packs_own():
    calibration = Calibration.of(np.arange(0, 201), "mean")  # the raw rewards 0..200 were seen
    reward = FeatureReward(one_column(), normalize="quantile", calibration=calibration)
    rows = [[(v, True)] for v in (0.0, 50.0, 200.0, 500.0, -3.0)] + [[]]
    same(scored(reward, rows).values, [0, 0.25, 1, 1, 0, NAN], 1e-6)


def test_quantiles_of_another_aggregation_are_refused():
    calibration = Calibration.of(np.arange(0, 201), "mean")
    with pytest.raises(ConfigError) as error:
        FeatureReward(one_column(), aggregation="max", normalize="quantile", calibration=calibration)
    assert "'mean'" in sentence(error) and "'max'" in sentence(error)
    with pytest.raises(ConfigError) as error:
        FeatureReward(one_column(), normalize="quantile")
    assert "calibra" in sentence(error)


# -- FeatureReward -----------------------------------------------------------------------------------------------------


def test_weights_make_one_number_a_token():
    reward = FeatureReward(two_columns(), weights=[2.0, -0.5])
    values = torch.tensor([[[1.0, 4.0], [3.0, 2.0]], [[5.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert scored(FeatureReward(two_columns()), [[(1.5, True)]], columns=2).values.tolist() == [3.0]
    got = reward.score(rollouts(2), {reward.request: Readings(values, mask)})
    assert got.values.tolist() == [(2 - 2 + 6 - 1) / 2, 10.0]
    assert got.parts["raw"].tolist() == got.values.tolist()


@pytest.mark.parametrize(
    ("options", "error_type", "says"),
    [
        ({"weights": [1.0, NAN]}, RewardError, "NaN"),
        ({"weights": [1.0, math.inf]}, RewardError, "infinite"),
        ({"weights": [1.0]}, RewardError, "1 weights for 2"),
        ({"weights": [1.0, 2.0, 3.0]}, RewardError, "3 weights for 2"),
        ({"weights": []}, RewardError, "0 weights for 2"),
        ({"reads": "refrence"}, ConfigError, "'reference'"),
        ({"normalize": "grup"}, ConfigError, "'group'"),
        ({"normalize": "quantile"}, ConfigError, "calibrated"),
        ({"aggregation": "per_token", "normalize": "group"}, ConfigError, "per_token"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(options, error_type, says):
    with pytest.raises(error_type) as error:
        FeatureReward(two_columns(), **options)
    assert says in sentence(error)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_schedule_that_is_not_finite_is_refused(bad):
    reward = FeatureReward(one_column(), schedule=lambda progress: bad)
    with pytest.raises(RewardError) as error:
        scored(reward, [[(1.0, True)]])
    assert "schedule" in sentence(error)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (mr.schedule.linear(1, 0), {0.0: 1, 0.25: 0.75, 1.0: 0}),
        (mr.schedule.linear(0.2, 0.6), {0.5: 0.4}),
        (mr.schedule.cosine(1, 0), {0.0: 1, 0.25: (1 + math.sqrt(0.5)) / 2, 0.5: 0.5, 1.0: 0}),
        (mr.schedule.warmup(0.2), {0.0: 0, 0.1: 0.5, 0.2: 1, 0.9: 1}),
        (mr.schedule.warmup(0), {0.0: 1}),
    ],
)
def test_schedules_multiply_the_reward_by_their_factor(schedule, at):
    reward = FeatureReward(one_column(), schedule=schedule)
    for progress, factor in at.items():
        got = scored(reward, [[(8.0, True)]], rollouts(1, progress=progress))
        assert got.values.tolist() == pytest.approx([8 * factor]) and got.parts["raw"].tolist() == [8.0]


def test_trust_lowers_raw_values_before_they_are_normalised():
    rows = [[(4.0, True)], [(-2.0, True)], [(6.0, True)]]
    batch = rollouts(3, trust=torch.tensor([0.25, 0.0, 1.0]))
    assert scored(FeatureReward(one_column()), rows, batch).values.tolist() == [1.0, -2.0, 6.0]
    same(scored(FeatureReward(one_column(), normalize="group"), rows, batch).values, numpy_zscore([1, -2, 6]))
    calibration = Calibration.of(np.arange(-100, 101), "mean")
    quantile = FeatureReward(one_column(), normalize="quantile", calibration=calibration)
    same(scored(quantile, rows, batch).values, [0.505, 0.49, 0.53], 1e-6)
    assert scored(FeatureReward(one_column()), rows, batch).parts["raw"].tolist() == [4.0, -2.0, 6.0]


names = st.sampled_from(["mean", "max", "last", "sum", "mean_last_2_tokens", "top_2_mean"])


@given(rows_of_tokens, names, st.data())
@settings(max_examples=100, deadline=None)
def test_guards_never_raise_a_reward(rows, name, data):
    trust = data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(rows), max_size=len(rows)))
    factor = data.draw(st.sampled_from([1.0, 0.3, 0.0, -2.0]))  # a schedule may turn a reward round
    reward = FeatureReward(one_column(), aggregation=name, schedule=lambda progress: factor)
    free = scored(reward, rows).values
    guarded = scored(reward, rows, rollouts(len(rows), trust=torch.tensor(trust))).values
    assert torch.equal(free.isnan(), guarded.isnan())
    assert (guarded <= free).logical_or(free.isnan()).all()


@given(finite, st.floats(0, 1, width=32))
def test_lowered_is_the_formula(r, w):
    want = w * max(r, 0.0) + min(r, 0.0)
    assert lowered(torch.tensor([r]), torch.tensor([w])).item() == pytest.approx(want, rel=1e-6)


def test_a_completion_without_a_readable_token_is_none():
    reward = FeatureReward(one_column())
    read = readings_of([[(3.0, True)], [], [(2.0, False)]])
    assert reward(["p"] * 3, ["c", "", "x"], source=Told(read)) == [3.0, None, None]
    dropped = Told(read, dropped=torch.tensor([True, False, False]))
    assert reward(["p"] * 3, ["c", "", "x"], source=dropped) == [None, None, None]


def test_per_token_rewards_add_nothing_to_the_scalar_and_hand_over_their_tokens():
    reward = FeatureReward(one_column(), aggregation="per_token", schedule=mr.schedule.linear(1, 0))
    rows = [[(4.0, True), (2.0, True)], [(-1.0, True)], []]
    got = scored(reward, rows, rollouts(3, trust=torch.tensor([0.5, 0.5, 0.5]), progress=0.25))
    same(got.values, [0, 0, NAN])
    (dense,) = got.dense
    assert dense.weight == 0.75
    assert dense.values.tolist() == [[2.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]  # lowered, not weighted
    assert dense.mask.tolist() == [[True, True], [True, False], [False, False]]
    same(got.parts["raw"], [3, -1, NAN])  # the mean before guards, as every feature reward reports it


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words for the tiny models: ids 0, 1, 2 are pad, bos, eos."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w3"
    )
    fast.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for b in m['content'] %}{{ b['text'] }}{% endfor %}{% endif %} {% endfor %}"
    )
    return fast


PROMPTS = ["w5 w6 w7", "w5 w6 w7", "w9", "w9"]
COMPLETIONS = [[10, 11, 12, 2], [20, 21, 2], [30, 31, 32, 33, 34], [2]]


def test_per_token_is_refused_where_only_numbers_can_be_returned(gemma, words):
    reward = mr.CompositeReward([FeatureReward(one_column(), aggregation="per_token")])
    with pytest.raises(RewardError) as error:
        reward(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(gemma, words))
    assert "MechRewardGRPOTrainer" in sentence(error)
    with pytest.raises(RewardError) as error:
        reward(PROMPTS, PROMPTS, COMPLETIONS, log_metric=plain_trainer(gemma, words)._log_metric)
    assert "MechRewardGRPOTrainer" in sentence(error)


def test_no_gradient_flows_through_a_reward(words):
    model = build("gemma2").train()
    assert torch.is_grad_enabled() and next(model.parameters()).requires_grad
    weight = torch.nn.Parameter(torch.ones(WIDTH))
    reward = FeatureReward(direction("d", weight, POINT), aggregation="per_token")
    source = HFSource(model, words)
    batch = source.batch(Call(PROMPTS, PROMPTS, COMPLETIONS, {}))
    got = reward.score(batch, source.read(batch, reward.requests))
    for tensor in [got.values, got.dense[0].values, *got.parts.values()]:
        assert not tensor.requires_grad
    assert model.training


# -- packs -------------------------------------------------------------------------------------------------------------

EVIDENCE = {
    "n": 100, "n_positive": 40, "aggregation": "mean", "temperature": 1.0, "data": "Gate split.",
    "spearman": {"value": 0.8, "low": 0.7, "high": 0.9}, "auc": {"value": 0.8, "low": 0.7, "high": 0.9},
    "null_spearman_max": 0.3, "null_spearman_q95": 0.2, "null_auc_q95": 0.6, "p_value": 0.005, "draws": 200,
    "surface": {"length": 0.6}, "surface_auc": 0.6, "surface_plus_auc": 0.8,
    "gain": {"value": 0.2, "low": 0.1, "high": 0.3},
    "verdict": [{"name": "auc", "passed": True, "sentence": "It separates them."}],
}  # fmt: skip
PACK = {
    "name": "tiny/steps_pack", "description": "Steps.", "model": "tiny",
    "sae": {"release": "tiny-res", "sae_id": "layer_1"}, "hook_point": "blocks.1.hook_resid_post", "d_model": WIDTH,
    "d_sae": 24, "features": [{"id": 3, "weight": 0.5}, {"id": 17, "weight": -2.0}], "status": "validated",
    "status_reason": "Passed all tests.", "evidence": EVIDENCE, "provenance": {"seed": 0}, "licence": "Apache-2.0",
    "calibration": {"quantiles": [i / 100 for i in range(101)], "aggregation": "mean"},
}  # fmt: skip
RECIPE = {"behaviour": "steps", "contrast": "with steps against without"}


def pack_with(**changes):
    return FeaturePack.model_validate(copy.deepcopy(PACK) | changes)


@pytest.fixture(scope="module")
def saved_sae(tmp_path_factory):
    """A tiny random JumpReLU SAE, and the folder in which SAELens has saved it."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(3)
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=24, apply_b_dec_to_input=True, metadata=metadata))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        sae.threshold.abs_()
    folder = tmp_path_factory.mktemp("sae")
    sae.save_model(str(folder))
    return sae, folder


@pytest.fixture(scope="module")
def handle(saved_sae):
    return replace(formats.saelens(saved_sae[1]), name="tiny-res/layer_1")


def test_a_packs_reward_is_its_features_weighted_and_averaged_over_the_tokens_that_are_read(
    gemma, words, handle, saved_sae
):
    reward = FeatureReward.from_pack(pack_with(), sae=handle)
    assert reward.__name__ == "steps_pack"
    got = reward(PROMPTS, ["c"] * 4, COMPLETIONS, source=HFSource(gemma, words))
    want = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        prefix = words(prompt).input_ids
        hidden = gemma(torch.tensor([prefix + completion]), output_hidden_states=True).hidden_states[POINT.layer + 1]
        tokens = []
        for t in range(len(completion) - 1):  # the final token is never read
            latents = saved_sae[0].encode(hidden[0, len(prefix) + t].float())
            tokens.append(0.5 * latents[3].item() - 2.0 * latents[17].item())
        want.append(sum(tokens) / len(tokens) if tokens else None)
    assert got[3] is None and want[3] is None and any(want[:3])
    assert got[:3] == pytest.approx(want[:3], rel=1e-4, abs=1e-4)
    assert reward(PROMPTS, ["c"] * 4, COMPLETIONS, source=HFSource(gemma, words)) == got


def test_a_pack_may_be_a_path(handle, tmp_path):
    pack_with().write(tmp_path / "my_pack.json")
    reward = FeatureReward.from_pack(str(tmp_path / "my_pack.json"), sae=handle, aggregation="mean_last_32_tokens")
    assert reward.weights.tolist() == [0.5, -2.0] and reward.readout.labels == ("feature_3", "feature_17")
    assert reward.aggregation == "mean_last_32_tokens"


def test_a_validated_pack_is_used_without_a_warning_and_a_candidate_with_one(handle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureReward.from_pack(pack_with(), sae=handle, strict=True)
    candidate = pack_with(status="candidate", status_reason="AUC .55 is too low.", evidence=None)
    with pytest.warns(CandidateWarning, match=r"steps_pack is a candidate.*AUC \.55") as caught:
        FeatureReward.from_pack(candidate, sae=handle)
    assert caught[0].filename == __file__
    with pytest.raises(PackError) as error:
        FeatureReward.from_pack(candidate, sae=handle, strict=True)
    assert "AUC .55" in sentence(error)


def test_a_recipe_without_features_is_refused(handle):
    recipe = pack_with(features=[], status="candidate", evidence=None, recipe=RECIPE, status_reason="Not run yet.")
    with pytest.raises(PackError) as error:
        FeatureReward.from_pack(recipe, sae=handle)
    assert "recipe without features" in sentence(error) and "Not run yet." in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {"hook_point": "blocks.2.hook_resid_post"},
        {"hook_point": "blocks.1.hook_resid_pre"},
        {"d_model": WIDTH + 1},
        {"d_sae": 48},
        {"sae": {"release": "tiny-res", "sae_id": "layer_1/other"}},
        {"sae": {"release": "another-res", "sae_id": "layer_1"}},
    ],
)
def test_the_sae_must_be_the_packs_own(handle, other):
    with pytest.raises(PackError) as error:
        FeatureReward.from_pack(pack_with(**other), sae=handle)
    assert "tiny/steps_pack was made for" in sentence(error) and "tiny-res/layer_1" in str(error.value)


def test_an_sae_in_a_local_folder_is_taken_at_its_word(saved_sae):
    FeatureReward.from_pack(pack_with(), sae=formats.open_path(saved_sae[1]))


def test_calibration_serves_only_the_aggregation_that_it_was_measured_with(handle, caplog):
    reward = FeatureReward.from_pack(pack_with(), sae=handle, normalize="quantile")
    assert reward.calibration is not None and not caplog.records
    FeatureReward.from_pack(pack_with(), sae=handle, aggregation="max")
    assert "measured with mean, not max" in caplog.text
    with pytest.raises(ConfigError):
        FeatureReward.from_pack(pack_with(), sae=handle, aggregation="max", normalize="quantile")
    other = PACK["calibration"] | {"aggregation": "max"}  # a pack whose two parts disagree
    with pytest.raises(ConfigError):
        FeatureReward.from_pack(pack_with(calibration=other), sae=handle, normalize="quantile")


def test_evidence_of_another_aggregation_than_the_packs_is_told(handle, caplog):
    candidate = pack_with(status="candidate", evidence=EVIDENCE | {"aggregation": "max"})
    with pytest.warns(CandidateWarning):
        FeatureReward.from_pack(candidate, sae=handle)
    assert "measured with max, not mean" in caplog.text


# -- called by hand ----------------------------------------------------------------------------------------------------


def test_plain_and_conversational_calls_with_the_same_ids_give_the_same_reward(gemma, words, handle):
    reward, source = FeatureReward.from_pack(pack_with(), sae=handle), HFSource(gemma, words)
    prompts, completions = ["w5 w6 w7", "w9 w8"], ["w10 w11 w12", "w20 w21"]
    chats = [[{"role": "user", "content": p}] for p in prompts]
    replies = [[{"role": "assistant", "content": c}] for c in completions]
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": c}]}] for c in completions]
    assert (
        source.batch(Call(prompts, completions, None, {})).prompt_ids
        == source.batch(Call(chats, replies, None, {})).prompt_ids
    )
    plain = reward(prompts, completions, source=source)
    assert reward(chats, replies, source=source) == plain == reward(chats, blocks, source=source)
    assert reward(prompts, completions, [[10, 11, 12, 2], [20, 21, 2]], source=source) == plain
    assert None not in plain and plain[0] != plain[1]


def test_reads_reference_takes_the_reference_model(gemma, words):
    reward = FeatureReward(one_column(), reads="reference")
    with pytest.raises(RewardError) as error:
        reward(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(gemma, words))
    assert "reference=" in sentence(error)
    other = copy.deepcopy(gemma)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    policy = FeatureReward(one_column())
    by_reference = reward(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(gemma, words, reference=other))
    assert by_reference == policy(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(other, words))
    assert by_reference != policy(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(gemma, words))


def test_read_last_reads_the_final_token_too(gemma, words):
    without, with_last = (FeatureReward(one_column(), aggregation="last", read_last=last) for last in (False, True))
    both = [r(PROMPTS[2:], ["", ""], COMPLETIONS[2:], source=HFSource(gemma, words)) for r in (without, with_last)]
    assert both[0][1] is None and both[1][1] is not None  # a completion of EOS alone
    assert both[0][0] != both[1][0]


def test_a_readout_of_another_model_is_refused(gemma, words):
    wide, deep = direction("w", torch.ones(WIDTH + 1), POINT), direction("d", torch.ones(WIDTH), HookPoint(9))
    for readout in (wide, deep):
        with pytest.raises(ModelMismatchError) as error:
            FeatureReward(readout)(PROMPTS, PROMPTS, COMPLETIONS, source=HFSource(gemma, words))
        sentence(error)


def test_without_any_source_one_sentence_says_what_to_pass():
    with pytest.raises(RewardError) as error:
        FeatureReward(one_column())(["p"], ["c"])
    assert "source=HFSource(model, tokenizer)" in sentence(error)
    with pytest.raises(RewardError):  # a bare function is not a trainer
        FeatureReward(one_column())(["p"], ["c"], log_metric=lambda name, value: None)


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(RewardError) as error:
        OutcomeReward(exactly)(["p", "p"], ["c"], solution=["c", "c"])
    assert "2 prompts, 1 completions" in sentence(error)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def exactly(completions, golds, *, strict=False):
    return [c == g if not strict else c == f"[{g}]" for c, g in zip(completions, golds, strict=True)]


def test_an_outcome_needs_no_model():
    reward = OutcomeReward(mr.verifiers.gsm8k)
    assert reward.__name__ == "gsm8k" and reward.requests == []
    got = reward(["q"] * 3, ["so\n#### 4", "#### 5", "none"], answer=["#### 4", "#### 4", "no number"])
    assert got == [1.0, 0.0, None]


def test_the_gold_column_is_found_in_order_or_named():
    call = (["p"], ["right"])
    reward = OutcomeReward(exactly)
    for column in ("answer", "gold", "target", "ground_truth", "solution", "label"):
        assert reward(*call, **{column: ["right"], "level": ["x"]}) == [1.0]
    assert reward(*call, answer=["right"], solution=["wrong"]) == [1.0]
    assert reward(*call, label=["right"], answer=["wrong"]) == [0.0]
    assert reward(*call, label=["a class"], solution=["right"]) == [1.0]
    assert OutcomeReward(exactly, gold_column="mine")(*call, mine=["right"], solution=["wrong"]) == [1.0]


@pytest.mark.parametrize("options", [{}, {"gold_column": "solutoin"}])
def test_a_missing_gold_column_is_told_with_the_columns_there_are(options):
    with pytest.raises(RewardError) as error:
        OutcomeReward(exactly, **options)(["right"], ["right"], solutions=["right"], level=["easy"])
    assert "there are: solutions, level" in sentence(error) and "Did you mean 'solutions'?" in str(error.value)
    with pytest.raises(RewardError) as error:
        OutcomeReward(exactly, **options)(["right"], ["right"])
    assert "there are: none" in sentence(error)


def test_the_gold_is_never_read_from_the_prompt():
    prompts = ["The solution is right.\n#### right"] * 2
    with pytest.raises(RewardError):
        OutcomeReward(exactly)(prompts, ["right", "right"])
    assert OutcomeReward(exactly)(prompts, ["right", "wrong"], solution=["wrong", "wrong"]) == [0.0, 1.0]


def test_a_gold_of_none_gives_none_whatever_the_verifier_makes_of_it():
    assert OutcomeReward(exactly)(["p"] * 3, ["", "a", "a"], solution=[None, None, "a"]) == [None, None, 1.0]
    assert OutcomeReward(mr.verifiers.exact_match)(["p"] * 2, ["a", "a"], solution=[None, "a"]) == [None, 1.0]


def test_verdicts_may_be_numbers_and_none_and_golds_need_not_be_text():
    reward = OutcomeReward(lambda completions, golds: [0.25, None, golds[2] == "7"], name="graded")
    assert reward.__name__ == "graded"
    assert reward(["p"] * 3, ["a", "b", "c"], answer=[1, 2, 7]) == [0.25, None, 1.0]


def test_options_reach_the_verifier():
    call = (["p"] * 2, ["4", "[4]"])
    assert OutcomeReward(exactly, strict=True)(*call, answer=["4", "4"]) == [0.0, 1.0]
    assert OutcomeReward(exactly)(*call, answer=["4", "4"]) == [1.0, 0.0]


def test_a_verifier_that_miscounts_is_named():
    with pytest.raises(RewardError) as error:
        OutcomeReward(lambda completions, golds: [True], name="lazy")(["p"] * 2, ["a", "b"], answer=["a", "b"])
    assert "'lazy' gave 1 verdicts for 2 completions" in sentence(error)


def test_conversational_completions_reach_the_verifier_as_text():
    chat = [[{"role": "assistant", "content": "right"}], [{"role": "assistant", "content": None}]]
    assert OutcomeReward(exactly)(["p"] * 2, chat, answer=["right", "right"]) == [1.0, 0.0]


# -- as TRL calls it ---------------------------------------------------------------------------------------------------


def plain_trainer(model, tokenizer, **changes):
    """What a reward can see of a plain ``trl.GRPOTrainer``."""

    class Trainer:
        def __init__(self):
            self.model, self.tools, self.eos_token_ids = model, None, [2]
            self.num_generations, self.num_generations_eval = 2, 4
            self.state = types.SimpleNamespace(global_step=3, max_steps=12)
            self.accelerator = types.SimpleNamespace(
                unwrap_model=lambda m: m,
                autocast=nullcontext,
                gather=lambda rows: rows,
                process_index=0,
                device="cpu",
                num_processes=1,
            )
            self.metrics, self.extra = {}, {}
            self.__dict__.update(changes)

        def _tokenize_prompts(self, prompts):
            return tokenizer(prompts).input_ids, None

        def _log_metric(self, name, value):
            self.metrics[name] = value

        def _log_completion_extra(self, column, values):
            self.extra[column] = values

    return Trainer()


def as_trl_calls(reward, trainer, prompts, completions, ids, **columns):
    return reward(
        prompts=prompts, completions=completions, completion_ids=ids, trainer_state=trainer.state,
        log_extra=trainer._log_completion_extra, log_metric=trainer._log_metric, environments=[None] * len(prompts),
        **columns,
    )  # fmt: skip


def test_a_plain_trainer_is_recognised_by_its_bound_methods(gemma, words, handle):
    model = copy.deepcopy(gemma).train()
    trainer = plain_trainer(model, words)
    reward = FeatureReward.from_pack(pack_with(), sae=handle, schedule=mr.schedule.linear(1, 0))
    texts = ["a", "b", "c", ""]
    got = as_trl_calls(reward, trainer, PROMPTS, texts, COMPLETIONS, level=["x"] * 4)
    by_hand = FeatureReward.from_pack(pack_with(), sae=handle)
    want = by_hand(PROMPTS, texts, COMPLETIONS, source=HFSource(gemma, words))
    assert got == [w if w is None else pytest.approx(0.75 * w, rel=1e-6) for w in want]  # step 3 of 12
    assert all(type(value) in (float, type(None)) for value in got) and len(got) == 4
    assert model.training
    raw = trainer.extra["steps_pack/raw"]
    assert raw[:3] == pytest.approx(want[:3]) and math.isnan(raw[3])
    assert trainer.metrics["steps_pack/raw"] == pytest.approx(np.mean(want[:3]))
    assert trainer.metrics["steps_pack/seconds"] >= 0


def test_a_plain_trainer_gives_groups_progress_and_the_end_of_a_completion(gemma, words):
    seen = []

    class Looks(FeatureReward):
        def score(self, batch, readings):
            seen.append(batch)
            return Scores(torch.zeros(len(batch)))

    model = copy.deepcopy(gemma)
    trainer = plain_trainer(model, words)
    for mode in (True, False):
        model.train(mode)
        as_trl_calls(Looks(one_column()), trainer, PROMPTS, ["a"] * 4, COMPLETIONS, level=list("wxyz"))
    training, evaluating = seen
    assert (training.num_generations, evaluating.num_generations, training.progress) == (2, 4, 0.25)
    assert training.columns == {"level": list("wxyz")} and training.eos_token_ids == {2}
    assert training.prompt_ids == [[5, 6, 7], [5, 6, 7], [9], [9]] and training.lengths == [4, 3, 5, 1]


def test_what_a_plain_trainer_cannot_show_is_refused(gemma, words):
    reward = FeatureReward(one_column())
    for trainer, ids in (
        (plain_trainer(gemma, words), None),
        (plain_trainer(gemma, words, tools=[print]), COMPLETIONS),
    ):
        with pytest.raises(RewardError) as error:
            as_trl_calls(reward, trainer, PROMPTS, PROMPTS, ids)
        sentence(error)


def test_a_dataset_column_called_source_is_a_column():
    """NuminaMath, on which many train, has one."""
    got = OutcomeReward(exactly, gold_column="source")(["p"] * 2, ["olympiads", "x"], source=["olympiads"] * 2)
    assert got == [1.0, 0.0]
    read = readings_of([[(3.0, True)]])

    class Trainer:
        rollout_source = Told(read)

        def log_metric(self, name, value): ...

    assert FeatureReward(one_column())(["p"], ["c"], source=["aime"], log_metric=Trainer().log_metric) == [3.0]
    assert Trainer.rollout_source.accepted[0][1].columns == {"source": ["aime"]}


def test_logs_hold_a_value_for_each_rollout_and_their_mean():
    reward = FeatureReward(one_column("steps"))
    metrics, extra = {}, {}
    source = Told(readings_of([[(3.0, True)], [], [(5.0, True)]]))
    reward(["p"] * 3, ["c"] * 3, source=source, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    assert extra.keys() == {"steps/raw"} and extra["steps/raw"][::2] == [3.0, 5.0] and math.isnan(extra["steps/raw"][1])
    assert metrics["steps/raw"] == 4.0 and set(metrics) == {"steps/raw", "steps/seconds"}


def test_the_time_of_the_verifier_is_reported_apart():
    metrics = {}

    def slow(completions, golds):
        threading.Event().wait(0.05)
        return [True]

    reward = mr.CompositeReward([OutcomeReward(slow)])
    reward(["p"], ["c"], source=Told(), log_metric=metrics.__setitem__, answer=["c"])
    assert metrics["composite/slow/verifier_seconds"] >= 0.05 > metrics["composite/seconds"]


def test_requests_say_what_is_to_be_read():
    readout = one_column()
    reward = FeatureReward(readout, reads="reference", read_last=True)
    assert reward.requests == [Request(readout, "reference", True)]
    assert FeatureReward(readout).requests == [Request(readout)]


def test_a_reward_that_does_not_score_says_so():
    with pytest.raises(RewardError) as error:
        Reward("empty")(["p"], ["c"])
    sentence(error)
