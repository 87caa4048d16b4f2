"""What users and their files hold on to: names, console help, formats, and the bits of seeded trainings.

    python tests/helpers/snapshot.py interfaces [--write]    compare with, or replace, tests/data/interfaces.json
    python tests/helpers/snapshot.py weights --out FILE      digests of five seeded trainings; give --against to compare

The interfaces are compared by tests/test_snapshot.py too. The weights depend on the machine and on its libraries, so
they are compared before and after a change on one machine, and are not stored.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
STORED = TESTS / "data" / "interfaces.json"

MODULES = {
    "mechreward": None,
    "mechreward.hacking": None,
    "mechreward.readout": ["HookPoint", "Readings", "Readout", "ReadoutBank", "Request", "direction"],
    "mechreward.reward.guards": ["Guard", "RepetitionDetector", "Verdict"],
    "mechreward.rollout.batch": ["Call", "RolloutBatch"],
    "mechreward.rollout.capture": ["ResidualTap", "check_fits"],
    "mechreward.rollout.hf": ["HFSource", "load_model", "read_forward", "sample"],
    "mechreward.rollout.labelled": ["Labelled", "read_rollouts", "sample_rollouts", "write_rollouts"],
    "mechreward.integrations.trl_grpo": ["MechRewardGRPOConfig", "MechRewardGRPOTrainer"],
    "mechreward.verifiers": None,
    "mechreward.pocket": ["dataset", "files", "path", "resolve"],
}
"""Where public names are imported from, and which; None for what the module lists itself."""


# -- names -------------------------------------------------------------------------------------------------------------


def names() -> dict[str, dict[str, Any]]:
    """The signature of each public name, and of each public method of ours."""
    found = {}
    for path, listed in MODULES.items():
        module = importlib.import_module(path)
        found[path] = {name: described(getattr(module, name)) for name in sorted(listed or module.__all__)}
    return found


def described(thing: Any) -> Any:
    if inspect.ismodule(thing):
        return "module"
    if inspect.isclass(thing):
        inherited = {
            n for base in thing.__mro__[1:] if not base.__module__.startswith("mechreward") for n in vars(base)
        }
        own = {
            n: v
            for base in reversed(thing.__mro__)
            if base.__module__.startswith("mechreward")
            for n, v in vars(base).items()
            if not n.startswith("_") and n not in inherited and not isinstance(v, (str, int, float, tuple, type(None)))
        }
        members = {n: signature(v) if callable(v) else "attribute" for n, v in sorted(own.items())}
        return {"()": signature(thing), **members}
    return signature(thing) if callable(thing) else type(thing).__name__


def signature(thing: Any) -> str:
    """Names and defaults of the parameters: annotations may be spelt anew."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "?"
    if len(parameters) > 60:  # a GRPOConfig: TRL's options are TRL's
        ours = {"beta", "beta_end", "kl_target", "entropy_floor", "repetition_guard", "vllm_backend", "record"}
        parameters = [p for p in parameters if p.name in ours]
    plain = [str(p.replace(annotation=p.empty)) for p in parameters]
    return re.sub(r" at 0x[0-9a-f]+", "", f"({', '.join(plain)})")


# -- the command line --------------------------------------------------------------------------------------------------


def console_help() -> dict[str, list[str]]:
    """What ``--help`` prints of each command, at 80 columns."""
    import click
    import typer.main
    from typer.testing import CliRunner

    from mechreward.cli import app

    pages = {}

    def visit(command: Any, words: list[str]) -> None:
        printed = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
        assert printed.exit_code == 0, (words, printed.output)
        pages[" ".join(["mechreward", *words])] = [line.rstrip() for line in printed.output.splitlines()]
        for name in getattr(command, "commands", {}):
            visit(command.commands[name], [*words, name])

    root = typer.main.get_command(app)
    assert isinstance(root, click.Command) or hasattr(root, "commands")
    visit(root, [])
    return pages


# -- formats -----------------------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The kind of JSON that it is: keys, and types in place of values."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        kinds = {json.dumps(shape(each)): shape(each) for each in value}
        return [kinds[kind] for kind in sorted(kinds)]
    return type(value).__name__


def formats() -> dict[str, Any]:
    """Packs, probes, the server's interface; and what a recorded training with a checkpoint leaves in its folder."""
    from mechreward import pocket
    from mechreward.features.pack import FeaturePack
    from mechreward.integrations.served import Served
    from mechreward.integrations.server.app import Settings, create_app

    probe = json.loads((pocket.files().parents[1] / "catalogs/pocket/correctness_probe.json").read_text())
    served = Served(model="mechreward/pocket", packs=("pocket/reasoning_pack",))
    with tempfile.TemporaryDirectory() as folder:
        trainer("guards and monitors", Path(folder), save_strategy="steps", save_steps=3, record=8).train()
        left = {
            str(file.relative_to(folder)): read(file)
            for file in sorted(Path(folder).rglob("*"))
            if file.name in ("recording.json", "environment.json", "metrics.jsonl", "trace.jsonl", "mechreward.json")
        }
    return {
        "pack": FeaturePack.model_json_schema(),
        "probe": shape(probe),
        "server": create_app(served, Settings()).openapi(),
        "training": left,
    }


def read(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    return shape([json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text))


# -- trainings ---------------------------------------------------------------------------------------------------------

ARMS = ("generation tap", "reference tap", "own forward", "dense", "guards and monitors")


def trainer(arm: str, folder: Path, **options: Any) -> Any:
    """Return a trainer that trains pocket for three steps."""
    import torch
    from trl import GRPOConfig, GRPOTrainer

    import mechreward as mr
    from mechreward.hacking import (
        AdversarialSuite,
        Flagged,
        HeldOut,
        ProxyGoldGap,
        RepetitionDetector,
        RepresentationShift,
    )

    torch.manual_seed(0)
    sae = mr.load_sae(release="pocket-res-canonical", sae_id="layer_2/width_2k/canonical")
    outcome = mr.OutcomeReward(verifier=mr.verifiers.math_boxed)
    kind = {"aggregation": "per_token"} if arm == "dense" else {}
    reads = "reference" if arm == "reference tap" else "policy"
    reward = mr.FeatureReward.from_pack("pocket/reasoning_pack", sae=sae, reads=reads, **kind)
    composite = mr.CompositeReward(rewards=[outcome, reward], weights=[1.0, 0.3])
    settings = {
        "output_dir": str(folder), "num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 24,
        "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "beta": 0.04, "report_to": [], "use_cpu": True,
        "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    plain = arm == "own forward"
    extras = {}
    if arm == "guards and monitors":
        watched = mr.FeatureReward(mr.load_probe("pocket/correctness_probe"))
        suite = AdversarialSuite.from_preset("standard", sae=sae, clean=200)  # learns only, in so few steps
        extras["guards"] = [RepetitionDetector(n=1, threshold=0.2, min_ngrams=2), suite]
        extras["monitors"] = [
            Flagged(every=1),
            HeldOut(watched, outcome, every=1),
            ProxyGoldGap(reward, outcome, every=1),
            RepresentationShift(mr.HookPoint(2), 128, every=1),
        ]
    return (GRPOTrainer if plain else mr.MechRewardGRPOTrainer)(
        model=mr.pocket.path(),
        args=(GRPOConfig if plain else mr.MechRewardGRPOConfig)(**settings | options),
        train_dataset=mr.pocket.dataset("train", 64),
        reward_funcs=composite,
        **extras,
    )


def weights() -> dict[str, str]:
    """A digest of all weights after each training."""
    found = {}
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(arm, Path(folder))
            made.train()
        digest = hashlib.sha256()
        for name, parameter in sorted(made.model.named_parameters()):
            digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
        found[arm] = digest.hexdigest()
    return found


# -- comparing ---------------------------------------------------------------------------------------------------------


def interfaces() -> dict[str, Any]:
    # Through JSON, as what is stored.
    return json.loads(json.dumps({"names": names(), "help": console_help(), "formats": formats()}))


def differences(stored: Any, now: Any) -> str:
    """A unified diff, empty where nothing differs."""
    before, after = (json.dumps(each, indent=1, sort_keys=True).splitlines() for each in (stored, now))
    return "\n".join(difflib.unified_diff(before, after, "stored", "now", lineterm="", n=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["interfaces", "weights"])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    if options.what == "interfaces":
        now, file = interfaces(), STORED
    else:
        now, file = weights(), options.against
    target = STORED if options.write else options.out
    if target is not None:
        target.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if file is not None and not options.write:
        found = differences(json.loads(file.read_text(encoding="utf-8")), now)
        print(found or "The same.")
        sys.exit(bool(found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
