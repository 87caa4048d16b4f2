"""The configuration of experiment 04."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechreward import pocket
from mechreward.schema import Strict
from mechreward.train.config import Arm, Count, ExperimentConfig, NonEmpty, Positive, Rate
from sarm.model import Mode, Reconstructs

Share = Annotated[float, Field(ge=0, le=1)]


class Pairs(Strict):
    """Where preference pairs come from.

    Attributes:
        path: A ``.jsonl`` or ``.jsonl.gz`` file, a dataset on the hub; ``mechreward/pocket``: the model's own answers.
        split: Split of the hub's dataset, or of pocket's questions.
        first: Rows to skip.
        rows: Rows to use after these; for pocket, questions.
        rollouts: For pocket: rollouts per question.
        per_question: For pocket: maximum number of pairs per question.
        steps: For pocket: the fewest and the most steps of a problem.
        wording: For pocket: ``usual``, or ``other``, sentences that the model has never seen.
    """

    path: NonEmpty
    split: NonEmpty = "train"
    first: Count = 0
    rows: Positive | None = None
    rollouts: Positive = 6
    per_question: Positive = 2
    steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [2, 4])
    wording: Literal["usual", "other"] = "usual"

    @model_validator(mode="after")
    def _ends(self) -> Pairs:
        if self.path == pocket.MODEL_ID and self.rows is None:
            raise ValueError("has no rows, but pocket makes questions without end: say how many")
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"has steps {self.steps}: give the fewest first")
        return self


class Pretraining(Strict):
    """How the sparse autoencoder is made.

    Attributes:
        checkpoint: Use this published autoencoder instead, for ``encoder: sequence``.
        corpus: Number of texts of pocket's own corpus. Default: both sides of the training pairs.
        epochs, batch_size, learning_rate: As in :class:`sarm.model.Recipe`.
    """

    checkpoint: NonEmpty | None = None
    corpus: Positive | None = None
    epochs: Positive = 1
    batch_size: Positive = 512
    learning_rate: Rate = 1e-3


class RewardModel(Strict):
    """Settings that all reward models of the experiment share.

    Attributes:
        layers: L, the decoder layers that are kept.
        latents, k: Size of the sparse autoencoder, and latents that are kept per vector.
        rec_lambda, reconstructs: See :class:`sarm.model.SarmSettings`.
        max_length: Maximum number of tokens; pairs with a longer side are left out, and counted.
        pretraining: How the sparse autoencoder is pretrained.
        learning_rate: Learning rate of all trained weights.
        frozen_learning_rates: Replace it in mode 0, where it costs little to try several: each model takes the one with
            the lowest preference loss on a tenth of the training prompts, which it does not learn from.
        epochs, batch_size, micro_batch, warmup, weight_decay, bf16: As in :class:`sarm.model.Recipe`.
    """

    layers: Positive
    latents: Positive
    k: Positive
    rec_lambda: Annotated[float, Field(ge=0)] = 1.0
    reconstructs: Reconstructs = "completion"
    max_length: Positive = 512
    pretraining: Pretraining = Pretraining()
    learning_rate: Rate
    frozen_learning_rates: Annotated[list[Rate], Field(min_length=1)] | None = None
    epochs: Positive = 3
    batch_size: Positive = 32
    micro_batch: Positive | None = None
    warmup: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    bf16: bool = False


class Cell(Strict):
    """One way of ranking a pair. Cells differ in nothing else.

    Attributes:
        head: ``sarm``; ``dense``, a linear head on the z-scored vector itself; ``features``, a pack's reward with no
            training; ``length``, the number of tokens, with the sign that is right more often in training.
        mode: The train mode of ``sarm`` and ``dense``.
        use_topk: Whether the head of ``sarm`` reads the k largest latents, or all pre-activations.
        encoder: For ``sarm``: pretrained on last tokens (``sequence``), on as many vectors of all tokens (``token``),
            or not at all (``random``).
        shuffled: In training, a coin decides which side is preferred.
        pack: The pack of ``features``.
    """

    head: Literal["sarm", "dense", "features", "length"]
    mode: Mode | None = None
    use_topk: bool | None = None
    encoder: Literal["sequence", "token", "random"] | None = None
    shuffled: bool = False
    pack: NonEmpty | None = None

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Cell:
        needs = {
            "sarm": {"mode", "use_topk", "encoder"},
            "dense": {"mode"},
            "features": {"pack"},
            "length": set(),
        }[self.head]
        for name in ("mode", "use_topk", "encoder", "pack"):
            if (getattr(self, name) is not None) != (name in needs):
                raise ValueError(f"has head {self.head}, which {'needs' if name in needs else 'has no'} {name}")
        return self


class SarmArm(Arm):
    """An arm as in other experiments; or a cell of this one as the only reward.

    Attributes:
        cell: The reward model, trained with the run's own seed.
    """

    cell: NonEmpty | None = None

    @model_validator(mode="after")
    def _rewards_something(self) -> SarmArm:
        if self.cell is None:
            return super()._rewards_something()  # pyright: ignore[reportCallIssue, reportReturnType]
        if self.outcome or self.features is not None:
            raise ValueError("has a cell, which is rewarded alone here: leave outcome and features out")
        return self


class SarmGrpo(ExperimentConfig):
    """GRPO as in experiments 01 to 03; its ``output`` holds the policies."""

    arms: dict[str, SarmArm] = Field(min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]


class SarmConfig(Strict):
    """Experiment 04.

    Attributes:
        output: Folder for pairs and reward models.
        name: Name of the results, ``experiments/results/<name>.{json,md}``.
        model: ``mechreward/pocket``, a folder, or a model on the Hugging Face hub.
        verifier: Name of the verifier that judges sampled answers.
        train: Training pairs.
        test: Sets of test pairs; the first is in distribution.
        reward_model, cells: See their classes.
        main: The cell that the others are compared with.
        grpo: Policies trained with the cells' rewards.
        stored: Results of experiments 01 to 03 at the same budget, to compare the policies with.
        seeds: Every cell has one reward model per seed.
    """

    output: NonEmpty
    name: NonEmpty
    model: NonEmpty
    verifier: Literal["math_boxed", "gsm8k", "exact_match"] = "math_boxed"
    train: Pairs
    test: Annotated[dict[str, Pairs], Field(min_length=1)]
    reward_model: RewardModel
    cells: Annotated[dict[str, Cell], Field(min_length=1)]
    main: NonEmpty
    grpo: SarmGrpo | None = None
    stored: NonEmpty | None = None
    seeds: Annotated[list[Count], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_its_cells(self) -> SarmConfig:
        wanted = {"main": self.main}
        if self.grpo is not None:
            wanted |= {f"grpo.arms.{name}.cell": arm.cell for name, arm in self.grpo.arms.items() if arm.cell}
            if missing := set(self.grpo.seeds) - set(self.seeds):
                raise ValueError(
                    f"has no reward models of seed {min(missing)}, which grpo.seeds names: add it to seeds"
                )
        for key, cell in wanted.items():
            if cell not in self.cells:
                raise ValueError(f"has {key}: {cell}, but no such cell: there are {', '.join(self.cells)}")
            if self.cells[cell].head not in ("sarm", "dense"):
                raise ValueError(f"has {key}: {cell}, which is not trained: name a cell with head sarm or dense")
        return self
