"""``mechreward redteam``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechreward.cli.common import (
    Answer,
    AsJson,
    BatchSize,
    Dtype,
    MaxNewTokens,
    Name,
    Prompt,
    Seed,
    Split,
    Subset,
    Verifier,
    check_folder,
    console,
    made,
    progress,
    resumable,
)
from mechreward.features.catalog import load_pack

if TYPE_CHECKING:
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.reward.guards import Guard

Model = Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Questions with answers: mechreward/pocket (the default for that model), one of the hub, or a .jsonl."
    ),
]
Chosen = Annotated[
    list[str] | None,
    typer.Option("--attack", help="templates, best-of-n, suffix, policy or aware; may be repeated. Default: all."),
]
Folder = Annotated[Path, typer.Option(help="Folder for redteam.json, redteam.md and trajectories.")]
Suite = Annotated[str, typer.Option(help="Detectors on guard: standard, strict, text_only or none.")]
ProbeName = Annotated[str | None, typer.Option(help="A probe whose disagreement is a further detector (DualVerifier).")]
Families = Annotated[list[str] | None, typer.Option(help="Only these families of templates.")]
Questions = Annotated[
    int, typer.Option(min=4, help="So many; half of them set the thresholds, which few make unreliable.")
]
Rollouts = Annotated[int, typer.Option(min=1, help="Clean rollouts a question, at temperature 1.")]
Instances = Annotated[int, typer.Option(min=1, help="Rollouts that each template and the suffix attack.")]
BestOf = Annotated[int, typer.Option(min=2, help="The largest N of best-of-N.")]
BestOfQuestions = Annotated[int, typer.Option(min=2, help="Questions for best-of-N.")]
SuffixLength = Annotated[int, typer.Option(min=1, help="Tokens.")]
SuffixSteps = Annotated[int, typer.Option(min=1, help="Replacements that are tried, 24 tokens each.")]
Train = Annotated[str, typer.Option(help="What policies train: lora, full or both.")]
PolicySteps = Annotated[int, typer.Option(min=1, help="Of a policy, at most.")]
Patience = Annotated[int, typer.Option(min=1, help="Stop a policy whose objective has not risen for so many.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Default: 1e-3 for LoRA, 1e-4 for full (small models; large ones want less).")
]
PromptsPerStep = Annotated[int, typer.Option(min=1, help="Of a policy.")]
Generations = Annotated[int, typer.Option(min=2, help="Of a policy: rollouts a question.")]
Alpha = Annotated[
    float, typer.Option(min=0, help="Aware attack: what standing at a detector's threshold costs, in clean sd.")
]


def redteam(
    name: Name,
    model: Model = None,
    data: Data = None,
    attack: Chosen = None,
    out: Folder = Path("redteam"),
    suite: Suite = "standard",
    probe: ProbeName = None,
    family: Families = None,
    questions: Questions = 500,
    rollouts: Rollouts = 8,
    instances: Instances = 100,
    best_of: BestOf = 256,
    best_of_questions: BestOfQuestions = 20,
    suffix_length: SuffixLength = 8,
    suffix_steps: SuffixSteps = 32,
    train: Train = "lora",
    steps: PolicySteps = 100,
    patience: Patience = 20,
    learning_rate: LearningRate = None,
    prompts_per_step: PromptsPerStep = 16,
    num_generations: Generations = 8,
    alpha: Alpha = 3.0,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Attack a pack's reward, and report what each attack gains, what it costs, and which detectors notice.

    Attacks: twenty families of text templates, best-of-N, a searched suffix, a policy trained on the reward alone
    without KL, and one that knows the detectors. It can be interrupted: the same command goes on behind the last
    template or question that was finished, and starts a suffix or a policy again that was cut off.

    Example: mechreward redteam pocket/reasoning_pack --attack templates --attack best-of-n
    """
    from mechreward.hacking.redteam.campaign import NAMES, Plan
    from mechreward.hacking.redteam.policy import KINDS, Training
    from mechreward.train.sampling import Sampling

    chosen = list(dict.fromkeys(attack or NAMES))
    _check(chosen, train, learning_rate, family)
    sampling = Sampling(verifier, split, subset, prompt, answer, questions, rollouts, max_new_tokens, batch_size, seed)
    sampling.check()
    check_folder(out)
    training = Training(
        steps, learning_rate, seed, patience, prompts_per_step, num_generations, max_new_tokens=max_new_tokens
    )
    kinds = list(KINDS) if train == "both" else [train]
    plan = Plan(
        chosen, training, instances, family, best_of, best_of_questions, suffix_length, suffix_steps, kinds, alpha
    )
    told = _carried_out(name, model, data, plan, sampling, suite, probe, dtype, train, out)
    _show(told, out, as_json)


def _carried_out(
    name: str,
    model: str | None,
    data: str | None,
    plan: Any,
    sampling: Any,
    suite: str,
    probe: str | None,
    dtype: str,
    train: str,
    out: Path,
) -> Any:
    """The report on a plan's attacks, which is written, too."""
    import warnings

    from mechreward import verifiers
    from mechreward.errors import CandidateWarning
    from mechreward.hacking.redteam import campaign, report
    from mechreward.hacking.redteam.target import Target
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.sampling import fingerprint, load_model, parse_dtype

    began, pack = time.perf_counter(), load_pack(name)
    model_name = model or pack.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)  # that a pack is no more is what a red team finds out
        reward = FeatureReward.from_pack(pack)
    guards = _guards(suite, probe, reward)
    loaded, tokenizer = load_model(model_name, parse_dtype(dtype))
    check_fits([request.readout for part in [reward, *guards] for request in part.requests], loaded)
    asked, of = sampling.asked(questions_for(data, model_name), "train")
    verifier = getattr(verifiers, sampling.verifier)
    target = Target(loaded, tokenizer, reward, guards, verifier, sampling.generate, sampling.batch_size)
    settings: dict[str, Any] = {
        "attacks": plan.attacks, "suite": suite, "probe": probe, "verifier": sampling.verifier, "questions": len(asked),
        "rollouts": sampling.rollouts, "instances": plan.instances, "best_of": plan.best_of,
        "suffix_length": plan.suffix_length, "suffix_steps": plan.suffix_steps, "train": train,
        "steps": plan.training.steps, "patience": plan.training.patience, "alpha": plan.alpha,
        "learning_rate": plan.training.learning_rate, "max_new_tokens": sampling.max_new_tokens,
        "aggregation": reward.aggregation,
    }  # fmt: skip
    decides = {
        "pack": pack.model_dump_json(), "model": fingerprint(loaded), "suite": suite, "probe": probe,
        "way of sampling": sampling.generate, "set of questions": [asked["prompt"], asked["answer"]],
        "sampling": [sampling.verifier, sampling.rollouts, sampling.batch_size, sampling.seed],
    }  # fmt: skip
    with resumable(out / ".partial") as unfinished, progress() as tell:
        ground = campaign.prepare(target, asked, sampling.rollouts, sampling.seed, unfinished, tell)
        found = campaign.carry_out(plan, ground, model_name, out, decides, unfinished, tell)
        told = report.RedTeam(
            pack=pack.name,
            model=model_name,
            data=f"{len(asked)} questions of {questions_for(data, model_name)} ({of}), {sampling.rollouts} rollouts "
            f"each, by {sampling.verifier}",
            seed=sampling.seed,
            clean=ground.clean,
            attacks=found,
            settings=settings,
            seconds=round(time.perf_counter() - began + unfinished.seconds, 1),
        )
        report.write(told, out)
    return told


def _show(told: Any, out: Path, as_json: bool) -> None:
    """The report, and where it is."""
    from mechreward.hacking.redteam import report

    if as_json:
        typer.echo(told.model_dump_json(indent=2))
    else:
        console.print(report.table(told))
        for each in told.attacks:
            console.print(each.verdict, soft_wrap=True, markup=False, highlight=False)
        console.print(report.false_positive_table(told))
    made(f"{out / 'redteam.json'}, {out / 'redteam.md'}: {len(told.attacks)} attacks.", as_json)


def questions_for(data: str | None, model_name: str) -> str:
    """What was asked for, or pocket's own questions for pocket."""
    from mechreward import pocket
    from mechreward.errors import ConfigError, DataError
    from mechreward.rollout.labelled import holds_rollouts

    if data is None:
        if pocket.resolve(model_name) != pocket.path():
            raise ConfigError(f"Name questions for {model_name} with --data: a dataset of the hub, or a .jsonl.")
        return pocket.MODEL_ID
    if data.endswith(".jsonl") and Path(data).is_file() and holds_rollouts(Path(data)):
        raise DataError(f"{data} holds rollouts, and a red team samples its own: give questions with answers.")
    return data


def _guards(suite: str, probe: str | None, reward: FeatureReward) -> list[Guard]:
    """The detectors on guard."""
    guards: list[Any] = []
    if suite != "none":
        from mechreward.hacking.adversarial import AdversarialSuite

        detectors = AdversarialSuite.from_preset(suite)
        detectors.attach([reward])
        guards.append(detectors)
    if probe is not None:
        from mechreward.hacking.dual_verifier import Disagreement
        from mechreward.probes.linear_probe import load_probe

        guards.append(Disagreement(reward, load_probe(probe)))
    return guards


def _check(chosen: Sequence[str], train: str, learning_rate: float | None, family: list[str] | None) -> None:
    """Options with impossible values, before anything is loaded."""
    from mechreward.errors import ConfigError, nearest
    from mechreward.hacking.redteam.campaign import NAMES
    from mechreward.hacking.redteam.policy import KINDS
    from mechreward.hacking.redteam.templates import FAMILIES, TOKEN_FAMILIES

    for each in chosen:
        if each not in NAMES:
            raise ConfigError(f"There is no attack '{each}': there are {', '.join(NAMES)}.{nearest(each, NAMES)}")
    if train not in (*KINDS, "both"):
        raise ConfigError(f"--train {train} is not possible: use lora, full or both.{nearest(train, [*KINDS, 'both'])}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate {learning_rate} is not possible: give a number above 0.")
    known = [*FAMILIES, *TOKEN_FAMILIES]
    for each in family or []:
        if each not in known:
            raise ConfigError(f"There is no family of templates '{each}'.{nearest(each, known)}")
