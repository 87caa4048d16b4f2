"""Folders of runs written by hand, for the report: small, with known figures, and with text that means harm."""

import json
from pathlib import Path

import mechreward as mr

HARM = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
PACK = mr.load_pack("pocket/reasoning_pack").model_copy(update={"name": "a/pack"})


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def rollout(step, row, right, reward, tokens, **changes):
    """A recorded rollout; feature_7 reads 2 on every third token, feature_9 reads its place."""
    n = len(tokens)
    return {
        "step": step, "set": "training", "row": row, "group": row // 2, "prompt": f"Question {row}?", "gold": "42",
        "right": right, "tokens": tokens, "more": 0, "unread": [n - 1],
        "readings": {
            "a/pack": {
                "score": [*(0.5 * t for t in range(n - 1)), None],
                "features": {
                    "feature_7": [list(range(0, n - 1, 3)), [2.0] * len(range(0, n - 1, 3))],
                    "feature_9": [list(range(1, n - 1)), [float(t) for t in range(1, n - 1)]],
                },
            }
        },
        "reward": reward, "rewards": {"composite": reward}, "parts": {"composite/features": reward / 2},
        "advantage": reward - 1, "trust": 1.0, "flags": [], "dropped": False, **changes,
    }  # fmt: skip


def write_run(
    root: Path, arm: str, seed: int, right: dict[int, list[int]], trace=(), finished=True, **training
) -> Path:
    """A run as an experiment leaves it: ``right`` has for each step which of the questions were answered right."""
    folder = root / arm / f"seed-{seed}"
    folder.mkdir(parents=True)
    config = {
        "model": "mechreward/pocket", "verifier": "math_boxed", "watch": [], "training": {"max_steps": 2, **training},
        "arm": {"outcome": 1.0}, "seed": seed,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"device": "a machine", "packages": {"torch": "2.0"}}))
    samples = [
        {"step": step, "question": q, "completion": f"answer {q}", "right": bool(value), "tokens": 5 + q, "ended": True}
        for step, values in right.items()
        for q, value in enumerate(values)
    ]
    (folder / "samples.jsonl").write_text(lines(samples))
    (folder / "evaluations.jsonl").write_text(lines([{"step": step} for step in right]))
    metrics = [
        {
            "step": step, "reward": step + seed, "kl": 0.1 * step, "completions/mean_length": 10.0 * step,
            "guards/flagged": 0.25, "mechreward/hook_seconds": 0.1, "composite/seconds": 0.3,
            "composite/math_boxed/verifier_seconds": 0.05, "mechreward/recording_seconds": 0.01, "seconds": 2.0,
            "peak_memory_bytes": 1_500_000_000 + seed, "mechreward/reading_bytes": 2048.0,
            "monitor/alarm/flagged/high": float(step == 2 and seed == 1),
        }
        for step in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text(lines(metrics))
    (folder / "trace.jsonl").write_text(lines(trace))
    readout = {
        "labels": ["feature_7", "feature_9"], "weights": [1.5, -0.5], "width": 2,
        "hook_point": "blocks.2.hook_resid_post", "reads": "policy", "aggregation": "mean", "pack": "a/pack",
    }  # fmt: skip
    about = {
        "memory": "whole process",
        "readouts": {"a/pack": readout},
        "packs": {"a/pack": PACK.model_dump(mode="json")},
    }
    (folder / "recording.json").write_text(json.dumps(about))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder
