"""What feature rewards add to a GRPO step: seconds and bytes, beside an outcome-only step and the naive way.

    python benchmarks/overhead.py [--device cuda] [--only pocket] [--rounds 3]

Real TRL training loops take turns in one process, in a new order every round, so that whatever else the machine does
meets all of them alike; every ratio is taken within a round. Each arm's first turn is discarded for time, and is the
one in which memory is measured. Leaves `benchmarks/results/overhead-<device>.json` and a page made from it.

Our cost is all time inside this library: hooks, readings, rewards, guards, bookkeeping, and any forward pass that it
adds. It contains neither the verifier nor TRL's own passes. The naive cost is all time inside the naive function.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import inspect
import json
import logging
import platform
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from measure import THEIRS, Ledger, TakingTurns, check_live_bytes
from rich.console import Console
from rich.table import Table
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scaling import FEATURES, measure_scaling, on_paper
from torch.nn.functional import pad
from trl.trainer.grpo_trainer import GRPOTrainer

import mechreward as mr
from mechreward.files import made_now, made_sentence
from mechreward.integrations.trl import passes, trainer
from mechreward.readout import ReadoutBank
from mechreward.recording import Recording
from mechreward.reward import base
from mechreward.reward.base import Reward
from mechreward.rollout import plain
from mechreward.rollout.capture import ResidualTap
from mechreward.rollout.sampling import sample
from mechreward.rollout.source import HFSource
from mechreward.sae.handle import SAEHandle

RESULTS = Path(__file__).parent / "results"

OURS = ("hooks", "encode", "bookkeeping", "recording", "guards", "rewards", "forward")
NAIVE, VERIFIER = "naive", "verifier"

MAX_SHARE = 0.01
"""Target: our cost on a tap, as a share of the outcome-only step, with a sliced encoder."""

MIN_RATIO = 20
"""Target: the naive way's cost over ours, in time and in peak memory."""

L0 = 100
"""Latents that fire per token in the random dictionaries."""

GEMMA_2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "vocab_size": 256_000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Setting:
    """A model and the size of its steps.

    Attributes:
        model: Gemma-2's configuration, randomly initialised and trained by LoRA; None for the shipped `pocket`,
            trained whole.
        layer: Whose output is read.
        d_sae: Latents in each dictionary.
        prompts: Different prompts in one generation step.
        generations: Completions of each prompt.
        tokens: In every completion: the end token is suppressed until then.
        passes: Parts into which TRL cuts the step's rows for its forward and backward passes; even.
        rounds: Turns of each arm that count.
        note: What to keep in mind when reading its figures.
        questions: Which of `pocket`'s questions are the prompts.
        dtype: Of the model's weights.
        tolerance: How far the naive reward may lie from ours, as a share of the largest reward.
    """

    name: str
    model: dict[str, Any] | None
    layer: int
    d_sae: int
    prompts: int
    generations: int
    tokens: int
    passes: int
    rounds: int
    note: str
    questions: Any = "reasoning"
    dtype: str = "float32"
    tolerance: float = 1e-4

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


SETTINGS = {
    "cpu": [
        Setting(
            name="pocket",
            model=None,
            layer=2,
            d_sae=2048,
            prompts=16,
            generations=8,
            tokens=64,
            passes=2,
            rounds=5,
            note="The shipped model (1.05 M parameters): each step of it is cheap, so fixed costs weigh most here.",
        ),
        Setting(
            name="gemma-2-2b-cut",
            model=GEMMA_2_2B | {"num_hidden_layers": 6, "vocab_size": 512},
            layer=3,
            d_sae=16_384,
            prompts=2,
            generations=4,
            tokens=24,
            passes=2,
            rounds=3,
            note="Gemma-2-2B's layer sizes with 6 of 26 layers and a vocabulary of 512, randomly initialised. Both "
            "cuts flatter the naive way: its second forward pass would run 26 layers and compute 256,000 logits. Short "
            "completions keep a step within half a minute; fixed costs weigh more in it.",
            questions="retrieval",
        ),
    ],
    "cuda": [
        Setting(
            name="gemma-2-2b",
            model=GEMMA_2_2B,
            layer=12,
            d_sae=16_384,
            prompts=8,
            generations=8,
            tokens=512,
            passes=8,
            rounds=3,
            note="Gemma-2-2B's sizes, randomly initialised. Every change between TRL's code and ours waits for the "
            "device, so our seconds are an upper bound. A dictionary that moves to the device counts as memory.",
            dtype="bfloat16",
            tolerance=0.1,
        )
    ],
}


def quick(setting: Setting) -> Setting:
    """The same comparison in seconds: two rounds of tiny steps on a tiny model."""
    model = setting.model
    if model is not None:
        small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
        model = model | small
    return replace(
        setting, model=model, layer=2, d_sae=2048, prompts=2, generations=2, tokens=8, passes=2, rounds=2,
        note="A quick run: its figures say nothing.",
    )  # fmt: skip


# -- the arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way of rewarding.

    Attributes:
        says: What it is, in the tables.
        encoder: ``"jumprelu"``, ``"topk"`` or None for no features of ours.
        tap: Where MechRewardGRPOTrainer takes its readings; ``"forward"`` for a pass of our own, under TRL's plain
            trainer; None for no readings of ours.
        naive: Whether the naive function runs beside the outcome reward.
        held_to_targets: Whether the targets are for this arm.
    """

    says: str
    encoder: str | None = None
    tap: str | None = None
    naive: bool = False
    held_to_targets: bool = False


ARMS = {
    "outcome": Arm("outcome only"),
    "generation": Arm("features, generation tap", "jumprelu", "generation", held_to_targets=True),
    "old_logprobs": Arm("features, old-logprobs tap", "jumprelu", "old_logprobs", held_to_targets=True),
    "reference": Arm("features, reference tap", "jumprelu", "reference", held_to_targets=True),
    "topk": Arm("TopK features, generation tap", "topk", "generation"),
    "forward": Arm("features, own forward", "jumprelu", "forward"),
    "naive": Arm("naive second forward", naive=True),
}


class NaiveFeatureReward:
    """What one would write without this library: run the model again, keep all hidden states, encode everything.

    Rows are left-padded as TRL pads them, and go through the model in the parts in which TRL runs its own passes. The
    final token of each completion is left out, as in our rewards, so that both give the same numbers.
    """

    def __init__(self, model: Any, tokenizer: Any, sae: SAE, layer: int, ids: list[int], weights: Any, rows: int):
        self.__name__ = "naive"
        self.model, self.tokenizer, self.sae, self.layer, self.rows = model, tokenizer, sae, layer, rows
        self.ids, self.weights = ids, torch.tensor(weights, device=sae.device)

    def __call__(self, prompts: list[str], completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
        training = self.model.training
        self.model.eval()
        rewards = []
        for start in range(0, len(prompts), self.rows):
            part = slice(start, start + self.rows)
            rewards += self.score(prompts[part], completion_ids[part])
        self.model.train(training)
        return rewards

    @torch.no_grad()
    def score(self, prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        prompt = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        completion = self.tokenizer.pad({"input_ids": completion_ids}, return_tensors="pt", padding_side="right")
        device, width = self.model.device, completion.input_ids.shape[1]
        output = self.model(
            input_ids=torch.cat([prompt.input_ids, completion.input_ids], dim=1).to(device),
            attention_mask=torch.cat([prompt.attention_mask, completion.attention_mask], dim=1).to(device),
            output_hidden_states=True,
            use_cache=False,
        )
        features = self.sae.encode(output.hidden_states[self.layer + 1][:, -width:])
        tokens = features[..., self.ids] @ self.weights
        mask = pad(completion.attention_mask[:, 1:], (0, 1)).to(device)
        return ((tokens * mask).sum(dim=1) / mask.sum(dim=1)).tolist()


@dataclass(frozen=True)
class Encoders:
    """The dictionaries of a setting: folders in SAELens' format, and the latents that are rewarded."""

    folders: dict[str, Path]
    ids: dict[str, list[int]]
    weights: list[float]
    l0: float  # latents of the JumpReLU dictionary that fire per token

    def reward(self, encoder: str, reads: Any) -> mr.FeatureReward:
        readout = mr.load_sae(path=self.folders[encoder]).features(self.ids[encoder], name="features")
        return mr.FeatureReward(readout, self.weights, aggregation="mean", reads=reads)


class Workshop:
    """Builds everything that the arms of one setting need; the frozen weights of large models exist once."""

    def __init__(self, setting: Setting, device: str, ledger: Ledger, folder: Path):
        self.setting, self.device, self.ledger, self.folder = setting, device, ledger, folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(mr.pocket.path())
        self.data = mr.pocket.dataset("train", 1000, kind=setting.questions)
        self.base = self._base()
        residual = self._residual(self.data["prompt"][:64])
        self.encoders = self._shipped(residual) if setting.model is None else self._random(residual)

    def _base(self) -> Any:
        torch.manual_seed(0)
        auto: Any = transformers.AutoModelForCausalLM
        dtype = getattr(torch, self.setting.dtype)
        if self.setting.model is None:
            return auto.from_pretrained(mr.pocket.path(), dtype=dtype).eval().to(self.device)
        with torch.device(self.device):
            model = auto.from_config(transformers.Gemma2Config(**self.setting.model), dtype=dtype).eval()
        # With tied embeddings a random model repeats its last token for ever: flat logits keep completions apart.
        model.model.norm.weight.data.fill_(-0.95)  # Gemma scales by 1 + weight
        return model

    def policy(self) -> tuple[Any, Any]:
        """A model of its own for an arm, and how TRL is to train it."""
        if self.setting.model is None:
            return copy.deepcopy(self.base), None
        shared = {id(p): p for p in self.base.parameters()}
        return copy.deepcopy(self.base, shared), peft.LoraConfig(task_type="CAUSAL_LM")

    @torch.no_grad()
    def _residual(self, prompts: list[str]) -> torch.Tensor:
        """Residual vectors at the hook layer on a few prompts, ``[N, d_model]`` float32 on the CPU."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        hidden = self.base(**inputs, output_hidden_states=True).hidden_states[self.setting.layer + 1]
        return hidden[inputs.attention_mask.bool()][:1024].float().cpu()

    def _shipped(self, residual: torch.Tensor) -> Encoders:
        saes = mr.pocket.files() / "saes"
        return self._described({kind: saes / kind for kind in ("jumprelu", "topk")}, residual)

    def _random(self, residual: torch.Tensor) -> Encoders:
        """Random directions; one threshold for all latents, so high that `L0` of them fire on an average token."""
        hook = SAEMetadata(model_name="gemma-2-2b", hook_name=f"blocks.{self.setting.layer}.hook_resid_post")
        sizes: dict[str, Any] = {"d_in": residual.shape[1], "d_sae": self.setting.d_sae, "metadata": hook}
        directions = torch.randn(sizes["d_in"], sizes["d_sae"]) / sizes["d_in"] ** 0.5
        firing = (residual[:64] @ directions).flatten().topk(64 * L0).values
        jumprelu = JumpReLUSAE(JumpReLUSAEConfig(**sizes, apply_b_dec_to_input=False))
        jumprelu.threshold.data.fill_(firing[-1])
        topk = TopKSAE(TopKSAEConfig(**sizes, apply_b_dec_to_input=False, k=L0))
        folders = {}
        for kind, sae in {"jumprelu": jumprelu, "topk": topk}.items():
            sae.W_enc.data = directions
            folders[kind] = self.folder / kind
            sae.save_model(folders[kind])
        return self._described(folders, residual)

    def _described(self, folders: dict[str, Path], residual: torch.Tensor) -> Encoders:
        fired = {kind: activations(mr.load_sae(path=folder), residual) for kind, folder in folders.items()}
        return Encoders(
            folders,
            ids={kind: values.mean(dim=0).topk(FEATURES).indices.tolist() for kind, values in fired.items()},
            weights=torch.linspace(1.0, -0.5, FEATURES).tolist(),
            l0=float((fired["jumprelu"] > 0).sum(dim=1).float().mean()),
        )

    def naive_reward(self, model: Any = None) -> NaiveFeatureReward:
        """``model``: the trainer's, as soon as there is one."""
        sae = SAE.load_from_disk(self.encoders.folders["jumprelu"], device=self.device)
        ids, rows = self.encoders.ids["jumprelu"], self.setting.rows // self.setting.passes
        return NaiveFeatureReward(model, self.tokenizer, sae, self.setting.layer, ids, self.encoders.weights, rows)

    def check_that_naive_equals_ours(self) -> float:
        """Both rewards on the same rollouts; the largest difference as a share of the largest reward.

        Raises:
            AssertionError: They differ by more than the setting's tolerance, or are too uniform to compare.
        """
        prompts, tokens = self.data["prompt"][:2], self.setting.tokens
        generate: dict[str, Any] = {"min_new_tokens": tokens // 2, "max_new_tokens": tokens}
        batch = sample(self.base, self.tokenizer, prompts, 4, do_sample=True, **generate)
        rollouts: Any = (batch.prompts, batch.completions, batch.completion_ids)
        ours = self.encoders.reward("jumprelu", "policy")(*rollouts, source=HFSource(self.base, self.tokenizer))
        naive = self.naive_reward(self.base)(*rollouts)
        largest = max(abs(value) for value in naive)
        difference = max(abs(a - b) for a, b in zip(ours, naive, strict=True) if a is not None) / largest
        assert len(set(naive)) > len(prompts), "All rollouts of a prompt are rewarded alike: too easy a comparison."
        assert difference <= self.setting.tolerance, f"Naive and ours differ by {difference:.2g}."
        return difference

    def arm(self, arm: Arm) -> TakingTurns:
        """The arm's trainer, ready for its first turn."""
        setting, old = self.setting, arm.tap == "old_logprobs"
        outcome = mr.OutcomeReward(self.ledger.charge(mr.verifiers.math_boxed, VERIFIER), gold_column="answer")
        reads = "reference" if arm.tap == "reference" else "policy"
        features = [self.encoders.reward(arm.encoder, reads)] if arm.encoder else []
        composite = mr.CompositeReward([outcome, *features], [1.0, 0.3][: 1 + len(features)])
        naive = self.naive_reward() if arm.naive else None
        # TRL runs an old-logprobs pass where one generation serves several optimizer steps: there, two instead of one.
        accumulation = setting.passes // 2 if old else setting.passes
        steps = setting.passes // accumulation
        config = mr.MechRewardGRPOConfig(
            output_dir=str(self.folder / "runs"),
            num_generations=setting.generations,
            per_device_train_batch_size=setting.rows // setting.passes,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=setting.passes,
            max_completion_length=setting.tokens,
            generation_kwargs={"min_new_tokens": setting.tokens},
            max_steps=(setting.rounds + 1) * steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            reward_weights=[1.0, 0.3][: 2 if naive else 1],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=setting.dtype == "bfloat16",
            use_cpu=self.device == "cpu",
            disable_tqdm=True,
        )
        model, lora = self.policy()
        plain = arm.naive or arm.tap == "forward"
        trainer = (GRPOTrainer if plain else mr.MechRewardGRPOTrainer)(
            model=model,
            args=config,
            reward_funcs=[composite, self.ledger.charge(naive, NAIVE)] if naive else [composite],
            train_dataset=self.data,
            processing_class=self.tokenizer,
            peft_config=lora,
        )
        if naive:
            naive.model = trainer.model
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        return TakingTurns(trainer, steps, self.ledger)


def activations(sae: SAEHandle, residual: torch.Tensor) -> torch.Tensor:
    """All latents on some residual vectors, ``[N, d_sae]``."""
    readout = sae.all_features()
    values = torch.zeros(len(residual), readout.width)
    ReadoutBank([readout]).encode(readout.hook_point, residual, values)
    return values


# -- whose time it is -------------------------------------------------------------------------------------------------


def charge_our_code(ledger: Ledger) -> None:
    """Whatever the library runs during a step is charged to it; what TRL runs on its behalf, to TRL."""
    overridden = [
        name
        for name, method in vars(mr.MechRewardGRPOTrainer).items()
        if inspect.isfunction(method) and hasattr(GRPOTrainer, name) and name != "__init__"
    ]
    for name in overridden:
        setattr(GRPOTrainer, name, ledger.charge(getattr(GRPOTrainer, name), THEIRS))
        setattr(mr.MechRewardGRPOTrainer, name, ledger.charge(vars(mr.MechRewardGRPOTrainer)[name], "bookkeeping"))
    for name in ("rollouts", "on_log"):  # what `record=500`, the default, writes
        setattr(Recording, name, ledger.charge(vars(Recording)[name], "recording"))
    Reward.__call__ = ledger.charge(Reward.__call__, "rewards")
    ReadoutBank.encode = ledger.charge(ReadoutBank.encode, "encode")
    for module in (trainer, base):
        module.apply_guards = ledger.charge(module.apply_guards, "guards")  # pyright: ignore
    for module in (passes, plain):
        module.read_with_trainer = ledger.charge(module.read_with_trainer, "forward")  # pyright: ignore
    install = ResidualTap._install

    def install_charged(tap, layer, point):
        handle = install(tap, layer, point)
        hooks: Any = handle.hooks_dict_ref()
        hooks[handle.id] = ledger.charge(hooks[handle.id], "hooks")
        return handle

    ResidualTap._install = install_charged  # pyright: ignore[reportAttributeAccessIssue]


def ours(seconds: dict[str, float]) -> float:
    return sum(seconds.get(owner, 0.0) for owner in OURS)


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(setting: Setting, device: str, ledger: Ledger, console: Console, seed: int = 0) -> dict[str, Any]:
    """All arms of a setting, turn by turn.

    Returns:
        For each arm: ``rounds`` (seconds by owner), ``logged`` (the trainer's own figure of our seconds, each round),
        ``bytes`` (peak, by side), ``taps``.
    """
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(setting, device, ledger, Path(folder))
        difference = workshop.check_that_naive_equals_ours()
        console.print(f"{setting.name}: naive and ours agree to {difference:.1g} of the largest reward.")
        playing = {name: workshop.arm(arm) for name, arm in ARMS.items()}
        arms: dict[str, Any] = {name: {"rounds": []} for name in ARMS}
        order, shuffle = list(ARMS), random.Random(seed)
        for turn in range(setting.rounds + 1):
            shuffle.shuffle(order)
            for name in order:
                first = turn == 0
                seconds, peaks = playing[name].turn(with_memory=first)
                if first:
                    arms[name]["bytes"] = peaks
                else:
                    arms[name]["rounds"].append(seconds)
            line = ", ".join(f"{name} {sum(a['rounds'][-1].values()):.1f} s" for name, a in arms.items() if turn)
            console.print(f"  {'round ' + str(turn) + ': ' + line if turn else 'warmed up, memory measured'}")
        for name, arm in ARMS.items():
            trainer: Any = playing[name].trainer
            arms[name]["logged"] = logged_seconds(trainer)[1:]
            arms[name]["taps"] = getattr(trainer, "taps", {})
            served = set(arms[name]["taps"].values()) or {arm.tap}
            assert served == {arm.tap}, f"{name} was served by {served}."
        sizes = asdict(setting) | {"l0": workshop.encoders.l0, "difference": difference}
        return {"setting": sizes, "arms": arms, "summary": summarise(arms)}


def logged_seconds(trainer: Any) -> list[float]:
    """What the trainer itself logs of our time, once per generation."""
    return [
        log.get("mechreward/hook_seconds", 0.0) + log["composite/seconds"]
        for log in trainer.state.log_history
        if "composite/seconds" in log
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def summarise(arms: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds; shares and ratios between arms are taken within each round."""
    outcome = [sum(seconds.values()) for seconds in arms["outcome"]["rounds"]]
    naive = [seconds[NAIVE] for seconds in arms["naive"]["rounds"]]
    naive_bytes = arms["naive"]["bytes"][NAIVE]
    summary = {}
    for name, arm in arms.items():
        cost = naive if ARMS[name].naive else [ours(seconds) for seconds in arm["rounds"]]
        peak = naive_bytes if ARMS[name].naive else arm["bytes"]["ours"]
        entry: dict[str, Any] = {
            "step_seconds": spread([sum(seconds.values()) for seconds in arm["rounds"]]),
            "cost_seconds": spread(cost),
            "logged_seconds": spread(arm["logged"]),
            "share_of_outcome_step": spread([c / step for c, step in zip(cost, outcome, strict=True)]),
            "naive_over_this": spread([n / c for n, c in zip(naive, cost, strict=True)]),
            "peak_bytes": peak,
            "naive_bytes_over_this": naive_bytes / peak,
            "parts": {owner: median(s.get(owner, 0.0) for s in arm["rounds"]) for owner in OURS},
        }
        if ARMS[name].held_to_targets:
            entry["targets_met"] = {
                "share": entry["share_of_outcome_step"]["median"] <= MAX_SHARE,
                "time": entry["naive_over_this"]["median"] >= MIN_RATIO,
                "memory": entry["naive_bytes_over_this"] >= MIN_RATIO,
            }
        summary[name] = entry
    return summary


# -- what is said of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A table, for the terminal and for the page alike."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str

    def rich(self) -> Table:
        table = Table(title=self.title, caption=self.note, caption_justify="left", title_justify="left")
        for i, column in enumerate(self.header):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"


def sheets(results: dict[str, Any]) -> Iterator[Sheet]:
    for comparison in results["comparisons"]:
        yield cost_sheet(comparison)
        yield parts_sheet(comparison)
    yield scaling_sheet(results["scaling"])
    yield paper_sheet(results["on_paper"])


def cost_sheet(comparison: dict[str, Any]) -> Sheet:
    s = comparison["setting"]
    rows = s["prompts"] * s["generations"]
    return Sheet(
        f"{s['name']}: {rows} completions of {s['tokens']} tokens, K = {FEATURES} of {s['d_sae']:,} latents",
        ["arm", "step", "cost", "share of outcome step", "naive / cost", "peak bytes", "naive / peak", "targets met"],
        [
            [
                ARMS[name].says,
                f"{e['step_seconds']['median']:.2f} s",
                milliseconds(e["cost_seconds"]["median"]),
                within(e["share_of_outcome_step"], lambda v: f"{100 * v:.2f} %"),
                within(e["naive_over_this"], lambda v: f"{v:.1f}") if ARMS[name].encoder else "",
                mebibytes(e["peak_bytes"]),
                f"{e['naive_bytes_over_this']:,.1f}" if ARMS[name].encoder else "",
                verdict(e.get("targets_met")),
            ]
            for name, e in comparison["summary"].items()
        ],
        f"{s['note']} Medians of {s['rounds']} rounds (lowest to highest). Cost: our code, or for the naive arm its "
        f"function. Targets on taps: share <= {MAX_SHARE:.0%}, naive / ours >= {MIN_RATIO} in time and in peak memory. "
        f"The old-logprobs arm takes two optimizer steps for one generation, the others one. {s['l0']:.0f} latents "
        f"fire per token. On the same rollouts, naive and ours differ by {s['difference']:.1g} of the largest reward.",
    )


def parts_sheet(comparison: dict[str, Any]) -> Sheet:
    return Sheet(
        f"{comparison['setting']['name']}: where our time goes",
        ["arm", *OURS, "sum", "logged by the trainer"],
        [
            [
                ARMS[name].says,
                *(milliseconds(e["parts"][owner]) for owner in OURS),
                milliseconds(sum(e["parts"].values())),
                milliseconds(e["logged_seconds"]["median"]),
            ]
            for name, e in comparison["summary"].items()
        ],
        "Each part without the others that it calls. Logged: mechreward/hook_seconds + composite/seconds. In the naive "
        "arm, ours is the composite around the outcome reward.",
    )


def scaling_sheet(scaling: dict[str, Any]) -> Sheet:
    return Sheet(
        f"ReadoutBank.encode per token, d = {scaling['d_model']}",
        ["sweep", "encoder", "N", "K", "d_sae", "layers", "encode", "bare matmul", "FLOP counted", "limit"],
        [
            [
                c["sweep"],
                c["kind"],
                *(f"{c[size]:,}" for size in ("tokens", "columns", "d_sae", "layers")),
                f"{c['encode']:.2f} µs",
                f"{c['matmul']:.2f} µs",
                f"{c['counted']:,.0f}",
                f"{c['limit']:,}",
            ]
            for c in scaling["cases"]
        ],
        f"Medians of {scaling['repeats']} interleaved rounds. Limit: 2 K d per token and layer where the encoder is "
        "sliced, 2 d_sae d for TopK. FLOP counted by torch.utils.flop_counter.",
    )


def paper_sheet(paper: dict[str, Any]) -> Sheet:
    return Sheet(
        f"On paper: {paper['model']}, FLOP per token",
        ["what", "formula", "FLOP", "share of one forward"],
        [[what, formula, f"{flop:,.0f}", f"{share:.5%}"] for what, formula, flop, share in paper["rows"]],
        f"Naive / ours: {paper['naive_over_ours']:,.0f}.",
    )


def within(values: dict[str, float], show: Callable[[float], str]) -> str:
    return f"{show(values['median'])} ({show(values['low'])} to {show(values['high'])})"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def verdict(met: dict[str, bool] | None) -> str:
    if met is None:
        return ""
    missed = [target for target, reached in met.items() if not reached]
    return "missed: " + ", ".join(missed) if missed else "all"


def machine(device: str) -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "sae-lens")
        }
        | {"mechreward": mr.__version__},
    }


def page(results: dict[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return "\n".join(
        [
            "# Overhead\n",
            f"`{results['command']}` on {m['gpu'] or m['cpu']}, {m['threads']} threads; {versions}. "
            f"{made_sentence(results)}",
            "Our cost is all time inside the library, its bookkeeping and guards included, without the verifier and "
            "TRL's own passes.\n",
            *(sheet.markdown() for sheet in sheets(results)),
        ]
    )


def slug(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("mechreward").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    everything = [setting.name for settings in SETTINGS.values() for setting in settings]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--only", choices=everything, help="one model alone")
    parser.add_argument("--rounds", type=int, help="turns of each arm that count, in place of each setting's own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)

    settings = [s for s in SETTINGS[options.device] if options.only in (None, s.name)]
    if options.quick:
        settings = [quick(s) for s in settings]
    if options.rounds is not None:
        settings = [replace(s, rounds=options.rounds) for s in settings]

    console = Console(width=max(150, Console().width))  # the tables are wide, also in a file
    d_model, repeats = (64, 2) if options.quick else (GEMMA_2_2B["hidden_size"], 7)
    check_live_bytes()
    now = made_now()
    # First, while `encode` is still as it is shipped: from then on every call of it is timed.
    cases = measure_scaling(d_model, repeats, options.device)
    ledger = Ledger(options.device, dict.fromkeys(OURS, "ours") | {NAIVE: NAIVE})
    charge_our_code(ledger)
    results = {
        "command": command(options),
        "made": now,
        "machine": machine(options.device),
        "comparisons": [compare(setting, options.device, ledger, console) for setting in settings],
        "scaling": {"d_model": d_model, "repeats": repeats, "cases": cases},
        "on_paper": on_paper(),
    }
    for sheet in sheets(results):
        console.print(sheet.rich())
    options.out.mkdir(parents=True, exist_ok=True)
    partial = "-".join(["", *filter(None, [options.only, "quick" if options.quick else None])])
    file = options.out / f"overhead-{slug(options.device)}{partial if len(partial) > 1 else ''}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(results))
    console.print(f"{file} and {file.with_suffix('.md').name}")


def command(options: argparse.Namespace) -> str:
    """What was run, without folders of this machine."""
    given = [
        *(["--device", options.device] if options.device != "cpu" else []),
        *(["--only", options.only] if options.only else []),
        *(["--rounds", str(options.rounds)] if options.rounds is not None else []),
        *(["--quick"] if options.quick else []),
    ]
    return " ".join(["python benchmarks/overhead.py", *given])


if __name__ == "__main__":
    be_quiet()
    main()
