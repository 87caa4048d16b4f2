"""Train a sparse autoencoder for a model that has none: capture, train, evaluate, export.

    python scripts/train_sae.py --model Qwen/Qwen3-0.6B --layer 14 --text corpus.txt --text rollouts.jsonl \
        --latents 16384 --tokens 50000000 --dtype bfloat16 --out runs/qwen3-sae

The residual stream after one decoder layer is captured by mechreward's own hooks, shuffled, and handed to SAELens'
`SAETrainer`. The SAE is a BatchTopK one, whose auxiliary loss keeps latents alive, and is saved as the JumpReLU that it
becomes, so that rewards can read a few of its columns without the rest. Give the same command again after an
interruption: it goes on from the last checkpoint, at the same vector, and arrives at the same weights.

Results: OUT/sae (SAELens' format, for `mechreward.load_sae(path=...)`) and OUT/figures.json.
docs/training_new_sae.md says how to choose the options, and what to do with the SAE.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechreward import pocket
from mechreward.errors import ConfigError, MechRewardError
from mechreward.extras import require
from mechreward.files import Made, made_now
from mechreward.readout import HookPoint
from mechreward.rollout.capture import text_config
from mechreward.rollout.sampling import keeping_softcap
from mechreward.sae import formats
from sae_training import (
    Pieces,
    ResidualStream,
    check_layer,
    read_documents,
    sae_figures,
    tokenise,
)

HELD_OUT_EVERY = 50  # pieces of text, where no held-out text is given
NORM_BATCHES = 10


def main() -> None:
    try:
        train(arguments())
    except MechRewardError as error:
        raise SystemExit(f"Error: {error}") from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id; mechreward/pocket is the embedded model")
    add("--layer", type=int, required=True, help="its output is what the SAE reads; a bit past the middle is usual")
    add("--text", type=Path, action="append", required=True, help=".txt or .jsonl to train on; may be given again")
    add("--held-out", type=Path, action="append", help="text to evaluate on (default: each 50th piece of the text)")
    add("--latents", type=int, default=16384, help="size of the dictionary")
    add("--k", type=int, default=32, help="latents active per token, on average")
    add("--tokens", type=int, default=10_000_000, help="to train on; a shorter text is read several times")
    add("--context", type=int, default=512, help="documents are cut into pieces of at most this many tokens")
    add("--batch", type=int, default=2048, help="tokens in a training step")
    add("--buffer", type=int, default=65_536, help="vectors that are shuffled together, kept in memory")
    add("--lr", type=float, default=1e-3)
    add("--checkpoints", type=int, default=20, help="how many are made; the last one is kept")
    add("--eval-tokens", type=int, default=20_000, help="held-out tokens; dead latents: ten times as many trained ones")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="the model's, not the SAE's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, help="folder for checkpoints and results")
    return parser.parse_args()


def train(options: argparse.Namespace) -> None:
    check(options)
    model, tokenizer = load(options)
    check_layer(model, options.layer)
    point = HookPoint(options.layer)

    # 1. The text, in pieces; some of it is held out.
    pieces = tokenise(tokenizer, read_documents(options.text), options.context)
    if options.held_out:
        held_out = tokenise(tokenizer, read_documents(options.held_out), options.context)
    else:
        everything = range(len(pieces))
        held_out = pieces.take(everything[::HELD_OUT_EVERY])
        pieces = pieces.take([piece for piece in everything if piece % HELD_OUT_EVERY])
    stream = ResidualStream(model, point, pieces, options.batch, options.buffer, options.seed)
    epochs = options.tokens / stream.tokens
    print(f"{stream.tokens:,} tokens of text, each read {epochs:.2g} times on average.", flush=True)
    begun = remember(options, pieces)

    # 2. Training, unless it was finished before.
    folder = options.out / "sae"
    if not folder.exists():
        seconds = fit(options, stream, text_config(model).hidden_size, folder)
        (options.out / "seconds.json").write_text(json.dumps(seconds))
    seconds = json.loads((options.out / "seconds.json").read_text())

    # 3. Figures, on the exported files.
    print("Evaluating.", flush=True)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(options.seed)).tolist()
    rows, count = [], 0
    while order and count < options.eval_tokens:
        rows.append(held_out[order.pop()])
        count += len(rows[-1]) - 1
    stream.batches = 0
    seen = (next(stream) for _ in range(max(1, min(10 * options.eval_tokens, stream.tokens) // options.batch)))
    figures = sae_figures(model, formats.open_path(folder), rows, seen)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "made": begun,
        "figures": {name: float(f"{value:.5g}") for name, value in figures.items()},
        "settings": settings(options) | {"parameters": sum(p.numel() for p in model.parameters())},
        "text_tokens": stream.tokens,
        "training_seconds": round(seconds),
        "device": torch.cuda.get_device_name() if "cuda" in options.device else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "sae-lens")},
    }
    (options.out / "figures.json").write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    print(json.dumps(result["figures"], indent=2))
    print(f"The SAE is in {folder}, its figures in {options.out / 'figures.json'}.")


def check(options: argparse.Namespace) -> None:
    """What is wrong with the options shows before the model is loaded."""
    require("sae_lens", "sae")
    for name in ("latents", "k", "tokens", "batch", "eval_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be at least 1.")
    if options.latents < options.k:
        raise ConfigError(f"--k {options.k} of --latents {options.latents} cannot be active: take more latents.")
    if options.tokens < options.batch:
        raise ConfigError(f"--tokens {options.tokens} is less than one --batch of {options.batch}: train on more.")


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    name = pocket.resolve(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, options.dtype), **keeping_softcap(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"The model '{options.model}' could not be loaded: {reason}") from error
    return model.to(options.device).eval(), tokenizer


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on."""
    names = ("layer", "latents", "k", "tokens", "context", "batch", "buffer", "lr", "seed", "dtype", "checkpoints")
    return {"model": model_name(options)} | {name: getattr(options, name) for name in names}


def model_name(options: argparse.Namespace) -> str:
    """The hub id, or the name of the folder."""
    return Path(options.model).resolve().name if Path(options.model).exists() else options.model


def remember(options: argparse.Namespace, pieces: Pieces) -> Made:
    """Write down what this run is; a folder with another one in it is refused. Returns what it began at."""
    ours, begun = settings(options) | {"text": pieces.fingerprint()}, made_now()
    file = options.out / "run.json"
    if file.exists():
        theirs = json.loads(file.read_text())
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"{options.out} holds a run with another {name} ({theirs.get(name)}, not {value}): choose another "
                    "--out, or remove it."
                )
        begun = theirs.get("made", {"commit": None, "date": None})  # an older version did not record it
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**ours, "made": begun}, indent=2) + "\n")
    return begun


def fit(options: argparse.Namespace, stream: ResidualStream, width: int, folder: Path) -> float:
    """Train, or go on training, and export to ``folder``. Returns the seconds that it took in all."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    before, began = 0.0, time.monotonic()
    torch.manual_seed(options.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=width,
            d_sae=options.latents,
            k=options.k,
            normalize_activations="expected_average_only_in",  # folded into the weights at the end
            apply_b_dec_to_input=True,
            device=options.device,
        )
    )
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = model_name(options), str(stream.point)
    steps = options.tokens // options.batch
    checkpoints = options.out / "checkpoints"

    def with_position(checkpoint_path: Path | None) -> None:
        """SAELens has written the weights and the trainer's state; a checkpoint with the text's position is whole."""
        assert checkpoint_path is not None
        position = {"batches": stream.batches, "seconds": before + time.monotonic() - began}
        partial = checkpoint_path / "position.partial"
        partial.write_text(json.dumps(position))
        partial.rename(checkpoint_path / "position.json")
        for older in checkpoints.iterdir():
            if older != checkpoint_path:
                shutil.rmtree(older)

    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * options.batch,
            train_batch_size_samples=options.batch,
            lr=options.lr,
            lr_end=options.lr / 10,
            lr_warm_up_steps=min(100, steps // 10),
            lr_decay_steps=steps // 3,
            dead_feature_window=min(1000, max(10, steps // 20)),
            device=options.device,
            n_checkpoints=options.checkpoints,
            checkpoint_path=str(checkpoints),
        ),
        sae,
        stream,
        save_checkpoint_fn=with_position,
    )
    whole = sorted(checkpoints.glob("*/position.json"), key=lambda file: int(file.parent.name))
    if whole:
        last = whole[-1].parent
        trainer.load_trainer_state(last)
        sae.load_weights_from_checkpoint(last)
        position = json.loads(whole[-1].read_text())
        before, stream.batches = position["seconds"], position["batches"]
        # SAELens saves before it counts the step, and would make all earlier checkpoints again.
        trainer.n_training_steps = trainer.n_training_samples // options.batch
        trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t > trainer.n_training_samples]
        print(f"Going on from the checkpoint at {trainer.n_training_samples:,} tokens.", flush=True)
    else:
        # Where the vectors are: scaled to a mean norm of sqrt(d), and the decoder's bias at their mean, which lr x
        # steps would be too short a way to reach.
        vectors = torch.cat([next(stream) for _ in range(NORM_BATCHES)])
        stream.batches = 0
        scale = math.sqrt(width) / float(vectors.norm(dim=-1).mean())
        trainer.activation_scaler.scaling_factor = scale
        sae.b_dec.data.copy_(vectors.mean(dim=0) * scale)
    trainer.fit()
    partial = folder.with_name("sae.partial")
    sae.save_inference_model(partial)
    partial.rename(folder)
    return before + time.monotonic() - began


if __name__ == "__main__":
    main()
