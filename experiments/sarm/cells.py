"""Experiment 04: does SARM's sparse autoencoder help a reward model, and what is such a model worth as a reward?

Three stages, each of which skips what it finds finished in the experiment's folder:

- *pairs*: preferences, read from a file or the hub; or, on `pocket`, sampled from the model itself and judged by the
  verifier, right answers preferred to wrong ones of the same question;
- *models*: for every seed, reward models that differ in one thing each, and what else can rank a pair;
- *grpo*: some of them as the only reward of a policy, at the budget of experiments 01 to 03.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import hashlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechreward import pocket, verifiers
from mechreward.errors import ConfigError, DataError, MechRewardError, nearest
from mechreward.experiments import arms, runner
from mechreward.experiments.config import Arm, Count, ExperimentConfig, Positive, Text, read_config
from mechreward.integrations.recording import ENVIRONMENT, environment, write_json
from mechreward.pocket.questions import OTHER_WORDING, WORDING, corpus_completion, questions
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.hf import HFSource, load_model
from mechreward.rollout.labelled import sample_rollouts
from mechreward.schema import Strict
from sarm import model as method
from sarm.model import Mode, Recipe, Reconstructs, Sarm, SarmReward, SarmSettings, Tokens, TopKSAE
from sarm.preferences import Preference, read_preferences, write_preferences

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


# -- configuration ----------------------------------------------------------------------------------------------------


class Pairs(Strict):
    """Where preference pairs come from.

    Attributes:
        path: A ``.jsonl`` or ``.jsonl.gz`` file, a dataset on the hub; ``mechreward/pocket``: the model's own answers.
        split: Of the hub's dataset, or of pocket's questions.
        first: Rows that are passed over.
        rows: How many after these; of pocket, questions.
        rollouts: Of pocket: sampled for each question.
        per_question: Of pocket: pairs of a question at most.
        steps: Of pocket: the fewest and the most steps of a problem.
        wording: Of pocket: ``usual``, or ``other``, sentences that the model has never seen.
    """

    path: Text
    split: Text = "train"
    first: Count = 0
    rows: Positive | None = None
    rollouts: Positive = 6
    per_question: Positive = 2
    steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [2, 4])
    wording: Literal["usual", "other"] = "usual"

    @model_validator(mode="after")
    def _ends(self) -> Pairs:
        if self.path == pocket.MODEL_ID and self.rows is None:
            raise ValueError("has no rows, but pocket makes questions without end: say how many")
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"has steps {self.steps}: give the fewest first")
        return self


class Pretraining(Strict):
    """How the sparse autoencoder is made.

    Attributes:
        checkpoint: A published autoencoder instead, for ``encoder: sequence``.
        corpus: So many texts of pocket's own corpus; by default both sides of the training pairs.
        epochs, batch_size, learning_rate: As in :class:`sarm.model.Recipe`.
    """

    checkpoint: Text | None = None
    corpus: Positive | None = None
    epochs: Positive = 1
    batch_size: Positive = 512
    learning_rate: Rate = 1e-3


class RewardModel(Strict):
    """What all reward models of the experiment have in common.

    Attributes:
        layers: L, the decoder layers that are kept.
        latents, k: Of the sparse autoencoder.
        rec_lambda, reconstructs: See :class:`sarm.model.SarmSettings`.
        max_length: Tokens; pairs with a longer side are left out, and counted.
        pretraining: Of the sparse autoencoder.
        learning_rate: Of all that is trained.
        frozen_learning_rates: In place of it in mode 0, where it costs little to try several: each model takes the one
            with the lowest preference loss on a tenth of the training prompts, which it then does not learn from.
        epochs, batch_size, micro_batch, warmup, weight_decay, bf16: As in :class:`sarm.model.Recipe`.
    """

    layers: Positive
    latents: Positive
    k: Positive
    rec_lambda: Annotated[float, Field(ge=0)] = 1.0
    reconstructs: Reconstructs = "completion"
    max_length: Positive = 512
    pretraining: Pretraining = Pretraining()
    learning_rate: Rate
    frozen_learning_rates: Annotated[list[Rate], Field(min_length=1)] | None = None
    epochs: Positive = 3
    batch_size: Positive = 32
    micro_batch: Positive | None = None
    warmup: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    bf16: bool = False


class Cell(Strict):
    """One way of ranking a pair; cells differ in nothing else.

    Attributes:
        head: ``sarm``; ``dense``, a linear head on the z-scored vector itself; ``features``, a pack's reward with no
            training; ``length``, the number of tokens, with the sign that is right more often in training.
        mode: The train mode, for ``sarm`` and ``dense``.
        use_topk: Whether the head of ``sarm`` reads the k largest latents, or all pre-activations.
        encoder: Of ``sarm``: pretrained on last tokens (``sequence``), on as many vectors of all tokens (``token``), or
            not at all (``random``).
        shuffled: In training, which side is preferred is decided by a coin.
        pack: For ``features``.
    """

    head: Literal["sarm", "dense", "features", "length"]
    mode: Mode | None = None
    use_topk: bool | None = None
    encoder: Literal["sequence", "token", "random"] | None = None
    shuffled: bool = False
    pack: Text | None = None

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Cell:
        needs = {
            "sarm": {"mode", "use_topk", "encoder"},
            "dense": {"mode"},
            "features": {"pack"},
            "length": set(),
        }[self.head]
        for name in ("mode", "use_topk", "encoder", "pack"):
            if (getattr(self, name) is not None) != (name in needs):
                raise ValueError(f"has head {self.head}, which {'needs' if name in needs else 'has no'} {name}")
        return self


class SarmArm(Arm):
    """As in other experiments; or a cell of this one as the only reward.

    Attributes:
        cell: The reward model, trained with the run's own seed.
    """

    cell: Text | None = None

    @model_validator(mode="after")
    def _rewards_something(self) -> SarmArm:
        if self.cell is None:
            return super()._rewards_something()  # pyright: ignore[reportCallIssue, reportReturnType]
        if self.outcome or self.features is not None:
            raise ValueError("has a cell, which is rewarded alone here: leave outcome and features out")
        return self


class SarmGrpo(ExperimentConfig):
    """GRPO as in experiments 01 to 03; its ``output`` holds the policies."""

    arms: dict[str, SarmArm] = Field(min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]


class SarmConfig(Strict):
    """Experiment 04.

    Attributes:
        output: Folder for pairs and reward models.
        name: Of the results, ``experiments/results/<name>.{json,md}``.
        model: ``mechreward/pocket``, a folder, or a model on the Hugging Face hub.
        verifier: That judges sampled answers.
        train: Pairs to learn from.
        test: Sets of pairs to be measured on; the first is in distribution.
        reward_model, cells: See there.
        main: The cell that the others are compared with.
        grpo: Policies trained with the cells' rewards.
        stored: Results of experiments 01 to 03 at the same budget, to compare the policies with.
        seeds: One reward model of every cell for each.
    """

    output: Text
    name: Text
    model: Text
    verifier: Literal["math_boxed", "gsm8k", "exact_match"] = "math_boxed"
    train: Pairs
    test: Annotated[dict[str, Pairs], Field(min_length=1)]
    reward_model: RewardModel
    cells: Annotated[dict[str, Cell], Field(min_length=1)]
    main: Text
    grpo: SarmGrpo | None = None
    stored: Text | None = None
    seeds: Annotated[list[Count], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_its_cells(self) -> SarmConfig:
        wanted = {"main": self.main}
        if self.grpo is not None:
            wanted |= {f"grpo.arms.{name}.cell": arm.cell for name, arm in self.grpo.arms.items() if arm.cell}
            if missing := set(self.grpo.seeds) - set(self.seeds):
                raise ValueError(
                    f"has no reward models of seed {min(missing)}, which grpo.seeds names: add it to seeds"
                )
        for key, cell in wanted.items():
            if cell not in self.cells:
                raise ValueError(f"has {key}: {cell}, but no such cell: there are {', '.join(self.cells)}")
            if self.cells[cell].head not in ("sarm", "dense"):
                raise ValueError(f"has {key}: {cell}, which is not trained: name a cell with head sarm or dense")
        return self


# -- pairs ------------------------------------------------------------------------------------------------------------


def prepared_pairs(config: SarmConfig, name: str, source: Pairs) -> list[Preference]:
    """A set's pairs: read, or sampled once and kept in the experiment's folder."""
    if source.path != pocket.MODEL_ID:
        wanted = None if source.rows is None else source.first + source.rows
        pairs = read_preferences(source.path, source.split, wanted)[source.first :]
        if not pairs:
            raise DataError(f"{source.path} has no pairs after the first {source.first}.")
        return pairs
    decides = {"model": config.model, "verifier": config.verifier, **source.model_dump()}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    file = Path(config.output) / "pairs" / f"{name.replace(' ', '-')}-{digest}.jsonl"
    if not file.exists():
        write_preferences(sampled_pairs(config, source), file)
    return read_preferences(file)


def sampled_pairs(config: SarmConfig, source: Pairs) -> list[Preference]:
    """The model's own right and wrong answers to the same questions, as texts; no text is used twice."""
    model, tokenizer = load_model(config.model)
    wording = WORDING if source.wording == "usual" else OTHER_WORDING
    low, high = source.steps
    stream = questions(source.split, steps=(low, high), wording=wording)  # pyright: ignore[reportArgumentType]
    asked = list(itertools.islice(stream, source.first, source.first + (source.rows or 0)))
    found = sample_rollouts(
        model,
        tokenizer,
        {"prompt": [q.prompt for q in asked], "answer": [q.answer for q in asked]},
        getattr(verifiers, config.verifier),
        source.rollouts,
        f"{source.path} ({source.split})",
        seed=0,
        batch_size=512,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64 if high <= 4 else 96,
    )
    pairs, texts = [], found.batch.texts
    for group in np.unique(found.groups):
        rows = np.flatnonzero(found.groups == group)
        right, wrong = (list(dict.fromkeys(texts[i] for i in rows if found.labels[i] == label)) for label in (1, 0))
        prompt = found.batch.prompts[rows[0]]
        both = list(zip(right, wrong, strict=False))[: source.per_question]
        pairs += [Preference(prompt, chosen, rejected) for chosen, rejected in both]
    return pairs


@dataclasses.dataclass(frozen=True)
class PairSet:
    """A set of pairs that fit into the model's length.

    Attributes:
        pairs: As text.
        tokens: As the reward model reads them.
        groups: Number of each one's prompt, ``[P]``: pairs of one prompt are alike.
        left_out: How many were too long.
    """

    pairs: list[Preference]
    tokens: list[tuple[Tokens, Tokens]]
    groups: NDArray[np.int64]
    left_out: int

    @classmethod
    def of(cls, pairs: Sequence[Preference], tokenizer: Any, longest: int) -> PairSet:
        tokens = [method.encoded_pair(tokenizer, pair) for pair in pairs]
        kept = [i for i, sides in enumerate(tokens) if max(len(side.ids) for side in sides) <= longest]
        if not kept:
            raise DataError(f"All {len(pairs)} pairs are longer than max_length = {longest} tokens: raise it.")
        _, groups = np.unique([json.dumps(pairs[i].prompt) for i in kept], return_inverse=True)
        return cls([pairs[i] for i in kept], [tokens[i] for i in kept], groups, len(pairs) - len(kept))

    def count(self) -> dict[str, int]:
        """How many pairs, of how many prompts, and how many more were too long."""
        return {"pairs": len(self.pairs), "prompts": len(np.unique(self.groups)), "left_out": self.left_out}


# -- reward models ----------------------------------------------------------------------------------------------------


class Workshop:
    """What all cells share: pairs, texts, and what the untrained model reads of them, each made when first needed."""

    def __init__(self, config: SarmConfig, tell: Callable[[str], None] = print):
        self.config, self.tell, self.folder = config, tell, Path(config.output)
        self._vectors: dict[str, Tensor] = {}
        self._pretrained: dict[tuple[str, int], tuple[TopKSAE, float | None]] = {}

    @cached_property
    def sets(self) -> dict[str, PairSet]:
        """``train``, and the sets to be measured on.

        Raises:
            DataError: A prompt with the same chosen answer is in the training pairs and in a test set. (Prompts may
                come again with other answers.)
        """
        _, tokenizer = self.untrained
        sets = {}
        for name, source in {"train": self.config.train, **self.config.test}.items():
            pairs = prepared_pairs(self.config, name, source)
            sets[name] = PairSet.of(pairs, tokenizer, self.config.reward_model.max_length)
            self.tell(f"{name}: {len(sets[name].pairs)} pairs, {sets[name].left_out} too long")
        learnt = {json.dumps([pair.prompt, pair.chosen]) for pair in sets["train"].pairs}
        for name in self.config.test:
            if any(json.dumps([pair.prompt, pair.chosen]) in learnt for pair in sets[name].pairs):
                raise DataError(f"A pair of test set '{name}' is in the training pairs too: choose others.")
        return sets

    @cached_property
    def untrained(self) -> tuple[Sarm, Any]:
        """The truncated decoder as it was before, and the tokenizer."""
        settings = SarmSettings(self.config.reward_model.layers, False, 0)
        return method.new_sarm(self.config.model, settings, None)

    def vectors(self, name: str) -> Tensor:
        """z-scored last-token vectors of a set's pairs by the untrained decoder, ``[P, 2, d_model]``; kept on disk."""
        pairs = self.sets[name]
        texts = [side for both in pairs.tokens for side in both]
        return self._kept("last", texts, method.read_vectors).view(len(pairs.pairs), 2, -1)

    def texts(self) -> list[Tokens]:
        """What the sparse autoencoder is pretrained on."""
        _, tokenizer = self.untrained
        count = self.config.reward_model.pretraining.corpus
        if count is None:
            return [side for both in self.sets["train"].tokens for side in both]
        rng = random.Random("texts for SARM's autoencoder")
        asked = itertools.islice(questions("corpus", seed=1), count)
        return [method.encoded(tokenizer, q.prompt, corpus_completion(q, rng, 0.6)) for q in asked]

    def pretraining_vectors(self, kind: str) -> Tensor:
        """``[N, d_model]``, one for each text: of its last token, or as many drawn from all tokens."""
        texts = self.texts()
        if kind == "sequence":
            return self._kept("last", texts, method.read_vectors)

        def drawn(model: Sarm, texts: Sequence[Tokens]) -> Tensor:
            everything = method.read_vectors(model, texts, everywhere=True)
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
            return everything[order[: len(texts)]]

        return self._kept("any", texts, drawn)

    def _kept(self, which: str, texts: list[Tokens], read: Callable[[Sarm, Sequence[Tokens]], Tensor]) -> Tensor:
        """What is read of texts, ``which`` of their vectors: read once, and kept on disk."""
        decides = [self.config.model, self.config.reward_model.layers, [text.ids for text in texts]]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
        file = self.folder / "vectors" / f"{which}-{digest}.safetensors"
        if file.name not in self._vectors:
            if not file.exists():
                began = time.monotonic()
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_suffix(".part")
                save_file({"vectors": read(self.untrained[0], texts).contiguous()}, unfinished)
                unfinished.replace(file)
                self.tell(f"{len(texts)} texts read in {time.monotonic() - began:.0f} s")
            self._vectors[file.name] = load_file(file)["vectors"]
        return self._vectors[file.name]

    def autoencoder(self, kind: str, seed: int) -> tuple[TopKSAE, float | None]:
        """A sparse autoencoder of a seed, pretrained or not, and the loss that it reached; a copy, to be trained on."""
        if (kind, seed) not in self._pretrained:
            self._pretrained[kind, seed] = self._new_autoencoder(kind, seed)
        sae, reached = self._pretrained[kind, seed]
        return copy.deepcopy(sae), reached

    def _new_autoencoder(self, kind: str, seed: int) -> tuple[TopKSAE, float | None]:
        settings = self.config.reward_model
        p = settings.pretraining
        if kind == "sequence" and p.checkpoint is not None:
            return method.read_checkpoint(p.checkpoint, settings.k), None
        d_model = self.untrained[0].head.in_features
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sae = TopKSAE(d_model, settings.latents, settings.k)
        if kind == "random":
            return sae, None
        recipe = Recipe(p.learning_rate, p.epochs, p.batch_size, weight_decay=0.0)
        return sae, method.pretrain(sae, self.pretraining_vectors(kind), recipe, seed)


def make_cell(shop: Workshop, name: str, seed: int) -> Path:
    """Train one cell with one seed, unless that was done before, and measure it on every set.

    Returns:
        Its folder, with ``config.yaml``, ``environment.json``, ``result.json``, and for a trained one
        ``sarm.safetensors``.
    """
    config, cell = shop.config, shop.config.cells[name]
    folder = shop.folder / "models" / name / f"seed-{seed}"
    decides = config.model_dump(mode="json", include={"model", "verifier", "train", "test", "reward_model"})
    runner.claim(folder, {**decides, "cell": cell.model_dump(mode="json"), "seed": seed})
    if (folder / "result.json").exists():
        return folder
    write_json(folder / ENVIRONMENT, environment())
    began = time.monotonic()
    result: dict[str, Any]
    if cell.head in ("sarm", "dense"):
        model, about = trained(shop, cell, seed)
        margins = {test: trained_margins(shop, model, test) for test in config.test}
        if model.sae is not None:
            about["top_latents"] = {test: top_share(shop, model, test) for test in config.test}
        method.save_sarm(model, folder / "sarm.safetensors", config.model)
    else:
        about = {}
        rank = feature_margins(shop, cell.pack) if cell.head == "features" else length_margins(shop)
        margins = {test: rank(test) for test in config.test}
    result = {
        **about,
        "seconds": time.monotonic() - began,
        "pairs": {n: found.count() for n, found in shop.sets.items()},
    }
    result["sets"] = {test: _measured(shop.sets[test], m) for test, m in margins.items()}
    write_json(folder / "result.json", result)
    shown = ", ".join(f"{test} {np.mean(found['correct']):.3f}" for test, found in result["sets"].items())
    shop.tell(f"{name}, seed {seed}: {shown} ({result['seconds']:.0f} s)")
    return folder


def _measured(pairs: PairSet, margins: Tensor) -> dict[str, list[float]]:
    """For each prompt, the share of its pairs that are ranked rightly; a tie is half right."""
    right = torch.where(margins > 0, 1.0, torch.where(margins < 0, 0.0, 0.5)).numpy()
    return {"correct": [float(right[pairs.groups == group].mean()) for group in np.unique(pairs.groups)]}


def trained(shop: Workshop, cell: Cell, seed: int) -> tuple[Sarm, dict[str, Any]]:
    """A trained reward model; of several learning rates, at the one that does best on held-out training prompts."""
    s, pairs = shop.config.reward_model, shop.sets["train"]
    rates = (s.frozen_learning_rates if cell.mode == 0 else None) or [s.learning_rate]
    held = np.zeros(len(pairs.pairs), dtype=bool)
    if len(rates) > 1:
        prompts = np.unique(pairs.groups)
        chosen = np.random.default_rng([seed, 4]).permutation(len(prompts))[: max(1, len(prompts) // 10)]
        held = np.isin(pairs.groups, prompts[chosen])
    learnt, apart = np.flatnonzero(~held), np.flatnonzero(held)
    flip = np.random.default_rng([seed, 5]).random(len(pairs.pairs)) < 0.5 if cell.shuffled else np.zeros_like(held)
    best: tuple[float, Sarm, dict[str, Any]] | None = None
    for rate in rates:
        model, reached = _untrained_cell(shop, cell, seed)
        vectors = _flipped(shop.vectors("train"), flip) if cell.mode == 0 else None
        sides = [(b, a) if turned else (a, b) for (a, b), turned in zip(pairs.tokens, flip, strict=True)]
        recipe = Recipe(rate, s.epochs, s.batch_size, s.micro_batch, s.warmup, s.weight_decay, s.bf16)
        some = None if vectors is None else vectors[learnt]
        log = method.train(model, [sides[i] for i in learnt], recipe, seed, some)
        loss = 0.0
        if len(apart):
            if vectors is None:
                scores = method.score(model, [side for i in apart for side in sides[i]]).view(-1, 2)
            else:
                scores = _rewards(model, vectors[apart])
            loss = float(method.preference_loss(scores[:, 0], scores[:, 1]))
        about = {"learning_rate": rate, "held_out_loss": loss, "pretraining_loss": reached, "last_step": log[-1]}
        if best is None or loss < best[0]:
            best = loss, model, about
    assert best is not None
    return best[1], best[2]


def _untrained_cell(shop: Workshop, cell: Cell, seed: int) -> tuple[Sarm, float | None]:
    s, reached, sae = shop.config.reward_model, None, None
    if cell.encoder is not None:
        sae, reached = shop.autoencoder(cell.encoder, seed)
    mode: Any = cell.mode
    settings = SarmSettings(s.layers, bool(cell.use_topk), mode, s.rec_lambda, s.reconstructs)
    return method.new_sarm(shop.config.model, settings, sae)[0], reached


def _flipped(vectors: Tensor, flip: NDArray) -> Tensor:
    return torch.where(torch.tensor(flip)[:, None, None], vectors.flip(1), vectors)


@torch.no_grad()
def _rewards(model: Sarm, vectors: Tensor) -> Tensor:
    """r of pairs' vectors, ``[P, 2, d_model] -> [P, 2]``."""
    device = model.head.weight.device
    return torch.cat([model.rewards(part.to(device)) for part in vectors.flatten(0, 1).split(1024)]).view(-1, 2).cpu()


def _vectors_of(shop: Workshop, model: Sarm, test: str) -> Tensor:
    """What the model's own decoder reads of a set, ``[P, 2, d_model]``."""
    return shop.vectors(test) if model.settings.mode == 0 else method.read_pairs(model, shop.sets[test].tokens)


def trained_margins(shop: Workshop, model: Sarm, test: str) -> Tensor:
    """r_chosen - r_rejected of a set's pairs, ``[P]``."""
    rewards = _rewards(model, _vectors_of(shop, model, test))
    return rewards[:, 0] - rewards[:, 1]


@torch.no_grad()
def top_share(shop: Workshop, model: Sarm, test: str, top: int = 10) -> float:
    """The share of the margins, sum |w_i (f_i(chosen) - f_i(rejected))|, that the ``top`` latents make."""
    total = torch.zeros(model.head.in_features)
    for part in _vectors_of(shop, model, test).split(512):
        chosen, rejected = (model.features(part[:, side].to(model.head.weight.device)) for side in (0, 1))
        total += ((chosen - rejected) * model.head.weight).abs().sum(dim=0).cpu()
    return float(total.topk(min(top, len(total))).values.sum() / total.sum().clamp(min=1e-12))


def feature_margins(shop: Workshop, pack: str | None) -> Callable[[str], Tensor]:
    """A pack's reward, with no training."""
    reward, source = FeatureReward.from_pack(pack or ""), HFSource(*load_model(shop.config.model))

    def rank(test: str) -> Tensor:
        pairs = shop.sets[test].pairs
        sides = [
            reward([p.prompt for p in pairs], [getattr(p, side) for p in pairs], source=source)
            for side in ("chosen", "rejected")
        ]
        values = torch.tensor([[torch.nan if v is None else v for v in side] for side in sides])
        return values[0] - values[1]

    return rank


def length_margins(shop: Workshop) -> Callable[[str], Tensor]:
    """The number of tokens, more or fewer being better as in training."""

    def longer(name: str) -> Tensor:
        return torch.tensor([float(len(a.ids) - len(b.ids)) for a, b in shop.sets[name].tokens])

    sign = 1.0 if float(longer("train").sign().mean()) >= 0 else -1.0
    return lambda test: sign * longer(test)


# -- GRPO -------------------------------------------------------------------------------------------------------------


def outfit(config: SarmConfig) -> runner.Outfitter:
    """What the runner trains an arm with: a cell's reward model of the run's own seed, or as in other experiments."""

    def fitted(grpo: SarmGrpo, arm: str, seed: int, folder: Path) -> arms.Outfit:
        cell = grpo.arms[arm].cell
        if cell is None:
            return arms.outfit(grpo, arm, seed, folder)
        made = Path(config.output) / "models" / cell / f"seed-{seed}" / "sarm.safetensors"
        if not made.exists():
            raise ConfigError(f"There is no reward model {made}: train it first, with --stage models.")
        return arms.Outfit(CompositeReward([SarmReward(*method.load_sarm(made))]))

    return fitted


# -- the command line -------------------------------------------------------------------------------------------------

STAGES = ("pairs", "models", "grpo", "report")


def main(about: str) -> None:
    """The command line of ``experiments/04_sarm_reproduction.py``, whose docstring is ``about``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML file")
    parser.add_argument("--stage", choices=STAGES, help="only this; default: all, one after the other")
    parser.add_argument("--cell", action="append", help="only this cell (may be repeated); default: all")
    parser.add_argument("--arm", action="append", help="only this arm of GRPO (may be repeated); default: all")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated); default: all")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder for the results")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    runner.quiet()
    try:
        config = read_config(options.config, SarmConfig)
        for stage in [options.stage] if options.stage else STAGES:
            _carry_out(stage, config, options)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from what is finished.")


def _carry_out(stage: str, config: SarmConfig, options: argparse.Namespace) -> None:
    if stage == "pairs":
        _ = Workshop(config).sets
    elif stage == "models":
        shop = Workshop(config)
        for cell, seed in _chosen("cell", config.cells, config.seeds, options.cell, options.seed):
            make_cell(shop, cell, seed)
    elif stage == "grpo" and config.grpo is not None:
        for arm, seed in _chosen("arm", config.grpo.arms, config.grpo.seeds, options.arm, options.seed):
            runner.run(config.grpo, arm, seed, outfit=outfit(config))
            gc.collect()  # a trainer and its model hold each other
    elif stage == "report":
        from sarm import results

        print(results.write(config, options.out))


def _chosen(
    what: str, names: Mapping[str, Any], seeds: list[int], only: list[str] | None, only_seeds: list[int] | None
) -> list[tuple[str, int]]:
    """What to make, everything of a seed before the next seed."""
    for name in only or []:
        if name not in names:
            raise ConfigError(f"There is no {what} '{name}'; there are {', '.join(names)}.{nearest(name, names)}")
    for seed in only_seeds or []:
        if seed not in seeds:
            raise ConfigError(f"The configuration has no seed {seed}: it has {', '.join(map(str, seeds))}.")
    return [(name, seed) for seed in only_seeds or seeds for name in only or names]
