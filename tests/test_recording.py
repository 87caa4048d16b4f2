"""What a training records for the report: the readings of an independent pass, bounded, and nothing of the training."""

import json

import numpy as np
import pytest
import sae_lens
import torch
from test_trl import options
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import mechreward as mr
from mechreward import recording
from mechreward.files import read_jsonl
from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.reward.base import Reward
from mechreward.reward.guards import Verdict
from mechreward.rollout.batch import Scores


class Ids(Reward):
    """Keeps the token ids that it is shown, and pays nothing."""

    def __init__(self):
        super().__init__("ids")
        self.seen = []

    def score(self, batch, readings, sense=1.0):
        self.seen.append((batch.prompt_ids, batch.completion_ids))
        return Scores(torch.zeros(len(batch)))


class Suspicious:
    """A guard that flags the second rollout of each group."""

    requests = ()
    names = ("second",)

    def __call__(self, batch, readings):
        second = torch.arange(len(batch)) % batch.num_generations == 1
        flags = [["second: it <b>is</b> the second"] if row else [] for row in second]
        return Verdict(torch.where(second, 0.25, 1.0), torch.zeros_like(second), flags)


def train(folder, **changes):
    """Two steps of eight rollouts."""
    ids = Ids()
    composite = mr.CompositeReward(
        [mr.FeatureReward.from_pack("pocket/reasoning_pack"), mr.OutcomeReward(verifier=mr.verifiers.math_boxed)],
        [0.3, 1.0],
    )
    trainer = MechRewardGRPOTrainer(
        mr.pocket.path(),
        [composite, ids],
        MechRewardGRPOConfig(**options(folder, **{"max_completion_length": 48, **changes})),
        mr.pocket.dataset("train", 16),
        guards=[Suspicious()],
    )
    trainer.train()
    return trainer, ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    trainer, ids = train(folder)
    return folder, trainer, ids, read_jsonl(folder / "trace.jsonl")


@torch.no_grad()
def by_hand(prompt, completion):
    """The pack's features on a completion of the untrained model: HF's hidden states, SAELens' own encoder."""
    model = AutoModelForCausalLM.from_pretrained(mr.pocket.path()).eval()
    sae = sae_lens.SAE.load_from_disk(mr.pocket.files() / "saes" / "jumprelu")
    hidden = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[3][0]
    return sae.encode(hidden[len(prompt) :])


def test_readings_are_those_of_an_independent_pass(trained):
    _, trainer, ids, trace = trained
    pack = mr.load_pack("pocket/reasoning_pack")
    first = [record for record in trace if record["step"] == 1]  # on the untrained model's weights
    assert len(first) == 8
    for record in first:
        prompt, completion = (rows[record["row"]] for rows in ids.seen[0])
        want = by_hand(prompt, completion).numpy()
        last = len(completion) - 1
        assert record["unread"] == [last] and record["more"] == 0
        assert "".join(record["tokens"]) == trainer.processing_class.decode(completion)
        read = record["readings"]["pocket/reasoning_pack"]
        for feature in pack.features:
            got = np.zeros(last)
            places, values = read["features"].get(f"feature_{feature.id}", ([], []))
            got[places] = values
            np.testing.assert_allclose(got, want[:last, feature.id], rtol=1e-3, atol=1e-3)
        r = want[:last, [f.id for f in pack.features]] @ np.array([f.weight for f in pack.features])
        np.testing.assert_allclose(read["score"][:last], r, rtol=2e-3, atol=2e-3)
        assert read["score"][last] is None
        # The raw reward is the mean over the last 32 tokens that are read.
        assert record["parts"]["composite/reasoning_pack/raw"] == pytest.approx(r[-32:].mean(), rel=2e-3, abs=2e-3)


def test_rewards_verdicts_and_flags(trained):
    _, _, _, trace = trained
    questions = {row["prompt"]: row for row in mr.pocket.dataset("train", 16)}
    for record in trace:
        text = "".join(record["tokens"]).replace("<eos>", "")
        row = questions[record["prompt"]]
        assert record["gold"] == row["answer"]  # the first of the columns that may hold it
        assert record["right"] is (mr.verifiers.math_boxed([text], [row["solution"]])[0] is True)
        second = record["row"] % 4 == 1
        assert record["flags"] == (["second: it <b>is</b> the second"] if second else [])
        assert record["trust"] == (0.25 if second else 1.0) and record["dropped"] is False
        raw = record["parts"]["composite/reasoning_pack/raw"]
        kept = raw * 0.25 if second and raw > 0 else raw
        assert record["reward"] == pytest.approx(0.3 * kept + record["right"], abs=1e-4)
        assert record["rewards"] == {"composite": pytest.approx(record["reward"]), "ids": 0.0}
        assert record["group"] == record["row"] // 4
    for step in (1, 2):
        groups = np.array([r["advantage"] for r in trace if r["step"] == step]).reshape(2, 4)
        np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-4)  # GRPO's advantages of a group


def test_figures_of_every_step(trained):
    folder, trainer, *_ = trained
    metrics = read_jsonl(folder / "metrics.jsonl")
    logged = [log for log in trainer.state.log_history if "reward" in log]
    assert [m["step"] for m in metrics] == [1, 2]
    for got, log in zip(metrics, logged, strict=True):
        assert got["reward"] == log["reward"] and got["seconds"] > log["mechreward/hook_seconds"] > 0
        assert got["peak_memory_bytes"] > 1e8  # torch alone takes more
    width = mr.load_pack("pocket/reasoning_pack")
    assert metrics[0]["mechreward/reading_bytes"] % (8 * len(width.features) * 4) == 0
    about = json.loads((folder / "recording.json").read_text())
    assert (
        about["model"] == "mechreward/pocket" and str(mr.pocket.files()) not in (folder / "recording.json").read_text()
    )
    assert about["packs"]["pocket/reasoning_pack"]["name"] == "pocket/reasoning_pack"


def test_recording_changes_nothing(trained, tmp_path):
    other, _ = train(tmp_path, record=None)
    for name, weight in trained[1].model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
    assert not {"metrics.jsonl", "trace.jsonl", "recording.json"} & {f.name for f in tmp_path.iterdir()}


@pytest.mark.parametrize(("record", "steps"), [(2, [1, 3]), (0, [])])
def test_it_is_bounded_and_spread(tmp_path, record, steps):
    train(tmp_path, record=record, max_steps=3, max_completion_length=8)
    trace = read_jsonl(tmp_path / "trace.jsonl") if record else []
    assert [r["step"] for r in trace] == steps
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    assert (tmp_path / "trace.jsonl").exists() is bool(record)


def test_a_short_training_does_not_record_all_of_its_rollouts(tmp_path):
    train(tmp_path, max_steps=1, max_completion_length=8, per_device_train_batch_size=32)
    assert len(read_jsonl(tmp_path / "trace.jsonl")) == recording.ROLLOUTS < 32


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_rollouts_leave_the_device_in_one_piece(trained):
    """As many tensor operations, and so waits for a device, for one rollout as for eight."""
    _, trainer, _, _ = trained
    step, read, counts = trainer._step_state, trainer.passes.read, []
    for rows in ([0], list(range(8))):
        with Operations() as seen:
            records = recording.traced(step.batch, rows, trainer.processing_class, trainer.recording.rewards, read)
        assert len(records) == len(rows)
        counts.append(seen.count)
    assert counts[0] == counts[1]


def test_what_goes_wrong_ends_the_recording_and_not_the_training(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(recording, "traced", broken)
    trainer, _ = train(tmp_path, max_completion_length=8)
    assert trainer.state.global_step == 2
    assert (
        sum("No more rollouts are recorded" in r.message and "disk is full" in r.message for r in caplog.records) == 1
    )
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2 and trainer.recording.broken == {"rollouts"}


def test_a_file_of_that_name_that_is_not_ours_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("somebody's own\n")
    train(tmp_path, max_completion_length=8)
    assert (tmp_path / "metrics.jsonl.old").read_text() == "somebody's own\n"
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_wide_readouts_are_cut_to_their_heaviest_columns():
    readout = mr.load_sae(release="pocket-res-canonical", sae_id="layer_2/width_2k/canonical").features(range(50))
    weights = [(-1) ** k * (k % 40) for k in range(50)]
    kept = recording.columns(mr.FeatureReward(readout, weights))
    heaviest = sorted(sorted(range(50), key=lambda k: (-abs(weights[k]), k))[: recording.COLUMNS])
    assert kept == heaviest and len(kept) == 32
