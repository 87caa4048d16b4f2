"""pocket: its questions, and the figures on its card, measured again on the shipped files."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechreward as mr
from mechreward.aggregation import aggregation
from mechreward.errors import CandidateWarning, ConfigError
from mechreward.pocket.questions import (
    KNOWN_PEOPLE,
    SPLITS,
    Question,
    questions,
    split_of,
    step_accuracy,
    way_of_answering,
)
from mechreward.readout import ReadoutBank
from mechreward.rollout.hf import HFSource, read_forward, sample
from mechreward.stats import auc

FIGURES = json.loads((mr.pocket.files() / "figures.json").read_text())


@pytest.fixture(scope="module")
def pocket():
    model = AutoModelForCausalLM.from_pretrained(mr.pocket.path()).eval()
    return model, AutoTokenizer.from_pretrained(mr.pocket.path())


def drawn(split, n, seed=0, kind="reasoning") -> list[Question]:
    return list(itertools.islice(questions(split, seed, kind), n))


class TestQuestions:
    def test_answers_by_hand(self):
        """Each solution's steps, worked again with plain arithmetic on the question's own text."""
        for q in drawn("test", 300):
            total = q.start
            for change in q.changes:
                total += change
                assert 0 <= total <= 99
            assert q.answer == str(total) and q.solution.endswith(f"#### {total}")
            assert all(f" {abs(n)}" in q.prompt for n in [q.start, *q.changes, *q.distractors])
            assert 2 <= len(q.changes) <= 4 and q.distractors
            for step in q.solution.split("\n")[0].split():
                left, right = step.rstrip(".").split("=")
                assert eval(left) == int(right)

    def test_splits_never_share_a_question(self):
        seen = {}
        for split in SPLITS:
            for seed in (0, 1):
                for kind in ("reasoning", "retrieval"):
                    for q in drawn(split, 400, seed, kind):
                        if split == "corpus" and q.kind == "retrieval" and q.known:
                            continue  # the corpus holds every fact
                        assert seen.setdefault(q.prompt, split) == split == split_of(q.prompt)

    def test_seeds_are_reproducible_and_different(self):
        assert drawn("train", 50) == drawn("train", 50) != drawn("train", 50, seed=1)

    def test_known_means_known(self):
        for q in drawn("gate", 200, kind="retrieval"):
            named = any(f" {name} " in q.prompt or f" {name}?" in q.prompt for name in KNOWN_PEOPLE)
            assert q.known == named == (q.answer != "unknown")

    def test_ways_and_steps(self):
        q = Question("", "16", " 12+7=19. 19-3=16.\n#### 16", "reasoning", True, 12, (7, -3), (5,))
        assert way_of_answering(q.solution, q) == "careful" and step_accuracy(q.solution, q.solution) == 1
        assert way_of_answering(" 12+7=19. 19-3=16. 16+5=21.\n#### 21", q) == "careless"
        assert way_of_answering("\n#### 16", q) == "direct" and way_of_answering("no idea", q) == "other"
        assert step_accuracy(" 12+7=18. 18-3=15.\n#### 15", q.solution) == 0
        assert step_accuracy(" 12+7=19. 19-3=15.\n#### 15", q.solution) == 0.5

    def test_typos(self):
        with pytest.raises(ConfigError, match="Did you mean 'train'"):
            mr.pocket.dataset("trian")
        with pytest.raises(ConfigError, match="Did you mean 'retrieval'"):
            mr.pocket.dataset("train", kind="retreival")

    def test_dataset(self):
        data = mr.pocket.dataset("train", 20)
        assert set(data.column_names) == {"prompt", "solution", "answer", "kind", "known"} and len(data) == 20
        assert mr.verifiers.math_boxed(data["solution"], data["answer"]) == [True] * 20


def within(found: float, claimed: float, n: int) -> bool:
    """Whether two measurements of a proportion, ours on n and the card's on as many or more, agree (4 s.e.)."""
    return abs(found - claimed) <= 4 * (2 * max(claimed * (1 - claimed), 0.01) / n) ** 0.5


class TestCard:
    def test_the_figures_meet_what_was_set_out(self):
        assert 1e6 <= FIGURES["parameters"] <= 2e6
        assert 0.25 <= FIGURES["accuracy"] <= 0.45
        assert FIGURES["known_facts_right"] >= 0.95
        assert 0.5 <= FIGURES["unknown_facts_hedged"] <= 0.8
        for kind, dead in (("jumprelu", 0.10), ("topk", 0.02)):
            sae = FIGURES[f"sae_{kind}"]
            assert sae["fvu"] <= 0.05 and sae["l0"] <= 32 and sae["cross_entropy_recovered"] >= 0.97
            assert sae["dead"] <= dead

    def test_reasoning(self, pocket):
        model, tokenizer = pocket
        asked = drawn("test", 400, seed=77)  # other questions than the card's
        torch.manual_seed(77)
        texts = sample(model, tokenizer, [q.prompt for q in asked], 1).texts
        right = [v is True for v in mr.verifiers.math_boxed(texts, [q.answer for q in asked])]
        careful = [way_of_answering(t, q) == "careful" for t, q in zip(texts, asked, strict=True)]
        assert within(sum(right) / 400, FIGURES["accuracy"], 400)
        assert within(sum(careful) / 400, FIGURES["ways"]["careful"], 400)

    def test_facts(self, pocket):
        model, tokenizer = pocket
        asked = [q for q in drawn("corpus", 400, seed=78, kind="retrieval") if q.known]
        asked += [q for q in drawn("test", 400, seed=78, kind="retrieval") if not q.known]
        torch.manual_seed(78)
        texts = sample(model, tokenizer, [q.prompt for q in asked], 1).texts
        right = mr.verifiers.exact_match(texts, [q.answer for q in asked])
        known = [r for r, q in zip(right, asked, strict=True) if q.known]
        unknown = [r for r, q in zip(right, asked, strict=True) if not q.known]
        assert within(sum(known) / len(known), FIGURES["known_facts_right"], len(known))
        # Unknown people repeat: some sixty questions, so the effective n is smaller.
        assert within(sum(unknown) / len(unknown), FIGURES["unknown_facts_hedged"], 60)

    @pytest.mark.parametrize("kind", ["canonical", "topk"])
    def test_saes_reconstruct_as_the_card_says(self, pocket, kind):
        """FVU and L0 by SAELens' own encode and decode, on HF's own hidden states."""
        from sae_lens import SAE

        model, tokenizer = pocket
        folder = {"canonical": "jumprelu", "topk": "topk"}[kind]
        sae = SAE.load_from_disk(str(mr.pocket.files() / "saes" / folder), device="cpu")
        texts = [q.prompt + q.solution for q in drawn("test", 150, seed=5)]
        vectors = []
        with torch.no_grad():
            for text in texts:
                ids = tokenizer(text, return_tensors="pt").input_ids
                vectors.append(model(input_ids=ids, output_hidden_states=True).hidden_states[3][0, 1:])
            x = torch.cat(vectors)
            features = sae.encode(x)
            missed = (x - sae.decode(features)).square().sum() / (x - x.mean(0)).square().sum()
        card = FIGURES[f"sae_{folder}"]
        assert missed.item() == pytest.approx(card["fvu"], abs=0.02)
        assert (features > 0).float().sum(1).mean().item() == pytest.approx(card["l0"], abs=4)

    @pytest.mark.parametrize("kind", ["jumprelu", "topk"])
    def test_cross_entropy_recovered(self, pocket, kind):
        """SAELens' own reconstruction in place of layer 2's output (BOS stays), against zeros."""
        from sae_lens import SAE

        model, tokenizer = pocket
        sae = SAE.load_from_disk(str(mr.pocket.files() / "saes" / kind), device="cpu")
        texts = [tokenizer(q.prompt + q.solution, return_tensors="pt").input_ids for q in drawn("test", 60, seed=6)]

        def loss(replacement):
            def hook(_module, _args, output):
                hidden = output[0] if isinstance(output, tuple) else output
                new = torch.cat([hidden[:, :1], replacement(hidden[:, 1:])], dim=1)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = model.model.layers[2].register_forward_hook(hook)
            with torch.no_grad():
                mean = sum(model(input_ids=ids, labels=ids).loss.item() for ids in texts) / len(texts)
            handle.remove()
            return mean

        clean, rebuilt, zero = loss(lambda x: x), loss(lambda x: sae.decode(sae.encode(x))), loss(torch.zeros_like)
        assert zero > clean + 1
        claimed = FIGURES[f"sae_{kind}"]["cross_entropy_recovered"]
        assert (zero - rebuilt) / (zero - clean) == pytest.approx(claimed, abs=0.02)


PACKS = ["reasoning", "retrieval", "confidence"]


@pytest.fixture(scope="module", params=PACKS)
def measured(request, pocket):
    """A pack, and fresh rollouts of its kind with the behaviour's label."""
    model, tokenizer = pocket
    kind = "reasoning" if request.param == "reasoning" else "retrieval"
    asked = drawn("gate", 150, seed=91, kind=kind)
    torch.manual_seed(91)
    batch = sample(model, tokenizer, [q.prompt for q in asked], 4)
    asked = [q for q in asked for _ in range(4)]
    final = [t.rsplit("####", 1)[-1].strip() if "####" in t else "" for t in batch.texts]
    known = {
        "reasoning": lambda q, f: f == q.answer,
        "retrieval": lambda q, f: q.known and f == q.answer,
        "confidence": lambda q, f: f == q.answer,
    }[request.param]
    keep = [request.param != "confidence" or f not in ("", "unknown") for f in final]
    labels = [known(q, f) for q, f in zip(asked, final, strict=True)]
    return request.param, batch, labels, keep


class TestPacks:
    @pytest.mark.slow
    def test_evidence_holds_on_fresh_rollouts(self, measured, pocket):
        name, batch, labels, keep = measured
        pack = mr.load_pack(f"pocket/{name}_pack")
        with pytest.warns(CandidateWarning) if pack.status == "candidate" else _nothing():
            reward = mr.FeatureReward.from_pack(pack)
        scores = reward(batch.prompts, batch.completions, batch.completion_ids, source=HFSource(*pocket))
        usable = [k and s is not None for k, s in zip(keep, scores, strict=True)]
        found = auc(
            [s for s, u in zip(scores, usable, strict=True) if u], [x for x, u in zip(labels, usable, strict=True) if u]
        )
        interval = pack.evidence.auc  # wide where few people are asked about: their rollouts are not independent
        assert interval.low - 0.03 <= found <= interval.high + 0.03
        assert pack.evidence.n >= 1000 and pack.evidence.p_value is not None

    def test_status_follows_the_evidence(self):
        for name in PACKS:
            pack = mr.load_pack(f"pocket/{name}_pack")
            assert (pack.status == "validated") == all(t.passed for t in pack.evidence.verdict)
            assert pack.status == "validated" or pack.status_reason


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("name", ["correctness_probe", "fact_retrieval_probe"])
@pytest.mark.slow
def test_probe_evidence_holds_on_fresh_rollouts(pocket, name):
    model, tokenizer = pocket
    kind = "reasoning" if name == "correctness_probe" else "retrieval"
    asked = drawn("gate", 150, seed=92, kind=kind)
    torch.manual_seed(92)
    batch = sample(model, tokenizer, [q.prompt for q in asked], 4)
    asked = [q for q in asked for _ in range(4)]
    final = [t.rsplit("####", 1)[-1].strip() if "####" in t else "" for t in batch.texts]
    labels = [f == q.answer and (kind == "reasoning" or q.known) for q, f in zip(asked, final, strict=True)]
    probe = mr.load_probe(f"pocket/{name}")
    read = read_forward(model, batch, ReadoutBank([probe]))[probe]
    scores = aggregation("mean_last_32_tokens")(read.values[..., 0], read.mask).nan_to_num()
    card = json.loads((mr.pocket.files().parent.parent / "catalogs" / "pocket" / f"{name}.json").read_text())
    assert auc(scores.numpy(), labels) == pytest.approx(card["evidence"]["auc"]["value"], abs=0.06)
    calibration = card["calibration"]
    chance = torch.sigmoid(calibration["slope"] * scores + calibration["intercept"])
    reward = mr.FeatureReward(probe)
    found = reward.score(batch, {reward.request: read}).values
    torch.testing.assert_close(found[~found.isnan()], chance[~found.isnan()])
    right, brier = torch.tensor(labels).float(), calibration["brier"]
    assert brier["low"] - 0.03 <= float((chance - right).square().mean()) <= brier["high"] + 0.03
    assert float(chance.mean()) == pytest.approx(float(right.mean()), abs=0.04 + calibration["ece"])


def test_model_id_resolves():
    assert mr.pocket.resolve("mechreward/pocket") == mr.pocket.path()
    assert mr.pocket.resolve("google/gemma-2-2b") == "google/gemma-2-2b"


def test_text_round_trip(pocket):
    _, tokenizer = pocket
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(chr(rng.choice([rng.randint(32, 126), rng.randint(160, 0x2FFF)])) for _ in range(40))
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
