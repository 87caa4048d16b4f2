"""Experiment 05: a policy that chooses which SAE features to add, the model left as it is; and what it must beat.

An arm either trains such a policy (``policy``), or steers in a fixed way (``constant``, ``substitute``), or leaves the
model alone (``none``). Run folders are as in :mod:`mechreward.train.runner`, with ``features.json``: how often
each feature was added on the test questions.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from crl.method import (
    ActorCritic,
    Chooser,
    Clipped,
    Directions,
    Masking,
    Steering,
    decoder_directions,
    random_directions,
    steered_rollouts,
    update,
)
from mechreward.errors import ConfigError
from mechreward.files import ENVIRONMENT, append, environment, read_jsonl, write_json
from mechreward.readout import residual
from mechreward.rollout.sampling import load_model, sample
from mechreward.rollout.source import read_in_pieces
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import load_sae
from mechreward.schema import Strict
from mechreward.train import arms, data, evaluation, runner
from mechreward.train.config import Count, ExperimentConfig, NonEmpty, Positive, Rate
from mechreward.verifiers.golds import gold, golds, verdicts

CHECKPOINT = "checkpoint.pt"


# -- the configuration ------------------------------------------------------------------------------------------------


class Dictionary(Strict):
    """The sparse autoencoder whose decoder steers, as in :func:`mechreward.load_sae`."""

    release: NonEmpty
    sae_id: NonEmpty


class PPOSettings(Strict):
    """Budget and settings of the policy's training; names as in other experiments where they mean the same.

    Attributes:
        max_steps: Number of batches of rollouts.
        prompts_per_step, num_generations: Questions per batch, and rollouts per question.
        max_completion_length: Maximum number of tokens of a rollout.
        temperature: Sampling temperature of the model.
        coefficient: c, in units of the decoder rows' length.
        learning_rate: Constant learning rate of policy and critic (Adam).
        clip, epochs, minibatches: PPO's settings.
        bf16: Keep the model, which is not trained, in bfloat16.
    """

    max_steps: Positive
    prompts_per_step: Positive = 12
    num_generations: Positive = 8
    max_completion_length: Positive = 256
    temperature: Rate = 1.0
    coefficient: Rate
    learning_rate: Rate
    clip: Rate = 0.2
    epochs: Positive = 4
    minibatches: Positive = 4
    bf16: bool = False


class Round(Strict):
    """A round of the search for a constant feature.

    Attributes:
        questions: Questions on which every remaining feature is tried, one rollout each.
        keep: Number of features that remain.
    """

    questions: Positive
    keep: Positive


class SteeringArm(Strict):
    """One way of steering.

    Attributes:
        steer: ``policy``: by one that PPO trains. ``constant``: one feature at every token, searched for on
            ``data.discovery``. ``substitute``: by the trained policy of the arm ``of`` with the same seed, each feature
            replaced by another that fires about as often. ``none``: not at all.
        k: Features per token (``policy``).
        masking: See :mod:`crl.method`.
        directions: The SAE's, or random ones of the same lengths.
        states: ``shuffled``: the policy reads a random token of another text instead of its own.
        of: See ``substitute``.
        search: Rounds (``constant``); the last keeps one.
        begin_without: The model may not begin its answer with the first token of these texts, so that unsteered answers
            have the format of steered ones (``none``).
    """

    steer: Literal["policy", "constant", "substitute", "none"] = "policy"
    k: Positive = 1
    masking: Masking = "none"
    directions: Literal["sae", "random"] = "sae"
    states: Literal["own", "shuffled"] = "own"
    of: NonEmpty | None = None
    search: list[Round] = Field(default_factory=list)
    begin_without: list[NonEmpty] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_complete(self) -> SteeringArm:
        if (self.of is not None) != (self.steer == "substitute"):
            raise ValueError("should have `of` if it has steer substitute, and only then")
        if bool(self.search) != (self.steer == "constant"):
            raise ValueError("should have `search` if it has steer constant, and only then")
        if self.search and self.search[-1].keep != 1:
            raise ValueError("should keep 1 feature in the last round of its search")
        if self.begin_without and self.steer != "none":
            raise ValueError("has begin_without, which is for steer none")
        if self.steer != "policy" and (self.k, self.masking, self.directions, self.states) != (1, "none", "sae", "own"):
            raise ValueError(f"has settings of a policy, but steer is {self.steer}")
        return self


class Tuning(Strict):
    """Pilot runs of one policy on ``data.train`` alone, from which ``coefficient`` and ``learning_rate`` are taken.

    Attributes:
        arm: The arm that is tuned.
        coefficients: Tried first, at the first learning rate.
        learning_rates: Tried at the best coefficient.
        seed: Random seed of the pilots, none of the experiment's.
    """

    arm: NonEmpty
    coefficients: Annotated[list[Rate], Field(min_length=1)]
    learning_rates: Annotated[list[Rate], Field(min_length=1)]
    seed: Count


class CRLConfig(ExperimentConfig):
    """Experiment 05.

    Attributes:
        sae: The autoencoder whose features are added.
        training: Settings of the policy's training; the model is not trained.
        tuning: The pilots before the runs.
        arms: Ways of steering.
    """

    sae: Dictionary
    training: PPOSettings  # pyright: ignore[reportIncompatibleVariableOverride]
    tuning: Tuning
    arms: Annotated[dict[str, SteeringArm], Field(min_length=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    @field_validator("arms")
    @classmethod
    def _have_a_source(cls, arms: dict[str, SteeringArm]) -> dict[str, SteeringArm]:
        for name, arm in arms.items():
            if arm.of is not None and (arm.of not in arms or arms[arm.of].steer != "policy"):
                raise ValueError(f"has an arm {name!r} with `of` {arm.of!r}, which is no arm with steer policy")
        return arms

    def budget(self) -> dict[str, Any]:
        shared = {**super().budget(), "sae": self.sae.model_dump()}
        # No KL: the model is not trained. The comparison with experiments that train it reads the key.
        return {**shared, "training": {**shared["training"], "beta": 0.0}}


# -- what is shared by runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, and what steers it.

    Attributes:
        config: The experiment.
        model, tokenizer: The untrained model and its tokenizer.
        sae: The sparse autoencoder.
        directions: Its decoder's rows.
    """

    config: CRLConfig
    model: Any
    tokenizer: Any
    sae: SAEHandle
    directions: Directions

    def answered(self, prompts: Sequence[str], steering: Steering) -> Any:
        """Sample steered rollouts as in training; return them and their choices."""
        return steered_rollouts(self.model, self.tokenizer, prompts, steering, **arms.sampling(self.config))

    def steering(self, choose: Chooser, directions: Directions | None = None, **how: Any) -> Steering:
        """Make a steering with the experiment's coefficient."""
        chosen, c = directions or self.directions, self.config.training.coefficient
        return Steering(self.model, chosen, c, choose, **how)

    def right(self, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return 1 for a right answer and 0 for any other, ``[n]``."""
        verifier = arms.verifier(self.config)
        judged = verdicts(verifier, texts, golds(verifier, answers, "answer"))
        return torch.tensor([float(verdict is True) for verdict in judged])

    def cached(
        self, name: str, cache_key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what several runs need, computed once and kept in the experiment's folder."""
        shared = {key: value for key, value in self.config.budget().items() if key != "evaluation"}
        everything = {**shared, "discovery": self.config.discovery.model_dump(), **cache_key}
        return arms.cached_tensors(Path(self.config.output), name, everything, compute)

    def discovery(self) -> dict[str, Tensor]:
        """Read unsteered rollouts on ``data.discovery``.

        Returns:
            ``firing`` ``[d_sae]``, the share of tokens on which each latent fires; ``states`` ``[M, d_model]``, the
            residual vector of every token.
        """
        return self.cached("discovery", {}, self._read_discovery)

    def _read_discovery(self) -> dict[str, Tensor]:
        questions, config = data.load(self.config.data.discovery), self.config
        torch.manual_seed(config.discovery.seed)
        rollouts, size = config.discovery.rollouts, config.evaluation.batch_size
        batch = sample(self.model, self.tokenizer, questions["prompt"], rollouts, size, **arms.sampling(config))
        fired, states = torch.zeros(self.sae.d_sae), []
        both = [self.sae.all_features(), residual(self.sae.hook_point, self.sae.d_model)]
        for _, (latents, stream) in read_in_pieces(self.model, batch, both):
            fired += (latents.values[latents.mask] > 0).sum(dim=0).cpu()
            states.append(stream.values[stream.mask].cpu())
        everything = torch.cat(states)
        return {"firing": fired / len(everything), "states": everything}

    def search(self, rounds: Sequence[Round]) -> dict[str, Tensor]:
        """Search for a constant feature on ``data.discovery``: the most accurate of each round remain.

        Returns:
            ``feature`` and its ``accuracy`` in the last round, and the number of ``rollouts``, ``[1]`` each.
        """
        plan = {"search": [r.model_dump() for r in rounds]}
        return self.cached("search", plan, lambda: self._race(rounds))

    def _race(self, rounds: Sequence[Round]) -> dict[str, Tensor]:
        questions = data.load(self.config.data.discovery)
        racing, spent, accuracy = torch.arange(len(self.directions)), 0, torch.zeros(1)
        for number, each in enumerate(rounds):
            rng = np.random.default_rng([self.config.discovery.seed, number])
            asked = rng.choice(len(questions), each.questions, replace=each.questions > len(questions)).tolist()
            rows = questions.select(asked)
            torch.manual_seed(self.config.discovery.seed + number)
            scores = torch.zeros(len(racing))
            tries = [(f, q) for f in range(len(racing)) for q in range(each.questions)]
            for start in range(0, len(tries), self.config.evaluation.batch_size):
                some = tries[start : start + self.config.evaluation.batch_size]
                chosen = racing[[f for f, _ in some]][:, None].to(self.model.device)
                steering = self.steering(lambda states, previous, chosen=chosen: chosen)
                batch, _ = self.answered([rows["prompt"][q] for _, q in some], steering)
                right = self.right(batch.texts, [rows["answer"][q] for _, q in some])
                scores.index_add_(0, torch.tensor([f for f, _ in some]), right)
            spent += len(tries)
            best = scores.argsort(descending=True, stable=True)[: each.keep]
            racing, accuracy = racing[best], scores[best] / each.questions
        return {"feature": racing, "accuracy": accuracy, "rollouts": torch.tensor([spent])}


def bench(config: CRLConfig) -> Bench:
    """Load the model and its SAE.

    Raises:
        MechRewardError: The model or the SAE is unavailable.
    """
    model, tokenizer = load_model(config.model, torch.bfloat16 if config.training.bf16 else torch.float32)
    sae = load_sae(config.sae.release, config.sae.sae_id)
    return Bench(config, model, tokenizer, sae, decoder_directions(sae))


def substitutes(firing: Tensor, seed: int) -> Tensor:
    """Return for each latent another that fires about as often, drawn as for a random control, ``[d_sae]``."""
    rng = np.random.default_rng([seed, 1])
    rate = np.log(np.maximum(firing.double().numpy(), 1e-9))
    others = []
    for latent, own in enumerate(rate):
        order = np.argsort(np.abs(rate - own), kind="stable")
        others.append(int(rng.choice(order[order != latent][: arms.NEIGHBOURS])))
    return torch.tensor(others)


# -- steering by arm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steerer:
    """An arm's way of steering.

    Attributes:
        learning: The policy that is trained; None where nothing is.
        testing: Makes the steering that is tested; None for an unsteered model.
        training: Makes the steering of the training.
    """

    learning: ActorCritic | None
    testing: Callable[[], Steering] | None
    training: Callable[[], Steering] | None = None


def steerer(bench: Bench, arm: SteeringArm, seed: int) -> Steerer:
    """Make an arm's steering, before it is trained.

    Raises:
        ConfigError: It needs a run that is not finished.
    """
    device = bench.model.device
    if arm.steer == "none":
        return Steerer(None, None)
    if arm.steer == "constant":
        feature = bench.search(arm.search)["feature"].to(device)
        return Steerer(None, lambda: bench.steering(lambda states, previous: feature.expand(len(states), 1)))
    if arm.steer == "substitute":
        assert arm.of is not None  # the schema says so
        agent = trained(bench, arm.of, seed)
        other = substitutes(bench.discovery()["firing"], seed).to(device)
        # The policy reads what it was trained to read: its own choice at the token before.
        own: list[Tensor] = []

        def choose(states: Tensor, previous: Tensor) -> Tensor:
            before = previous if bool((previous < 0).all()) else own[-1]
            own.append(agent.best(states, before))
            return other[own[-1]]

        return Steerer(None, lambda: bench.steering(choose, k=agent.k))
    agent = new_agent(bench, arm, seed)
    chosen = random_directions(bench.directions, seed) if arm.directions == "random" else bench.directions
    how: dict[str, Any] = {"directions": chosen, "k": arm.k}
    if arm.states == "shuffled":
        how["read"] = strangers(bench.discovery()["states"].to(device), seed)
    return Steerer(agent, lambda: bench.steering(agent.best, **how), lambda: bench.steering(agent.sampled, **how))


def strangers(states: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Replace each token's state by that of a random token of another text, from an own random generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda own: states[torch.randint(len(states), (len(own),), generator=generator).to(states.device)]


def new_agent(bench: Bench, arm: SteeringArm, seed: int) -> ActorCritic:
    """Make an untrained policy with the seed's weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent = ActorCritic(bench.sae.d_model, len(bench.directions), arm.k, arm.masking)
    return agent.to(bench.model.device)


def trained(bench: Bench, arm: str, seed: int) -> ActorCritic:
    """Load the policy of a finished run."""
    folder = runner.folder_of(bench.config, arm, seed)
    if not (folder / "summary.json").exists():
        raise ConfigError(f"{folder} is not finished, and its policy is needed: run `--arm {arm} --seed {seed}` first.")
    agent = new_agent(bench, bench.config.arms[arm], seed)
    agent.load_state_dict(load_file(folder / "model" / "agent.safetensors"))
    return agent


# -- one run ----------------------------------------------------------------------------------------------------------


def run(bench: Bench, arm: str, seed: int, log: runner.Log = print) -> Path:
    """Run one arm with one seed, or resume the run; a finished run is left as it is.

    Returns:
        The run's folder.

    Raises:
        ConfigError: The folder holds a run of another configuration.
    """
    config = bench.config
    folder = runner.folder_of(config, arm, seed)
    if runner.is_finished(folder, config.run(arm, seed)):
        log(f"{arm}, seed {seed}: finished before, in {folder}")
        return folder
    questions, test = data.load(config.data.train), evaluation.test_questions(config, seed)
    runner.check_data(config, questions, test)
    steers = steerer(bench, config.arms[arm], seed)
    runner.claim(folder, config.run(arm, seed))
    if not (folder / CHECKPOINT).exists():  # a resumed run keeps the commit and date of its beginning
        write_json(folder / ENVIRONMENT, environment())
    this = Recorded(bench, arm, seed, folder, test, steers, log)
    if steers.learning is None:
        runner.forget(folder, -1)
        last = this.unchanging()
    else:
        last = train(this, questions)
        (folder / "model").mkdir(exist_ok=True)
        save_file(steers.learning.state_dict(), folder / "model" / "agent.safetensors")
    write_json(folder / "summary.json", {"steps": config.training.max_steps, **last})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return folder


def train(this: Recorded, questions: Any) -> dict[str, Any]:
    """Train by PPO, with an evaluation before the first step, every few steps, and after the last."""
    config, agent, makes = this.bench.config, this.steers.learning, this.steers.training
    assert agent is not None and makes is not None
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.training.learning_rate)
    done = resumed(this.folder, agent, optimizer)
    runner.forget(this.folder, done)
    if done < 0:
        this.evaluate(0)
        done = 0
        keep(this.folder, agent, optimizer, done)
    evaluations = read_jsonl(this.folder / "evaluations.jsonl")  # the last one's, where no step is left
    last = {name: value for name, value in evaluations[-1].items() if name != "step"}
    began, first = time.monotonic(), done
    steering = makes()  # one for all steps: it may have random numbers of its own
    for step in range(done + 1, config.training.max_steps + 1):
        log = one_step(this.bench, agent, optimizer, steering, questions, this.seed, step)
        this.append("metrics.jsonl", [{"step": step, **log}])
        if step % config.evaluation.every == 0 or step == config.training.max_steps:
            left = (time.monotonic() - began) / (step - first) * (config.training.max_steps - step)
            last = this.evaluate(step, f", about {left / 60:.0f} min left" if left else "")
            keep(this.folder, agent, optimizer, step)
    return last


def one_step(
    bench: Bench,
    agent: ActorCritic,
    optimizer: torch.optim.Optimizer,
    steering: Steering,
    questions: Any,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Sample a batch and train on it; seed and step determine all random numbers, so that a run can be resumed."""
    training, began = bench.config.training, time.monotonic()
    order = np.random.default_rng(seed).permutation(len(questions))
    asked = np.take(order, range((step - 1) * training.prompts_per_step, step * training.prompts_per_step), mode="wrap")
    rows = questions.select(np.repeat(asked, training.num_generations).tolist())
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
    batch, done = bench.answered(rows["prompt"], steering)
    judging = time.monotonic()
    rewards = bench.right(batch.texts, rows["answer"])
    judged = time.monotonic() - judging
    log = update(agent, optimizer, done, rewards, Clipped(training.clip, training.epochs, training.minibatches))
    counts = torch.bincount(done.actions.flatten(), minlength=len(bench.directions)).float()
    share = counts / counts.sum()
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        **log,
        "features/used": int((counts > 0).sum()),
        "features/top_share": float(share.max()),
        "completions/mean_length": float(np.mean(batch.lengths)),
        "guards/flagged": 0.0,  # there is no feature reward to guard
        "mechreward/hook_seconds": steering.seconds,
        "composite/seconds": judged,
        "seconds": time.monotonic() - began,
    }


def keep(folder: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint atomically."""
    unfinished = folder / f"{CHECKPOINT}.part"
    torch.save({"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, unfinished)
    unfinished.replace(folder / CHECKPOINT)


def resumed(folder: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint and return its step; -1 without one."""
    if not (folder / CHECKPOINT).exists():
        return -1
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    agent.load_state_dict(state["agent"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# -- what is recorded -------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARK = re.compile(r"####[ \t]*\S|\\boxed\s*\{")


def formatted(text: str) -> bool:
    """Return whether an answer is marked as the task wants it: ``#### N`` or ``\\boxed{N}``."""
    return _MARK.search(text) is not None


def same_number(text: str, gold: str) -> bool:
    """Return whether the last number in a text is the last in the gold answer, whatever the format."""
    found, wanted = (_NUMBER.findall(t.replace("\u2212", "-")) for t in (text, gold))
    return bool(found and wanted) and float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run and its records."""

    bench: Bench
    arm: str
    seed: int
    folder: Path
    test: Any
    steers: Steerer
    log: runner.Log

    def append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        append(self.folder / name, records)

    def evaluate(self, step: int, more: str = "") -> dict[str, Any]:
        """Evaluate by sampling; at the end greedily, too, and after training with steering switched off."""
        rows, figures, used = self._answers(self.steers.testing)
        if step == self.bench.config.training.max_steps:
            greedy, _, _ = self._answers(self.steers.testing, do_sample=False)
            for row, by_greed in zip(rows, greedy, strict=True):
                row |= {"greedy": by_greed["right"], "greedy_tolerant": by_greed["tolerant"]}
            figures["greedy_accuracy"] = _mean(rows, "greedy")
            if self.steers.learning is not None:
                off, _, _ = self._answers(None)
                for row, without in zip(rows, off, strict=True):
                    row["off"] = without["right"]
                figures["off_accuracy"] = _mean(rows, "off")
            write_json(self.folder / "features.json", used)
        self._write(step, rows, figures)
        self.log(f"{self.arm}, seed {self.seed}, step {step:>3}: {figures['accuracy']:.3f} right{more}")
        return figures

    def unchanging(self) -> dict[str, Any]:
        """Test a fixed way of steering once, and record its figures at every step."""
        config, steps = self.bench.config, self.bench.config.training.max_steps
        figures = self.evaluate(steps)
        rows = [r for r in read_jsonl(self.folder / "samples.jsonl") if r["step"] == steps]
        runner.forget(self.folder, -1)
        self.append("metrics.jsonl", [])
        for step in [*range(0, steps, config.evaluation.every), steps]:
            self._write(step, [{k: v for k, v in row.items() if k != "step"} for row in rows], figures)
        return figures

    def _write(self, step: int, rows: Sequence[dict[str, Any]], figures: dict[str, Any]) -> None:
        self.append("samples.jsonl", [{"step": step, **row} for row in rows])
        self.append("evaluations.jsonl", [{"step": step, **figures}])

    def _answers(
        self, makes: Callable[[], Steering] | None, do_sample: bool = True
    ) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """Sample one rollout per question, score it in three ways, and count the features that were added.

        The sampling seed is the same for all arms and steps.
        """
        bench, arm = self.bench, self.bench.config.arms[self.arm]
        steering = None if makes is None else makes()
        with steering or nullcontext(), beginning_without(bench.model, bench.tokenizer, arm.begin_without):
            rows, figures = evaluation.evaluate(
                bench.model, bench.tokenizer, self.test, bench.config, [], self.seed, do_sample
            )
        for row, answer in zip(rows, self.test["answer"], strict=True):
            text = row["completion"]
            row["strict"] = row["right"] and formatted(text)
            row["tolerant"] = row["right"] or same_number(text, str(gold(answer, "answer", structured=True)))
            row["steps_shown"] = "=" in text
        figures |= {name: _mean(rows, name) for name in ("strict", "tolerant", "steps_shown")}
        return rows, figures, {} if steering is None else usage(steering, [row["tokens"] for row in rows])


def usage(steering: Steering, tokens: Sequence[int]) -> dict[str, Any]:
    """Count how often each feature was added: over all tokens, and before the first generated token."""
    everywhere: Counter[int] = Counter()
    first: Counter[int] = Counter()
    lengths = iter(tokens)
    for actions in steering.actions():
        for row in actions.tolist():
            written = row[: next(lengths)]
            everywhere.update(feature for chosen in written for feature in chosen)
            first.update(written[0] if written else [])
    counts = {"tokens": dict(everywhere.most_common()), "first": dict(first.most_common())}
    return {name: {str(feature): n for feature, n in count.items()} for name, count in counts.items()}


@contextmanager
def beginning_without(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[None]:
    """Forbid the model to begin its answer with the first token of any of these texts."""
    settings = model.generation_config
    before = settings.begin_suppress_tokens
    if texts:
        settings.begin_suppress_tokens = [tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts]
    try:
        yield
    finally:
        settings.begin_suppress_tokens = before


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


# -- before the runs --------------------------------------------------------------------------------------------------


def tune(config: CRLConfig, log: runner.Log = print) -> list[dict[str, float]]:
    """Run pilots on training questions alone: each coefficient, then each learning rate at the best coefficient.

    A pilot is judged by its mean reward over the last third of its steps: sampled rollouts on questions that the policy
    has not seen before.

    Returns:
        ``coefficient``, ``learning_rate``, ``first`` and ``last`` (mean reward over the first and last third of the
        steps) of each pilot.
    """
    plan, pilots = config.tuning, []

    def pilot(coefficient: float, rate: float) -> None:
        values = {**config.training.model_dump(), "coefficient": coefficient, "learning_rate": rate}
        this = bench(config.model_copy(update={"training": PPOSettings.model_validate(values)}))
        steers = steerer(this, config.arms[plan.arm], plan.seed)
        assert steers.learning is not None and steers.training is not None  # the arm is a policy
        optimizer = torch.optim.Adam(steers.learning.parameters(), lr=rate)
        questions, steering, rewards = data.load(config.data.train), steers.training(), []
        for step in range(1, config.training.max_steps + 1):
            figures = one_step(this, steers.learning, optimizer, steering, questions, plan.seed, step)
            rewards.append(figures["reward"])
        third = max(1, len(rewards) // 3)
        first, last = float(np.mean(rewards[:third])), float(np.mean(rewards[-third:]))
        pilots.append({"coefficient": coefficient, "learning_rate": rate, "first": first, "last": last})
        log(f"c {coefficient:g}, learning rate {rate:g}: {first:.3f} right in the first third, {last:.3f} in the last")

    for coefficient in plan.coefficients:
        pilot(coefficient, plan.learning_rates[0])
    best = max(pilots, key=lambda p: p["last"])["coefficient"]
    for rate in plan.learning_rates[1:]:
        pilot(best, rate)
    return pilots
