"""Monitors at work in a training: they see each step, are logged, and may end the training; they never enter a reward.

A monitor that raises is disabled with a warning, in all processes alike, and training continues.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mechreward.errors import ConfigError, nearest
from mechreward.hacking.monitor import Monitor, Observation, Report, measured
from mechreward.reward.base import Reward
from mechreward.rollout.sampling import untouched_randomness

logger = logging.getLogger(__name__)


class Watch:
    """All monitors of one training.

    Args:
        monitors: Plain rewards, whose values are logged, and monitors of `mechreward.hacking`.
        stop_on: For an alarm's name, at how many checks in a row it must ring to end training.
        trainer: Whose training.

    Attributes:
        ringing: For each alarm, for how many checks in a row it has rung.
        disabled: The names of monitors that have raised.
        losses: ``kl`` and ``entropy`` of the last optimiser step, in nats a token.

    Raises:
        ConfigError: Monitors of one name, or ``stop_on`` an alarm that no monitor raises.
    """

    def __init__(self, monitors: Sequence[Any], stop_on: Mapping[str, int], trainer: Any):
        _check(monitors, stop_on)
        self.monitors, self.stop_on, self.trainer = monitors, stop_on, trainer
        self.ringing: dict[str, int] = {}
        self.disabled: set[str] = set()
        self.losses: dict[str, float] = {}

    def look(self, seen: Observation) -> None:
        """Show a step to every monitor, now that its rewards are known."""
        with untouched_randomness(), torch.no_grad():
            for monitor in self.monitors:
                if monitor_name(monitor) in self.disabled:
                    self.trainer._log_metric(f"monitor/{monitor_name(monitor)}/disabled", 1.0)
                elif isinstance(monitor, Reward) or self.trainer.model.training:
                    self._run(monitor, seen)

    def _run(self, monitor: Reward | Monitor, seen: Observation) -> None:
        """Measure here, judge everywhere; an error disables the monitor, in all processes alike."""
        rows, error = {}, None
        try:
            rows = measured(monitor, seen)
        except Exception as raised:
            error = raised
        if seen.batch.gather(torch.tensor([float(error is not None)])).any():
            self._disable(monitor, error)
        elif isinstance(monitor, Reward):
            values, name = rows[""], monitor_name(monitor)
            if not values.isnan().all():
                self.trainer._log_metric(f"monitor/{name}", float(values.nanmean()))
            self.trainer._log_completion_extra(f"monitor/{name}", values.tolist())
        else:
            everyone = {name: seen.batch.grouped(rows[name].cpu().float()).double().numpy() for name in sorted(rows)}
            try:
                report = monitor.judge(everyone, dict(self.losses))
                if report is not None:
                    self._take(monitor, report)
            except Exception as raised:
                self._disable(monitor, raised)

    def _take(self, monitor: Monitor, report: Report) -> None:
        """Log a monitor's figures, and count for how many checks in a row its alarms have rung."""
        step = self.trainer.state.global_step
        for name, value in report.metrics.items():
            if not math.isnan(value):
                self.trainer._log_metric(f"monitor/{monitor.name}/{name}", value)
        for alarm in monitor.alarms:
            message = report.alarms.get(alarm)
            self.trainer._log_metric(f"monitor/alarm/{alarm}", float(message is not None))
            self.ringing[alarm] = 0 if message is None else self.ringing.get(alarm, 0) + 1
            if self.ringing[alarm] == 1:
                logger.warning("Alarm %s at step %d: %s", alarm, step, message)
            if self.ringing[alarm] >= self.stop_on.get(alarm, math.inf) and self.trainer.stopped_because is None:
                self.trainer.stopped_because = (
                    f"Training ends at step {step + 1}: the alarm {alarm} has rung at "
                    f"{self.ringing[alarm]} checks in a row. {message}"
                )

    def _disable(self, monitor: Reward | Monitor, error: Exception | None) -> None:
        name = monitor_name(monitor)
        self.disabled.add(name)
        stops = isinstance(monitor, Monitor) and any(alarm in self.stop_on for alarm in monitor.alarms)
        logger.warning(
            "The monitor '%s' is disabled from step %d on, because it raised %s: %s.%s",
            name,
            self.trainer.state.global_step,
            "an error in another process" if error is None else type(error).__name__,
            str(error).rstrip("."),
            " Its alarms can no longer stop training." if stops else "",
        )
        self.trainer._log_metric(f"monitor/{name}/disabled", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitors' baselines and open windows, by their names (JSON)."""
        states = {}
        for monitor in self.monitors:
            if monitor_name(monitor) in self.disabled:
                continue
            try:
                states[monitor_name(monitor)] = json.loads(json.dumps(monitor.state_dict()))
            except Exception as raised:
                self._disable(monitor, raised)
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        for monitor in self.monitors:
            state = states.get(monitor_name(monitor))
            try:
                if state:
                    monitor.load_state_dict(state)
            except Exception as raised:
                self._disable(monitor, raised)


def monitor_name(monitor: Reward | Monitor) -> str:
    return monitor.__name__ if isinstance(monitor, Reward) else monitor.name


def _check(monitors: Sequence[Any], stop_on: Mapping[str, int]) -> None:
    """Refuse monitors that cannot be told apart, and alarms that none raises."""
    strange = next((m for m in monitors if not isinstance(m, (Reward, Monitor))), None)
    if strange is not None:
        raise ConfigError(f"{strange!r} is no monitor: pass a reward, or a monitor of mechreward.hacking.")
    names = [monitor_name(monitor) for monitor in monitors]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Two monitors are called '{twice}': give one of them another name=.")
    known = [alarm for monitor in monitors if isinstance(monitor, Monitor) for alarm in monitor.alarms]
    for alarm, checks in stop_on.items():
        if alarm not in known:
            raise ConfigError(
                f"No monitor raises the alarm '{alarm}': there are {', '.join(known) or 'none'}.{nearest(alarm, known)}"
            )
        if isinstance(checks, bool) or not isinstance(checks, int) or checks < 1:
            raise ConfigError(f"stop_on needs a number of checks from 1 on for '{alarm}', not {checks!r}.")
