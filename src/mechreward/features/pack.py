"""The feature pack: a named, versioned JSON of SAE features with weights, calibration and *evidence*.

A pack claims that its features track a behaviour. The schema keeps that claim honest: only a pack whose evidence
passed every test of the gate (:mod:`mechreward.features.gate`) can carry the status ``"validated"``, and a pack that
names no features yet is a ``"candidate"`` with a recipe for finding them.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from mechreward.errors import PackError
from mechreward.schema import Strict, most_telling, sentence, shown
from mechreward.stats import Interval

SCHEMA_VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class PackFeature(Strict):
    """One SAE latent of a pack.

    Attributes:
        id: Index of the latent in the SAE, 0 <= id < d_sae.
        weight: What one unit of the latent's activation adds to the reward.
        note: What the latent seems to stand for; empty when nobody has looked.
    """

    id: Count
    weight: float
    note: str = ""


class SAERef(Strict):
    """Where the pack's SAE comes from: the two names that ``mr.load_sae`` takes."""

    release: Text
    sae_id: Text


class GateTest(Strict):
    """One test of the gate: its name, whether the pack passed, and why in plain words."""

    name: Text
    passed: bool
    sentence: Text


class Injection(Strict):
    """What cue words alone do to the reading (Ma et al., arXiv 2601.05679).

    Attributes:
        cues: The tokens on which the pack reads highest, as text.
        rate: Injected tokens as a share of the completion's own.
        rise: For each way of putting them into rollouts without the behaviour: how far the reading rises, as a share of
            its distance to the rollouts with the behaviour.
    """

    cues: list[str]
    rate: Annotated[float, Field(gt=0)]
    rise: dict[str, Interval]


class FormatChange(Strict):
    """What a change of format alone does to the reading.

    Attributes:
        auc: AUC on the changed rollouts.
        rise: How far the reading of rollouts without the behaviour rises, as a share of the distance to those with it.
    """

    auc: Interval
    rise: Interval


class Bin(Strict):
    """Rollouts of neighbouring readings: their mean reading, how many they are, and the share with the behaviour."""

    reading: float
    n: Count
    share: Share


class Evidence(Strict):
    """What was measured on held-out rollouts, and the verdict.

    Attributes:
        n: Rollouts that were read.
        n_positive: Those among them that show the behaviour.
        aggregation: How readings over tokens became one number per rollout.
        temperature: Sampling temperature of the rollouts, if known.
        data: One sentence: which split and seed, read by which model.
        spearman: Rank correlation of the reading with the label.
        auc: Probability that a rollout with the behaviour reads higher than one without.
        null_spearman_max: Largest \\|Spearman| among the draws of the permutation null, which repeats the selection.
        null_spearman_q95: Its 95th percentile.
        null_auc_q95: The same percentile for AUC (each draw's AUC counted in the direction that is above .5).
        p_value: (1 + draws at least as large as the observed Spearman) / (1 + draws).
        draws: Draws of the permutation null.
        null_spearman: \\|Spearman| of each draw; ``None`` in packs gated before it was kept.
        curve: How the share with the behaviour rises with the reading: bins of equal size, lowest first; likewise.
        noise_spearman_q95: The 95th percentile of the milder null that permutes the gate's labels too; ``None`` when
            it was not measured.
        auc_within_careful: AUC among the rollouts answered the careful way, or ``None`` without such a notion.
        n_within_careful: How many those are.
        length_controlled: Rank correlation of reading and label with the length taken out of both.
        surface: Cross-validated AUC of each surface baseline alone, e.g. length, way_of_answering, ngrams.
        surface_auc: Cross-validated AUC of all surface baselines together, and of what they predict of the reading.
        surface_plus_auc: The same with the reading added.
        gain: surface_plus_auc - surface_auc.
        injection: What cue words alone do.
        formats: What each change of format alone does; ``paraphrase`` where other words were given.
        surprise: How much less likely the rollouts are to the model than its own at temperature 1, in nats a token.
        without: AUC of the pack without one feature, by its id.
        verdict: Every test of the gate.
    """

    n: Count
    n_positive: Count
    aggregation: Text
    temperature: Annotated[float, Field(ge=0)] | None
    data: Text
    spearman: Interval
    auc: Interval
    null_spearman_max: float
    null_spearman_q95: float
    null_auc_q95: Share
    p_value: Share
    draws: Count
    null_spearman: list[float] | None = None
    curve: list[Bin] | None = None
    noise_spearman_q95: float | None = None
    auc_within_careful: Interval | None = None
    n_within_careful: Count | None = None
    length_controlled: Interval | None = None
    surface: dict[str, Share]
    surface_auc: Share
    surface_plus_auc: Share
    gain: Interval
    injection: Injection | None = None
    formats: dict[str, FormatChange] | None = None
    surprise: Interval | None = None
    without: dict[str, Share] | None = None
    verdict: list[GateTest]

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if self.n_positive > self.n:
            raise ValueError(f"counts {self.n_positive} positive rollouts among {self.n}")
        return self

    def passed(self) -> bool:
        """Whether there is a verdict and every test in it was passed."""
        return bool(self.verdict) and all(test.passed for test in self.verdict)

    def reason(self) -> str:
        """The sentence for a pack's ``status_reason``: all passed, or what the failed tests say."""
        if self.passed():
            return f"Passed all {len(self.verdict)} tests of the gate on {self.n} held-out rollouts."
        return " ".join(test.sentence for test in self.verdict if not test.passed) or "The gate has no verdict."


class Calibration(Strict):
    """What the raw reward looks like, so that packs on different scales can be compared and combined.

    Attributes:
        quantiles: The 0, 1, ..., 100 % quantiles of the raw reward over the gate's rollouts.
        aggregation: The aggregation that the reward was computed with.
    """

    quantiles: Annotated[list[float], Field(min_length=101, max_length=101)]
    aggregation: Text

    @field_validator("quantiles")
    @classmethod
    def _non_decreasing(cls, quantiles: list[float]) -> list[float]:
        if any(high < low for low, high in itertools.pairwise(quantiles)):
            raise ValueError("should not decrease from one quantile to the next")
        return quantiles

    @classmethod
    def of(cls, rewards: ArrayLike, aggregation: str) -> Self:
        """Calibration from the raw rewards ``[n]`` of the gate's rollouts.

        Raises:
            PackError: There are none, or some are not finite.
        """
        values = np.asarray(rewards, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise PackError("A calibration needs a non-empty list of finite rewards; leave out rollouts without one.")
        quantiles = np.maximum.accumulate(np.quantile(values, np.linspace(0, 1, 101)))  # against rounding
        return cls(quantiles=quantiles.tolist(), aggregation=aggregation)

    def to_unit(self, value: ArrayLike) -> NDArray[np.float64]:
        """Raw rewards, any shape, to their share of the gate's rollouts that lie below, in [0, 1], float64.

        Monotone. A value that many rollouts share (such as 0, when no feature fires) gets the middle of its ranks;
        below everything seen is 0, above it 1; NaN stays NaN.
        """
        # np.interp is undefined for repeated abscissae, so repeated quantiles become one point at their mean rank.
        points, inverse, counts = np.unique(self.quantiles, return_inverse=True, return_counts=True)
        ranks = np.bincount(inverse, weights=np.linspace(0, 1, 101)) / counts
        raw = np.asarray(value, dtype=np.float64)
        return np.clip(np.interp(raw, points, ranks, left=0.0, right=1.0), 0.0, 1.0)


class Approximation(Strict):
    """A selection among all latents, replaced by one threshold.

    Attributes:
        of: What it stands for.
        threshold: In units of the pre-activation.
        tokens: How many residual vectors it was calibrated and measured on.
        changed: Share of the readings that are zero in one and not in the other.
        relative_error: ||exact - approximate|| / ||exact|| over the pack's features.
    """

    of: Literal["topk", "groupmax"]
    threshold: float
    tokens: Count
    changed: Share
    relative_error: Annotated[float, Field(ge=0)]


class FrozenEncoder(Strict):
    """The encoder columns that a frozen pack carries, in a safetensors file beside its JSON.

    Attributes:
        file: The file's name.
        sha256: Its checksum.
        kind, k: The nonlinearity; see ``mechreward.readout.Nonlinearity``.
        norm, scale, center: What happens to the input first; see ``mechreward.readout.InputTransform``.
        approximation: Set where a threshold replaces a selection: such readings are not exact.
    """

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    kind: Literal["relu", "jumprelu", "gated", "topk", "groupmax"]
    k: Count = 0
    norm: Literal["none", "constant_norm_rescale", "layer_norm"] = "none"
    scale: float = 1.0
    center: bool = False
    approximation: Approximation | None = None


class Recipe(Strict):
    """How to find the features of a pack that has none yet.

    Attributes:
        behaviour: The behaviour that the features should track.
        contrast: What to contrast: a description, or pairs of texts with named sides.
        settings: Settings of the discovery, by name.
    """

    behaviour: Text
    contrast: str | list[dict[str, str]]
    settings: dict[str, str | int | float] = Field(default_factory=dict)


class FeaturePack(Strict):
    """A pack as its JSON file holds it.

    Attributes:
        schema_version: Version of this schema.
        name: As users load it, e.g. ``"pocket/reasoning_pack"``.
        description: What a high reward means.
        model: Hub id of the model whose residual stream is read.
        sae: The SAE that the features belong to.
        hook_point: Where it reads, e.g. ``blocks.2.hook_resid_post``.
        d_model: Width of the residual stream.
        d_sae: Number of latents of the SAE.
        aggregation: The aggregation that the evidence was measured with, and the default for rewards.
        features: Latents and weights, each id once.
        status: ``"validated"`` only when the evidence passed every test of the gate.
        status_reason: One sentence that says why the status is what it is.
        calibration: Quantiles of the raw reward, if measured.
        evidence: What was measured on held-out rollouts, if anything.
        frozen: The encoder columns that it carries, if it is frozen.
        recipe: How to find the features; needed while there are none.
        provenance: Seeds, script, versions: what it takes to make the pack again.
        licence: Licence of the pack.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Text
    description: Text
    model: Text
    sae: SAERef
    hook_point: str
    d_model: Annotated[int, Field(gt=0)]
    d_sae: Annotated[int, Field(gt=0)]
    aggregation: Text = "mean"
    features: list[PackFeature]
    status: Literal["validated", "candidate"]
    status_reason: Text
    calibration: Calibration | None = None
    evidence: Evidence | None = None
    frozen: FrozenEncoder | None = None
    recipe: Recipe | None = None
    provenance: dict[str, str | int | float]
    licence: Text
    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """Where it was read from: a frozen pack's encoder lies there too."""
        return self._folder

    @field_validator("hook_point")
    @classmethod
    def _hook_point_form(cls, hook_point: str) -> str:
        if not re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,5})\.hook_resid_(pre|mid|post)", hook_point):
            raise ValueError("should look like blocks.2.hook_resid_post")
        return hook_point

    @model_validator(mode="after")
    def _features_fit(self) -> Self:
        seen: set[int] = set()
        for feature in self.features:
            if feature.id in seen:
                raise ValueError(f"names feature {feature.id} twice; keep one of them")
            if feature.id >= self.d_sae:
                raise ValueError(f"names feature {feature.id}, but its SAE has d_sae = {self.d_sae} latents")
            seen.add(feature.id)
        return self

    @model_validator(mode="after")
    def _status_is_earned(self) -> Self:
        if not self.features and (self.recipe is None or self.status != "candidate"):
            raise ValueError("has no features, so it needs a recipe and the status 'candidate'")
        if self.status == "candidate":
            return self
        if self.evidence is None:
            raise ValueError("has status 'validated' but no evidence; run the gate or set the status 'candidate'")
        if not self.evidence.passed():
            failed = [test.name for test in self.evidence.verdict if not test.passed]
            which = f"fails {', '.join(failed)}" if failed else "has no tests"
            raise ValueError(f"has status 'validated' but its evidence {which}; set the status 'candidate'")
        if self.evidence.aggregation != self.aggregation:
            raise ValueError(
                f"has status 'validated' for aggregation '{self.aggregation}', but its evidence was measured with "
                f"'{self.evidence.aggregation}'; run the gate with the pack's own aggregation"
            )
        return self

    def write(self, path: str | Path) -> None:
        """Write JSON: keys in the order of the schema, two spaces, so that a changed pack gives a short diff."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def read_pack(path: str | Path) -> FeaturePack:
    """Read and check a pack's JSON file.

    Raises:
        PackError: Whatever is wrong with it, in one sentence.
    """
    path = Path(path)
    raw = _read_json(path)
    version = raw.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:  # 1.0 and true equal 1 but are not the version 1
        found = "no schema_version" if "schema_version" not in raw else f"schema_version {shown(version)}"
        raise PackError(
            f"{path} has {found}, but this release of mechreward reads {SCHEMA_VERSION}: write the pack again with "
            "this release, or install the release that wrote it."
        )
    try:
        pack = FeaturePack.model_validate(raw)
    except ValidationError as error:
        raise PackError(f"{path}: {sentence(most_telling(error), FeaturePack, 'pack')}") from None
    pack._folder = path.parent
    return pack


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, with repeated keys refused (Python would silently keep the last)."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise PackError(f"{path} cannot be read ({error.strerror}): check the path of the pack.") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd numbers, absurd nesting
        raise PackError(f"{path} is not valid JSON ({error}): correct it there, or write the pack again.") from None
    if not isinstance(raw, dict):
        raise PackError(f"{path} holds a JSON {type(raw).__name__}, not a pack: a pack is an object of named keys.")
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice = next(key for key in keys if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"key '{twice}' occurs twice in one object")
    return keys
