"""The configuration of an experiment: a checked YAML file. An error names the key and its line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mechreward.aggregation import aggregation
from mechreward.errors import ConfigError
from mechreward.readout import Reads
from mechreward.reward.composition import Mode
from mechreward.schema import Location, Strict, most_telling, sentence, shown_location

NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Control = Literal["none", "random", "direction", "shuffled"]


class QuestionSource(Strict):
    """Where questions come from.

    Attributes:
        path: ``mechreward/pocket``, a local JSONL file, or a dataset on the Hugging Face hub.
        subset: The configuration of the hub dataset, e.g. ``main``.
        split: The split, with a slice to take only a part: ``train[:500]``.
        rows: Use only the first rows. Default: all; ``mechreward/pocket``, which is endless, needs a number.
        prompt: What the model reads, with the dataset's columns in braces.
        answer: The column with the gold answer.
    """

    path: NonEmpty
    subset: str | None = None
    split: NonEmpty = "train"
    rows: Positive | None = None
    prompt: NonEmpty = "{prompt}"
    answer: NonEmpty = "answer"

    @field_validator("prompt")
    @classmethod
    def _names_columns(cls, prompt: str) -> str:
        try:
            fields = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
        except ValueError as error:
            raise ValueError(f"is not a template ({error}): write columns in braces, and {{{{ for a brace") from None
        if not fields or not all(name.isidentifier() for name in fields):
            raise ValueError("should name at least one column in braces, e.g. {question}")
        return prompt

    @property
    def columns(self) -> list[str]:
        """The columns that the source must have."""
        return [name for _, name, _, _ in Formatter().parse(self.prompt) if name] + [self.answer]


class Data(Strict):
    """Questions, in three sets that must not overlap.

    Attributes:
        train: What GRPO trains on.
        discovery: Questions whose rollouts are contrasted to find features or directions (see :class:`Discovery`).
        test: What is reported.
    """

    train: Annotated[list[QuestionSource], Field(min_length=1)]
    discovery: Annotated[list[QuestionSource], Field(min_length=1)]
    test: Annotated[list[QuestionSource], Field(min_length=1)]


class Features(Strict):
    """The part of the reward that reads activations.

    Attributes:
        pack: The name or file of a pack. A recipe is carried out first, on ``data.discovery``.
        weight: Weight in the sum; lambda for ``aggregation: per_token``.
        aggregation: How a rollout's tokens become one number. Default: the pack's own.
        reads: Read the activations of the policy, or those of the frozen reference on the policy's text.
        control: Replace the pack's features: ``random``, other latents with matched firing rates; ``direction``, the
            raw difference of means, without an SAE; ``shuffled``, the pack's readings, permuted within each group.
    """

    pack: NonEmpty
    weight: float = 1.0
    aggregation: str | None = None
    reads: Reads = "policy"
    control: Control = "none"

    @field_validator("aggregation")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        try:
            return name if name is None or aggregation(name) else None
        except ConfigError as error:
            raise ValueError(f"is {name!r}: {str(error).rstrip('.')}") from None


class Arm(Strict):
    """One reward. The arms of an experiment differ in nothing else.

    Attributes:
        outcome: Weight of the verifier's verdict.
        features: The part that reads activations, if any.
        mode: How the two are combined; see ``CompositeReward``.
        scale_rewards: How TRL scales advantages; ``group`` cancels HERO's difficulty weight.
    """

    outcome: float = 0.0
    features: Features | None = None
    mode: Mode = "sum"
    scale_rewards: Literal["group", "batch", "none"] = "group"

    @model_validator(mode="after")
    def _rewards_something(self) -> Arm:
        if self.outcome == 0 and self.features is None:
            raise ValueError("rewards nothing: give it outcome, features or both")
        if self.mode != "sum" and (self.outcome == 0 or self.features is None):
            raise ValueError(f"has mode {self.mode}, which combines outcome and features: give both")
        if self.mode == "hero" and self.scale_rewards == "group":
            raise ValueError("has mode hero and scale_rewards group, which cancels HERO's difficulty weight: use none")
        return self


class Discovery(Strict):
    """Rollouts of the untrained model; right ones are contrasted with wrong ones.

    Attributes:
        rollouts: Rollouts per question of ``data.discovery``.
        seed: Random seed of the sampling.
    """

    rollouts: Positive = 4
    seed: int = 0


class GRPOSettings(Strict):
    """GRPO's settings, by TRL's names where TRL has one.

    Attributes:
        max_steps: Optimiser steps.
        prompts_per_step: Questions per step, over all processes.
        num_generations: Rollouts per question.
        max_completion_length: Maximum number of tokens of a rollout.
        learning_rate, lr_scheduler_type, warmup_steps, beta, temperature, gradient_checkpointing, bf16: As in TRL.
            With bf16, trained weights stay in float32.
        gradient_accumulation_steps: Number of parts in which a step's rollouts are trained on.
        lora_rank: Train a LoRA adapter of this rank on all linear layers; None trains every weight.
    """

    max_steps: Positive
    prompts_per_step: Positive = 16
    num_generations: Annotated[int, Field(gt=1)] = 8
    max_completion_length: Positive = 256
    learning_rate: Rate = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Count = 0
    beta: Annotated[float, Field(ge=0)] = 0.04
    temperature: Rate = 1.0
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    lora_rank: Positive | None = None

    @model_validator(mode="after")
    def _divides(self) -> GRPOSettings:
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError("has warmup_steps, which lr_scheduler_type constant ignores: use constant_with_warmup")
        rollouts = self.prompts_per_step * self.num_generations
        if rollouts % self.gradient_accumulation_steps:
            raise ValueError(
                f"has prompts_per_step x num_generations = {rollouts}, which gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps} does not divide"
            )
        return self


class Evaluation(Strict):
    """Evaluation on ``data.test``, one sample per question at the training temperature.

    Attributes:
        every: Steps between evaluations; the untrained model and the last step are always evaluated.
        questions: Number of questions, drawn by the run's seed. Default: all.
        batch_size: Rollouts generated at once.
    """

    every: Positive = 10
    questions: Positive | None = None
    batch_size: Positive = 256


_BUDGET = {"model", "verifier", "watch", "data", "training", "evaluation"}


class ExperimentConfig(Strict):
    """One experiment: a model, data, and arms that are trained alike.

    Attributes:
        output: Folder for the runs, ``<output>/<arm>/seed-<n>``. Experiments to be compared share it.
        model: ``mechreward/pocket``, a folder, or a model on the Hugging Face hub.
        verifier: Name of a verifier in ``mechreward.verifiers``.
        watch: Packs whose readings every arm logs, rewarded or not.
        data, discovery, training, evaluation, arms: See their classes.
        seeds: Every arm is run once with each seed.
    """

    output: NonEmpty
    model: NonEmpty
    verifier: Literal["math_boxed", "gsm8k", "exact_match"] = "math_boxed"
    watch: list[NonEmpty] = Field(default_factory=list)
    data: Data
    discovery: Discovery = Discovery()
    training: GRPOSettings
    evaluation: Evaluation = Evaluation()
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]

    @field_validator("arms")
    @classmethod
    def _are_folder_names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"has an arm {name!r}, but an arm's name is a folder's: use letters, digits, - and _")
        return arms

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("has a seed twice")
        return seeds

    def budget(self) -> dict[str, Any]:
        """Return what arms must have in common to be compared."""
        return self.model_dump(mode="json", include=_BUDGET)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Return everything that determines one run, as it is stored with the run."""
        return {
            **self.budget(),
            "discovery": self.discovery.model_dump(),
            "arm": self.arms[arm].model_dump(),
            "seed": seed,
        }


C = TypeVar("C", bound=Strict)


def validated(schema: type[C], values: object, where: str, what: str = "configuration") -> C:
    """Validate values by a schema.

    Args:
        schema: The schema.
        values: Nested dicts and lists.
        where: The beginning of the error's sentence: where the values come from.
        what: What the values are called in an error about the whole.

    Raises:
        ConfigError: Something is wrong: one sentence with the key.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(where + sentence(most_telling(error), schema, what)) from None


def read_config(path: str | Path, schema: type[C] = ExperimentConfig) -> C:
    """Read a YAML file by a schema.

    Raises:
        ConfigError: It cannot be read, or something in it is wrong: one sentence with the key and its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=_Loader)
        raw = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({reason}): check the path given to --config.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_complaint(error)}.") from None
    if not isinstance(raw, dict):
        first_key = next(iter(schema.model_fields))
        raise ConfigError(f"{path} holds no keys: a configuration begins with `{first_key}: ...`.")
    lines = _lines(root, path)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = most_telling(error)
        message = sentence(first, schema, "configuration")
        raise ConfigError(f"{path}, line {_line(lines, first['loc'])}: {message}") from None


class _Loader(yaml.SafeLoader):
    """Read 1e-4 as a number, as YAML 1.2 does; PyYAML follows 1.1, where it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _yaml_complaint(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, {problem}" if mark is not None else " ".join(problem.split())


def _lines(root: yaml.Node, path: Path) -> dict[Location, int]:
    """Return the line of every key and list item, and refuse a key that is given twice."""
    lines: dict[Location, int] = {}

    def visit(node: yaml.Node, location: Location, around: tuple[yaml.Node, ...] = ()) -> None:
        lines.setdefault(location, node.start_mark.line + 1)
        if node in around:
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: this mapping contains itself; write it out.")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, str(key.value))
                if here in lines:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"{path}, line {line}: key '{shown_location(here)}' is given twice (first in line "
                        f"{lines[here]}); keep one."
                    )
                lines[here] = key.start_mark.line + 1
                visit(value, here, (*around, node))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                visit(value, (*location, index), (*around, node))

    visit(root, ())
    return lines


def _line(lines: dict[Location, int], location: Sequence[int | str]) -> int:
    """Return the line of a location, or of the nearest location around it."""
    place = tuple(location)
    while place not in lines:
        place = place[:-1]
    return lines[place]
