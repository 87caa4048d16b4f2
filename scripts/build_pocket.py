"""Make `pocket` from nothing: data, tokenizer, language model, SAEs, probes, packs, model card.

    python scripts/build_pocket.py            # all stages; a finished stage is not run again
    python scripts/build_pocket.py --only lm  # one stage

Work in progress lives in `build/pocket`; what is shipped is copied to `src/mechreward/pocket/files` and
`src/mechreward/catalogs/pocket`. Seeds are fixed, and threads too, since float sums depend on them; another
machine's sums may still differ in the last bits, and so may what grows from them.
"""

import argparse
import functools
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Template
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mechreward import pocket
from mechreward.features.discover import Chance, Search, discover
from mechreward.features.judge import judge
from mechreward.features.pack import read_pack
from mechreward.pocket.questions import Kind, Question, Split, corpus_completion, questions, way_of_answering
from mechreward.probes.linear_probe import linear_probe, load_probe, save_probe
from mechreward.probes.training import calibrate, rollout_logits
from mechreward.readout import HookPoint, ReadoutBank, residual
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.sampling import sample
from mechreward.rollout.source import pooled, read_forward
from mechreward.sae import formats
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import load_sae
from mechreward.stats import auc, bootstrap
from sae_training import sae_figures

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "pocket"
SHIPPED = ROOT / "src" / "mechreward" / "pocket" / "files"

CATALOG = ROOT / "src" / "mechreward" / "catalogs" / "pocket"

LM_BATCH = 64


@dataclass(frozen=True)
class Phase:
    """A part of the language model's training."""

    steps: int
    lr: float
    largest: int  # quantity in a word problem: small numbers first
    hedged: float  # share of unknown facts
    seed: int


PHASES = [Phase(2000, 3e-3, 20, 0.65, 1), Phase(400, 1e-3, 49, 0.75, 2)]
SAE_SAMPLES, SAE_BATCH = 2_000_000, 1024
SAE_COMMON: dict[str, Any] = {
    "d_in": 128,
    "d_sae": 2048,
    "normalize_activations": "expected_average_only_in",
    "apply_b_dec_to_input": True,
}
HOOK = HookPoint(2)
ATTENTION = "eager"  # SDPA leaves Gemma-2's soft-capping out
CANONICAL = ("pocket-res-canonical", "layer_2/width_2k/canonical")
AGGREGATION = "mean_last_32_tokens"


def progress(label: str, total: int) -> tuple[Progress, TaskID]:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return bar, bar.add_task(label, total=total)


def corpus(phase: Phase) -> Iterator[tuple[str, str]]:
    """(prompt, completion) pairs: three word problems to one fact."""
    rng = random.Random(phase.seed)
    word_problems = questions("corpus", phase.seed, "reasoning", phase.largest)
    facts = questions("corpus", phase.seed, "retrieval")
    while True:
        question = next(facts if rng.random() < 0.25 else word_problems)
        yield question.prompt, corpus_completion(question, rng, phase.hedged)


def build_tokenizer() -> None:
    """Byte-level BPE on the corpus with single digits, so that any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    text = ("".join(pair) for pair in itertools.islice(corpus(replace(PHASES[0], seed=0)), 20_000))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
        "Answer:{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% else %}"
        "{{ message.content }}\n{% endif %}{% endfor %}"
    )
    fast.save_pretrained(WORK / "lm")


def lm_batch(pairs, tokenizer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and loss weights [B, T]: answers count fully, questions a tenth."""
    rows = []
    for prompt, completion in itertools.islice(pairs, size):
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = tokenizer(completion, add_special_tokens=False).input_ids
        answer_ids.append(tokenizer.eos_token_id)
        rows.append((prompt_ids + answer_ids, [0.1] * len(prompt_ids) + [1.0] * len(answer_ids)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])
    return ids, weights


def new_lm(tokenizer: Any) -> Gemma2ForCausalLM:
    """A four-layer Gemma-2 of about a million parameters."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=128,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = ATTENTION
    model = Gemma2ForCausalLM(config)
    model.generation_config.update(
        do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=64
    )
    return model


def build_lm() -> None:
    """Train the language model, small numbers first."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WORK / "lm")
    model = new_lm(tokenizer)
    for number, phase in enumerate(PHASES):
        train_lm(model, tokenizer, phase, WORK / f"lm-phase-{number}.pt")
    model.save_pretrained(WORK / "lm")


def train_lm(model: Gemma2ForCausalLM, tokenizer: Any, phase: Phase, checkpoint: Path) -> None:
    """One phase: AdamW, linear warm-up, cosine to 2 %; goes on from its checkpoint if there is one."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / phase.steps))),
    )
    pairs, first = corpus(phase), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        for _ in itertools.islice(pairs, first * LM_BATCH):
            pass
    bar, task = progress("language model", phase.steps)
    with bar:
        bar.update(task, completed=first)
        for step in range(first, phase.steps):
            ids, weights = lm_batch(pairs, tokenizer, LM_BATCH)
            logits = model(input_ids=ids[:, :-1], attention_mask=(ids != tokenizer.pad_token_id).long()[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"language model, loss {loss.item():.3f}")
            if (step + 1) % 50 == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"schedule": schedule.state_dict()}, checkpoint)


def load_lm() -> tuple[Any, Any]:
    model = Gemma2ForCausalLM.from_pretrained(WORK / "lm", attn_implementation=ATTENTION).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(WORK / "lm")


def rollouts(split: Split, kind: Kind, prompts: int, each: int, seed: int) -> tuple[RolloutBatch, list[Question]]:
    """Rollouts sampled at temperature 1, and for each the question that it answers."""
    model, tokenizer = load_lm()
    asked = list(itertools.islice(questions(split, seed, kind), prompts))
    torch.manual_seed(seed)
    batch = sample(model, tokenizer, [q.prompt for q in asked], each, batch_size=250)
    return batch, [q for q in asked for _ in range(each)]


def whole_text(batch: RolloutBatch) -> RolloutBatch:
    """The same tokens with everything after BOS counted as completion, so that prompts are read too."""
    tokens = [[*p, *c] for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    return replace(
        batch, prompt_ids=[t[:1] for t in tokens], completion_ids=[t[1:] for t in tokens], eos_token_ids=frozenset()
    )


def residual_stream(model: Any, batch: RolloutBatch) -> Tensor:
    """Every token's residual vector at the SAE's hook point but BOS's, ``[tokens, d_model]``."""
    everything, stream, vectors = whole_text(batch), residual(HOOK, model.config.hidden_size), []
    for start in range(0, len(everything), 250):
        piece = everything.take(range(start, min(start + 250, len(everything))))
        readings = read_forward(model, piece, ReadoutBank([stream]), read_last=True)[stream]
        vectors.append(readings.values[readings.mask])
    return torch.cat(vectors)


def build_activations() -> None:
    """Residual vectors of the model's own rollouts on the corpus's questions, three word problems to two facts."""
    model, _ = load_lm()
    texts = [rollouts("corpus", "reasoning", 9000, 1, 100)[0], rollouts("corpus", "retrieval", 6000, 1, 100)[0]]
    save_file({"residual": torch.cat([residual_stream(model, b) for b in texts])}, WORK / "activations.safetensors")


def shuffled(vectors: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(vectors), generator=generator).split(size):
            if len(index) == size:
                yield vectors[index]


def train_sae(sae: Any, folder: str, lr: float, dead_window: int) -> None:
    """Train with SAELens' own trainer on activations that our hooks captured, and save in SAELens' format."""
    vectors = load_file(WORK / "activations.safetensors")["residual"]
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = pocket.MODEL_ID, str(HOOK)
    settings = SAETrainerConfig(
        total_training_samples=SAE_SAMPLES,
        train_batch_size_samples=SAE_BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=100,
        lr_decay_steps=SAE_SAMPLES // SAE_BATCH // 3,
        dead_feature_window=dead_window,
        n_batches_for_norm_estimate=100,
    )
    SAETrainer(settings, sae, shuffled(vectors, SAE_BATCH, seed=1)).fit()
    sae.save_inference_model(WORK / "saes" / folder)


def build_jumprelu() -> None:
    """SAELens' BatchTopK, whose auxiliary loss keeps latents alive, saved as the JumpReLU that it becomes."""
    torch.manual_seed(0)
    train_sae(
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SAE_COMMON, k=24)), "jumprelu", lr=1e-3, dead_window=300
    )


def build_topk() -> None:
    torch.manual_seed(0)
    train_sae(TopKTrainingSAE(TopKTrainingSAEConfig(**SAE_COMMON, k=32)), "topk", lr=3e-3, dead_window=20)


def measured(sae: SAEHandle) -> dict[str, float]:
    """FVU, L0 and cross-entropy recovered on the test split; latents that never fire in all that was trained on."""
    model, _ = load_lm()
    batches = [rollouts("test", "reasoning", 900, 1, 7)[0], rollouts("test", "retrieval", 300, 1, 7)[0]]
    held_out = [[*p, *c] for batch in batches for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    seen = load_file(WORK / "activations.safetensors")["residual"].split(4096)
    figures = sae_figures(model, sae, held_out, seen)
    return {name: figures[name] for name in ("fvu", "l0", "dead", "cross_entropy_recovered", "tokens")}


def final_answer(text: str) -> str:
    return text.rsplit("####", 1)[-1].strip() if "####" in text else ""


def is_right(batch: RolloutBatch, asked: list[Question]) -> np.ndarray:
    return np.array([final_answer(t) == q.answer for t, q in zip(batch.texts, asked, strict=True)])


@dataclass
class Behaviour:
    """What a pack or probe is to detect: which rollouts count, and which of them show it."""

    name: str
    description: str
    kind: Kind
    label: Callable[[Question, str], bool]
    counts: Callable[[Question, str], bool] = lambda question, text: True


def answered(question: Question, text: str) -> bool:
    return final_answer(text) not in ("", "unknown")


BEHAVIOURS = [
    Behaviour(
        "reasoning",
        "The final answer to a word problem is right.",
        "reasoning",
        lambda q, text: final_answer(text) == q.answer,
    ),
    Behaviour(
        "retrieval",
        "A fact about a person from the corpus is recalled rightly, as opposed to a hedge or an invention.",
        "retrieval",
        lambda q, text: q.known and final_answer(text) == q.answer,
    ),
    Behaviour(
        "confidence",
        "A fact that is stated without hedging is true, as opposed to made up.",
        "retrieval",
        lambda q, text: final_answer(text) == q.answer,
        answered,
    ),
]
PROBES = {
    "correctness_probe": BEHAVIOURS[0],
    "fact_retrieval_probe": BEHAVIOURS[1],
}


@functools.cache
def labelled(split: Split, name: str) -> Labelled:
    """Rollouts of one split, with what is to be predicted."""
    behaviour = next(b for b in BEHAVIOURS if b.name == name)
    batch, asked = rollouts(split, behaviour.kind, 400 if behaviour.kind == "reasoning" else 800, 4, 11)
    readable = batch.mask().any(dim=1).tolist()
    keep = [
        i for i, (q, t) in enumerate(zip(asked, batch.texts, strict=True)) if readable[i] and behaviour.counts(q, t)
    ]
    batch, asked = batch.take(keep), [asked[i] for i in keep]
    _, groups = np.unique(np.array(batch.prompts), return_inverse=True)
    return Labelled(
        batch=batch,
        labels=np.array([behaviour.label(q, t) for q, t in zip(asked, batch.texts, strict=True)]),
        groups=groups,
        source=f"{len(keep)} rollouts of pocket on its {split} split, seed 11",
        temperature=1.0,
        ways=ways(batch, asked),
    )


def ways(batch: RolloutBatch, asked: list[Question]) -> list[str]:
    if asked[0].kind == "reasoning":
        return [way_of_answering(t, q) for t, q in zip(batch.texts, asked, strict=True)]
    return ["confident" if answered(q, t) else "hedged" for t, q in zip(batch.texts, asked, strict=True)]


def build_packs() -> None:
    """Choose features on one split, measure their evidence on another."""
    model, tokenizer = load_lm()
    shutil.copytree(WORK / "saes", SHIPPED / "saes", dirs_exist_ok=True)  # packs name the shipped dictionary
    for behaviour in BEHAVIOURS:
        found = discover(
            model,
            tokenizer,
            labelled("discovery", behaviour.name),
            [load_sae(*CANONICAL)],
            name=f"pocket/{behaviour.name}_pack",
            behaviour=behaviour.description,
            search=Search(aggregation=AGGREGATION),
        )
        chance = Chance(found.saes, found.chance, found.asked)
        pack = judge(found.pack, model, tokenizer, labelled("gate", behaviour.name), chance)
        made = {"made_by": "scripts/build_pocket.py"}
        pack = pack.model_copy(update={"licence": "Apache-2.0", "provenance": pack.provenance | made})
        pack.write(WORK / "catalog" / f"{behaviour.name}_pack.json")
        print(behaviour.name, pack.status_reason, flush=True)


def build_probes() -> None:
    """Logistic probes on residual vectors averaged over a rollout: linear, so the mean of logits is the logit."""
    model, _ = load_lm()
    stream = residual(HOOK, model.config.hidden_size)
    for name, behaviour in PROBES.items():
        found, held_out = labelled("discovery", behaviour.name), labelled("gate", behaviour.name)
        x, x_held_out = (
            torch.cat(list(pooled(model, data.batch, [stream], AGGREGATION))).numpy() for data in (found, held_out)
        )
        mean, scale = x.mean(axis=0), x.std(axis=0)
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit((x - mean) / scale, found.labels)
        weight = fitted.coef_[0] / scale
        bias = float(fitted.intercept_[0] - weight @ mean)
        logits = x_held_out @ weight + bias
        held_out_auc = bootstrap(auc, logits, held_out.labels, groups=held_out.groups)
        card = {
            "description": behaviour.description,
            "aggregation": AGGREGATION,
            "trained_on": f"{len(x)} rollouts of the discovery split",
            "evidence": {
                "n": len(logits),
                "auc": held_out_auc.model_dump(),
                "data": "rollouts of the gate split, seed 11, which training never saw",
            },
            "licence": "Apache-2.0",
        }
        probe = linear_probe(f"pocket/{name}", torch.tensor(weight), bias, HOOK, pocket.MODEL_ID)
        save_probe(probe, WORK / "catalog" / name, card)
        print(name, held_out_auc, flush=True)


def calibrate_probes() -> None:
    """Platt scaling on the gate split, which did not choose the weights; these stay as they are."""
    model, _ = load_lm()
    for name, behaviour in PROBES.items():
        held_out, file = labelled("gate", behaviour.name), WORK / "catalog" / name
        probe = load_probe(str(file))
        fitted = calibrate(rollout_logits(model, held_out, probe), held_out.labels, held_out.groups)
        save_probe(probe, file, {"calibration": fitted.model_dump()})
        print(name, fitted.brier, fitted.ece, flush=True)


def language_figures() -> dict[str, Any]:
    """What the language model can do, sampled at temperature 1 on the test split."""
    batch, asked = rollouts("test", "reasoning", 1000, 1, 5)
    right = is_right(batch, asked)
    how = [way_of_answering(t, q) for t, q in zip(batch.texts, asked, strict=True)]
    told: dict[bool, np.ndarray] = {}
    sources: list[tuple[Split, bool]] = [("corpus", True), ("test", False)]
    for split, known in sources:  # all facts that were trained on; people never heard of
        facts, about = rollouts(split, "retrieval", 2000, 1, 5)
        told[known] = is_right(facts, about)[[q.known is known for q in about]]
    return {
        "parameters": sum(p.numel() for p in load_lm()[0].parameters()),
        "accuracy": right.mean(),
        "ways": {way: how.count(way) / len(how) for way in ("careful", "careless", "direct", "other")},
        "accuracy_of_careful": right[[way == "careful" for way in how]].mean(),
        "known_facts_right": told[True].mean(),
        "unknown_facts_hedged": told[False].mean(),
        "n": {"reasoning": len(right), "known": len(told[True]), "unknown": len(told[False])},
    }


def build_card() -> None:
    """Measure everything, write the model card, and copy what is shipped."""
    figures: dict[str, Any] = language_figures()
    for kind in ("jumprelu", "topk"):
        figures[f"sae_{kind}"] = measured(formats.saelens(WORK / "saes" / kind))
    rounded = json.loads(json.dumps(figures, default=float), parse_float=lambda text: round(float(text), 4))
    for folder in (SHIPPED, CATALOG):
        shutil.rmtree(folder, ignore_errors=True)
    load_lm()[0].save_pretrained(SHIPPED / "model")
    load_lm()[1].save_pretrained(SHIPPED / "model")
    file = SHIPPED / "model" / "config.json"
    # Which `save_pretrained` leaves out: everything was measured so, and older transformers would choose SDPA.
    config = json.loads(file.read_text()) | {"attn_implementation": ATTENTION}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copytree(WORK / "saes", SHIPPED / "saes")
    shutil.copytree(WORK / "catalog", CATALOG)
    (SHIPPED / "figures.json").write_text(json.dumps(rounded, indent=2) + "\n")
    write_readme()
    print(json.dumps(rounded, indent=2))


def write_readme() -> None:
    """The model card, from what is shipped."""
    figures = json.loads((SHIPPED / "figures.json").read_text())
    template = (ROOT / "scripts" / "pocket_card.md.j2").read_text()
    packs = [read_pack(CATALOG / f"{behaviour.name}_pack.json") for behaviour in BEHAVIOURS]
    probes = [json.loads((CATALOG / f"{name}.json").read_text()) for name in PROBES]
    card = Template(template, trim_blocks=True, lstrip_blocks=True).render(f=figures, packs=packs, probes=probes)
    (SHIPPED / "README.md").write_text(card + "\n")


STAGES = {
    "tokenizer": build_tokenizer,
    "lm": build_lm,
    "activations": build_activations,
    "jumprelu": build_jumprelu,
    "topk": build_topk,
    "probes": build_probes,
    "calibration": calibrate_probes,
    "packs": build_packs,
    "card": build_card,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run this stage alone, again if it is finished")
    only = parser.parse_args().only
    torch.set_num_threads(2)
    WORK.mkdir(parents=True, exist_ok=True)
    done_file = WORK / "done.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    for name, stage in STAGES.items():
        if name != only and (only or name in done):
            continue
        began = time.monotonic()
        stage()
        done[name] = round(time.monotonic() - began)
        done_file.write_text(json.dumps(done, indent=2))
        print(f"{name}: {done[name]} s", flush=True)


if __name__ == "__main__":
    main()
