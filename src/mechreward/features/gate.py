"""The gate: what a pack must show on held-out rollouts before it may be called validated.

Each test has an explicit threshold (the constants below):

1. ``auc``: the reading separates rollouts with and without the behaviour. Obfuscation Atlas (arXiv 2602.15515)
   needed a probe AUC above .7 for training against a probe to stay honest.
2. ``spearman``: rank correlation of at least .30, the published first stage gate of the contrast method.
3. ``length_controlled``: half of that must be left when the length is taken out of reading and label.
4. ``permutation``: better than the same selection made on labels that have nothing to do with the behaviour.
5. ``auc_within_careful``: still better than chance among rollouts answered the careful way alone, so that the pack
   does not merely recognise the way of answering. Left out where there is no such notion.
6. ``gain_over_surface``: adds something to length, way of answering and n-grams; otherwise the text alone would do.
7. ``token_injection``: its own cue words, put into rollouts that lack the behaviour, raise the reading by less than
   half of the way to those that show it (Ma et al., arXiv 2601.05679).
8. ``format``: under other line breaks, spaces, bullets or capitals (and other words, where given) the AUC falls by no
   more than .10, and the reading of rollouts without the behaviour rises by less than half of that way.
9. ``on_policy``: the rollouts are what the model itself writes at temperature 1.

Every interval must clear its threshold with its worse end, and rollouts of one prompt are resampled together. The last
three need the model: :func:`mechreward.features.judge.judge` runs them all. A pack without any one of its features is
measured too, and not tested: a pack of one feature may be a good one.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from mechreward import progress
from mechreward.errors import PackError
from mechreward.features.pack import Bin, Evidence, FormatChange, GateTest, Injection
from mechreward.stats import Interval, auc, bootstrap, comparable, spearman

AUC_LOW = 0.70  # lower end of the AUC's interval must lie above
SPEARMAN_LOW = 0.30  # lower end of Spearman's interval must reach
P_BELOW = 0.01  # with 100 draws: the observed value exceeds every draw
CAREFUL_LOW = 0.50  # lower end of the AUC within careful answers must lie above
GAIN_LOW = 0.0  # lower end of the gain over surface baselines must lie above
LENGTH_LOW = 0.15  # lower end of the rank correlation without the length must reach
RISE_HIGH = 0.50  # upper end of the rise by cue words, or by a change of format, must lie below
FORMAT_DROP = 0.10  # a change of format may lower the AUC by so much
SURPRISE = 0.05  # nats a token: the interval of the surprise must come so near to 0

Floats = NDArray[np.float64]
Splits = list[tuple[NDArray[np.int64], NDArray[np.int64]]]  # row numbers to train on and to test on
Surface = dict[str, Any]  # baseline's name -> scipy.sparse.csr_array [n, columns], float64

# The penalty of the regressions is meant for the hundreds of n-grams. Columns scaled by this factor are penalised 10
# (l1) or 100 (l2) times less, in effect not at all: the reading, length and way of answering all get that treatment,
# so that the reading cannot gain merely from saying again, unpenalised, what a penalised baseline already says.
_UNPENALISED = 10.0

# (C, l1_ratio) of scikit-learn's LogisticRegression; the pair that serves the surface baseline best is used. l2 suits a
# behaviour that shows in many n-grams, l1 one that hangs on a few, such as a cue word. Without l1, readings that were
# a noisy count of one word passed the surface test in 8 of 12 made-up worlds of 480 rollouts; with it, in none.
_PENALTIES = ((0.01, 0), (0.1, 0), (1.0, 0), (0.03, 1), (0.1, 1), (0.3, 1))


def length_controlled(scores: ArrayLike, labels: ArrayLike, lengths: ArrayLike) -> float:
    """Partial rank correlation of scores and labels given the length.

    Pearson's r of what is left of both ranks after regression on a cubic of the rank of the length, and on which tenth
    of all lengths it falls in.

    Args:
        scores: One number per rollout [n].
        labels: Bools or numbers [n], not all the same.
        lengths: In tokens [n].

    Returns:
        A float in [-1, 1]; 0 when the length explains one of the two entirely.
    """
    scores, labels = comparable(scores, labels)
    rank = _standardised(rankdata(np.asarray(lengths, dtype=np.float64)))
    tenth = np.digitize(rank, np.unique(np.quantile(rank, np.linspace(0.1, 0.9, 9))))
    known = np.column_stack([np.ones_like(rank), rank, rank**2, rank**3, tenth[:, None] == np.arange(1, 10)])
    ranks = np.column_stack([rankdata(scores), rankdata(labels)])
    ranks -= ranks.mean(axis=0)
    left = ranks - known @ np.linalg.lstsq(known, ranks, rcond=None)[0]
    x, y = left.T
    norm = np.sqrt((x @ x) * (y @ y))
    explained = norm <= 1e-9 * np.sqrt(np.square(ranks).sum(axis=0).prod())
    return 0.0 if explained else float(np.clip(x @ y / norm, -1, 1))


def rise(changed: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> float:
    """How far changed rollouts without the behaviour rise, as a share of the way to those with it.

    (mean changed_0 - mean r_0) / (mean r_1 - mean r_0), Ma et al.'s transfer ratio; infinite where the reading does not
    even rise with the behaviour.
    """
    scores, labels = comparable(scores, labels)
    positive = labels.astype(bool)
    low, way = scores[~positive].mean(), scores[positive].mean() - scores[~positive].mean()
    return float((np.asarray(changed, dtype=np.float64)[~positive].mean() - low) / way) if way > 0 else float("inf")


def surface_features(texts: Sequence[str], lengths: ArrayLike, ways: Sequence[str] | None = None) -> Surface:
    """What can be seen of each completion without looking inside the model, as one sparse matrix per baseline.

    - ``length``: the length itself, cubic splines of it and which tenth of all lengths it falls in, so that any curve
      can be fitted.
    - ``way_of_answering``: one column per way; left out without ``ways``.
    - ``ngrams``: for words, digits and signs, alone and in pairs: whether it occurs, and its share of the text (a
      reading averaged over tokens is such a share). Every digit is written as 0: how long a number is stays visible,
      which number it is does not, since the answers themselves would otherwise be learnt by heart.

    Nothing here looks at labels, so it may be computed before cross-validation splits the rollouts.

    Args:
        texts: Completions [n].
        lengths: Their lengths in tokens [n].
        ways: Name of the way in which each was answered [n], or ``None``.

    Returns:
        Sparse float64 [n, columns] by baseline.
    """
    from scipy.sparse import csr_array
    from sklearn.preprocessing import SplineTransformer

    tokens = _standardised(np.asarray(lengths, dtype=np.float64))
    edges = np.unique(np.quantile(tokens, np.linspace(0.1, 0.9, 9)))
    tenth = np.digitize(tokens, edges)[:, None] == np.arange(len(edges) + 1)
    curves = SplineTransformer(n_knots=6).fit_transform(tokens[:, None])
    surface: Surface = {"length": csr_array(np.column_stack([tokens, curves, tenth]) * _UNPENALISED)}
    if ways is not None:
        names = np.asarray(ways)
        surface["way_of_answering"] = csr_array((names[:, None] == np.unique(names)) * _UNPENALISED)
    ngrams = _ngrams(texts)
    if ngrams is not None:
        surface["ngrams"] = ngrams
    return surface


class SurfaceGain(NamedTuple):
    """What a reading adds to what can be seen in the text.

    Attributes:
        alone: Cross-validated AUC of each surface baseline by itself.
        surface_auc: Cross-validated AUC of all of them together, and of what they predict of the reading.
        surface_plus_auc: The same with the reading added.
        gain: The difference, with its bootstrap interval over prompts.
    """

    alone: dict[str, float]
    surface_auc: float
    surface_plus_auc: float
    gain: Interval


def surface_gain(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    surface: Surface,
    *,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
) -> SurfaceGain:
    """Logistic regression on the surface, without and with the reading; AUC of out-of-fold predictions.

    Folds keep all rollouts of a prompt together (GroupKFold). The penalty is the one with which the *surface* does best
    and is then used with the reading too: the baseline is taken at its strongest.

    For the same reason the baseline also gets, as one column, what the surface predicts of the *reading* (linear
    regression on other prompts, no labels). A reading that is nothing but a well-shaped function of the text would
    otherwise gain from its shape, which a baseline fitted to a few hundred labels finds only roughly: on made-up
    worlds where the reading was a function of length alone, a baseline without this column let it pass in 3 of 3.

    The interval resamples prompts of the out-of-fold predictions; the regressions are not fitted again.

    Args:
        scores: The reading per rollout [n].
        labels: Bools [n].
        groups: Prompt of each rollout [n].
        surface: From :func:`surface_features`.
        folds: Folds of the cross-validation, at most one per prompt.
        draws: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    from scipy.sparse import csr_array, hstack

    reading, truth = comparable(scores, labels)
    splits = _splits(truth.astype(bool), np.asarray(groups), folds)
    alone = {}
    for name, matrix in surface.items():
        alone[name], *_ = _best(matrix, truth, splits)
        progress.advance()
    # What the surface predicts of the reading is a column of the baseline.
    seen = hstack(list(surface.values()), format="csr")
    reading = _standardised(reading)
    predicted = _standardised(_predicted_reading(seen, reading, splits))
    progress.advance()
    seen = hstack([seen, csr_array(predicted[:, None] * _UNPENALISED)], format="csr")
    without_auc, penalty, without = _best(seen, truth, splits)
    progress.advance()
    column = csr_array(reading[:, None] * _UNPENALISED)
    with_reading = _out_of_fold(hstack([seen, column], format="csr"), truth, splits, penalty)

    def difference(plus: Floats, minus: Floats, positive: NDArray) -> float:
        return auc(plus, positive) - auc(minus, positive)

    gain = bootstrap(difference, with_reading, without, truth, groups=groups, draws=draws, seed=seed)
    progress.advance()
    return SurfaceGain(alone, without_auc, auc(with_reading, truth), gain)


@dataclass(frozen=True)
class Measured:
    """What was measured on n held-out rollouts, for the gate to judge.

    What needs the model is measured before (:mod:`mechreward.features.judge`).

    Attributes:
        scores: The pack's raw reward per rollout [n]; rollouts in which no token could be read are left out before.
        labels: Whether each rollout shows the behaviour [n], bool.
        groups: Prompt of each rollout [n].
        texts: Completions [n].
        lengths: Their lengths in tokens [n].
        ways: Way of answering of each [n], or ``None``; those that are called ``careful`` have a test of their own.
        null: For each selection by chance, \\|Spearman| and the AUC counted from .5 upwards, since the sign of such a
            selection is arbitrary [draws, 2].
        null_of: What its draws are.
        aggregation: Aggregation that the scores were computed with.
        temperature: Sampling temperature of the rollouts, if known.
        data: One sentence: split, seed, model.
        injection, formats, surprise, without: See :class:`mechreward.features.pack.Evidence`.
    """

    scores: ArrayLike
    labels: ArrayLike
    groups: ArrayLike
    texts: Sequence[str]
    lengths: ArrayLike
    ways: Sequence[str] | None
    null: Floats
    null_of: str
    aggregation: str
    temperature: float | None
    data: str
    injection: Injection | None = None
    formats: dict[str, FormatChange] | None = None
    surprise: Interval | None = None
    without: dict[str, float] | None = None


def gate(measured: Measured, *, draws: int = 1000, seed: int = 0) -> Evidence:
    """Judge a pack by what was measured on held-out rollouts.

    Args:
        measured: See above.
        draws: Bootstrap resamples of every interval.
        seed: Seed of every bootstrap.
    """
    reading, truth = comparable(measured.scores, measured.labels)
    ways, null = measured.ways, measured.null
    positive, groups = truth.astype(bool), np.asarray(measured.groups)

    def interval(statistic: Callable[..., float], *more: ArrayLike) -> Interval:
        found = bootstrap(statistic, reading, positive, *more, groups=groups, draws=draws, seed=seed)
        progress.advance()
        return found

    seen = surface_features(measured.texts, measured.lengths, ways)
    with progress.stage("The gate's tests", len(seen) + 6):
        rho, area = interval(spearman), interval(auc)
        surface = surface_gain(reading, positive, groups, seen, draws=draws, seed=seed)
        partial = interval(length_controlled, measured.lengths)

    p_value = (1 + int((null[:, 0] >= rho.value).sum())) / (1 + len(null))
    tests = [
        _lower_end_test(
            "auc",
            "A rollout with the behaviour reads higher than one without with probability (AUC)",
            area,
            AUC_LOW,
            strict=True,
        ),
        _lower_end_test("spearman", "The rank correlation of reading and behaviour is", rho, SPEARMAN_LOW),
        _lower_end_test(
            "length_controlled",
            "With the length taken out of both, the rank correlation is",
            partial,
            LENGTH_LOW,
        ),
        _permutation_test(rho.value, p_value, null, measured.null_of),
    ]
    within, n_careful = None, None
    careful = np.array([way == "careful" for way in ways or ()])
    if careful.any():
        n_careful = int(careful.sum())
        with contextlib.suppress(PackError):  # careful answers that are too one-sided, or too few
            within = bootstrap(auc, reading[careful], positive[careful], groups=groups[careful], draws=draws, seed=seed)
        tests.append(_careful_test(within, n_careful, int(positive[careful].sum())))
    tests.append(_gain_test(surface))
    if measured.injection is not None:
        tests.append(_injection_test(measured.injection))
    if measured.formats is not None:
        tests.append(_format_test(measured.formats, area.value))
    if measured.surprise is not None:
        tests.append(_policy_test(measured.surprise, measured.temperature))

    return Evidence(
        n=len(reading),
        n_positive=int(positive.sum()),
        aggregation=measured.aggregation,
        temperature=measured.temperature,
        data=measured.data,
        spearman=rho,
        auc=area,
        null_spearman_max=float(null[:, 0].max()),
        null_spearman_q95=float(np.quantile(null[:, 0], 0.95)),
        null_auc_q95=float(np.quantile(null[:, 1], 0.95)),
        p_value=p_value,
        draws=len(null),
        null_spearman=[round(float(rho), 4) for rho in np.sort(null[:, 0])],
        curve=_curve(reading, positive),
        auc_within_careful=within,
        n_within_careful=n_careful,
        length_controlled=partial,
        surface=surface.alone,
        surface_auc=surface.surface_auc,
        surface_plus_auc=surface.surface_plus_auc,
        gain=surface.gain,
        injection=measured.injection,
        formats=measured.formats,
        surprise=measured.surprise,
        without=measured.without,
        verdict=tests,
    )


# The tests -----------------------------------------------------------------------------------------------------------


def _lower_end_test(
    name: str, what: str, interval: Interval, least: float, *, strict: bool = False, otherwise: str = "."
) -> GateTest:
    """Whether an interval's lower end reaches a threshold, or where ``strict``, lies above it."""
    passed = interval.low > least if strict else interval.low >= least
    verbs = ("is not above", "is above") if strict else ("does not reach", "reaches")
    ending = "." if passed else otherwise
    sentence = f"{what} {_shown(interval)}; the lower end {verbs[passed]} {least:.2f}{ending}"
    return GateTest(name=name, passed=passed, sentence=sentence)


def _injection_test(injection: Injection) -> GateTest:
    how, worst = max(injection.rise.items(), key=lambda item: item[1].high)
    passed = worst.high < RISE_HIGH
    return GateTest(
        name="token_injection",
        passed=passed,
        sentence=f"Cue words alone ({', '.join(map(repr, injection.cues))}; {injection.rate:.0%} of the length, {how}) "
        f"bring rollouts without the behaviour {_shown(worst)} of the way to those with it; the upper end "
        f"{'is' if passed else 'is not'} below {RISE_HIGH:.2f}{'.' if passed else ', so the pack detects words.'}",
    )


def _format_test(formats: dict[str, FormatChange], area: float) -> GateTest:
    if not formats:
        sentence = "No change of format could be made: the tokenizer cannot write the changed texts."
        return GateTest(name="format", passed=False, sentence=sentence)
    weakest, change = min(formats.items(), key=lambda item: item[1].auc.value)
    strongest, other = max(formats.items(), key=lambda item: item[1].rise.high)
    keeps, stays = change.auc.value >= area - FORMAT_DROP, other.rise.high < RISE_HIGH
    return GateTest(
        name="format",
        passed=keeps and stays,
        sentence=f"Of {len(formats)} changes of format, the AUC suffers most from '{weakest}' ({area:.2f} to "
        f"{change.auc.value:.2f}; a fall of {FORMAT_DROP:.2f} is allowed), and '{strongest}' brings rollouts without "
        f"the behaviour {_shown(other.rise)} of the way to those with it ({RISE_HIGH:.2f} is too much).",
    )


def _policy_test(surprise: Interval, temperature: float | None) -> GateTest:
    near = surprise.low <= SURPRISE and surprise.high >= -SURPRISE
    passed = near and temperature in (None, 1.0)
    sampled = "" if temperature is None else f", sampled at temperature {temperature:g},"
    how = "come from" if passed else "do not come from"
    return GateTest(
        name="on_policy",
        passed=passed,
        sentence=f"The rollouts{sampled} are {_shown(surprise)} nats a token less "
        f"likely to the model than its own: they {how} the model itself at temperature 1 (where it is 0, and "
        f"{SURPRISE:.2f} either way is allowed).",
    )


def _permutation_test(rho: float, p_value: float, null: Floats, null_of: str) -> GateTest:
    passed = p_value < P_BELOW
    above = int((null[:, 0] >= rho).sum())
    too_few = "" if 1 / (1 + len(null)) < P_BELOW else " (no result of so few draws could be: 100 are the least)"
    return GateTest(
        name="permutation",
        passed=passed,
        sentence=f"Of {len(null)} {null_of}, {above} reach the rank correlation {rho:.2f} "
        f"(their largest: {null[:, 0].max():.2f}), p = {p_value:.4f}, which {'is' if passed else 'is not'} below "
        f"{P_BELOW:.2f}{too_few}.",
    )


def _careful_test(careful: Interval | None, n: int, n_positive: int) -> GateTest:
    if careful is None:
        sentence = (
            f"Within careful answers nothing can be said: {n_positive} of {n} show the behaviour, too few on one side."
        )
        return GateTest(name="auc_within_careful", passed=False, sentence=sentence)
    return _lower_end_test(
        "auc_within_careful",
        f"Among the {n} careful answers alone the AUC is",
        careful,
        CAREFUL_LOW,
        strict=True,
        otherwise=", so the features may only tell the way of answering.",
    )


def _gain_test(surface: SurfaceGain) -> GateTest:
    passed = surface.gain.low > GAIN_LOW
    return GateTest(
        name="gain_over_surface",
        passed=passed,
        sentence=f"The text's surface alone reaches AUC {surface.surface_auc:.3f}, with the reading "
        f"{surface.surface_plus_auc:.3f}: a gain of {_shown(surface.gain, '.3f')}, whose lower end "
        f"{'is above 0.' if passed else 'is not above 0, so the text alone would do.'}",
    )


def _shown(interval: Interval, form: str = ".2f") -> str:
    return interval.shown(form, "95 % interval ")


# Helpers -------------------------------------------------------------------------------------------------------------


def _curve(reading: Floats, positive: NDArray[np.bool_], bins: int = 10) -> list[Bin]:
    """The share with the behaviour by tenths of the reading."""
    parts = np.array_split(np.argsort(reading, kind="stable"), bins)
    return [
        Bin(reading=float(reading[rows].mean()), n=len(rows), share=float(positive[rows].mean()))
        for rows in parts
        if len(rows)
    ]


def _standardised(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _ngrams(texts: Sequence[str]) -> Any:
    """Sparse [n, 2 V]: presence, and share of the text in units of its own standard deviation; None without words."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import StandardScaler, normalize

    plain = [re.sub(r"\d", " 0 ", text) for text in texts]
    # n-grams in fewer than five rollouts cannot help; newlines count, since they part the steps of an answer.
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w ]", min_df=5, max_features=2000)
    try:
        counts: Any = vectorizer.fit_transform(plain)
    except ValueError:  # no n-gram occurs in five texts
        return None
    shares = StandardScaler(with_mean=False).fit_transform(normalize(counts, norm="l1"))
    present = (counts > 0).astype(np.float64)
    return hstack([present, shares], format="csr")


def _splits(positive: NDArray, groups: NDArray, folds: int) -> Splits:
    """Row numbers to train and to test on, whole prompts at a time."""
    from sklearn.model_selection import GroupKFold

    folds = min(folds, len(np.unique(groups)))
    if folds < 2:
        raise PackError("Cross-validation needs rollouts of at least two prompts: sample more prompts.")
    splits = list(GroupKFold(folds).split(positive, groups=groups))
    if any(positive[train].all() or not positive[train].any() for train, _ in splits):
        raise PackError(
            "One fold of prompts holds every rollout with (or without) the behaviour, so it cannot be predicted from "
            "the others: sample more prompts."
        )
    return splits


def _out_of_fold(matrix: Any, labels: Floats, splits: Splits, penalty: tuple[float, int]) -> Floats:
    """Log-odds [n] for each rollout from a regression that never saw its prompt."""
    from sklearn.linear_model import LogisticRegression

    strength, l1_ratio = penalty
    predictions = np.empty(len(labels))
    for train, test in splits:
        model = LogisticRegression(C=strength, l1_ratio=l1_ratio, solver="liblinear", random_state=0, max_iter=300)
        predictions[test] = model.fit(matrix[train], labels[train]).decision_function(matrix[test])
    return predictions


def _predicted_reading(matrix: Any, reading: Floats, splits: Splits) -> Floats:
    """What the surface predicts of each reading [n], by linear regression on other prompts, at the best penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso, Ridge

    models: list[Any] = [Ridge(alpha=alpha, solver="sparse_cg", tol=1e-6) for alpha in (1.0, 10.0, 100.0)]
    models += [Lasso(alpha=alpha, max_iter=2000, tol=1e-3) for alpha in (0.01, 0.03, 0.1)]
    tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops early is merely one more candidate
        for model in models:
            predictions = np.empty(len(reading))
            for train, test in splits:
                predictions[test] = model.fit(matrix[train], reading[train]).predict(matrix[test])
            tried.append(predictions)
    return min(tried, key=lambda predictions: float(np.square(predictions - reading).sum()))


def _best(matrix: Any, labels: Floats, splits: Splits) -> tuple[float, tuple[float, int], Floats]:
    """The AUC, penalty and out-of-fold predictions of the penalty that serves a baseline best."""
    tried = [(penalty, _out_of_fold(matrix, labels, splits, penalty)) for penalty in _PENALTIES]
    areas = [auc(predictions, labels) for _, predictions in tried]
    best = int(np.argmax(areas))
    return areas[best], *tried[best]
