"""Finding features that track a behaviour: rollouts that show it against rollouts that do not.

All latents of one or several dictionaries are scanned in one pass, and the best make a pack. With thousands of latents
and a few hundred rollouts some large difference is always found by chance, so a selection proves nothing by itself: it
is made again on permuted labels, and :mod:`mechreward.features.gate` compares the two on other rollouts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mechreward import progress
from mechreward.aggregation import aggregation as find_aggregation
from mechreward.errors import ConfigError, PackError, nearest
from mechreward.families import UNNAMED
from mechreward.features.pack import FeaturePack, PackFeature, SAERef
from mechreward.features.reasonscore import reason_scores
from mechreward.features.scan import Scan, permuted, scan
from mechreward.rollout.batch import plain_text
from mechreward.rollout.capture import check_fits
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import pooled
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import reference

_ROWS = 64  # rollouts that are scanned at a time: extra memory is 64 rows, however many there are
_SCREENED = 64  # latents of a dictionary, the strongest by effect, that a sparse regression chooses from

METHODS = ("effect", "firing", "lasso", "reasonscore")


class Selection(NamedTuple):
    """Latents of one dictionary with weights.

    Attributes:
        sae: Number of the dictionary among those that were scanned.
        ids: ``[K]`` int64, strongest first, those that rise with the behaviour before those that fall.
        weights: ``[K]`` float64.
        strength: By which dictionaries are compared: the mean criterion of the latents, or a cross-validated AUC.
    """

    sae: int
    ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    strength: float


@dataclass(frozen=True)
class Search:
    """How latents are chosen.

    Methods: ``effect``, Cohen's d of the aggregated activations; ``firing``, SparseRM's gap in firing rates (arXiv
    2511.07896); ``lasso``, a sparse logistic regression on the 64 latents of largest effect; ``reasonscore``, which
    looks at cue words instead of labels (arXiv 2503.18878, see :mod:`mechreward.features.reasonscore`).

    Attributes:
        method: See above.
        aggregation: How activations over a rollout's tokens become one number, as the pack's reward will do it.
        n_positive: How many latents to take among those that rise with the behaviour.
        n_negative: How many among those that fall; ``reasonscore`` knows none.
        min_firing: Latents that fire in a smaller share of the rollouts are left out.
        permutations: Of the labels: for the adjusted p of each latent, and for the gate.
        seed: Of the permutations.

    Raises:
        ConfigError: An unknown method or aggregation, or no latents to select.
    """

    method: str = "effect"
    aggregation: str = "mean"
    n_positive: int = 10
    n_negative: int = 10
    min_firing: float = 0.01
    permutations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"There is no discovery method '{self.method}': use {', '.join(METHODS)}."
                f"{nearest(self.method, METHODS)}"
            )
        find_aggregation(self.aggregation)
        if self.aggregation == "per_token":
            raise ConfigError("aggregation='per_token' gives no number for a rollout to select by: use 'mean'.")
        if min(self.n_positive, self.lowering) < 0 or self.n_positive + self.lowering == 0:
            raise ConfigError(
                f"n_positive={self.n_positive} and n_negative={self.lowering} select no latents"
                f"{' (reasonscore knows no negative ones)' if self.by_words else ''}: ask for at least one."
            )

    @property
    def by_words(self) -> bool:
        """Whether cue words decide, and not the labels."""
        return self.method == "reasonscore"

    @property
    def lowering(self) -> int:
        """How many latents to take among those that fall."""
        return 0 if self.by_words else self.n_negative


@dataclass(frozen=True)
class Discovery:
    """What was found, and what would have been found by chance.

    Attributes:
        pack: A candidate that no gate has seen.
        per_sae: The selection from each dictionary; the pack is the one of greatest strength.
        scan: Every latent of all dictionaries, one after the other; ``None`` for ReasonScore, which uses no labels.
        scores: ReasonScore of every latent of all dictionaries, ``[F]``, for that method.
        chance: The same selection on permuted labels; none for ReasonScore.
        saes: The dictionaries.
        asked: Digest of each question that was used: a gate must not use it again.
    """

    pack: FeaturePack
    per_sae: list[Selection]
    scan: Scan | None
    scores: NDArray[np.float64] | None
    chance: list[Selection]
    saes: list[SAERef]
    asked: list[str]


def discover(
    model: Any,
    tokenizer: Any,
    rollouts: Labelled,
    saes: Sequence[SAEHandle],
    name: str,
    behaviour: str,
    search: Search | None = None,
) -> Discovery:
    """Scan all latents on labelled rollouts, and propose a pack.

    The cost is one truncated forward pass and tokens x width x d_model multiplications; a second pass over a part of
    the latents for ``lasso``, and over all of them, a pass for each dictionary, for ``reasonscore``.

    Args:
        model: The model whose residual stream the dictionaries read.
        tokenizer: Its tokenizer, for ``reasonscore``.
        rollouts: n of them, labelled.
        saes: One or several dictionaries, of one layer or several. The pack is from the strongest one, and so is each
            selection by chance: choosing the layer is part of the selection.
        name: Of the pack.
        behaviour: What the labels mean, in a sentence.
        search: How latents are chosen.

    Raises:
        PackError: Nothing could be selected.
        ConfigError: Dictionaries for several models, or none.
        ModelMismatchError: A dictionary reads another model.
    """
    search = search or Search()
    by_words = search.by_words
    check_models(saes)
    everything = [sae.all_features() for sae in saes]
    check_fits(everything, model)
    spans = [slice(*ends) for ends in itertools.pairwise(np.cumsum([0, *(sae.d_sae for sae in saes)]).tolist())]

    # Cue words need the scan for the spreads and firing rates alone.
    scores = None
    with progress.stage("Reading every latent", len(rollouts) * (1 + len(saes) if by_words else 1)):
        blocks = (block.numpy() for block in pooled(model, rollouts.batch, everything, search.aggregation))
        permutations = 0 if by_words else search.permutations
        found = scan(blocks, rollouts.labels, rollouts.groups, permutations, search.seed)
        if by_words:
            scores = np.concatenate([reason_scores(model, tokenizer, rollouts.batch, sae) for sae in saes])

    # One selection a dictionary: with the labels, then with each permutation of them.
    if search.method == "lasso":
        chosen = _sparse_regressions(model, rollouts, saes, spans, found, search)
    else:
        criteria = found.effects if search.method == "effect" else found.gaps if scores is None else [scores]
        chosen = [[_ranked(i, row[span], found, span, search) for i, span in enumerate(spans)] for row in criteria]
    per_sae, *others = chosen
    chance = [max(selections, key=lambda s: s.strength) for selections in others]
    best = max(per_sae, key=lambda selection: selection.strength)
    if len(best.ids) == 0:
        raise _nothing_found(search.min_firing, len(rollouts))

    settings: dict[str, str | int | float] = {
        "made_by": "mechreward discover",
        "method": search.method,
        "discovered_on": rollouts.source,
        "discovery_rollouts": len(rollouts),
        "discovery_with_behaviour": int(rollouts.labels.sum()),
        "dictionaries_scanned": len(saes),
        "n_positive": search.n_positive,
        "n_negative": search.lowering,
        "min_firing": search.min_firing,
        "permutations": search.permutations,
        "seed": search.seed,
    }
    if search.method == "effect":
        p = found.adjusted_p[spans[best.sae]][best.ids]
        settings["latents_significant"] = int((p <= 0.05).sum())
        settings["largest_effect"] = float(np.nan_to_num(np.abs(found.effect[spans[best.sae]][best.ids]).max()))
        settings["largest_effect_by_chance"] = float(np.nan_to_num(found.largest_by_chance.max(initial=0.0)))
    sae = saes[best.sae]
    pack = FeaturePack(
        name=name,
        description=behaviour,
        model=sae.model_name or UNNAMED,
        sae=_reference(sae),
        hook_point=str(sae.hook_point),
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        aggregation=search.aggregation,
        features=[PackFeature(id=int(i), weight=float(w)) for i, w in zip(best.ids, best.weights, strict=True)],
        status="candidate",
        status_reason=f"Chosen on {len(rollouts)} rollouts; no gate has measured it on others.",
        provenance=settings,
        licence="not stated",
    )
    return Discovery(
        pack=pack,
        per_sae=per_sae,
        scan=None if by_words else found,
        scores=scores,
        chance=chance,
        saes=[_reference(sae) for sae in saes],
        asked=digests(rollouts),
    )


def select(
    activations: NDArray,
    labels: ArrayLike,
    n_positive: int = 10,
    n_negative: int = 10,
    min_firing: float = 0.01,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The latents with the strongest effect on either side, and weights that let each contribute alike.

    weight_k = sign(d_k) / (s_k K), s_k the standard deviation of latent k over all rollouts: the reward is the mean of
    K readings that are each in units of their standard deviation, so every latent contributes alike. (Weights of +-1
    on raw activations would let the few latents with large activations decide alone.)

    Args:
        activations: Aggregated activation per rollout and latent [n, F], any float type.
        labels: Whether the rollout shows the behaviour [n], bool.
        n_positive: How many latents to take among those that are higher with the behaviour.
        n_negative: How many among those that are lower.
        min_firing: Latents that fire (activation > 0) in a smaller share of the rollouts are left out: their effect
            rests on a handful of rollouts.

    Returns:
        ids [K] int64 and weights [K] float64, positive side first, strongest first, equal effects by lower id.
        K < n_positive + n_negative when fewer latents qualify.
    """
    rows = (activations[start : start + _ROWS] for start in range(0, len(activations), _ROWS))
    found = scan(rows, labels, permutations=0)
    search = Search(n_positive=n_positive, n_negative=n_negative, min_firing=min_firing)
    ids = _ranked(0, found.effect, found, slice(None), search).ids
    if len(ids) == 0:
        raise _nothing_found(min_firing, len(activations))
    return ids, _even_weights(found.effect[ids], activations[:, ids].astype(np.float64).std(axis=0))


# The pieces of a discovery ------------------------------------------------------------------------------------------


def _nothing_found(min_firing: float, rollouts: int) -> PackError:
    return PackError(
        f"No latent fires in at least {min_firing:.0%} of the {rollouts} rollouts and differs between those with and "
        "without the behaviour: lower min_firing, or contrast more rollouts."
    )


def _ranked(sae: int, criterion: NDArray, found: Scan, span: slice, search: Search) -> Selection:
    """The latents of one dictionary with the greatest criterion on either side."""
    score = np.where(found.firing[span] < search.min_firing, 0.0, criterion)
    ids = _strongest(score, search.n_positive, search.lowering)
    strength = float(np.abs(score[ids]).mean()) if len(ids) else 0.0
    return Selection(sae, ids, _even_weights(score[ids], found.spread[span][ids]), strength)


def _strongest(score: NDArray, n_positive: int, n_negative: int) -> NDArray[np.int64]:
    """Latents of the greatest positive and of the greatest negative scores, strongest first."""
    order = np.argsort(-score, kind="stable")  # stable: ties go to the lower id
    raising = order[score[order] > 0][:n_positive]
    order = np.argsort(score, kind="stable")
    lowering = order[score[order] < 0][:n_negative]
    return np.concatenate([raising, lowering]).astype(np.int64)


def _even_weights(score: NDArray, spread: NDArray) -> NDArray[np.float64]:
    """sign(score_k) / (s_k K): every latent contributes alike."""
    return np.sign(score) / np.maximum(spread, np.finfo(np.float64).tiny) / max(1, len(score))


def _sparse_regressions(
    model: Any,
    rollouts: Labelled,
    saes: Sequence[SAEHandle],
    spans: list[slice],
    found: Scan,
    search: Search,
) -> Iterator[list[Selection]]:
    """For each labelling, a sparse logistic regression on each dictionary's latents of largest effect under it."""
    rng = np.random.default_rng(search.seed)  # the seed of the scan: the same permutations
    labellings = [rollouts.labels, *permuted(rollouts.labels, rollouts.groups, search.permutations, rng)]
    screened = [
        [_screened(row[span], found.firing[span], search.min_firing) for span in spans] for row in found.effects
    ]
    # A latent that any labelling has screened is read once.
    wanted = [np.unique(np.concatenate([each[i] for each in screened])) for i in range(len(saes))]
    readouts = [sae.features(ids.tolist()) for sae, ids in zip(saes, wanted, strict=True) if len(ids)]
    read = np.zeros((len(rollouts), 0))
    if readouts:
        read = torch.cat(list(pooled(model, rollouts.batch, readouts, search.aggregation))).double().numpy()
    columns = np.split(read, np.cumsum([len(ids) for ids in wanted])[:-1], axis=1)

    each = zip(labellings, screened, strict=True)
    for labels, ids in progress.track(each, "Regressions, permutations included", len(labellings)):
        selections = []
        for i, latents in enumerate(ids):
            x = columns[i][:, np.searchsorted(wanted[i], latents)]
            coefficients, area = sparse_logistic(x, labels, rollouts.groups)
            best = _strongest(coefficients, search.n_positive, search.lowering)
            spread = np.maximum(x[:, best].std(axis=0), np.finfo(np.float64).tiny)
            selections.append(Selection(i, latents[best], coefficients[best] / spread, area))
        yield selections


def _screened(effect: NDArray, firing: NDArray, min_firing: float) -> NDArray[np.int64]:
    size = np.where(firing < min_firing, 0.0, np.abs(effect))
    order = np.argsort(-size, kind="stable")[:_SCREENED]
    return order[size[order] > 0]


def sparse_logistic(x: NDArray, labels: NDArray, groups: NDArray) -> tuple[NDArray[np.float64], float]:
    """An l1-penalised logistic regression, its penalty chosen by cross-validation over questions.

    Args:
        x: ``[n, M]``, any scale.
        labels: ``[n]`` bool.
        groups: The question of each row, ``[n]``.

    Returns:
        Coefficients of the standardised columns ``[M]``, and the cross-validated AUC; none and .5 where no column
        helps or a fold has labels of one kind only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.svm import l1_min_c

    nothing = np.zeros(x.shape[1]), 0.5
    spread = x.std(axis=0)
    z = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    folds = min(5, len(np.unique(groups)))
    if folds < 2 or z.shape[1] == 0 or not z.any():
        return nothing
    splits = list(GroupKFold(folds).split(z, labels, groups))
    if any(labels[train].all() or not labels[train].any() for train, _ in splits):
        return nothing
    least = l1_min_c(z, labels, loss="log")  # below it every coefficient is zero
    best = nothing
    for penalty in (2.0, 5.0, 15.0):

        def fit(rows: Any, c: float = penalty * least) -> LogisticRegression:
            model = LogisticRegression(C=c, l1_ratio=1, solver="liblinear", random_state=0, intercept_scaling=10)
            return model.fit(z[rows], labels[rows])

        predicted = np.empty(len(labels))
        for train, test in splits:
            predicted[test] = fit(train).decision_function(z[test])
        area = float(roc_auc_score(labels, predicted))
        if area > best[1]:
            best = fit(slice(None)).coef_[0], area
    return best


def _reference(sae: SAEHandle) -> SAERef:
    release, sae_id = reference(sae.name)
    return SAERef(release=release, sae_id=sae_id)


def recorded_as(found: Discovery, model: str) -> Discovery:
    """With a model that can be loaded in the pack: SAEs may name none, and SAELens' registry leaves the owner out."""
    named = found.pack.model
    if named == UNNAMED or (model.endswith(f"/{named}") and not Path(model).exists()):
        return replace(found, pack=found.pack.model_copy(update={"model": model}))
    return found


def check_models(saes: Sequence[SAEHandle]) -> None:
    """Refuse dictionaries of several models.

    Raises:
        ConfigError: They are, or there is none.
    """
    if not saes:
        raise ConfigError("Discovery needs a sparse autoencoder to look for features in: name one.")
    models = {sae.model_name: sae.name for sae in saes if sae.model_name is not None}
    if len(models) > 1:
        listed = " and ".join(f"{name} reads {model}" for model, name in models.items())
        raise ConfigError(f"The sparse autoencoders belong to different models: {listed}.")


# On disk ------------------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    """What tells whether a question was used before, without keeping it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests(rollouts: Labelled) -> list[str]:
    """The digest of each prompt; of the completion where there is no prompt."""
    texts = (plain_text(p) or c for p, c in zip(rollouts.batch.prompts, rollouts.batch.texts, strict=True))
    return sorted({digest(text) for text in texts})


def chance_file(pack_file: Path) -> Path:
    """Where a discovery keeps, beside its pack, what the gate needs to repeat the selection."""
    return pack_file.with_suffix(".discovery.npz")


def write_discovery(found: Discovery, file: Path) -> None:
    """Write the pack to ``file``, and the scan and the selections by chance beside it."""
    width = max((len(s.ids) for s in found.chance), default=0)
    ids, weights = np.full((len(found.chance), width), -1), np.zeros((len(found.chance), width))
    for row, selection in enumerate(found.chance):
        ids[row, : len(selection.ids)], weights[row, : len(selection.ids)] = selection.ids, selection.weights
    arrays: dict[str, Any] = {
        "saes": np.array([json.dumps([sae.release, sae.sae_id]) for sae in found.saes]),
        "asked": np.array(found.asked, dtype="U16"),
        "chance_sae": np.array([s.sae for s in found.chance], dtype=np.int64),
        "chance_ids": ids,
        "chance_weights": weights,
    }
    if found.scan is not None:
        arrays |= {
            "effect": found.scan.effect,
            "adjusted_p": found.scan.adjusted_p,
            "firing_gap": found.scan.firing_gap,
            "firing": found.scan.firing,
        }
    if found.scores is not None:
        arrays["reason_score"] = found.scores
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(chance_file(file), **arrays)
    found.pack.write(file)


class Chance(NamedTuple):
    """What a gate needs to know of a discovery.

    Attributes:
        saes: The dictionaries that were scanned.
        selections: What was selected on permuted labels.
        asked: Digest of each question that was used.
    """

    saes: list[SAERef]
    selections: list[Selection]
    asked: list[str]


def read_chance(pack_file: Path) -> Chance | None:
    """What a discovery left beside its pack, or None.

    Raises:
        PackError: The file is damaged.
    """
    file = chance_file(pack_file)
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            saes = [SAERef(release=r, sae_id=i) for r, i in map(json.loads, arrays["saes"].tolist())]
            rows = zip(arrays["chance_sae"], arrays["chance_ids"], arrays["chance_weights"], strict=True)
            selections = [Selection(int(s), ids[ids >= 0], weights[ids >= 0], 0.0) for s, ids, weights in rows]
            asked = arrays["asked"].tolist()
    except Exception as error:  # zipfile, zlib, numpy and json each have their own
        raise PackError(f"{file} is damaged ({type(error).__name__}): discover the pack again.") from error
    if any(not 0 <= s.sae < len(saes) for s in selections):
        raise PackError(f"{file} is damaged (a dictionary that it does not name): discover the pack again.")
    return Chance(saes, selections, asked)
