"""SARM, the sparse-autoencoder reward model of Zhang et al., arXiv 2508.08746 (AAAI-26), and its dense control.

A language model cut after its first L decoder layers, without the final norm; the vector h at the last token; a z-score
over its entries; a TopK sparse autoencoder; a linear head on its latents::

    x = (h - mean h) / (std h + 1e-6)
    z = W_enc (x - pre_bias) + latent_bias,     f = TopK(z), the k largest; no ReLU, so that negative ones may survive
    x' = W_dec f + pre_bias
    r = w . f,  or  w . z                       the two readings of `use_topk`
    loss = -log sigmoid(r_chosen - r_rejected) + lambda |x' - x|^2 / |x|^2

What we read in the authors' code, where the paper leaves it open: std is torch's, with Bessel's correction; the
reconstruction is averaged over the tokens of the answer, then over sequences, or taken at the last token alone
(`sae_use_sequence_level`); the released recipe trains with TopK off, and the evaluation's parser turns it on for every
file with "TopK" in its name, "woTopK" included. Here `use_topk` has no default: decide. The initial weights of the
autoencoder were not found; ours are Gao et al.'s (2406.04093), the decoder the encoder's transpose with unit columns.

In this library's words, a trained SARM is an activation source of its own with a readout: it reads the policy's text
with its own, frozen model and tokenizer, never the policy's activations. `SarmReward` therefore requests no readings.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mechreward.errors import ConfigError, DataError, ModelMismatchError, SAEError
from mechreward.readout import Readings, Request
from mechreward.reward.base import Reward
from mechreward.reward.feature_reward import lowered
from mechreward.rollout.batch import RolloutBatch, Scores, Text
from mechreward.rollout.capture import decoder_layers, evaluating
from mechreward.rollout.sampling import load_model
from mechreward.rollout.source import MAX_TOKENS
from sarm.preferences import Preference

Mode = Literal[0, 1, 2, 3]
"""What is trained besides the head, which always learns from the preferences. 0: nothing. 1: the language model, from
the preferences. 2: language model and autoencoder, from preferences and reconstruction. 3, as in the released recipe:
the language model from the preferences, the autoencoder from both."""

Reconstructs = Literal["completion", "last"]

EPS = 1e-6


# -- the model --------------------------------------------------------------------------------------------------------


def z_score(h: Tensor) -> Tensor:
    """Return x = (h - mean) / (std + 1e-6) over the last dimension, std with Bessel's correction."""
    return (h - h.mean(dim=-1, keepdim=True)) / (h.std(dim=-1, keepdim=True) + EPS)


def normalised_mse(x: Tensor, reconstructed: Tensor) -> Tensor:
    """Return mean (x' - x)^2 / mean x^2 over the last dimension."""
    return (reconstructed - x).square().mean(dim=-1) / x.square().mean(dim=-1)


class TopKSAE(nn.Module):
    """The sparse autoencoder, with the published checkpoint's names of parameters.

    Args:
        d_model: Width of x.
        latents: n.
        k: Latents kept for each vector.

    Raises:
        ConfigError: k is not in 1 to n.
    """

    def __init__(self, d_model: int, latents: int, k: int):
        super().__init__()
        if not 1 <= k <= latents:
            raise ConfigError(f"k = {k} of {latents} latents is not possible: keep between 1 and all of them.")
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(d_model))
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.encoder = nn.Linear(d_model, latents, bias=False)
        self.decoder = nn.Linear(latents, d_model, bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(self.encoder.weight.T, dim=0))

    def pre_acts(self, x: Tensor) -> Tensor:
        """Return z = W_enc (x - pre_bias) + latent_bias, ``[..., d_model] -> [..., n]``."""
        return self.encoder(x - self.pre_bias) + self.latent_bias

    def topk(self, z: Tensor) -> Tensor:
        """Keep the k largest of each vector's z, whatever their sign, and 0 elsewhere."""
        values, index = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, index, values)

    def decode(self, latents: Tensor) -> Tensor:
        """Return x' = W_dec f + pre_bias, ``[..., n] -> [..., d_model]``."""
        return self.decoder(latents) + self.pre_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents ``[..., n]`` and reconstruction ``[..., d_model]``."""
        latents = self.topk(self.pre_acts(x))
        return latents, self.decode(latents)


def truncated(model: Any, layers: int) -> nn.Module:
    """Cut a causal language model down to its embedding and first ``layers`` decoder layers, without the final norm.

    The model that is given is taken apart. The output's ``last_hidden_state`` is the residual
    stream after the last of them, ``blocks.<layers - 1>.hook_resid_post``.

    Raises:
        ModelMismatchError: It has fewer layers, or a layout unlike Llama's, Gemma's or Qwen's.
    """
    found = decoder_layers(model)
    decoder = model.get_decoder()
    if not 1 <= layers <= len(found):
        raise ModelMismatchError(f"The model has {len(found)} layers: it cannot be cut after {layers}.")
    if getattr(decoder, "layers", None) is not found or not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise ModelMismatchError(
            f"{type(decoder).__name__} keeps its layers and its final norm elsewhere than in `layers` and `norm`: "
            "SARM supports decoders laid out as Llama's."
        )
    decoder.config = copy.deepcopy(decoder.config)
    decoder.config.num_hidden_layers = layers
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[:layers]
    decoder.layers = found[:layers]
    decoder.norm = nn.Identity()
    return decoder


class Losses(NamedTuple):
    """A step's losses.

    Attributes:
        total: The loss that is minimised.
        preference: -log sigmoid(r_chosen - r_rejected), mean over pairs.
        reconstruction: Normalised MSE, 0 where it is not part of the loss.
        margins: r_chosen - r_rejected, ``[B]``, detached.
    """

    total: Tensor
    preference: Tensor
    reconstruction: Tensor
    margins: Tensor


@dataclass(frozen=True)
class SarmSettings:
    """A SARM's settings: everything but its weights.

    Attributes:
        layers: L, the number of decoder layers.
        use_topk: The head reads f = TopK(z) if True, z itself if False. The published recipe says False.
        mode: See :data:`Mode`.
        rec_lambda: Weight of the reconstruction in modes 2 and 3.
        reconstructs: Over all tokens of the answer, or at its last alone.
    """

    layers: int
    use_topk: bool
    mode: Mode
    rec_lambda: float = 1.0
    reconstructs: Reconstructs = "completion"

    def __post_init__(self):
        if self.mode not in get_args(Mode) or self.reconstructs not in get_args(Reconstructs):
            raise ConfigError(
                f"SARM has the train modes 0 to 3, and reconstructs 'completion' or 'last', not mode {self.mode!r} and "
                f"{self.reconstructs!r}."
            )


class Sarm(nn.Module):
    """The reward model: truncated decoder, sparse autoencoder, head.

    Args:
        lm: From :func:`truncated`.
        sae: None for the dense control, a head on x itself.
        settings: The rest; ``use_topk`` and the reconstruction mean nothing to the dense control.
        d_model: Width of the residual stream.
    """

    def __init__(self, lm: nn.Module, sae: TopKSAE | None, settings: SarmSettings, d_model: int):
        super().__init__()
        self.lm, self.sae, self.settings = lm, sae, settings
        width = d_model if sae is None else sae.encoder.out_features
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.lm.requires_grad_(settings.mode != 0)
        if sae is not None:
            sae.requires_grad_(settings.mode in (2, 3))

    def hidden(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Return h at every token, ``[B, T] -> [B, T, d_model]`` float32; padding may be on either side."""
        positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)
        output = self.lm(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
        return output.last_hidden_state.float()

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads of x, ``[..., d_model] -> [..., n]``: f, z, or for the dense control x itself."""
        if self.sae is None:
            return x
        z = self.sae.pre_acts(x)
        return self.sae.topk(z) if self.settings.use_topk else z

    def rewards(self, x: Tensor) -> Tensor:
        """Return r of z-scored last-token vectors, ``[B, d_model] -> [B]``."""
        return self.head(self.features(x))[:, 0]

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Return r of each sequence, ``[B]``."""
        return self.rewards(z_score(last_of(self.hidden(ids, attention), attention)))

    def losses(self, ids: Tensor, attention: Tensor, answer: Tensor) -> Losses:
        """Return the losses of B pairs, with the gradients of the train mode.

        Args:
            ids, attention: ``[2B, T]``, the chosen sequences, then the rejected ones.
            answer: ``[2B, T]`` bool, the tokens of the answers.
        """
        x = z_score(self.hidden(ids, attention))
        chosen, rejected = self.rewards(last_of(x, attention)).chunk(2)
        preference = preference_loss(chosen, rejected)
        reconstruction = torch.zeros((), device=x.device)
        if self.sae is not None and self.settings.mode in (2, 3):
            target = x if self.settings.mode == 2 else x.detach()  # mode 3: the LM does not learn to be reconstructed
            if self.settings.reconstructs == "last":
                answer = is_last(attention)
            _, decoded = self.sae(target[answer])
            errors = torch.zeros_like(answer, dtype=x.dtype).masked_scatter(
                answer, normalised_mse(target[answer], decoded)
            )
            reconstruction = (errors.sum(dim=1) / answer.sum(dim=1)).mean()
        total = preference + self.settings.rec_lambda * reconstruction
        return Losses(total, preference, reconstruction, (chosen - rejected).detach())


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the Bradley-Terry loss: mean of -log sigmoid(r_chosen - r_rejected), ``[B], [B] -> []``."""
    return -F.logsigmoid(chosen - rejected).mean()


def is_last(attention: Tensor) -> Tensor:
    """Mark the last attended token of each row, ``[B, T]`` bool."""
    place = torch.arange(1, attention.shape[1] + 1, device=attention.device) * attention
    return place == place.max(dim=1, keepdim=True).values


def last_of(values: Tensor, attention: Tensor) -> Tensor:
    """Return the last token's vector of each row, ``[B, T, d] -> [B, d]``."""
    return values[is_last(attention)]


# -- tokens -----------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A prompt with an answer, as the reward model reads it.

    Attributes:
        ids: Its tokens; the last one ends the answer.
        start: Where the answer begins.
    """

    ids: list[int]
    start: int


def encoded(tokenizer: Any, prompt: Text, answer: Text) -> Tokens:
    """Tokenize a prompt and an answer, up to the token that ends the answer.

    A conversation is written by the tokenizer's chat template, without the trailing white space of some templates;
    plain text gets the tokenizer's end-of-sequence token.

    Raises:
        DataError: The tokenizer cannot write a conversation, or has no end-of-sequence token.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no end-of-sequence token, whose vector SARM reads: set one.")
        ids = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]
        return Tokens(ids, _shared(ids, tokenizer(prompt).input_ids))
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    try:
        asked, whole = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins)
            for messages, begins in ((before, True), ([*before, *said], False))
        )
    except (ValueError, TypeError, TemplateError) as error:  # no chat template, or one that refuses these roles
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The tokenizer cannot write a conversation ({reason}): give plain texts.") from None
    ids = tokenizer(whole.rstrip(), add_special_tokens=False).input_ids
    return Tokens(ids, _shared(ids, tokenizer(asked, add_special_tokens=False).input_ids))


def _shared(ids: list[int], prompt: list[int]) -> int:
    """Return how many ids are the prompt's: all of its ids, unless a token spans the border; never the last id."""
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, prompt, strict=False)))
    return min(same, len(ids) - 1)


def encoded_pair(tokenizer: Any, pair: Preference) -> tuple[Tokens, Tokens]:
    """Tokenize both sides of a pair."""
    return encoded(tokenizer, pair.prompt, pair.chosen), encoded(tokenizer, pair.prompt, pair.rejected)


def padded(sequences: Sequence[Tokens], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and attention ``[B, T]`` int64, and the answers' tokens ``[B, T]`` bool, padded on the right."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.tensor([[*s.ids, *[0] * (width - len(s.ids))] for s in sequences], device=device)
    attention = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in sequences], device=device)
    starts = torch.tensor([s.start for s in sequences], device=device)
    answer = attention.bool() & (torch.arange(width, device=device) >= starts[:, None])
    return ids, attention, answer


def by_length(sequences: Sequence[Tokens], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Group sequences of like length into batches of at most ``max_tokens`` padded tokens."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    while order:
        count = max(1, max_tokens // len(sequences[order[-1]].ids))
        yield order[-count:]
        order = order[:-count]


@torch.no_grad()
def read_vectors(sarm: Sarm, sequences: Sequence[Tokens], everywhere: bool = False) -> Tensor:
    """Read z-scored vectors of sequences by forward passes of the truncated decoder.

    Args:
        sarm: Only its language model is used.
        sequences: N of them.
        everywhere: Read every token but the first of each sequence, an attention sink, in no particular order.

    Returns:
        ``[N, d_model]`` float32 on the CPU, in the sequences' order; ``[tokens, d_model]`` with ``everywhere``.
    """
    device = sarm.head.weight.device
    parts: list[Tensor] = []
    order: list[int] = []
    with evaluating(sarm):
        for rows in by_length(sequences):
            ids, attention, _ = padded([sequences[i] for i in rows], device)
            x = z_score(sarm.hidden(ids, attention))
            chosen = attention.bool() if everywhere else is_last(attention)
            if everywhere:
                chosen[:, 0] = False
            parts.append(x[chosen].cpu())
            order += rows
    vectors = torch.cat(parts)
    return vectors if everywhere else vectors[torch.tensor(order).argsort()]


def read_pairs(sarm: Sarm, pairs: Sequence[tuple[Tokens, Tokens]]) -> Tensor:
    """Read z-scored last-token vectors of pairs, ``[P, 2, d_model]`` float32 on the CPU, the chosen first."""
    return read_vectors(sarm, [side for pair in pairs for side in pair]).view(len(pairs), 2, -1)


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How weights are trained, by AdamW with a cosine schedule.

    Attributes:
        learning_rate: Peak learning rate.
        epochs: Passes over the pairs.
        batch_size: Pairs (or vectors) per step.
        micro_batch: Pairs in one forward pass; gradients are accumulated.
        warmup: Share of the steps with a rising learning rate.
        weight_decay: AdamW's.
        bf16: Forward passes under bfloat16 autocast, weights in float32.
    """

    learning_rate: float
    epochs: int = 1
    batch_size: int = 32
    micro_batch: int | None = None
    warmup: float = 0.03
    weight_decay: float = 1e-3
    bf16: bool = False


def pretrain(sae: TopKSAE, vectors: Tensor, recipe: Recipe, seed: int) -> float:
    """Train a sparse autoencoder to reconstruct vectors, by the normalised MSE alone.

    Args:
        sae: Changed in place. ``pre_bias`` starts at the vectors' mean.
        vectors: ``[N, d_model]`` float32, z-scored: of last tokens, as published, or of all.
        recipe: ``batch_size`` counts vectors.
        seed: Random seed of the order.

    Returns:
        The mean loss over the last tenth of the steps.
    """
    with torch.no_grad():
        sae.pre_bias.copy_(vectors.mean(dim=0))
    device, losses = sae.pre_bias.device, []

    def step(rows: list[int]) -> float:
        x = vectors[rows].to(device)
        loss = normalised_mse(x, sae(x)[1]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return losses[-1]

    _descend(list(sae.parameters()), len(vectors), recipe, seed, step)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def train(
    sarm: Sarm,
    pairs: Sequence[tuple[Tokens, Tokens]],
    recipe: Recipe,
    seed: int,
    vectors: Tensor | None = None,
) -> list[dict[str, float]]:
    """Train a SARM on pairs, by its train mode. In mode 0 the frozen model reads each text once only.

    Args:
        sarm: Changed in place.
        pairs: P of them, (chosen, rejected).
        recipe: ``batch_size`` counts pairs.
        seed: Random seed of the order.
        vectors: For mode 0, where they are known: what :func:`read_pairs` gives.

    Returns:
        Each step's ``loss``, ``preference``, ``reconstruction``, ``accuracy``.
    """
    device, log = sarm.head.weight.device, []
    frozen = None
    if sarm.settings.mode == 0:
        frozen = read_pairs(sarm, pairs) if vectors is None else vectors

    def step(rows: list[int]) -> float:
        size, total = recipe.micro_batch or len(rows), 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                found = _losses(sarm, pairs, part, frozen)
            share = len(part) / len(rows)
            (found.total * share).backward()
            total += float(found.total.detach()) * share
            log.append(
                {
                    "loss": float(found.total.detach()),
                    "preference": float(found.preference.detach()),
                    "reconstruction": float(found.reconstruction.detach()),
                    "accuracy": float((found.margins > 0).float().mean()),
                }
            )
        return total

    learns = [parameter for parameter in sarm.parameters() if parameter.requires_grad]
    _descend(learns, len(pairs), recipe, seed, step)
    return log


def _losses(sarm: Sarm, pairs: Sequence[tuple[Tokens, Tokens]], rows: list[int], frozen: Tensor | None) -> Losses:
    if frozen is None:
        sides = [pairs[i][side] for side in (0, 1) for i in rows]
        return sarm.losses(*padded(sides, sarm.head.weight.device))
    chosen, rejected = (sarm.rewards(frozen[rows, side].to(sarm.head.weight.device)) for side in (0, 1))
    loss = preference_loss(chosen, rejected)
    return Losses(loss, loss, torch.zeros(()), (chosen - rejected).detach())


def _descend(parameters: list[nn.Parameter], count: int, recipe: Recipe, seed: int, step: Any) -> None:
    """Run AdamW over ``count`` examples in random order; ``step(rows)`` makes the gradients and returns the loss."""
    from transformers import get_cosine_schedule_with_warmup

    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(count / recipe.batch_size) * recipe.epochs
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimiser, round(recipe.warmup * steps), steps)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(count, generator=generator).split(recipe.batch_size):
            optimiser.zero_grad()
            loss = step(rows.tolist())
            if not math.isfinite(loss):
                raise DataError("The loss is NaN or infinite: lower the learning rate.")
            optimiser.step()
            schedule.step()


@torch.no_grad()
def score(sarm: Sarm, sequences: Sequence[Tokens]) -> Tensor:
    """Return r of each sequence, ``[N]`` float32 on the CPU."""
    return score_vectors(sarm, read_vectors(sarm, sequences))


@torch.no_grad()
def score_vectors(sarm: Sarm, vectors: Tensor) -> Tensor:
    """Return r of z-scored last-token vectors, ``[N, d_model] -> [N]`` float32 on the CPU."""
    device = sarm.head.weight.device
    return torch.cat([sarm.rewards(part.to(device)) for part in vectors.split(1024)]).cpu()


# -- what the latents say ---------------------------------------------------------------------------------------------


def feature_scores(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the paper's score of each latent, s = (c - j) / (c + j + mean(c + j)).

    Args:
        chosen, rejected: Last-token latents of N answers each, ``[N, n]``.

    Returns:
        ``[n]``; c and j are the sums over answers, the mean is over latents.
    """
    c, j = chosen.sum(dim=0), rejected.sum(dim=0)
    return (c - j) / (c + j + (c + j).mean())


def steered(latents: Tensor, latent: int, factor: float = 1.0, plus: float = 0.0) -> Tensor:
    """Multiply and raise one of the latents ``[..., n]``, for the head to read."""
    changed = latents.clone()
    changed[..., latent] = changed[..., latent] * factor + plus
    return changed


# -- files ------------------------------------------------------------------------------------------------------------

_SAE_KEYS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")


def read_checkpoint(file: str | Path, k: int) -> TopKSAE:
    """Read a published autoencoder (``.pt``, without unpickling code) or one of ours (``.safetensors``).

    Args:
        file: With the keys ``pre_bias``, ``latent_bias``, ``encoder.weight [n, d]``, ``decoder.weight [d, n]``.
        k: The file does not hold it; the published file's name does.

    Raises:
        SAEError: It cannot be read, or is not such an autoencoder.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts do
        raise SAEError(f"{file} cannot be read as a SARM autoencoder ({type(error).__name__}).") from None
    there = sorted(map(str, state)) if isinstance(state, Mapping) else []
    if there != sorted(_SAE_KEYS) or not all(isinstance(state[key], Tensor) for key in _SAE_KEYS):
        raise SAEError(f"{file} is no SARM autoencoder: it should hold {', '.join(_SAE_KEYS)}, and holds {there}.")
    latents, d_model = state["encoder.weight"].shape
    sae = TopKSAE(d_model, latents, k)
    try:
        sae.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise SAEError(f"{file}: {' '.join(str(error).split())[:200]}.") from None
    return sae


def new_sarm(model: str, settings: SarmSettings, sae: TopKSAE | None) -> tuple[Sarm, Any]:
    """Make an untrained SARM from a model's name, and load the tokenizer.

    Raises:
        MechRewardError: The model is unavailable, or does not fit.
    """
    whole, tokenizer = load_model(model, torch.float32)  # for training, in which bf16 weights lose small updates
    d_model = whole.config.get_text_config().hidden_size
    if sae is not None and len(sae.pre_bias) != d_model:
        raise ModelMismatchError(
            f"The autoencoder reads vectors of width {len(sae.pre_bias)}, but {model} has width {d_model}."
        )
    sarm = Sarm(truncated(whole, settings.layers), sae, settings, d_model)
    return sarm.to(whole.device), tokenizer


def save_sarm(sarm: Sarm, file: Path, model: str) -> None:
    """Write a trained SARM to one safetensors file; weights of a model that stayed frozen are not repeated.

    Args:
        sarm: The model.
        file: Ending in ``.safetensors``.
        model: The language model's name, from which a frozen one is loaded again.
    """
    kept = {n: p.contiguous() for n, p in sarm.state_dict().items() if sarm.settings.mode or not n.startswith("lm.")}
    about = {"model": model, "settings": json.dumps(asdict(sarm.settings)), "k": str(sarm.sae.k if sarm.sae else 0)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    save_file(kept, unfinished, metadata=about)
    unfinished.replace(file)


def load_sarm(file: str | Path) -> tuple[Sarm, Any]:
    """Load a trained SARM, frozen and in eval mode, and its tokenizer.

    Raises:
        SAEError: The file is not a SARM.
        MechRewardError: Its language model is unavailable.
    """
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        state = load_file(file)
        settings, k, model = SarmSettings(**json.loads(about["settings"])), int(about["k"]), about["model"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SAEError(f"{file} is no SARM that this library wrote ({type(error).__name__}: {error}).") from None
    sae = None
    if k:
        latents, d_model = state["sae.encoder.weight"].shape
        sae = TopKSAE(d_model, latents, k)
    sarm, tokenizer = new_sarm(model, settings, sae)
    missing, unexpected = sarm.load_state_dict(state, strict=False)
    if unexpected or any(settings.mode or not name.startswith("lm.") for name in missing):
        raise SAEError(f"{file} does not fit {model}: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    return cast(Sarm, sarm.eval().requires_grad_(False)), tokenizer


# -- the reward -------------------------------------------------------------------------------------------------------


class SarmReward(Reward):
    """A trained SARM as a reward: its score of each rollout's text.

    It reads with its own frozen model, so it needs no readings of the policy, works under any trainer, and cannot be
    fooled by changed activations, only by text. Guards act on the raw score as on any feature reward's:
    r <- trust max(r, 0) + min(r, 0).

    Args:
        sarm: From :func:`load_sarm`.
        tokenizer: Its own.
        name: Its name in logs.
    """

    def __init__(self, sarm: Sarm, tokenizer: Any, name: str = "sarm"):
        super().__init__(name)
        self.sarm, self.tokenizer = sarm, tokenizer

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Score the rollouts' texts; ``readings`` are ignored."""
        texts = zip(batch.prompts, batch.completions, strict=True)
        raw = score(self.sarm, [encoded(self.tokenizer, prompt, completion) for prompt, completion in texts])
        return Scores(lowered(raw, batch.trust, sense), parts={"raw": raw})
