"""How well a probe's reward tells rollouts apart: pooled logits as they were trained, and a mean of probabilities.

    python benchmarks/probe_auc.py

The probes that are shipped for `pocket`, on the rollouts of their cards, and one for each pooling, trained here.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mechreward as mr
from mechreward.aggregation import aggregation
from mechreward.files import made_now, made_sentence
from mechreward.pocket.questions import Kind, Split, questions
from mechreward.probes.linear_probe import Probe
from mechreward.probes.training import train_probe
from mechreward.readout import ReadoutBank
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.sampling import load_model, sample
from mechreward.rollout.source import read_forward
from mechreward.stats import Interval, auc, bootstrap

RESULTS = Path(__file__).parent / "results"
COMMAND = "python benchmarks/probe_auc.py"
POOLINGS = ("mean", "mean_last_32_tokens", "last", "max", "attention")
SEED = 11


def rollouts(model: Any, tokenizer: Any, split: Split, kind: Kind, prompts: int) -> Labelled:
    """Four rollouts a question, as `scripts/build_pocket.py` samples them: right, or not."""
    asked = list(itertools.islice(questions(split, SEED, kind), prompts))
    torch.manual_seed(SEED)
    batch = sample(model, tokenizer, [q.prompt for q in asked], 4, batch_size=250)
    asked = [q for q in asked for _ in range(4)]
    final = [text.rsplit("####", 1)[-1].strip() if "####" in text else "" for text in batch.texts]
    right = [q.answer == said and (kind == "reasoning" or q.known) for q, said in zip(asked, final, strict=True)]
    read = np.flatnonzero(batch.mask().any(dim=1).numpy())
    _, groups = np.unique(np.array(batch.prompts), return_inverse=True)
    source = f"{len(read)} rollouts of pocket on its {split} split, seed {SEED}"
    return Labelled(batch, np.array(right), groups, source, 1.0).take(read)


def compared(model: Any, probe: Probe, held_out: Labelled) -> dict[str, Any]:
    """AUC on the card, of the reward, and of the probabilities of single tokens, pooled."""
    reward = mr.FeatureReward(probe)
    read = read_forward(model, held_out.batch, ReadoutBank([probe]))[probe]
    now = reward.score(held_out.batch, {reward.request: read}).values.double().numpy()
    assert probe.card.evidence is not None
    found: dict[str, Any] = {"card": probe.card.evidence.auc, "scale": reward.scale}
    found["now"] = bootstrap(auc, now, held_out.labels, groups=held_out.groups)
    if probe.aggregation != "attention":
        pool = aggregation(probe.aggregation)
        odds = pool(read.values[..., 0].double().sigmoid(), read.mask).cpu().numpy()
        found["before"] = bootstrap(auc, odds, held_out.labels, groups=held_out.groups)
        found["gain"] = bootstrap(gain, now, odds, held_out.labels, groups=held_out.groups)
    return found


def gain(now: NDArray, before: NDArray, labels: NDArray) -> float:
    return auc(now, labels) - auc(before, labels)


def shown(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "refused"
    return f"{interval.value:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def page(rows: list[tuple[str, Probe, dict[str, Any]]], report: dict[str, Any]) -> str:
    lines = [
        "# What a probe's reward tells apart",
        "",
        f"`{COMMAND}`. {made_sentence(report)}",
        "",
        "AUC with 95 % intervals over questions. *Now*: `FeatureReward(probe)`, the tokens' logits pooled as in "
        "training. *Before*: the tokens' probabilities, pooled alike, as `load_probe` once gave them; for a maximum or "
        "the last token that is the same order.",
        "",
        "| probe | pooling | on the card | reward now | reward before | now - before |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, probe, found in rows:
        figures = f"{shown(found['card'])} | {shown(found['now'])} | {shown(found.get('before'))} | "
        difference = shown(found["gain"], "+") if "gain" in found else ""
        lines.append(f"| {name} | `{probe.aggregation}` | {figures}{difference} |")
    trained = rows[-1][1].card
    assert trained.evidence is not None
    lines += [
        "",
        f"Shipped probes on the rollouts of their cards (gate split, seed {SEED}). Trained here at "
        f"{trained.hook_point}: {trained.trained_on}; judged by {trained.evidence.n} of the gate split.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    report: dict[str, Any] = {"command": COMMAND, "made": made_now()}  # before the work: it may change
    torch.set_num_threads(1)
    model, tokenizer = load_model(mr.pocket.MODEL_ID)
    gates = {
        "correctness_probe": rollouts(model, tokenizer, "gate", "reasoning", 400),
        "fact_retrieval_probe": rollouts(model, tokenizer, "gate", "retrieval", 800),
    }
    rows = []
    for name, held_out in gates.items():
        probe = mr.load_probe(f"pocket/{name}")
        rows.append((f"`pocket/{name}`", probe, compared(model, probe, held_out)))
    learnt, judged = (rollouts(model, tokenizer, split, "reasoning", 100) for split in ("discovery", "gate"))
    for pooling in POOLINGS:
        print(f"training {pooling}", file=sys.stderr, flush=True)
        probe = train_probe(model, learnt, [2], pooling, judged, pooling, mr.pocket.MODEL_ID).probe
        rows.append(("trained here, right answers", probe, compared(model, probe, judged)))
    report["probes"] = [
        {"probe": name, "pooling": probe.aggregation, **{k: as_json(figure) for k, figure in found.items()}}
        for name, probe, found in rows
    ]
    (RESULTS / "probe_auc.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "probe_auc.md").write_text(page(rows, report))
    print(page(rows, report))


def as_json(figure: Any) -> Any:
    return figure.model_dump(mode="json") if isinstance(figure, Interval) else figure


if __name__ == "__main__":
    main()
