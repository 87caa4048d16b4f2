"""The folders of runs that a report is made of, as far as they were written; what they lack is said, not guessed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mechreward import pocket
from mechreward.errors import DataError, MechRewardError
from mechreward.features.catalog import load_pack
from mechreward.features.pack import FeaturePack
from mechreward.files import ENVIRONMENT, read_if_there, read_jsonl
from mechreward.recording import METRICS, RECORDING, TRACE
from mechreward.train.results import Run, read_run

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Folder:
    """One run.

    Attributes:
        path: Where it lies.
        arm: What it is called; runs of one arm differ in their seeds alone.
        seed: Its seed, if known.
        config: An experiment's ``config.yaml``; empty for a training outside of an experiment.
        recording: ``recording.json``; empty where there is none.
        metrics: What was logged, a record for each log.
        tested: Its evaluations on test questions, if it has any.
        trace: Recorded rollouts.
        finished: Whether it came to its last step; None where nothing says what that would be.
        missing: A sentence for each thing that was not recorded.
    """

    path: Path
    arm: str
    seed: int | None
    config: Record
    recording: Record
    metrics: list[Record]
    tested: Run | None
    trace: list[Record]
    finished: bool | None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"

    @property
    def model(self) -> str:
        """What was trained; the shipped model by its id, not by where it happens to lie."""
        return pocket.named(str(self.config.get("model") or self.recording.get("model") or "unknown"))

    @property
    def environment(self) -> Record:
        return _json(self.path / ENVIRONMENT)

    @property
    def shown_path(self) -> str:
        """The end of its path: where somebody keeps their files is nobody else's business."""
        return "/".join(self.path.parts[-3:] if self.config else self.path.parts[-1:])

    @property
    def settings(self) -> list[tuple[str, str]]:
        """What decided the run, and what it ran on, as far as it is known."""
        training = self.config.get("training") or {k: self.recording[k] for k in ("max_steps",) if k in self.recording}
        packages = self.environment.get("packages", {})
        shown = {
            "arm": json.dumps(self.config["arm"]) if "arm" in self.config else None,
            **{key.replace("_", " "): str(value) for key, value in training.items()},
            "verifier": self.config.get("verifier"),
            "device": self.environment.get("device"),
            "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        }
        return [(key, str(value)) for key, value in shown.items() if value not in (None, "")]

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def packs(self) -> list[FeaturePack]:
        """The packs that it read, as it recorded them, else as its experiment names them; not those that are gone."""
        recorded = self.recording.get("packs")
        found = []
        for pack in recorded.values() if recorded is not None else self._named():
            try:
                found.append(load_pack(pack) if isinstance(pack, str) else FeaturePack.model_validate(pack))
            except (MechRewardError, ValidationError):
                continue
        return found

    @property
    def pack_names(self) -> list[str]:
        """The packs that it, or its experiment's configuration, names."""
        recorded = self.recording.get("packs")
        return self._named() if recorded is None else list(recorded)

    def _named(self) -> list[str]:
        rewarded = (self.config.get("arm") or {}).get("features") or {}
        return list(dict.fromkeys([*filter(None, [rewarded.get("pack")]), *self.config.get("watch", [])]))


def find(paths: Sequence[str | Path]) -> list[Folder]:
    """Read runs: each path is one run's folder, or an experiment's with ``<arm>/seed-<n>`` in it.

    Raises:
        DataError: There is no such folder, or no run in it.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _runs_in(Path(path))))
    experiments = {_experiment(folder) for folder in folders}
    apart = Counter(name.name for name in experiments if name is not None)
    read = [_read(folder, unique=len(apart) < 2) for folder in folders]
    # Trainings outside of an experiment that share a folder's name need have nothing else in common.
    alone = Counter(run.arm for run in read if _experiment(run.path) is None)
    return [
        replace(run, arm=f"{run.path.parent.name}/{run.arm}")
        if _experiment(run.path) is None and alone[run.arm] > 1
        else run
        for run in read
    ]


def _runs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path} is no folder: give the output folder of a training, or of an experiment.")
    if _is_run(path):
        return [path]
    found = sorted(
        p for pattern in ("*/seed-*", "*", "*/*", "*/*/seed-*") for p in path.glob(pattern) if p.is_dir() and _is_run(p)
    )
    if not found:
        raise DataError(
            f"{path} holds no run: there is no {METRICS} in it or in a folder of it, nor a checkpoint of a trainer. "
            "Give the output_dir of a training, or the `output` of an experiment."
        )
    return list(dict.fromkeys(found))


def _is_run(path: Path) -> bool:
    return (path / METRICS).exists() or (path / "evaluations.jsonl").exists() or _last_state(path) is not None


def _last_state(path: Path) -> Path | None:
    """The last checkpoint's own history, which every trainer writes."""
    states = [s for s in path.glob("checkpoint-*/trainer_state.json") if s.parent.name.split("-")[1].isdigit()]
    return max(states, key=lambda state: int(state.parent.name.split("-")[1]), default=None)


def _experiment(folder: Path) -> Path | None:
    """The experiment that a run belongs to."""
    return folder.parent.parent if (folder / "config.yaml").exists() and folder.name.startswith("seed-") else None


def _read(folder: Path, unique: bool) -> Folder:
    config, recording, missing = _yaml(folder / "config.yaml"), _json(folder / RECORDING), []
    experiment = _experiment(folder)
    arm = folder.name if experiment is None else folder.parent.name
    arm = arm if unique or experiment is None else f"{experiment.name}/{arm}"
    seed = config.get("seed", recording.get("seed"))
    metrics = _metrics(folder, missing)
    tested = None
    if (folder / "evaluations.jsonl").exists() and (folder / "samples.jsonl").exists():
        tested = read_run(folder, seed or 0)
        tested = tested if tested.steps and all(tested.rows) else None
    if tested is None:
        missing.append("No evaluation on test questions: whether it got better cannot be judged from the training.")
    trace = read_if_there(folder / TRACE)
    if not trace:
        missing.append(
            "No rollouts with readings (trace.jsonl): it was made with record=None, with a plain GRPOTrainer, or "
            "before mechreward recorded them."
            + (" The test completions are shown without readings, questions and gold answers." if tested else "")
        )
        trace = _untraced(folder) if tested else []
    finished = _finished(folder, config, recording, metrics)
    if finished is False:
        missing.append(f"It has not come to its end: {metrics[-1]['step'] if metrics else 0} steps are there.")
    return Folder(folder, arm, seed, config, recording, metrics, tested, trace, finished, missing)


def _metrics(folder: Path, missing: list[str]) -> list[Record]:
    if (folder / METRICS).exists():
        return read_jsonl(folder / METRICS)
    state = _last_state(folder)
    if state is None:
        missing.append("No figures of the training (metrics.jsonl).")
        return []
    missing.append("No metrics.jsonl: the figures are those of the last checkpoint's trainer_state.json.")
    return [log for log in _json(state).get("log_history", []) if "reward" in log]


def _finished(folder: Path, config: Record, recording: Record, metrics: list[Record]) -> bool | None:
    if config:
        return (folder / "summary.json").exists()
    if "max_steps" not in recording:
        return None
    return bool(metrics) and metrics[-1]["step"] >= recording["max_steps"]


def _untraced(folder: Path) -> list[Record]:
    """Evaluated completions of a run without a trace, as far as they tell."""
    return [
        {
            "step": row["step"],
            "set": "test",
            "row": row.get("question"),
            "prompt": None,
            "gold": None,
            "right": row["right"],
            "tokens": [row["completion"]],
            "more": 0,
            "unread": [0],
            "readings": {},
        }
        for row in read_jsonl(folder / "samples.jsonl")
    ]


def _json(file: Path) -> Record:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is damaged ({error}): restore it, or leave this run out.") from None
    return content if isinstance(content, dict) else {}


def _yaml(file: Path) -> Record:
    if not file.exists():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise DataError(f"{file} is damaged: restore it, or leave this run out.") from None
    return content if isinstance(content, dict) else {}
