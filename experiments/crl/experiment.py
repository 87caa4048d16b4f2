"""Experiment 05: a policy that chooses which SAE features to add, the model left as it is; and what it must beat.

An arm either trains such a policy (``policy``), or steers in a fixed way (``constant``, ``substitute``), or leaves the
model alone (``none``). Run folders are those of :mod:`mechreward.train.runner`, with ``features.json``: how often
each feature was added on the test questions.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from mechreward import verifiers
from mechreward.errors import ConfigError
from mechreward.integrations.recording import ENVIRONMENT, append, environment, forget_after, read_jsonl, write_json
from mechreward.readout import residual
from mechreward.rollout.hf import load_model, read_in_pieces, sample
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import load_sae
from mechreward.schema import Strict
from mechreward.train import data, runner
from mechreward.train.arms import NEIGHBOURS, sampling
from mechreward.train.config import Count, ExperimentConfig, Positive, Text
from mechreward.verifiers.golds import gold, golds, verdicts

Rate = Annotated[float, Field(gt=0)]
CHECKPOINT = "checkpoint.pt"


# -- the configuration ------------------------------------------------------------------------------------------------


class Dictionary(Strict):
    """The sparse autoencoder whose decoder steers: as in :func:`mechreward.load_sae`."""

    release: Text
    sae_id: Text


class PPOTraining(Strict):
    """Budget and settings of the policy's training; names as in other experiments where they mean the same.

    Attributes:
        max_steps: Batches of rollouts.
        prompts_per_step, num_generations: Questions in a batch, and rollouts of each.
        max_completion_length: Tokens.
        temperature: At which the model samples.
        coefficient: c, in units of the decoder rows' length.
        learning_rate: Of policy and critic, constant (Adam).
        clip, epochs, minibatches: Of PPO.
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
        questions: That every feature still in the race is tried on, one rollout each.
        keep: How many stay in.
    """

    questions: Positive
    keep: Positive


class SteeringArm(Strict):
    """One way of steering.

    Attributes:
        steer: ``policy``: by one that PPO trains. ``constant``: one feature at every token, searched for on
            ``data.discovery``. ``substitute``: by the trained policy of the arm ``of`` with the same seed, each feature
            replaced by another that fires about as often. ``none``: not at all.
        k: Features at a token (``policy``).
        masking: See :mod:`crl.method`.
        directions: The SAE's, or random ones of the same lengths.
        states: ``shuffled``: the policy reads a random token of another text in place of its own.
        of: See ``substitute``.
        search: Rounds (``constant``); the last keeps one.
        begin_without: Texts whose first token the model may not begin its answer with, so that unsteered answers have
            the format of steered ones (``none``).
    """

    steer: Literal["policy", "constant", "substitute", "none"] = "policy"
    k: Positive = 1
    masking: Masking = "none"
    directions: Literal["sae", "random"] = "sae"
    states: Literal["own", "shuffled"] = "own"
    of: Text | None = None
    search: list[Round] = Field(default_factory=list)
    begin_without: list[Text] = Field(default_factory=list)

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
        arm: Which arm is tuned.
        coefficients: Tried first, at the first learning rate.
        learning_rates: Tried at the best coefficient.
        seed: Of the pilots: none of the experiment's.
    """

    arm: Text
    coefficients: Annotated[list[Rate], Field(min_length=1)]
    learning_rates: Annotated[list[Rate], Field(min_length=1)]
    seed: Count


class CRLConfig(ExperimentConfig):
    """Experiment 05.

    Attributes:
        sae: Whose features are added.
        training: Of the policy; the model is not trained.
        tuning: What was tried before.
        arms: Ways of steering.
    """

    sae: Dictionary
    training: PPOTraining  # pyright: ignore[reportIncompatibleVariableOverride]
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
        # No KL: the model is not trained. The key is there for whoever compares it with those that are.
        return {**shared, "training": {**shared["training"], "beta": 0.0}}


# -- what is shared by runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, and what steers it.

    Attributes:
        config: The experiment.
        model, tokenizer: As they are; nothing here trains them.
        sae: The sparse autoencoder.
        directions: Its decoder's rows.
    """

    config: CRLConfig
    model: Any
    tokenizer: Any
    sae: SAEHandle
    directions: Directions

    def answered(self, prompts: Sequence[str], steering: Steering) -> Any:
        """Steered rollouts and their choices, sampled as in training."""
        return steered_rollouts(self.model, self.tokenizer, prompts, steering, **sampling(self.config))

    def steering(self, choose: Chooser, directions: Directions | None = None, **how: Any) -> Steering:
        """With the experiment's coefficient."""
        chosen, c = directions or self.directions, self.config.training.coefficient
        return Steering(self.model, chosen, c, choose, **how)

    def right(self, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """1 for a right answer, 0 for any other, ``[n]``."""
        verifier = getattr(verifiers, self.config.verifier)
        said = verdicts(verifier, texts, golds(verifier, answers, "answer"))
        return torch.tensor([float(verdict is True) for verdict in said])

    def kept(self, what: str, decides: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What several runs need: made once, and kept in the experiment's folder under a hash of what decides it."""
        shared = {key: value for key, value in self.config.budget().items() if key != "evaluation"}
        everything = json.dumps({**shared, "discovery": self.config.discovery.model_dump(), **decides}, sort_keys=True)
        digest = hashlib.sha256(everything.encode()).hexdigest()[:12]
        file = Path(self.config.output) / f"{what}-{digest}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.part")
            save_file(make(), unfinished)
            unfinished.replace(file)
        return load_file(file)

    def discovery(self) -> dict[str, Tensor]:
        """Unsteered rollouts on ``data.discovery``.

        Returns:
            ``firing`` ``[d_sae]``, the share of tokens on which each latent fires; ``states`` ``[M, d_model]``, the
            residual vector of every token.
        """
        return self.kept("discovery", {}, self._read_discovery)

    def _read_discovery(self) -> dict[str, Tensor]:
        questions, config = data.load(self.config.data.discovery), self.config
        torch.manual_seed(config.discovery.seed)
        rollouts, size = config.discovery.rollouts, config.evaluation.batch_size
        batch = sample(self.model, self.tokenizer, questions["prompt"], rollouts, size, **sampling(config))
        fired, states = torch.zeros(self.sae.d_sae), []
        both = [self.sae.all_features(), residual(self.sae.hook_point, self.sae.d_model)]
        for _, (latents, stream) in read_in_pieces(self.model, batch, both):
            fired += (latents.values[latents.mask] > 0).sum(dim=0).cpu()
            states.append(stream.values[stream.mask].cpu())
        everything = torch.cat(states)
        return {"firing": fired / len(everything), "states": everything}

    def search(self, rounds: Sequence[Round]) -> dict[str, Tensor]:
        """The race for a constant feature on ``data.discovery``: the most accurate of each round stay in it.

        Returns:
            ``feature`` and its ``accuracy`` in the last round, and the number of ``rollouts``, ``[1]`` each.
        """
        plan = {"search": [r.model_dump() for r in rounds]}
        return self.kept("search", plan, lambda: self._race(rounds))

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
    """Load everything.

    Raises:
        MechRewardError: The model or the SAE cannot be had.
    """
    model, tokenizer = load_model(config.model, torch.bfloat16 if config.training.bf16 else torch.float32)
    sae = load_sae(config.sae.release, config.sae.sae_id)
    return Bench(config, model, tokenizer, sae, decoder_directions(sae))


def substitutes(firing: Tensor, seed: int) -> Tensor:
    """For each latent another, drawn from the :data:`NEIGHBOURS` nearest in (log) firing rate, ``[d_sae]``."""
    rng = np.random.default_rng([seed, 1])
    rate = np.log(np.maximum(firing.double().numpy(), 1e-9))
    others = []
    for latent, own in enumerate(rate):
        order = np.argsort(np.abs(rate - own), kind="stable")
        others.append(int(rng.choice(order[order != latent][:NEIGHBOURS])))
    return torch.tensor(others)


# -- who steers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steerer:
    """What an arm steers with.

    Attributes:
        learning: Chooses in training, and is trained; None where nothing is.
        testing: Makes the steering that is tested; None for an unsteered model.
        training: Makes the steering of training.
    """

    learning: ActorCritic | None
    testing: Callable[[], Steering] | None
    training: Callable[[], Steering] | None = None


def steerer(bench: Bench, arm: SteeringArm, seed: int) -> Steerer:
    """An arm's steering, before it is trained.

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
        # The policy goes on reading what it was trained to read: what it chose itself at the token before.
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
    """In place of each token's state that of a random token of another text; with random numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda own: states[torch.randint(len(states), (len(own),), generator=generator).to(states.device)]


def new_agent(bench: Bench, arm: SteeringArm, seed: int) -> ActorCritic:
    """An untrained policy; the seed decides its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent = ActorCritic(bench.sae.d_model, len(bench.directions), arm.k, arm.masking)
    return agent.to(bench.model.device)


def trained(bench: Bench, arm: str, seed: int) -> ActorCritic:
    """The policy of a finished run."""
    folder = Path(bench.config.output) / arm / f"seed-{seed}"
    if not (folder / "summary.json").exists():
        raise ConfigError(f"{folder} is not finished, and its policy is needed: run `--arm {arm} --seed {seed}` first.")
    agent = new_agent(bench, bench.config.arms[arm], seed)
    agent.load_state_dict(load_file(folder / "model" / "agent.safetensors"))
    return agent


# -- one run ----------------------------------------------------------------------------------------------------------


def run(bench: Bench, arm: str, seed: int, tell: Callable[[str], None] = print) -> Path:
    """Carry out one arm with one seed, or go on where it was interrupted; a finished run is left as it is.

    Returns:
        The run's folder.

    Raises:
        ConfigError: The folder holds a run of another configuration.
    """
    config = bench.config
    folder, decides = Path(config.output) / arm / f"seed-{seed}", config.run(arm, seed)
    if (folder / "config.yaml").exists():
        runner.claim(folder, decides)
    if (folder / "summary.json").exists():
        tell(f"{arm}, seed {seed}: finished before, in {folder}")
        return folder
    questions, test = data.load(config.data.train), runner.test_questions(config, seed)
    runner.check_data(config, questions, test)
    steers = steerer(bench, config.arms[arm], seed)
    runner.claim(folder, decides)
    if not (folder / CHECKPOINT).exists():  # a resumed run keeps the commit and date of its beginning
        write_json(folder / ENVIRONMENT, environment())
    this = Recorded(bench, arm, seed, folder, test, steers, tell)
    if steers.learning is None:
        forget(folder, -1)
        last = this.unchanging()
    else:
        last = train(this, questions)
        (folder / "model").mkdir(exist_ok=True)
        save_file(steers.learning.state_dict(), folder / "model" / "agent.safetensors")
    write_json(folder / "summary.json", {"steps": config.training.max_steps, **last})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return folder


def train(this: Recorded, questions: Any) -> dict[str, Any]:
    """PPO, with an evaluation before the first step, every so often, and after the last."""
    config, agent, makes = this.bench.config, this.steers.learning, this.steers.training
    assert agent is not None and makes is not None
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.training.learning_rate)
    done = resumed(this.folder, agent, optimizer)
    forget(this.folder, done)
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
    """A batch of rollouts and PPO on them; seed and step decide all random numbers, so that a run can be resumed."""
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


def forget(folder: Path, step: int) -> None:
    """Drop what was recorded after a step: it is about to be computed again."""
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        forget_after(folder / name, step)


def keep(folder: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A checkpoint, all or nothing."""
    unfinished = folder / f"{CHECKPOINT}.part"
    torch.save({"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, unfinished)
    unfinished.replace(folder / CHECKPOINT)


def resumed(folder: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer) -> int:
    """The step of the last checkpoint, which is loaded; -1 without one."""
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
    """Whether an answer is marked as the task wants it: ``#### N`` or ``\\boxed{N}``."""
    return _MARK.search(text) is not None


def same_number(text: str, gold: str) -> bool:
    """Whether the last number in a text is the last in the gold answer, whatever the format."""
    found, wanted = (_NUMBER.findall(t.replace("\u2212", "-")) for t in (text, gold))
    return bool(found and wanted) and float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run, and what it writes."""

    bench: Bench
    arm: str
    seed: int
    folder: Path
    test: Any
    steers: Steerer
    tell: Callable[[str], None]

    def append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        append(self.folder / name, records)

    def evaluate(self, step: int, more: str = "") -> dict[str, Any]:
        """Sample on the test questions; at the end greedily too, and after training with steering switched off."""
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
        self.tell(f"{self.arm}, seed {self.seed}, step {step:>3}: {figures['accuracy']:.3f} right{more}")
        return figures

    def unchanging(self) -> dict[str, Any]:
        """A fixed way of steering is tested once; its figures stand at every step."""
        config, steps = self.bench.config, self.bench.config.training.max_steps
        figures = self.evaluate(steps)
        rows = [r for r in read_jsonl(self.folder / "samples.jsonl") if r["step"] == steps]
        forget(self.folder, -1)
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
        """One rollout a question, scored in three ways, and the features that were added.

        The seed decides the sampling, the same for all arms and steps.
        """
        bench, arm = self.bench, self.bench.config.arms[self.arm]
        steering = None if makes is None else makes()
        with steering or nullcontext(), beginning_without(bench.model, bench.tokenizer, arm.begin_without):
            rows, figures = runner.evaluate(
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
    """How often each feature was added: over all tokens, and before the first token that is written."""
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
    """The model may not begin its answer with the first token of any of these texts."""
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


def tune(config: CRLConfig, tell: Callable[[str], None] = print) -> list[dict[str, float]]:
    """Pilot runs on training questions alone: each coefficient, then each learning rate at the best of them.

    A pilot is judged by its mean reward over the last third of its steps: rollouts of the policy as it samples, on
    questions that it sees for the first time.

    Returns:
        ``coefficient``, ``learning_rate``, ``first`` and ``last`` (mean reward over the first and last third of the
        steps) of each pilot.
    """
    plan, pilots = config.tuning, []

    def pilot(coefficient: float, rate: float) -> None:
        values = {**config.training.model_dump(), "coefficient": coefficient, "learning_rate": rate}
        this = bench(config.model_copy(update={"training": PPOTraining.model_validate(values)}))
        steers = steerer(this, config.arms[plan.arm], plan.seed)
        assert steers.learning is not None and steers.training is not None  # the arm is a policy
        optimizer = torch.optim.Adam(steers.learning.parameters(), lr=rate)
        questions, steering, rewards = data.load(config.data.train), steers.training(), []
        for step in range(1, config.training.max_steps + 1):
            log = one_step(this, steers.learning, optimizer, steering, questions, plan.seed, step)
            rewards.append(log["reward"])
        third = max(1, len(rewards) // 3)
        first, last = float(np.mean(rewards[:third])), float(np.mean(rewards[-third:]))
        pilots.append({"coefficient": coefficient, "learning_rate": rate, "first": first, "last": last})
        tell(f"c {coefficient:g}, learning rate {rate:g}: {first:.3f} right in the first third, {last:.3f} in the last")

    for coefficient in plan.coefficients:
        pilot(coefficient, plan.learning_rates[0])
    best = max(pilots, key=lambda p: p["last"])["coefficient"]
    for rate in plan.learning_rates[1:]:
        pilot(best, rate)
    return pilots
