"""``mechreward redteam``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mechreward import progress
from mechreward.cli.common import AsJson, Name, check_folder, console, expanded, made, resumable
from mechreward.features.catalog import load_pack
from mechreward.hacking.redteam.options import Options

if TYPE_CHECKING:
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.reward.guards import Guard


@expanded
def redteam(name: Name, options: Options, as_json: AsJson = False) -> None:
    """Attack a pack's reward, and report what each attack gains, what it costs, and which detectors notice.

    Attacks: seventeen families of text templates, best-of-N, a searched suffix, a policy trained on the reward alone
    without KL, and one that knows the detectors. It can be interrupted: the same command keeps the rollouts that were
    sampled and the policies that were trained.

    Example: mechreward redteam pocket/reasoning_pack --attack templates --attack best-of-n
    """
    import warnings

    from mechreward import verifiers
    from mechreward.errors import CandidateWarning
    from mechreward.hacking.redteam.campaign import Campaign
    from mechreward.hacking.redteam.report import RedTeam, false_positive_table, table, write
    from mechreward.hacking.redteam.target import Target
    from mechreward.integrations.trl_grpo import MechRewardGRPOTrainer
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.sampling import as_training, fingerprint, load_model, parse_dtype
    from mechreward.train.sampling import Sampling

    began = time.perf_counter()
    sampling = Sampling(
        options.verifier, options.split, options.subset, options.prompt, options.answer, options.questions,
        options.rollouts, options.max_new_tokens, options.batch_size, options.seed,
    )  # fmt: skip
    sampling.check()
    check_folder(options.out)

    # What is attacked, and what is on guard.
    pack = load_pack(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)  # that a pack is no more is what a red team finds out
        reward = FeatureReward.from_pack(pack)
    guards = _guards(options, reward)
    options = replace(options, model=options.model or pack.model)
    loaded, tokenizer = load_model(str(options.model), parse_dtype(options.dtype))
    check_fits([request.readout for part in [reward, *guards] for request in part.requests], loaded)
    data = questions_for(options.data, str(options.model))
    asked, split = sampling.asked(data, "train")
    verifier = getattr(verifiers, options.verifier)
    target = Target(
        loaded, tokenizer, reward, guards, verifier, as_training(options.max_new_tokens), options.batch_size
    )

    # The attacks.
    cache_key = {
        "pack": pack.model_dump_json(),
        "model": fingerprint(loaded),
        "set of questions": [asked["prompt"], asked["answer"]],
    }
    with resumable(options.out / ".partial") as unfinished, progress.shown():
        campaign = Campaign.prepare(target, asked, options, unfinished)
        found = campaign.attacks(MechRewardGRPOTrainer, cache_key)
        report = RedTeam(
            pack=pack.name,
            model=str(options.model),
            data=f"{len(asked)} questions of {data} ({split}), {options.rollouts} rollouts each, by {options.verifier}",
            seed=options.seed,
            clean=campaign.clean,
            attacks=found,
            settings=options.settings() | {"questions": len(asked), "aggregation": reward.aggregation},
            seconds=round(time.perf_counter() - began + unfinished.seconds, 1),
        )
        files = write(report, options.out)

    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        console.print(table(report))
        for each in report.attacks:
            console.print(each.verdict, soft_wrap=True, markup=False, highlight=False)
        console.print(false_positive_table(report))
    made(f"{', '.join(map(str, files))}: {len(report.attacks)} attacks.", as_json)


def questions_for(data: str | None, model_name: str) -> str:
    """Return the questions that were asked for, or pocket's own for pocket.

    Raises:
        ConfigError: There are none for another model.
        DataError: The file holds rollouts.
    """
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


def _guards(options: Options, reward: FeatureReward) -> list[Guard]:
    """Return the detectors on guard."""
    from mechreward.hacking.adversarial import AdversarialSuite
    from mechreward.hacking.dual_verifier import Disagreement
    from mechreward.probes.linear_probe import load_probe

    guards: list[Guard] = []
    if options.suite != "none":
        detectors = AdversarialSuite.from_preset(options.suite)
        detectors.attach([reward])
        guards.append(detectors)
    if options.probe is not None:
        guards.append(Disagreement(reward, load_probe(options.probe)))
    return guards
