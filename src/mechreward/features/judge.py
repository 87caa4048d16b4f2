"""The gate on a model: a pack's reward on held-out rollouts, on changed ones, and beside selections by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mechreward import progress
from mechreward.errors import DataError, PackError
from mechreward.features.discover import Chance, digests
from mechreward.features.frozen import check_sae, frozen_readout
from mechreward.features.gate import Measured, gate, rise
from mechreward.features.interventions import (
    FORMATS,
    INJECTIONS,
    Cues,
    Rewards,
    cues,
    injected,
    reformatted,
    rewritten,
    surprise,
)
from mechreward.features.pack import Calibration, FeaturePack, FormatChange, Injection
from mechreward.readout import Readout
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import check_fits
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import pooled
from mechreward.sae.registry import load_sae
from mechreward.stats import Interval, auc, bootstrap, spearman

DRAWS = 200  # selections by chance, where no discovery left its own
POOL = 1000  # latents that these are made of
CHANGED = 300  # rollouts, at most, whose text is changed or whose likelihood is asked for


def judge(
    pack: FeaturePack,
    model: Any,
    tokenizer: Any,
    rollouts: Labelled,
    chance: Chance | None = None,
    seed: int = 0,
) -> FeaturePack:
    """Measure a pack on held-out rollouts, and give it its evidence, calibration and status.

    Args:
        pack: With features.
        model: The model that it reads.
        tokenizer: Its tokenizer.
        rollouts: Labelled, of questions that discovery never saw, sampled at temperature 1.
        chance: What discovery would have selected by chance. Without it, random latents that fire and count alike take
            the place of selections, which are easier to beat.
        seed: Random seed.

    Raises:
        PackError: A recipe, or too few rollouts for an interval.
        DataError: A question was used in discovery.
        ModelMismatchError: The pack reads another model.
    """
    own = pack_readout(pack)
    if chance is not None and (seen := set(chance.asked) & set(digests(rollouts))):
        raise DataError(
            f"{len(seen)} of the questions of {rollouts.source} were used to discover {pack.name}: gate it on others."
        )
    how = "mean" if pack.aggregation == "per_token" else pack.aggregation
    check_fits([own], model)
    weights = torch.tensor([f.weight for f in pack.features])
    reward = Rewards([own], [weights[:, None]], how)
    some = np.sort(np.random.default_rng(seed).permutation(len(rollouts))[:CHANGED])
    few = rollouts.take(some)
    changes, selections = _format_changes(few, tokenizer), chance is not None and bool(chance.selections)
    # The pack with its cue words, and random latents where discovery left no selections; then the changed rollouts.
    passes, changed = 2 if selections else 3, len(INJECTIONS) + len(changes) + 1
    with progress.stage("Reading, changed rollouts included", passes * len(rollouts) + changed * len(few)):
        scores = together(reward, chance)(model, rollouts.batch)
        score, without, null = np.split(scores, [1, 1 + len(pack.features)], axis=1)
        null_of = "selections made on shuffled labels"
        if not selections:
            null = by_chance(pack, model, rollouts, how, seed)
            null_of = "packs of random latents that fire"
        score, labels = score[:, 0], rollouts.labels
        found = cues(model, rollouts, reward)
        robustness = _robustness(model, tokenizer, few, found, reward, score[some], changes, seed)
    measured = Measured(
        scores=score,
        labels=labels,
        groups=rollouts.groups,
        texts=rollouts.batch.texts,
        lengths=rollouts.batch.lengths,
        ways=rollouts.ways,
        null=np.array([by_chance_figures(column, labels) for column in null.T]),
        null_of=null_of,
        aggregation=how,
        temperature=rollouts.temperature,
        data=rollouts.source,
        without={str(f.id): auc(column, labels) for f, column in zip(pack.features, without.T, strict=True)},
        **robustness,
    )
    evidence = gate(measured, seed=seed)
    return pack.model_copy(
        update={
            "evidence": evidence,
            "calibration": Calibration.of(score, how),
            "aggregation": how,
            "status": "validated" if evidence.passed() else "candidate",
            "status_reason": evidence.reason(),
        }
    )


def _robustness(
    model: Any,
    tokenizer: Any,
    few: Labelled,
    found: Cues,
    reward: Rewards,
    score: NDArray[np.float64],
    changes: dict[str, RolloutBatch],
    seed: int,
) -> dict[str, Any]:
    """What becomes of the reward of changed rollouts, and whether the rollouts are the model's own."""

    def share(batch: RolloutBatch) -> tuple[NDArray[np.float64], Interval]:
        """The changed rollouts' reward, and the rise that the change brings."""
        changed = reward(model, batch)[:, 0]
        read = np.where(np.isfinite(changed), changed, score)
        return read, bootstrap(_bounded_rise, read, score, few.labels, groups=few.groups, seed=seed)

    formats = {}
    for name, batch in changes.items():
        read, up = share(batch)
        formats[name] = FormatChange(auc=bootstrap(auc, read, few.labels, groups=few.groups, seed=seed), rise=up)
    injection = Injection(
        cues=[tokenizer.decode([token]) for token in found.tokens],
        rate=found.rate,
        rise={way: share(injected(few.batch, found, way, seed))[1] for way in INJECTIONS},
    )
    nats = surprise(model, few.batch)
    return {
        "injection": injection,
        "formats": formats,
        "surprise": bootstrap(_per_token, nats, groups=few.groups, seed=seed),
    }


def _format_changes(few: Labelled, tokenizer: Any) -> dict[str, RolloutBatch]:
    """The rollouts in each other format that the tokenizer can write, and in other words where these are given."""
    changes = {name: reformatted(few, tokenizer, change) for name, change in FORMATS.items()}
    if few.paraphrases is not None:
        changes["paraphrase"] = rewritten(few, tokenizer, few.paraphrases)
    return {name: batch for name, batch in changes.items() if batch is not None}


def pack_readout(pack: FeaturePack) -> Readout:
    """What the pack reads: its own columns if it is frozen, else those of its sparse autoencoder.

    Raises:
        PackError: A recipe, or another sparse autoencoder than the pack's.
    """
    if not pack.features:
        raise PackError(
            f"{pack.name} is a recipe without features: find some with 'mechreward discover --recipe {pack.name} "
            "--data YOUR_ROLLOUTS.jsonl'."
        )
    if pack.frozen is not None:
        return frozen_readout(pack)
    sae = load_sae(pack.sae.release, pack.sae.sae_id)
    check_sae(pack, sae)
    return sae.features([f.id for f in pack.features])


def together(reward: Rewards, chance: Chance | None) -> Rewards:
    """A pack's reward, the pack without each of its features, and what was selected by chance, read at once."""
    own = reward.weights[0]  # [K, 1]
    k = len(own)
    saes, selections = ([], []) if chance is None else (chance.saes, chance.selections)
    readouts, weights = list(reward.readouts), [torch.zeros(k, 1 + k + len(selections))]
    weights[0][:, : 1 + k] = torch.cat([own, own * (1 - torch.eye(k))], dim=1)
    for number, sae in enumerate(saes):
        chosen = [(column, s) for column, s in enumerate(selections) if s.sae == number and len(s.ids)]
        if chosen:
            ids = np.unique(np.concatenate([s.ids for _, s in chosen]))
            columns = torch.zeros(len(ids), 1 + k + len(selections))
            for column, s in chosen:
                columns[np.searchsorted(ids, s.ids), 1 + k + column] = torch.tensor(s.weights).float()
            readouts.append(load_sae(sae.release, sae.sae_id).features(ids.tolist()))
            weights.append(columns)
    return Rewards(readouts, weights, reward.aggregation)


def by_chance(pack: FeaturePack, model: Any, rollouts: Labelled, how: str, seed: int) -> NDArray[np.float64]:
    """Rewards of random latents, as many as the pack has, counting alike, with the pack's signs, ``[n, draws]``."""
    rng = np.random.default_rng(seed)
    sae = load_sae(pack.sae.release, pack.sae.sae_id)
    pool = np.sort(rng.choice(sae.d_sae, size=min(POOL, sae.d_sae), replace=False))
    latents = sae.features(pool.tolist())
    read = torch.cat(list(pooled(model, rollouts.batch, [latents], how))).double().numpy()
    read = read[:, ((read > 0).mean(axis=0) >= 0.01) & (read.std(axis=0) > 0)]
    signs = np.sign([f.weight for f in pack.features])
    if read.shape[1] < len(signs):
        raise PackError(
            f"Only {read.shape[1]} of {len(pool)} random latents of {sae.name} fire on these rollouts, too few to "
            f"compare {pack.name} with: is it the right model?"
        )
    read /= read.std(axis=0)
    draws = (rng.choice(read.shape[1], size=len(signs), replace=False) for _ in range(DRAWS))
    return np.stack([read[:, draw] @ signs for draw in draws], axis=1)


def by_chance_figures(score: NDArray, labels: NDArray) -> tuple[float, float]:
    """\\|Spearman| and the AUC counted from .5 upwards, since the sign of a selection by chance is arbitrary."""
    return abs(spearman(score, labels)), 0.5 + abs(auc(score, labels) - 0.5)


def _bounded_rise(changed: NDArray, score: NDArray, labels: NDArray) -> float:
    """The rise; 10 where the reading does not even rise with the behaviour, since a file holds no infinity."""
    return float(np.clip(rise(changed, score, labels), -10, 10))


def _per_token(nats_and_tokens: NDArray) -> float:
    nats, tokens = nats_and_tokens.sum(axis=0)
    return float(nats / tokens)
