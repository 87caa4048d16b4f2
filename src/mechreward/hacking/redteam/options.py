"""What a red team is asked to do: each field is an option of ``mechreward redteam``, with its help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Option

from mechreward.errors import ConfigError, nearest

ATTACKS = ("templates", "best-of-n", "suffix", "policy", "aware")
"""The attacks, by what ``--attack`` calls them."""

Kind = Literal["lora", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a policy trains."""


@dataclass(frozen=True)
class Options:
    """How a red team attacks, on which questions, with which detectors on guard.

    Raises:
        ConfigError: An option has an unknown name or an impossible value.
    """

    model: Annotated[str | None, Option(help="A hub id or a folder. Default: the pack's.")] = None
    data: Annotated[
        str | None,
        Option(
            help="Questions with answers: mechreward/pocket (the default for that model), one of the hub, or a .jsonl."
        ),
    ] = None
    attack: Annotated[
        list[str] | None,
        Option(help="templates, best-of-n, suffix, policy or aware; may be repeated. Default: all."),
    ] = None
    out: Annotated[Path, Option(help="Folder for redteam.json, redteam.md and trajectories.")] = Path("redteam")
    suite: Annotated[str, Option(help="Detectors on guard: standard, strict, text_only or none.")] = "standard"
    probe: Annotated[str | None, Option(help="A probe whose disagreement is a further detector (DualVerifier).")] = None
    family: Annotated[list[str] | None, Option(help="Only these families of templates.")] = None
    questions: Annotated[
        int,
        Option(min=4, help="Maximum number of questions; half of them set the thresholds, which few make unreliable."),
    ] = 500
    rollouts: Annotated[int, Option(min=1, help="Clean rollouts per question, at temperature 1.")] = 8
    instances: Annotated[int, Option(min=1, help="Rollouts that each template and the suffix attack.")] = 100
    best_of: Annotated[int, Option(min=2, help="The largest N of best-of-N.")] = 256
    best_of_questions: Annotated[int, Option(min=2, help="Questions for best-of-N.")] = 20
    suffix_length: Annotated[int, Option(min=1, help="Tokens in the suffix.")] = 8
    suffix_steps: Annotated[int, Option(min=1, help="Replacements that are tried, 24 tokens each.")] = 32
    train: Annotated[str, Option(help="What policies train: lora, full or both.")] = "lora"
    steps: Annotated[int, Option(min=1, help="Maximum number of a policy's training steps.")] = 100
    patience: Annotated[int, Option(min=1, help="Stop a policy whose objective has not risen for this many steps.")] = (
        20
    )
    learning_rate: Annotated[
        float | None, Option(help="Default: 1e-3 for LoRA, 1e-4 for full (small models; large ones want less).")
    ] = None
    prompts_per_step: Annotated[int, Option(min=1, help="Questions per training step of a policy.")] = 16
    num_generations: Annotated[int, Option(min=2, help="Rollouts per question in a policy's training.")] = 8
    alpha: Annotated[
        float, Option(min=0, help="Aware attack: what standing at a detector's threshold costs, in clean sd.")
    ] = 3.0
    verifier: Annotated[str, Option(help="What labels sampled rollouts: math_boxed, gsm8k or exact_match.")] = (
        "math_boxed"
    )
    split: Annotated[str | None, Option(help="The dataset's split, e.g. train[:500].")] = None
    subset: Annotated[str | None, Option(help="The hub dataset's configuration, e.g. main.")] = None
    prompt: Annotated[str, Option(help="What the model reads, with the dataset's columns in braces.")] = "{prompt}"
    answer: Annotated[str, Option(help="The column with the gold answer.")] = "answer"
    max_new_tokens: Annotated[int, Option(min=2, help="Maximum number of tokens in a completion.")] = 256
    batch_size: Annotated[int, Option(min=1, help="Rollouts sampled at once.")] = 64
    dtype: Annotated[str, Option(help="Type of the model's weights: float32, bfloat16 or float16.")] = "float32"
    seed: Annotated[int, Option(help="Random seed.")] = 0

    def __post_init__(self):
        from mechreward.hacking.redteam.templates import FAMILIES, TOKEN_FAMILIES  # needs torch, which a help must not

        families = [*FAMILIES, *TOKEN_FAMILIES]
        for each in self.attacks:
            if each not in ATTACKS:
                known = ", ".join(ATTACKS)
                raise ConfigError(f"There is no attack '{each}': there are {known}.{nearest(each, ATTACKS)}")
        for each in self.family or []:
            if each not in families:
                raise ConfigError(f"There is no family of templates '{each}'.{nearest(each, families)}")
        if self.train not in (*KINDS, "both"):
            meant = nearest(self.train, [*KINDS, "both"])
            raise ConfigError(f"--train {self.train} is not possible: use lora, full or both.{meant}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"--learning-rate {self.learning_rate} is not possible: give a number above 0.")
        if min(self.steps, self.patience, self.prompts_per_step) < 1 or self.num_generations < 2:
            raise ConfigError(
                "A policy attack needs steps, patience and prompts_per_step of at least 1, and 2 generations, not "
                f"{self}."
            )

    @property
    def attacks(self) -> list[str]:
        """The attacks to make, each once."""
        return list(dict.fromkeys(self.attack or ATTACKS))

    @property
    def kinds(self) -> list[Kind]:
        """What policies train, one policy each."""
        return [kind for kind in KINDS if self.train in (kind, "both")]

    def settings(self) -> dict[str, Any]:
        """Return all options that a result depends on besides the model and the questions."""
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "data", "out")}
        return own | {"attack": self.attacks}
