"""``mechreward redteam``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mechreward.cli.common import AsJson, Name, console
from mechreward.cli.find import (
    Answer,
    BatchSize,
    Dtype,
    MaxNewTokens,
    Prompt,
    Sampling,
    Seed,
    Split,
    Subset,
    Verifier,
    _dtype,
    _progress,
)
from mechreward.features.catalog import load_pack

if TYPE_CHECKING:
    from mechreward.hacking.redteam.report import Attack
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.reward.guards import Guard

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


def redteam(
    name: Name,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None,
    data: Data = None,
    attack: Chosen = None,
    out: Annotated[Path, typer.Option(help="Folder for redteam.json, redteam.md and trajectories.")] = Path("redteam"),
    suite: Annotated[str, typer.Option(help="Detectors on guard: standard, strict, text_only or none.")] = "standard",
    probe: Annotated[
        str | None, typer.Option(help="A probe whose disagreement is a further detector (DualVerifier).")
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only these families of templates.")] = None,
    questions: Annotated[
        int, typer.Option(min=4, help="So many; half of them set the thresholds, which few make unreliable.")
    ] = 500,
    rollouts: Annotated[int, typer.Option(min=1, help="Clean rollouts a question, at temperature 1.")] = 8,
    instances: Annotated[int, typer.Option(min=1, help="Rollouts that each template and the suffix attack.")] = 100,
    best_of: Annotated[int, typer.Option(min=2, help="The largest N of best-of-N.")] = 256,
    best_of_questions: Annotated[int, typer.Option(min=2, help="Questions for best-of-N.")] = 20,
    suffix_length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8,
    suffix_steps: Annotated[int, typer.Option(min=1, help="Replacements that are tried, 24 tokens each.")] = 32,
    train: Annotated[str, typer.Option(help="What policies train: lora, full or both.")] = "lora",
    steps: Annotated[int, typer.Option(min=1, help="Of a policy, at most.")] = 100,
    patience: Annotated[int, typer.Option(min=1, help="Stop a policy whose objective has not risen for so many.")] = 20,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 1e-3 for LoRA, 1e-4 for full (small models; large ones want less).")
    ] = None,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Of a policy.")] = 16,
    num_generations: Annotated[int, typer.Option(min=2, help="Of a policy: rollouts a question.")] = 8,
    alpha: Annotated[
        float, typer.Option(min=0, help="Aware attack: what standing at a detector's threshold costs, in clean sd.")
    ] = 3.0,
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
    without KL, and one that knows the detectors.

    Example: mechreward redteam pocket/reasoning_pack --attack templates --attack best-of-n
    """
    import warnings

    from mechreward import verifiers
    from mechreward.errors import CandidateWarning, ConfigError, nearest
    from mechreward.hacking.redteam import campaign, report
    from mechreward.hacking.redteam.policy import KINDS, Training
    from mechreward.hacking.redteam.target import Target
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import load_model

    began, chosen = time.perf_counter(), list(dict.fromkeys(attack or campaign.NAMES))
    for each in chosen:
        if each not in campaign.NAMES:
            raise ConfigError(
                f"There is no attack '{each}': there are {', '.join(campaign.NAMES)}.{nearest(each, campaign.NAMES)}"
            )
    if train not in (*KINDS, "both"):
        raise ConfigError(f"--train {train} is not possible: use lora, full or both.{nearest(train, [*KINDS, 'both'])}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate {learning_rate} is not possible: give a number above 0.")
    if verifier not in verifiers.__all__:
        raise ConfigError(f"There is no verifier '{verifier}'.{nearest(verifier, verifiers.__all__)}")
    _check_folder(out)
    _check_families(family)
    pack = load_pack(name)
    model_name = model or pack.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)  # that a pack is no more is what a red team finds out
        reward = FeatureReward.from_pack(pack)
    guards = _guards(suite, probe, reward)
    training = Training(
        steps, learning_rate, seed, patience, prompts_per_step, num_generations, max_new_tokens=max_new_tokens
    )
    loaded, tokenizer = load_model(model_name, _dtype(dtype))
    check_fits([request.readout for part in [reward, *guards] for request in part.requests], loaded)
    sampling = Sampling(
        verifier, split, subset, prompt, answer, questions, rollouts, max_new_tokens, batch_size, seed, None
    )
    asked, of = sampling._questions(_data(data, model_name), "train", 0)
    target = Target(
        loaded,
        tokenizer,
        reward,
        guards,
        getattr(verifiers, verifier),
        generate={
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,  # as a training run samples, whatever the model's own settings are
            "max_new_tokens": max_new_tokens,
        },
        batch_size=batch_size,
    )
    with Console(stderr=True).status(f"Sampling {len(asked) * rollouts} clean rollouts ..."):
        ground = campaign.prepare(target, asked, rollouts, seed)
    found: list[Attack] = []
    if "templates" in chosen:
        with _progress("Templates") as tell:
            found += campaign.by_templates(ground, instances, family, tell)
    if "best-of-n" in chosen:
        with _progress("Best of N") as tell:
            found.append(campaign.by_best_of_n(ground, best_of, best_of_questions, tell))
    if "suffix" in chosen:
        with _progress("Suffix") as tell:
            found.append(campaign.by_suffix(ground, instances, suffix_length, suffix_steps, tell=tell))
    for which, price in (("policy", None), ("aware", alpha)):
        for kind in KINDS if train == "both" else [train]:
            if which in chosen:
                with _progress(f"Training ({which}, {kind})") as tell, warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own options
                    found.append(campaign.by_policy(ground, model_name, kind, training, out, price, tell))
    settings: dict[str, Any] = {
        "attacks": chosen, "suite": suite, "probe": probe, "verifier": verifier, "questions": len(asked),
        "rollouts": rollouts, "instances": instances, "best_of": best_of, "suffix_length": suffix_length,
        "suffix_steps": suffix_steps, "train": train, "steps": steps, "patience": patience, "alpha": alpha,
        "learning_rate": learning_rate, "max_new_tokens": max_new_tokens, "aggregation": reward.aggregation,
    }  # fmt: skip
    told = report.RedTeam(
        pack=pack.name,
        model=model_name,
        data=f"{len(asked)} questions of {_data(data, model_name)} ({of}), {rollouts} rollouts each, by {verifier}",
        seed=seed,
        clean=ground.clean,
        attacks=found,
        settings=settings,
        seconds=round(time.perf_counter() - began, 1),
    )
    written = report.write(told, out)
    if as_json:
        typer.echo(told.model_dump_json(indent=2))
        return
    console.print(report.table(told))
    for each in found:
        console.print(each.verdict, soft_wrap=True, markup=False, highlight=False)
    console.print(report.false_positive_table(told))
    console.print(f"{written[0]}, {written[1]}: {len(found)} attacks.", soft_wrap=True, markup=False)


def _data(data: str | None, model_name: str) -> str:
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


def _check_families(family: list[str] | None) -> None:
    from mechreward.errors import ConfigError, nearest
    from mechreward.hacking.redteam.templates import FAMILIES, TOKEN_FAMILIES

    known = [*FAMILIES, *TOKEN_FAMILIES]
    for each in family or []:
        if each not in known:
            raise ConfigError(f"There is no family of templates '{each}'.{nearest(each, known)}")


def _check_folder(out: Path) -> None:
    """Find out before the work, not after it, what cannot be written."""
    from mechreward.errors import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"--out {out} cannot be written to ({reason}): give another folder.") from None
