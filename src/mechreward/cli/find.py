"""``mechreward discover`` and ``mechreward gate``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mechreward.cli.common import Name, console, show_verdict
from mechreward.features.catalog import load_pack

Data = Annotated[
    str,
    typer.Option(
        help="Labelled rollouts (a .jsonl with prompt, completion and label), or questions to sample the model on: "
        "mechreward/pocket, a dataset of the hub, or a .jsonl. The options on sampling are for questions alone."
    ),
]
Verifier = Annotated[str, typer.Option(help="What labels sampled rollouts: math_boxed, gsm8k or exact_match.")]
Split = Annotated[str | None, typer.Option(help="The dataset's split, e.g. train[:500].")]
Subset = Annotated[str | None, typer.Option(help="The hub dataset's configuration, e.g. main.")]
Prompt = Annotated[str, typer.Option(help="What the model reads, with the dataset's columns in braces.")]
Answer = Annotated[str, typer.Option(help="The column with the gold answer.")]
Questions = Annotated[int | None, typer.Option(min=2, help="So many questions at most. Default: a recipe's, else 250.")]
Rollouts = Annotated[
    int | None,
    typer.Option(min=1, help="Rollouts a question, at temperature 1. Default: a recipe's, else 4."),
]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="The longest completion.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rollouts sampled at once.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Keep = Annotated[Path | None, typer.Option(help="Write the sampled and labelled rollouts to this .jsonl.")]


def discover(
    data: Data,
    sae: Annotated[list[str] | None, typer.Option(help="release/sae_id, or a path; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: what the SAE was made for.")] = None,
    out: Annotated[Path, typer.Option(help="The pack's JSON file.")] = Path("pack.json"),
    recipe: Annotated[str | None, typer.Option(help="Fill in this pack, which has no features yet.")] = None,
    behaviour: Annotated[str, typer.Option(help="What the labels mean, in a sentence.")] = "The final answer is right.",
    method: Annotated[str, typer.Option(help="effect, firing, lasso or reasonscore.")] = "effect",
    aggregation: Annotated[str | None, typer.Option(help="How a rollout's tokens become one number.")] = None,
    n_positive: Annotated[int | None, typer.Option(min=0, help="Latents that rise with the behaviour.")] = None,
    n_negative: Annotated[int | None, typer.Option(min=0, help="Latents that fall with it.")] = None,
    min_firing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out latents that fire in a smaller share of the rollouts.")
    ] = None,
    permutations: Annotated[int, typer.Option(min=0, help="Of the labels; the gate needs 100 or more.")] = 200,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = None,
    rollouts: Rollouts = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    keep_rollouts: Keep = None,
) -> None:
    """Find the latents that tell rollouts with a behaviour from those without, and propose a pack.

    Examples: mechreward discover --model mechreward/pocket --sae pocket-res-canonical/layer_2/width_2k/canonical
    --data mechreward/pocket --out my_pack.json

    mechreward discover --recipe gemma-2-9b/reasoning_pack --data openai/gsm8k --subset main
    --prompt "{question}" --verifier gsm8k --dtype bfloat16
    """
    from mechreward.errors import ConfigError
    from mechreward.features.discover import check_models, check_settings, recorded_as, write_discovery
    from mechreward.features.discover import discover as find_features
    from mechreward.features.frozen import freeze as freeze_pack
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import load_model
    from mechreward.sae.registry import load_sae, reference

    _check_files(out, keep_rollouts)
    template = None if recipe is None else load_pack(recipe)
    wanted = {} if template is None or template.recipe is None else template.recipe.settings
    names = sae or ([] if template is None else [f"{template.sae.release}/{template.sae.sae_id}"])
    if not names:
        raise ConfigError("Name a sparse autoencoder with --sae, or a pack without features with --recipe.")
    sampling = Sampling(
        verifier,
        split,
        subset,
        prompt,
        answer,
        questions or int(_setting(wanted, "questions", 250)),
        rollouts or int(_setting(wanted, "rollouts_per_question", 4)),
        max_new_tokens,
        batch_size,
        seed,
        keep_rollouts,
    )
    chosen = {
        "n_positive": n_positive if n_positive is not None else int(_setting(wanted, "n_positive", 10)),
        "n_negative": n_negative if n_negative is not None else int(_setting(wanted, "n_negative", 10)),
        "min_firing": min_firing if min_firing is not None else _setting(wanted, "min_firing", 0.01),
    }
    how = aggregation or (template.aggregation if template else "mean")
    # Before anything is sampled, which may take hours.
    check_settings(method, how, chosen["n_positive"], 0 if method == "reasonscore" else chosen["n_negative"])
    saes = [load_sae(*reference(name)) for name in names]
    check_models(saes)
    made_for = model or (template.model if template else saes[0].model_name)
    if made_for is None:
        raise ConfigError(f"{saes[0].name} does not say which model it was made for: name it with --model.")
    loaded, tokenizer = load_model(made_for, _dtype(dtype))
    check_fits([each.features([0]) for each in saes], loaded)
    found_in = sampling.labelled(loaded, tokenizer, data, "discovery")
    with _progress("Reading every latent") as tell:
        found = find_features(
            loaded,
            tokenizer,
            found_in,
            saes,
            name=out.stem if template is None else template.name,
            behaviour=behaviour if template is None else template.description,
            method=method,  # pyright: ignore[reportArgumentType] (it checks the name)
            aggregation=how,
            permutations=permutations,
            seed=seed,
            tell=tell,
            **chosen,
        )
    found = recorded_as(found, template.model if template else made_for)
    write_discovery(found, out)
    best = found.saes.index(found.pack.sae)
    if saes[best].kind not in ("topk", "groupmax"):  # those would carry their whole encoder
        freeze_pack(found.pack, out.parent, saes[best], stem=out.stem)
    _show_discovery(found, sum(each.d_sae for each in saes[:best]))
    console.print(
        f"{out}: a candidate. Whether it is more than chance and more than words:\n  mechreward gate {out} --model "
        f"{made_for} --data OTHER_QUESTIONS",
        soft_wrap=True,
        markup=False,
    )


def gate(
    name: Name,
    data: Data,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the pack goes with its evidence. Default: its file, or one of its name here."),
    ] = None,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = None,
    rollouts: Rollouts = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 1,
    keep_rollouts: Keep = None,
) -> None:
    """Test a pack on rollouts that its discovery never saw, and write the evidence and the verdict into it.

    Exit code 0 where it is validated, 1 where it stays a candidate.

    Example: mechreward gate my_pack.json --data mechreward/pocket
    """
    from mechreward.features.discover import chance_file, read_chance
    from mechreward.features.frozen import write_pack
    from mechreward.features.judge import judge, pack_readout
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import load_model

    pack, local = load_pack(name), name.endswith(".json") and not name.startswith("hf:")
    file = out or (Path(name) if local else Path(f"{name.split('/')[-1].removesuffix('.json')}.json"))
    _check_files(file, keep_rollouts)
    own, chance = pack_readout(pack), read_chance(Path(name)) if local else None
    loaded, tokenizer = load_model(model or pack.model, _dtype(dtype))
    check_fits([own], loaded)  # before anything is sampled, which may take hours
    sampling = Sampling(
        verifier,
        split,
        subset,
        prompt,
        answer,
        questions or 250,
        rollouts or 4,
        max_new_tokens,
        batch_size,
        seed,
        keep_rollouts,
    )
    held_out = sampling.labelled(loaded, tokenizer, data, "gate", chance.asked if chance else ())
    with console.status("Reading ..."):
        judged = judge(pack, loaded, tokenizer, held_out, chance, seed)
    write_pack(judged, file)
    if chance is not None and file != Path(name):
        shutil.copy2(chance_file(Path(name)), chance_file(file))  # so that it can be gated again
    show_verdict(judged)
    console.print(f"{file}: {judged.status}.", soft_wrap=True, markup=False)
    raise typer.Exit(0 if judged.status == "validated" else 1)


def _dtype(name: str) -> Any:
    import torch

    from mechreward.errors import ConfigError, nearest

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"There is no dtype '{name}' for a model here.{nearest(name, known)}")
    return known[name]


def _setting(recipe: dict[str, str | int | float], name: str, default: float) -> float:
    """A number that a recipe sets."""
    from mechreward.errors import PackError

    try:
        return float(recipe.get(name, default))
    except ValueError:
        raise PackError(f"The recipe's setting {name} is '{recipe[name]}', not a number: correct it there.") from None


def _check_files(pack_file: Path, keep_rollouts: Path | None) -> None:
    """Find out before the work, not after it, what cannot be written."""
    import re

    from mechreward.errors import ConfigError
    from mechreward.probes.training import check_writable

    if not re.fullmatch(r"[\w.-]+\.json", pack_file.name):
        raise ConfigError(
            f"--out {pack_file}: a pack's file is called by letters, digits, '.', '-' and '_', and ends in .json."
        )
    for file in (pack_file, *([keep_rollouts] if keep_rollouts else [])):
        check_writable(file)


@dataclass(frozen=True)
class Sampling:
    """The options by which rollouts are sampled and labelled, where ``--data`` does not hold them already."""

    verifier: str
    split: str | None
    subset: str | None
    prompt: str
    answer: str
    questions: int
    rollouts: int
    max_new_tokens: int
    batch_size: int
    seed: int
    keep: Path | None

    def labelled(self, model: Any, tokenizer: Any, data: str, of_pocket: str, used: Collection[str] = ()) -> Any:
        """Rollouts from a file, or sampled on questions that were not used before, and labelled by the verifier."""
        from mechreward import verifiers
        from mechreward.errors import ConfigError, DataError, nearest
        from mechreward.features.discover import digest
        from mechreward.rollout.labelled import holds_rollouts, read_rollouts, sample_rollouts, write_rollouts

        if data.endswith(".jsonl") and holds_rollouts(Path(data)):
            return read_rollouts(data, model, tokenizer)
        if self.verifier not in verifiers.__all__:
            raise ConfigError(f"There is no verifier '{self.verifier}'.{nearest(self.verifier, verifiers.__all__)}")
        found, split = self._questions(data, of_pocket, len(used))
        fresh = [i for i, asked in enumerate(found["prompt"]) if digest(asked) not in used][: self.questions]
        if len(fresh) < 2:
            raise DataError(
                f"Discovery has used the questions of {data} ({split}): gate on others, or another --split."
            )
        asked = found.select(fresh)
        with console.status(f"Sampling {len(asked) * self.rollouts} rollouts ..."):
            labelled = sample_rollouts(
                model,
                tokenizer,
                asked,
                getattr(verifiers, self.verifier),
                self.rollouts,
                f"{len(asked) * self.rollouts} rollouts on {data} ({split}), seed {self.seed}, by {self.verifier}",
                self.seed,
                self.batch_size,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,  # as a training run samples, whatever the model's own settings are
                max_new_tokens=self.max_new_tokens,
            )
        if self.keep is not None:
            write_rollouts(labelled, self.keep)
        return labelled

    def _questions(self, data: str, of_pocket: str, more: int) -> tuple[Any, str]:
        from pydantic import ValidationError

        from mechreward import pocket
        from mechreward.errors import ConfigError
        from mechreward.experiments.config import Source
        from mechreward.experiments.data import load
        from mechreward.schema import most_telling, sentence

        ours = pocket.resolve(data) == pocket.path()
        try:
            source = Source(
                path=data,
                subset=self.subset,
                split=self.split or (of_pocket if ours else "train"),
                rows=self.questions + more,
                prompt=self.prompt,
                answer=self.answer,
            )
        except ValidationError as error:
            raise ConfigError(f"--data: {sentence(most_telling(error), Source, 'source')}") from None
        return load([source]), source.split


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _show_discovery(found: Any, start: int) -> None:
    """The pack's latents with what the scan says of them, and how the dictionaries compare."""
    table = Table("feature", "weight")
    columns = {} if found.scan is None else {"effect d": found.scan.effect, "firing gap": found.scan.firing_gap}
    if found.scan is not None:
        columns |= {"fires": found.scan.firing, "adjusted p": found.scan.adjusted_p}
    if found.scores is not None:
        columns["ReasonScore"] = found.scores
    for column in columns:
        table.add_column(column, justify="right")
    for feature in found.pack.features:
        figures = [f"{values[start + feature.id]:.3g}" for values in columns.values()]
        table.add_row(str(feature.id), f"{feature.weight:+.4g}", *figures)
    console.print(table)
    if len(found.per_sae) > 1:
        for sae, selection in zip(found.saes, found.per_sae, strict=True):
            console.print(f"{sae.release}/{sae.sae_id}: {selection.strength:.3f}", soft_wrap=True, markup=False)
