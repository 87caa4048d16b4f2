"""Train `pocket` twice with GRPO, on the outcome alone and on outcome + features, and compare.

    python scripts/demo.py [--steps 30]

Takes about five minutes on two CPU cores. Leaves a table, and a plot of both curves.
"""

import argparse
import logging
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import mechreward as mr
from mechreward import stats
from mechreward.rollout.sampling import sample

OUT = Path("demo")
QUESTIONS, ROLLOUTS = 16, 8


@dataclass
class Arm:
    """One training run: accuracy afterwards, and TRL's log of each step."""

    name: str
    right: int
    log: list[dict[str, float]]
    seconds: float


def accuracy(model: Any, n: int) -> int:
    """Right answers to n unseen word problems, one sample each at temperature 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(mr.pocket.path())
    asked = mr.pocket.dataset("test", n)
    torch.manual_seed(0)
    answers = sample(model.eval(), tokenizer, asked["prompt"], 1).texts
    return sum(v is True for v in mr.verifiers.math_boxed(answers, asked["answer"]))


class LiveLine(transformers.TrainerCallback):
    """A progress bar with the step's metrics beside it."""

    def __init__(self, bar: Progress, name: str, steps: int):
        self.bar, self.name = bar, name
        self.task = bar.add_task(name, total=steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            right = logs["composite/math_boxed"]
            line = f"{self.name}  right {right:.2f}  features {feature_mean(logs):+.2f}  KL {logs['kl']:.4f}"
            self.bar.update(self.task, completed=state.global_step, description=line)


def feature_mean(logs: dict[str, float]) -> float:
    """The feature reward's raw mean, as a part of the reward or as a monitor."""
    return logs.get("composite/reasoning_pack/raw", logs.get("monitor/reasoning_pack", math.nan))


def train(name: str, rewards: list, weights: list[float], monitors: list, bar: Progress, steps: int, n: int) -> Arm:
    config = mr.MechRewardGRPOConfig(
        output_dir=str(OUT / name.replace(" ", "_").replace("+", "and")),
        num_generations=ROLLOUTS,
        per_device_train_batch_size=QUESTIONS * ROLLOUTS,
        max_completion_length=64,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = mr.MechRewardGRPOTrainer(
        model=mr.pocket.path(),
        args=config,
        train_dataset=mr.pocket.dataset("train", 2000),
        reward_funcs=mr.CompositeReward(rewards, weights),
        monitors=monitors,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.add_callback(LiveLine(bar, name, steps))
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    return Arm(name, accuracy(trainer.model, n), [log for log in trainer.state.log_history if "reward" in log], seconds)


def show(arms: list[Arm], before: int, n: int) -> Table:
    steps = len(arms[0].log)
    table = Table(title=f"pocket, {steps} steps of GRPO; {n} test questions, sampled at temperature 1")
    table.add_column()
    for arm in arms:
        table.add_column(arm.name, justify="right")
    rows = {
        "right before": lambda arm: interval(before, n),
        "right after": lambda arm: interval(arm.right, n),
        "reward": lambda arm: f"{last(arm, 'reward'):.3f}",
        "KL": lambda arm: f"{last(arm, 'kl'):.4f}",
        "feature reading": lambda arm: f"{sum(map(feature_mean, arm.log[-5:])) / len(arm.log[-5:]):+.3f}",
        "flagged": lambda arm: f"{flagged(arm):.0f} of {steps * QUESTIONS * ROLLOUTS}",
        "time in our code": lambda arm: f"{ours(arm):.2f} s of {arm.seconds:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, arms))
    return table


def last(arm: Arm, key: str) -> float:
    return sum(log[key] for log in arm.log[-5:]) / len(arm.log[-5:])


def flagged(arm: Arm) -> float:
    return sum(log["guards/flagged"] for log in arm.log) * QUESTIONS * ROLLOUTS


def ours(arm: Arm) -> float:
    """Seconds in hooks, readings and rewards; not in the verifier, and not in TRL's own passes."""
    return sum(log["mechreward/hook_seconds"] + log["composite/seconds"] for log in arm.log)


def interval(right: int, n: int) -> str:
    return stats.with_interval(right / n, stats.wilson(right, n))


def plot(arms: list[Arm], file: Path) -> None:
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for arm, colour in zip(arms, ("#555555", "#0072b2"), strict=True):
        steps = range(1, len(arm.log) + 1)
        right = [log["composite/math_boxed"] for log in arm.log]
        top.plot(steps, right, color=colour, alpha=0.3, linewidth=1)
        top.plot(steps, smooth(right), color=colour, label=arm.name, linewidth=2)
        features = [feature_mean(log) for log in arm.log]
        bottom.plot(steps, features, color=colour, alpha=0.3, linewidth=1)
        bottom.plot(steps, smooth(features), color=colour, linewidth=2)
    top.set(ylabel="share of rollouts that are right", ylim=(0, 1), title="pocket: GRPO on its training questions")
    bottom.set(ylabel="feature reading (raw)", xlabel="step (thin: each step; thick: mean of the last five)")
    top.legend(loc="lower right", frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, dpi=150)


def smooth(values: list[float]) -> list[float]:
    return [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="GRPO steps for each run (default 30)")
    parser.add_argument("--questions", type=int, default=500, help="test questions (default 500)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("mechreward").setLevel(logging.ERROR)
    OUT.mkdir(exist_ok=True)
    console = Console()
    console.print("Training the embedded model twice; each run is one line.")

    outcome = mr.OutcomeReward(mr.verifiers.math_boxed)
    pack = mr.load_pack("pocket/reasoning_pack")
    console.print(f"[bold]{pack.name}[/bold] is a {pack.status} pack: {pack.status_reason}")
    features = mr.FeatureReward.from_pack(pack)
    model = transformers.AutoModelForCausalLM.from_pretrained(mr.pocket.path())
    before = accuracy(model, options.questions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        arms = [
            train("outcome only", [outcome], [1.0], [features], bar, options.steps, options.questions),
            train(
                "outcome + features",
                [outcome, features],
                [1.0, 0.3],
                [],
                bar,
                options.steps,
                options.questions,
            ),
        ]
    console.print(show(arms, before, options.questions))
    console.print(
        "Intervals: 95 %. Reward, KL and reading: mean of the last five steps. Our code: readings and rewards, without "
        "the verifier. One seed: where intervals overlap, no difference was shown. In the outcome run the features are "
        "only watched."
    )
    file = OUT / "curves.png"
    plot(arms, file)
    console.print(f"Plot: {file.resolve()}")


if __name__ == "__main__":
    main()
