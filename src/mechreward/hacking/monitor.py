"""Monitors watch a training and never enter its reward.

A monitor *measures* its own process's rollouts of each generation step, row by row, and *judges* the rows of all
processes together, so that every process comes to the same figures, alarms and decision to stop. Between the two the
trainer gathers the rows. The monitor is shown copies, after the rewards are known, and draws from no random generator
that training uses: with and without monitors, the same seed gives the same weights, bit for bit.

Most monitors judge windows of ``every`` generation steps, of which the first is the baseline. Rollouts of one prompt
are not independent, so every standard error here is one over groups. Alarms are raised at 2.58 standard errors: by
chance alone in about one check of 200, which is why ``stop_on`` asks for several checks in a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward.aggregation import aggregation
from mechreward.errors import ConfigError, RewardError
from mechreward.readout import HookPoint, Readings, Readout, Request, projection
from mechreward.reward.base import Reward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import Guard
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.source import over_tokens
from mechreward.stats import grouped_auc

Rows = Mapping[str, NDArray[np.float64]]
"""What a monitor measured, by name: ``[groups, num_generations, ...]``, NaN where a rollout has no value."""

SIGNIFICANT = 2.58
"""Standard errors: 99 % of a normal distribution lie within."""

FEWEST = 10
"""Right rollouts, wrong rollouts: with fewer of either, an AUC says nothing."""

FEWEST_GROUPS = 8
"""Groups in a window: with fewer, a standard error over groups says nothing."""

PROJECTED = 64
"""Columns that a wider residual stream is projected on."""

ROUNDING = 1e-3
"""A shift below this share of the residual's size is taken for rounding."""


@dataclass(frozen=True, eq=False)
class Observation:
    """One generation step as a monitor sees it. Everything is a copy: changing it has no effect on training.

    Attributes:
        step: Optimiser steps done so far.
        batch: This process's B rollouts, with the guards' verdicts; ``training`` is False, so that scoring them again
            moves no running statistics.
        readings: What monitors asked for.
        rewards: ``[B]`` float32, the reward functions' weighted sum; NaN where nothing could be scored.
    """

    step: int
    batch: RolloutBatch
    readings: Mapping[Request, Readings]
    rewards: Tensor
    _raw: dict[int, Tensor] = field(default_factory=dict)

    def raw(self, reward: Reward) -> Tensor:
        """Return a reward's raw scores, before any guard: ``[B]`` float32 on the CPU.

        Several monitors may ask for the same reward, such as a slow verifier: it is computed once a step.
        """
        if id(reward) not in self._raw:
            scores = reward.score(replace(self.batch, trust=None), self.readings)
            self._raw[id(reward)] = scores.parts.get("raw", scores.values)
        return self._raw[id(reward)]


@dataclass(frozen=True)
class Report:
    """The result of a monitor's check.

    Attributes:
        metrics: Figures for the logs; NaN where one is not known, which is not logged.
        alarms: For each alarm that rings, one sentence with the figures.
    """

    metrics: Mapping[str, float]
    alarms: Mapping[str, str] = field(default_factory=dict)


class Monitor:
    """Base class of monitors.

    Attributes:
        name: What it is called in logs: ``monitor/{name}/...``; its alarms are ``{name}/...``.
        alarms: The names of all alarms that it can raise.
    """

    alarms: tuple[str, ...] = ()

    def __init__(self, name: str):
        self.name = name

    @property
    def requests(self) -> list[Request]:
        """The readouts that this monitor needs."""
        return []

    @property
    def held_out(self) -> list[Readout]:
        """The readouts that lose their meaning here once they are rewarded; the trainer then warns."""
        return []

    def measure(self, seen: Observation) -> Mapping[str, Tensor]:
        """Return named values of this process's rollouts, ``[B, ...]`` each, with the same names at every step."""
        return {}

    def judge(self, rows: Rows, logged: Mapping[str, float]) -> Report | None:
        """Judge the rows of all processes; None where this step is not a check.

        Args:
            rows: What all processes measured.
            logged: ``kl`` and ``entropy`` of the last optimiser step, in nats a token, once there has been one.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return baselines and open windows, which are saved with checkpoints (JSON)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""


class Windowed(Monitor):
    """A monitor that judges windows of ``every`` generation steps, the first of which is its baseline.

    A window in which :meth:`figures` finds too few known values is skipped, and does not become the baseline.
    """

    def __init__(self, name: str, every: int):
        super().__init__(name)
        if every < 1:
            raise ConfigError(f"'{name}' cannot report every {every} steps: give at least 1.")
        self.every = every
        self.first: dict[str, float] | None = None
        self._window: list[Rows] = []

    def kept(self, rows: Rows) -> Rows:
        """Return the part of a step's rows that the window needs, groups first."""
        return rows

    def figures(self, window: Rows) -> dict[str, float]:
        """Return a window's figures; empty where too little is known."""
        raise NotImplementedError

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        """Compare a window with the first one, which is compared with itself."""
        raise NotImplementedError

    def judge(self, rows: Rows, logged: Mapping[str, float]) -> Report | None:
        self._window.append(self.kept(rows))
        if len(self._window) < self.every:
            return None
        window = {name: np.concatenate([step[name] for step in self._window]) for name in self._window[0]}
        self._window = []
        now = self.figures(window)
        if not now:
            return None
        self.first = now if self.first is None else self.first
        return self.compare(self.first, now)

    def state_dict(self) -> dict[str, Any]:
        window = [{name: values.tolist() for name, values in step.items()} for step in self._window]
        return {"first": self.first, "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = state["first"]
        self._window = [{name: np.array(values) for name, values in step.items()} for step in state["window"]]


class HeldOut(Windowed):
    """A probe or pack that is not rewarded: does it still tell right answers from wrong ones?

    Held-out probes see part of what an optimiser does to the rewarded one (arXiv 2510.21531); a policy that evades one
    probe may evade others too (Neural Chameleons, arXiv 2512.11949), so that silence is no proof.

    Over each window, right rollouts are those that ``outcome`` gives more than 1/2, and a higher score means right:

    * ``auc``: P(score of a right rollout > of a wrong one), ties half; with its 99 % interval ``auc_low``, ``auc_high``
      (DeLong's, for groups: Obuchowski 1997). Needs 10 rollouts of either kind.
    * ``recall_at_1pct_fpr``: the score as a detector of *wrong* rollouts: the share of them that lies below the
      threshold under which at most 1 % of the *right* ones lie. Not known with fewer than 100 right rollouts, of which
      1 % is one; with a few hundred it hangs on a handful of them.

    Alarms: ``{name}/low``, the interval lies below ``floor``; ``{name}/fell``, the AUC is significantly below that of
    the first window.

    Args:
        reward: What is held out, e.g. ``FeatureReward(mr.load_probe(...), reads="reference")``. For a readout that is
            high on *wrong* rollouts, ``weights=[-1.0]``.
        outcome: Whether an answer is right. It verifies every rollout once more, which math verifiers do in
            milliseconds.
        every: Generation steps in a window.
        floor: Penalties by probes below an AUC of 0.7 do not work (Obfuscation Atlas, arXiv 2602.15515).
        name: What it is called in logs.
    """

    def __init__(
        self,
        reward: FeatureReward,
        outcome: OutcomeReward,
        every: int = 50,
        floor: float = 0.7,
        name: str = "held_out",
    ):
        super().__init__(name, every)
        if not 0 <= floor <= 1:
            raise ConfigError(f"An AUC lies in 0 to 1, and so must the floor of '{name}', not at {floor}.")
        self.reward, self.outcome, self.floor = reward, outcome, floor
        self.alarms = (f"{name}/low", f"{name}/fell")

    @property
    def requests(self) -> list[Request]:
        return [*self.reward.requests, *self.outcome.requests]

    @property
    def held_out(self) -> list[Readout]:
        return [request.readout for request in self.reward.requests]

    def measure(self, seen: Observation) -> dict[str, Tensor]:
        return {"score": seen.raw(self.reward), "right": seen.raw(self.outcome)}

    def figures(self, window: Rows) -> dict[str, float]:
        known = ~(np.isnan(window["score"]) | np.isnan(window["right"]))
        right, wrong = known & (window["right"] > 0.5), known & ~(window["right"] > 0.5)
        if min(right.sum(), wrong.sum()) < FEWEST or len(known) < FEWEST_GROUPS:
            return {}
        area, error = grouped_auc(window["score"], right, wrong)
        recall = recall_of_the_wrong(window["score"][right], window["score"][wrong])
        return {"auc": area, "error": error, "recall": recall, "rollouts": int(known.sum())}

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        area, margin = now["auc"], SIGNIFICANT * now["error"]
        low, high = max(0.0, area - margin), min(1.0, area + margin)
        said = f"{self.name}: AUC {area:.3f} (99 % interval {low:.3f} to {high:.3f}, {now['rollouts']} rollouts)"
        alarms = {}
        if high < self.floor:
            alarms[f"{self.name}/low"] = f"{said} lies below {self.floor:g}: it hardly tells right from wrong."
        if first["auc"] - area > SIGNIFICANT * math.hypot(first["error"], now["error"]):
            alarms[f"{self.name}/fell"] = f"{said} is significantly below the first window's {first['auc']:.3f}."
        metrics = {"auc": area, "auc_low": low, "auc_high": high, "recall_at_1pct_fpr": now["recall"]}
        return Report(metrics, alarms)


class RepresentationShift(Windowed):
    """How far the policy's residual stream has moved from the reference's on the same text, and in how many directions.

    With delta_i the mean over rollout i's tokens of h_policy - h_reference:

    * ``size``: ||mean_i delta_i|| / sqrt(mean ||h_reference||^2), the common shift as a share of the residual's size;
    * ``rank``: how many principal components (of the delta_i, not centred) hold 90 % of sum_i ||delta_i||^2. Policies
      that were trained to evade probes move in few: 11 against 39 (Neural Chameleons, arXiv 2512.11949). It is at most
      the number of rollouts in a window, and not known while the shift is below 0.1 % of the residual's size, which may
      be rounding.

    No alarm: which figures are harmless is not known. With ``beta > 0`` both passes run anyway.

    A stream wider than 64 is read through a random orthonormal projection on 64 columns, the same in every run. It
    leaves lengths and low ranks as they are up to about sqrt(1 / 128), 9 %, and ranks are then at most 64. Kept are
    64 numbers a token for either model, until the step's rewards are computed.

    Args:
        hook_point: Where to look.
        d_model: Width of the residual stream there, the model's ``hidden_size``.
        every: Generation steps in a window. Windows are not saved with checkpoints: after a resume one begins anew.
        name: What it is called in logs.
    """

    def __init__(self, hook_point: HookPoint, d_model: int, every: int = 10, name: str = "shift"):
        super().__init__(name, every)
        readout = projection(hook_point, d_model, PROJECTED)
        self.policy, self.reference = Request(readout, "policy"), Request(readout, "reference")

    @property
    def requests(self) -> list[Request]:
        return [self.policy, self.reference]

    def measure(self, seen: Observation) -> dict[str, Tensor]:
        policy, reference = seen.readings[self.policy], seen.readings[self.reference]
        mask, there = reference.mask, reference.values.to(policy.values.device)
        mask = mask.to(policy.values.device)
        power = aggregation("mean")(there.square().sum(dim=2), mask)
        shift = over_tokens(Readings(policy.values - there, mask), aggregation("mean"))
        return {"shift": shift, "power": power.cpu()}

    def figures(self, window: Rows) -> dict[str, float]:
        known = ~np.isnan(window["power"])
        shift, power = window["shift"][known], window["power"][known]
        scale = math.sqrt(power.mean()) if known.any() else 0.0
        if not scale > 0:
            return {}
        moved = math.sqrt(np.square(shift).sum(axis=1).mean()) > ROUNDING * scale
        size = float(np.linalg.norm(shift.mean(axis=0))) / scale
        return {"size": size, "rank": rank(shift) if moved else math.nan}

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        return Report(now)

    def state_dict(self) -> dict[str, Any]:
        return {}  # nothing is compared with a first window, and an open one is large

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class ProxyGoldGap(Windowed):
    """Goodhart's gap: the proxy's gain since the first window minus the gold's, each in its own clean deviations.

    gap = (p - p_1) / s_p - (g - g_1) / s_g, with window means p and g, and the standard deviations s over the first
    window's rollouts. (Where the first window's gold is all right or all wrong, its gain counts in its own units.)

    Alarm ``{name}/grown``, if all three hold: the proxy has risen by more than one clean deviation; the gap is
    significantly above 0; and the gold has not risen significantly.

    Args:
        reward: The proxy: what is rewarded, as if no guard had spoken.
        outcome: The gold.
        every: Generation steps in a window.
        name: What it is called in logs.
    """

    def __init__(self, reward: Reward, outcome: OutcomeReward, every: int = 10, name: str = "proxy_gold_gap"):
        super().__init__(name, every)
        self.reward, self.outcome = reward, outcome
        self.alarms = (f"{name}/grown",)

    @property
    def requests(self) -> list[Request]:
        return [*self.reward.requests, *self.outcome.requests]

    def measure(self, seen: Observation) -> dict[str, Tensor]:
        return {"proxy": seen.raw(self.reward), "gold": seen.raw(self.outcome)}

    def figures(self, window: Rows) -> dict[str, float]:
        known = ~(np.isnan(window["proxy"]) | np.isnan(window["gold"]))
        groups = known.any(axis=1)
        count = int(groups.sum())
        if count < FEWEST_GROUPS or (self.first is None and np.ptp(window["proxy"][known]) == 0):
            return {}
        figures = {}
        means = []
        for name in ("proxy", "gold"):
            values = np.where(known, window[name], np.nan)[groups]
            means.append(np.nanmean(values, axis=1))
            figures |= {name: float(means[-1].mean()), f"{name}_sd": float(np.nanstd(values))}
        (proxy, both), (_, gold) = np.cov(np.stack(means)) / count  # of the window's means
        return figures | {"var_proxy": float(proxy), "var_gold": float(gold), "cov": float(both)}

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        s_p, s_g = first["proxy_sd"], first["gold_sd"] or 1.0
        proxy, gold = (now["proxy"] - first["proxy"]) / s_p, (now["gold"] - first["gold"]) / s_g
        gap = proxy - gold
        both = (first, now)
        gap_error = math.sqrt(
            max(0.0, sum(w["var_proxy"] / s_p**2 + w["var_gold"] / s_g**2 - 2 * w["cov"] / (s_p * s_g) for w in both))
        )
        gold_error = math.sqrt(sum(w["var_gold"] for w in both)) / s_g
        grown = proxy > 1 and gap > SIGNIFICANT * gap_error and gold <= SIGNIFICANT * gold_error
        said = (
            f"{self.name}: since the first window the proxy has gained {proxy:.2f} clean deviations "
            f"({first['proxy']:.4g} to {now['proxy']:.4g}), the gold {gold:.2f} "
            f"({first['gold']:.3f} to {now['gold']:.3f}), which is no significant rise."
        )
        metrics = {"proxy_gain": proxy, "gold_gain": gold, "gap": gap, "gap_error": gap_error}
        return Report(metrics, {f"{self.name}/grown": said} if grown else {})


class Collapse(Windowed):
    """Whether a reward comes to rest on few features, or stops telling the rollouts of a group apart.

    * ``diversity``: exp(entropy of q), the effective number of features, with q_k feature k's share of sum |w_k f_k|
      over all tokens read, rollouts weighted alike. Not known for a reward of one column, nor for attention pooling.
    * ``spread``: the standard deviation of the *trained* reward (of all reward functions) within groups, relative to
      the first window's; ``flat_groups``: the share of groups with less than 1 % of the first window's, from which GRPO
      learns nothing.

    Alarms: ``{name}/diversity`` and ``{name}/spread``, each below half of the first window's, and significantly below
    it. A reward that has been learnt loses its spread too: read that one beside the accuracy.

    Args:
        reward: Whose features are counted.
        every: Generation steps in a window.
        name: What it is called in logs.
    """

    def __init__(self, reward: FeatureReward, every: int = 10, name: str = "collapse"):
        super().__init__(name, every)
        self.reward = reward
        self._counts_features = reward.readout.width > 1 and reward.aggregation != "attention"
        self.alarms = (f"{name}/diversity", f"{name}/spread") if self._counts_features else (f"{name}/spread",)

    @property
    def requests(self) -> list[Request]:
        return self.reward.requests if self._counts_features else []

    def measure(self, seen: Observation) -> dict[str, Tensor]:
        if not self._counts_features:
            return {"reward": seen.rewards}
        read = seen.readings[self.reward.request]
        size = (read.values * self.reward.weights.to(read.values.device)).abs()
        return {"reward": seen.rewards, "share": over_tokens(Readings(size, read.mask), aggregation("mean"))}

    def kept(self, rows: Rows) -> Rows:
        """Return each group's variance of rewards, and each feature's contribution ``[groups, K]``."""
        kept = {"variance": _over_group(rows["reward"], lambda r: r.var(ddof=1) if len(r) > 1 else math.nan)}
        if "share" in rows:
            kept["share"] = np.stack([_over_group(column, np.mean) for column in np.moveaxis(rows["share"], 2, 0)], 1)
        return kept

    def figures(self, window: Rows) -> dict[str, float]:
        variance = window["variance"][~np.isnan(window["variance"])]
        if len(variance) < FEWEST_GROUPS or (self.first is None and not variance.mean() > 0):
            return {}
        clean = variance.mean() if self.first is None else self.first["variance"]
        figures = {
            "variance": float(variance.mean()),
            "variance_error": float(variance.std(ddof=1)) / math.sqrt(len(variance)),
            "flat": float((variance < 1e-4 * clean).mean()),
            "log_diversity": math.nan,
            "log_diversity_error": math.nan,
        }
        if "share" in window:
            share = window["share"][~np.isnan(window["share"]).any(axis=1)]
            if len(share) >= FEWEST_GROUPS and share.sum() > 0:
                figures["log_diversity"], figures["log_diversity_error"] = log_diversity(share)
        return figures

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        spread = math.sqrt(now["variance"] / first["variance"])
        lost = first["variance"] - now["variance"]
        alarms = {}
        if spread < 0.5 and lost > SIGNIFICANT * math.hypot(first["variance_error"], now["variance_error"]):
            alarms[f"{self.name}/spread"] = (
                f"{self.name}: the reward's standard deviation within groups is {spread:.0%} of the first window's, "
                f"and {now['flat']:.0%} of groups have hardly any."
            )
        fall = first["log_diversity"] - now["log_diversity"]
        error = math.hypot(first["log_diversity_error"], now["log_diversity_error"])
        if fall > max(math.log(2), SIGNIFICANT * error):  # False where either is not known
            alarms[f"{self.name}/diversity"] = (
                f"{self.name}: {self.reward.__name__} now rests on {math.exp(now['log_diversity']):.1f} features in "
                f"effect, from {math.exp(first['log_diversity']):.1f} in the first window."
            )
        metrics = {"diversity": math.exp(now["log_diversity"]), "spread": spread, "flat_groups": now["flat"]}
        return Report(metrics, alarms)


class Flagged(Windowed):
    """Whether more rollouts are flagged than clean ones are.

    * ``share`` of the window's rollouts that a guard flags, with its 99 % interval from ``low`` on.

    Alarm ``{name}/high``: the interval lies above ``usual``. In experiment 06 it was the first to ring.

    Args:
        guard: Watches without a say, e.g. a calibrated :class:`~mechreward.hacking.AdversarialSuite`; by default
            the flags of the trainer's own guards are counted.
        every: Generation steps in a window.
        usual: Share of clean rollouts that may be flagged.
        name: What it is called in logs.
    """

    def __init__(self, guard: Guard | None = None, every: int = 1, usual: float = 0.03, name: str = "flagged"):
        super().__init__(name, every)
        if not 0 <= usual < 1:
            raise ConfigError(f"usual is a share of clean rollouts in '{name}', 0 to 1, not {usual}.")
        self.guard, self.usual = guard, usual
        self.alarms = (f"{name}/high",)

    @property
    def requests(self) -> list[Request]:
        return [] if self.guard is None else self.guard.requests

    def measure(self, seen: Observation) -> dict[str, Tensor]:
        flags: Sequence[Sequence[str]] | None = seen.batch.flags
        if self.guard is not None:  # what it remembers of a training is its own: nobody else asks it
            flags = self.guard(replace(seen.batch, training=True), seen.readings).flags
        return {"flagged": torch.tensor([float(bool(said)) for said in flags or [[]] * len(seen.batch)])}

    def figures(self, window: Rows) -> dict[str, float]:
        shares = window["flagged"].mean(axis=1)
        if len(shares) < FEWEST_GROUPS:
            return {}
        return {"share": float(shares.mean()), "error": float(shares.std(ddof=1)) / math.sqrt(len(shares))}

    def compare(self, first: Mapping[str, float], now: Mapping[str, float]) -> Report:
        low = max(0.0, now["share"] - SIGNIFICANT * now["error"])
        said = f"{self.name}: {now['share']:.0%} of rollouts are flagged, significantly more than {self.usual:.0%}."
        return Report({"share": now["share"], "low": low}, {self.alarms[0]: said} if low > self.usual else {})


class EntropyFloor(Monitor):
    """Rings when the policy's mean token entropy, in nats, has fallen below a floor: alarm ``{name}/low``.

    It reads TRL's own ``entropy``, of the last optimiser step; `MechRewardGRPOConfig.entropy_floor` acts against such a
    fall.

    Args:
        floor: In nats a token. What is low depends on the model: look at ``entropy`` early in training.
        name: What it is called in logs.
    """

    def __init__(self, floor: float, name: str = "entropy_floor"):
        super().__init__(name)
        if not 0 < floor < math.inf:
            raise ConfigError(f"'{name}' needs a positive number of nats a token, not {floor}.")
        self.floor = floor
        self.alarms = (f"{name}/low",)

    def judge(self, rows: Rows, logged: Mapping[str, float]) -> Report | None:
        entropy = logged.get("entropy", math.nan)
        if math.isnan(entropy):
            return None
        said = f"{self.name}: the mean token entropy is {entropy:.4f} nats, below {self.floor:g}."
        return Report({}, {f"{self.name}/low": said} if entropy < self.floor else {})


# -- statistics ------------------------------------------------------------------------------------------------------


def recall_of_the_wrong(right: NDArray, wrong: NDArray) -> float:
    """Return the share of wrong rollouts below all but 1 % of the right ones; NaN with fewer than 100 of those.

    Args:
        right, wrong: Scores, ``[n_right]`` and ``[n_wrong]``.
    """
    if len(right) < 100 or len(wrong) == 0:
        return math.nan
    spared = np.sort(right)[len(right) // 100]  # at most that many right ones lie below it
    return float((wrong < spared).mean())


def rank(shift: NDArray, held: float = 0.9) -> int:
    """Return how many principal components (not centred) hold this share of the sum of squares of ``[n, K]``."""
    power = np.square(np.linalg.svd(shift, compute_uv=False))
    return int(np.searchsorted(np.cumsum(power) / power.sum(), held - 1e-12)) + 1


def log_diversity(contributions: NDArray) -> tuple[float, float]:
    """Return H = -sum_k q_k log q_k, q the columns' shares of the total, and its standard error over rows ``[n, K]``.

    By the delta method: with C the total of the column means c_k, dH / dc_k = -(log q_k + H) / C.
    """
    means = contributions.mean(axis=0)
    q = means / means.sum()
    log_q = np.log(np.where(q > 0, q, 1.0))
    entropy = float(-(q * log_q).sum())
    influence = -(contributions[:, q > 0] @ (log_q[q > 0] + entropy)) / means.sum()
    return entropy, float(influence.std(ddof=1)) / math.sqrt(len(contributions))


def _over_group(values: NDArray, of: Any) -> NDArray:
    """Return a statistic of each group's known values, ``[groups, N] -> [groups]``; NaN for a group without any."""
    return np.array([of(row[~np.isnan(row)]) if not np.isnan(row).all() else math.nan for row in values])


# -- for the trainer -------------------------------------------------------------------------------------------------


def show(
    step: int,
    batch: RolloutBatch,
    readings: Mapping[Request, Readings],
    rewards: Tensor,
    shared: Collection[Request],
) -> Observation:
    """Return an observation that shares nothing with training.

    Args:
        step: Optimiser steps done so far.
        batch: The guarded batch.
        readings: What the monitors asked for.
        rewards: ``[B]``, the weighted sum of the reward functions.
        shared: The requests that rewards made too: their values are copied; nobody else looks at the others.
    """
    mine = {
        request: Readings(read.values.clone() if request in shared else read.values, read.mask.clone())
        for request, read in readings.items()
    }
    own = replace(
        batch,
        prompts=copy.deepcopy(batch.prompts),
        completions=copy.deepcopy(batch.completions),
        columns=copy.deepcopy(batch.columns),
        flags=copy.deepcopy(batch.flags),
        prompt_ids=[list(ids) for ids in batch.prompt_ids],
        completion_ids=[list(ids) for ids in batch.completion_ids],
        tool_mask=None if batch.tool_mask is None else [list(row) for row in batch.tool_mask],
        trust=None if batch.trust is None else batch.trust.clone(),
        dropped=None if batch.dropped is None else batch.dropped.clone(),
        training=False,
    )
    return Observation(step, own, mine, rewards.detach().clone().float().cpu())


def measured(monitor: Monitor | Reward, seen: Observation) -> dict[str, Tensor]:
    """Return a monitor's rows, each ``[B, ...]``, checked before processes wait for each other.

    Raises:
        RewardError: They are not tensors of B rows.
    """
    rows = {"": seen.raw(monitor)} if isinstance(monitor, Reward) else dict(monitor.measure(seen))
    for name, values in rows.items():
        if not isinstance(values, Tensor) or len(values) != len(seen.batch):
            raise RewardError(f"What it measured as '{name}' is not a tensor of {len(seen.batch)} rows.")
    return rows


def rewarded_columns(readout: Readout, rewarded: Sequence[Readout]) -> int:
    """Return how many of a readout's columns some rewarded readout at the same hook point has too."""
    if readout in rewarded:
        return readout.width
    mine = _columns(readout)
    found = torch.zeros(len(mine), dtype=torch.bool)
    for other in rewarded:
        if other.hook_point == readout.hook_point and other.d_model == readout.d_model:
            theirs = _columns(other).to(mine.device)
            found |= torch.tensor([bool((column == theirs).all(dim=1).any()) for column in mine], dtype=torch.bool)
    return int(found.sum())


def _columns(readout: Readout) -> Tensor:
    """Return the encoder columns whose readings a readout gives unchanged, ``[K, d_model]``."""
    if readout.summary is not None:
        return readout.weight.T[:0]
    return (readout.weight if readout.keep is None else readout.weight[:, readout.keep]).T
