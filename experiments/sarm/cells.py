"""The cells of experiment 04: reward models that differ in one thing each, and what else can rank a pair."""

from __future__ import annotations

import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward.errors import ConfigError, DataError
from mechreward.files import ENVIRONMENT, environment, write_json
from mechreward.pocket.questions import corpus_completion, questions
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.sampling import load_model
from mechreward.rollout.source import HFSource
from mechreward.train import arms, runner
from mechreward.unfinished import digest
from sarm import model as method
from sarm.config import Cell, SarmConfig, SarmGrpo
from sarm.model import Recipe, Sarm, SarmReward, SarmSettings, Tokens, TopKSAE
from sarm.pairs import PairSet, prepared_pairs


class Pipeline:
    """What all cells share: pairs, texts, and the untrained model's readings of them, each made when first needed."""

    def __init__(self, config: SarmConfig, log: Callable[[str], None] = print):
        self.config, self.log, self.folder = config, log, Path(config.output)
        self._vectors: dict[tuple[str, str], Tensor] = {}
        self._pretrained: dict[tuple[str, int], tuple[TopKSAE, float | None]] = {}

    @cached_property
    def sets(self) -> dict[str, PairSet]:
        """The pairs of ``train`` and of the test sets.

        Raises:
            DataError: A prompt with the same chosen answer is in the training pairs and in a test set. (Prompts may
                occur again with other answers.)
        """
        _, tokenizer = self.untrained
        sets = {}
        for name, source in {"train": self.config.train, **self.config.test}.items():
            pairs = prepared_pairs(self.config, name, source)
            sets[name] = PairSet.of(pairs, tokenizer, self.config.reward_model.max_length)
            self.log(f"{name}: {len(sets[name].pairs)} pairs, {sets[name].left_out} too long")
        learnt = {json.dumps([pair.prompt, pair.chosen]) for pair in sets["train"].pairs}
        for name in self.config.test:
            if any(json.dumps([pair.prompt, pair.chosen]) in learnt for pair in sets[name].pairs):
                raise DataError(f"A pair of test set '{name}' is in the training pairs too: choose others.")
        return sets

    @cached_property
    def untrained(self) -> tuple[Sarm, Any]:
        """The truncated decoder before training, and the tokenizer."""
        settings = SarmSettings(self.config.reward_model.layers, False, 0)
        return method.new_sarm(self.config.model, settings, None)

    def vectors(self, name: str) -> Tensor:
        """Return z-scored last-token vectors of a set's pairs by the untrained decoder, ``[P, 2, d_model]``."""
        pairs = self.sets[name]
        texts = [side for both in pairs.tokens for side in both]
        return self._read("last", texts, method.read_vectors).view(len(pairs.pairs), 2, -1)

    def texts(self) -> list[Tokens]:
        """Return the texts that the sparse autoencoder is pretrained on."""
        _, tokenizer = self.untrained
        count = self.config.reward_model.pretraining.corpus
        if count is None:
            return [side for both in self.sets["train"].tokens for side in both]
        rng = random.Random("texts for SARM's autoencoder")
        asked = itertools.islice(questions("corpus", seed=1), count)
        return [method.encoded(tokenizer, q.prompt, corpus_completion(q, rng, 0.6)) for q in asked]

    def pretraining_vectors(self, kind: str) -> Tensor:
        """Return ``[N, d_model]``, one vector for each text: of its last token, or as many drawn from all tokens."""
        texts = self.texts()
        if kind == "sequence":
            return self._read("last", texts, method.read_vectors)

        def drawn(model: Sarm, texts: Sequence[Tokens]) -> Tensor:
            everything = method.read_vectors(model, texts, everywhere=True)
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
            return everything[order[: len(texts)]]

        return self._read("any", texts, drawn)

    def _read(self, which: str, texts: list[Tokens], read: Callable[[Sarm, Sequence[Tokens]], Tensor]) -> Tensor:
        """Read ``which`` vectors of texts once, and keep them on disk."""

        def compute() -> dict[str, Tensor]:
            began = time.monotonic()
            vectors = read(self.untrained[0], texts).contiguous()
            self.log(f"{len(texts)} texts read in {time.monotonic() - began:.0f} s")
            return {"vectors": vectors}

        cache_key = [self.config.model, self.config.reward_model.layers, [text.ids for text in texts]]
        in_memory = which, digest(cache_key)
        if in_memory not in self._vectors:
            found = arms.cached_tensors(self.folder / "vectors", which, cache_key, compute)
            self._vectors[in_memory] = found["vectors"]
        return self._vectors[in_memory]

    def autoencoder(self, kind: str, seed: int) -> tuple[TopKSAE, float | None]:
        """Return a copy of a seed's sparse autoencoder, pretrained or not, and the loss that it reached."""
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


def make_cell(pipeline: Pipeline, name: str, seed: int) -> Path:
    """Train one cell with one seed, unless that was done before, and measure it on every set.

    Returns:
        Its folder, with ``config.yaml``, ``environment.json``, ``result.json``, and for a trained one
        ``sarm.safetensors``.
    """
    config, cell = pipeline.config, pipeline.config.cells[name]
    folder = cell_folder(config, name, seed)
    settings = config.model_dump(mode="json", include={"model", "verifier", "train", "test", "reward_model"})
    runner.claim(folder, {**settings, "cell": cell.model_dump(mode="json"), "seed": seed})
    if (folder / "result.json").exists():
        return folder
    write_json(folder / ENVIRONMENT, environment())
    began = time.monotonic()
    if cell.head in ("sarm", "dense"):
        model, about = trained(pipeline, cell, seed)
        margins = {test: trained_margins(pipeline, model, test) for test in config.test}
        if model.sae is not None:
            about["top_latents"] = {test: top_share(pipeline, model, test) for test in config.test}
        method.save_sarm(model, folder / "sarm.safetensors", config.model)
    else:
        about = {}
        rank = feature_margins(pipeline, cell.pack) if cell.head == "features" else length_margins(pipeline)
        margins = {test: rank(test) for test in config.test}
    result: dict[str, Any] = {
        **about,
        "seconds": time.monotonic() - began,
        "pairs": {n: found.count() for n, found in pipeline.sets.items()},
    }
    result["sets"] = {test: _measured(pipeline.sets[test], m) for test, m in margins.items()}
    write_json(folder / "result.json", result)
    shown = ", ".join(f"{test} {np.mean(found['correct']):.3f}" for test, found in result["sets"].items())
    pipeline.log(f"{name}, seed {seed}: {shown} ({result['seconds']:.0f} s)")
    return folder


def cell_folder(config: SarmConfig, name: str, seed: int) -> Path:
    """Return the folder of a cell with one seed."""
    return Path(config.output) / "models" / name / f"seed-{seed}"


def _measured(pairs: PairSet, margins: Tensor) -> dict[str, list[float]]:
    """Return for each prompt the share of its pairs that are ranked rightly; a tie is half right."""
    right = torch.where(margins > 0, 1.0, torch.where(margins < 0, 0.0, 0.5)).numpy()
    return {"correct": [float(right[pairs.groups == group].mean()) for group in np.unique(pairs.groups)]}


def trained(pipeline: Pipeline, cell: Cell, seed: int) -> tuple[Sarm, dict[str, Any]]:
    """Train a reward model; of several learning rates, keep the best on held-out training prompts."""
    s, pairs = pipeline.config.reward_model, pipeline.sets["train"]
    rates = (s.frozen_learning_rates if cell.mode == 0 else None) or [s.learning_rate]
    held = np.zeros(len(pairs.pairs), dtype=bool)
    if len(rates) > 1:
        prompts = np.unique(pairs.groups)
        chosen = np.random.default_rng([seed, 4]).permutation(len(prompts))[: max(1, len(prompts) // 10)]
        held = np.isin(pairs.groups, prompts[chosen])
    learnt, held_out = np.flatnonzero(~held), np.flatnonzero(held)
    flip = np.random.default_rng([seed, 5]).random(len(pairs.pairs)) < 0.5 if cell.shuffled else np.zeros_like(held)
    best: tuple[float, Sarm, dict[str, Any]] | None = None
    for rate in rates:
        model, reached = _untrained_cell(pipeline, cell, seed)
        vectors = _flipped(pipeline.vectors("train"), flip) if cell.mode == 0 else None
        sides = [(b, a) if turned else (a, b) for (a, b), turned in zip(pairs.tokens, flip, strict=True)]
        recipe = Recipe(rate, s.epochs, s.batch_size, s.micro_batch, s.warmup, s.weight_decay, s.bf16)
        some = None if vectors is None else vectors[learnt]
        log = method.train(model, [sides[i] for i in learnt], recipe, seed, some)
        loss = 0.0
        if len(held_out):
            if vectors is None:
                scores = method.score(model, [side for i in held_out for side in sides[i]]).view(-1, 2)
            else:
                scores = _rewards(model, vectors[held_out])
            loss = float(method.preference_loss(scores[:, 0], scores[:, 1]))
        about = {"learning_rate": rate, "held_out_loss": loss, "pretraining_loss": reached, "last_step": log[-1]}
        if best is None or loss < best[0]:
            best = loss, model, about
    assert best is not None
    return best[1], best[2]


def _untrained_cell(pipeline: Pipeline, cell: Cell, seed: int) -> tuple[Sarm, float | None]:
    s, reached, sae = pipeline.config.reward_model, None, None
    if cell.encoder is not None:
        sae, reached = pipeline.autoencoder(cell.encoder, seed)
    mode: Any = cell.mode
    settings = SarmSettings(s.layers, bool(cell.use_topk), mode, s.rec_lambda, s.reconstructs)
    return method.new_sarm(pipeline.config.model, settings, sae)[0], reached


def _flipped(vectors: Tensor, flip: NDArray) -> Tensor:
    return torch.where(torch.tensor(flip)[:, None, None], vectors.flip(1), vectors)


@torch.no_grad()
def _rewards(model: Sarm, vectors: Tensor) -> Tensor:
    """Return r of pairs' vectors, ``[P, 2, d_model] -> [P, 2]``."""
    return method.score_vectors(model, vectors.flatten(0, 1)).view(-1, 2)


def _vectors_of(pipeline: Pipeline, model: Sarm, test: str) -> Tensor:
    """Read a set by the model's own decoder, ``[P, 2, d_model]``."""
    return pipeline.vectors(test) if model.settings.mode == 0 else method.read_pairs(model, pipeline.sets[test].tokens)


def trained_margins(pipeline: Pipeline, model: Sarm, test: str) -> Tensor:
    """Return r_chosen - r_rejected of a set's pairs, ``[P]``."""
    rewards = _rewards(model, _vectors_of(pipeline, model, test))
    return rewards[:, 0] - rewards[:, 1]


@torch.no_grad()
def top_share(pipeline: Pipeline, model: Sarm, test: str, top: int = 10) -> float:
    """Return the ``top`` latents' share of the margins, sum |w_i (f_i(chosen) - f_i(rejected))|."""
    total = torch.zeros(model.head.in_features)
    for part in _vectors_of(pipeline, model, test).split(512):
        chosen, rejected = (model.features(part[:, side].to(model.head.weight.device)) for side in (0, 1))
        total += ((chosen - rejected) * model.head.weight).abs().sum(dim=0).cpu()
    return float(total.topk(min(top, len(total))).values.sum() / total.sum().clamp(min=1e-12))


def feature_margins(pipeline: Pipeline, pack: str | None) -> Callable[[str], Tensor]:
    """Rank pairs by a pack's reward, without training."""
    reward, source = FeatureReward.from_pack(pack or ""), HFSource(*load_model(pipeline.config.model))

    def rank(test: str) -> Tensor:
        pairs = pipeline.sets[test].pairs
        sides = [
            reward([p.prompt for p in pairs], [getattr(p, side) for p in pairs], source=source)
            for side in ("chosen", "rejected")
        ]
        values = torch.tensor([[torch.nan if v is None else v for v in side] for side in sides])
        return values[0] - values[1]

    return rank


def length_margins(pipeline: Pipeline) -> Callable[[str], Tensor]:
    """Rank pairs by the number of tokens; more or fewer is better, as in training."""

    def longer(name: str) -> Tensor:
        return torch.tensor([float(len(a.ids) - len(b.ids)) for a, b in pipeline.sets[name].tokens])

    sign = 1.0 if float(longer("train").sign().mean()) >= 0 else -1.0
    return lambda test: sign * longer(test)


# -- GRPO -------------------------------------------------------------------------------------------------------------


def setup(config: SarmConfig) -> runner.Setup:
    """Set a run up with a cell's reward model of the run's own seed, or as in other experiments."""

    def of_arm(grpo: SarmGrpo, arm: str, seed: int, folder: Path) -> arms.RunSetup:
        cell = grpo.arms[arm].cell
        if cell is None:
            return arms.setup(grpo, arm, seed, folder)
        file = cell_folder(config, cell, seed) / "sarm.safetensors"
        if not file.exists():
            raise ConfigError(f"There is no reward model {file}: train it first, with --stage models.")
        return arms.RunSetup(CompositeReward([SarmReward(*method.load_sarm(file))]))

    return of_arm
