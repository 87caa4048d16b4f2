"""CRL: control by reinforcement learning over SAE features (arXiv 2602.10437), on a model that stays as it is.

At every step of generation a policy reads the residual vector of the current token and chooses features of a sparse
autoencoder; their decoder directions are added to that vector, and the model generates its next token from there. PPO
trains the policy on the task's reward. What we know of the paper is its abstract and introduction, reviews of it, and
a proof of concept that predates it; its PPO settings were not found. So these are our choices:

- *State*: x_l of the current token at the SAE's own hook point (``resid_post`` for most), before it is steered. Layers
  up to the hook see no steering, so a token's state follows from the text alone.
- *Action*: k of n features, drawn one after the other without replacement (Plackett-Luce), which for k = 1 is the
  categorical distribution. Old and new log-probabilities come from the one function :func:`log_prob`.
- *Steering*: x' = x + c * sum of the chosen rows of W_dec, without the decoder's bias (:class:`Steering`).
- *Steered tokens*: the prompt's last token, from which the first token is generated, and every generated token that is
  fed back: one action per generated token. The rest of the prompt is never steered.
- *Transition*: the model's decoding step; whether it samples is up to the caller (in the paper it is deterministic).
- *Reward*: the task's, at the end of the text. PPO clips, with A = R - V(x): generalised advantage estimation with
  gamma = lambda = 1, which for a reward at the end is the same for every token but for the critic.
- *Masking*: **the paper's rule (adaptive feature masking, AFM) was not found**; its reviewers call it undefined too.
  ``masking="none"`` is the default. ``"no_repeat"`` is our own rule with the same aim, diversity: what was added at a
  token cannot be added at the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mechreward.errors import CaptureError, ConfigError, SAEError
from mechreward.readout import HookPoint, Readout, direction
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import check_fits, decoder_layers, input_device
from mechreward.rollout.sampling import sample
from mechreward.sae.handle import SAEHandle

Masking = Literal["none", "no_repeat"]


# -- directions and policy --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions that an action may add to the residual stream.

    Attributes:
        vectors: ``[n, d_model]`` float32.
        hook_point: Where they are added.
        model_name: The model that they were made for, if known.
    """

    vectors: Tensor
    hook_point: HookPoint
    model_name: str | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def probe(self) -> Readout:
        """Return a readout of this width at this hook point, for :func:`~mechreward.rollout.capture.check_fits`."""
        return replace(direction("steering", self.vectors[0], self.hook_point), model_name=self.model_name)


def decoder_directions(sae: SAEHandle) -> Directions:
    """Return the rows of W_dec in the scale of the residual stream, without ``b_dec``.

    Raises:
        SAEError: The SAE rescales each token, so that its features have no direction of fixed length.
    """
    if sae.transform.norm != "none":
        raise SAEError(
            f"{sae.name} rescales every token ({sae.transform.norm}), so that its features have no steering vector of "
            "fixed length: use an SAE that reads the residual stream as it is."
        )
    weight, _ = sae.read_decoder()
    return Directions(weight / sae.transform.scale, sae.hook_point, sae.model_name)


def random_directions(like: Directions, seed: int) -> Directions:
    """Return as many directions of the same lengths, drawn uniformly from the sphere (a control)."""
    noise = torch.randn(like.vectors.shape, generator=torch.Generator().manual_seed(seed))
    lengths = like.vectors.norm(dim=-1, keepdim=True)
    return Directions(noise / noise.norm(dim=-1, keepdim=True) * lengths, like.hook_point, like.model_name)


def _mlp(d_model: int, outputs: int) -> nn.Sequential:
    """Make one hidden layer as wide as its input, which is scaled to root mean square 1 as in the model's layers."""
    return nn.Sequential(
        nn.RMSNorm(d_model, elementwise_affine=False),
        nn.Linear(d_model, d_model),
        nn.Tanh(),
        nn.Linear(d_model, outputs),
    )


class ActorCritic(nn.Module):
    """Policy and critic, two separate networks of one hidden layer.

    Args:
        d_model: Width of the residual stream.
        features: n, the number of features to choose from.
        k: Features that are added at a token.
        masking: Which features may not be chosen; see the module's docstring.

    Raises:
        ConfigError: There are too few features.
    """

    def __init__(self, d_model: int, features: int, k: int = 1, masking: Masking = "none"):
        super().__init__()
        if k < 1 or features < k + (k if masking == "no_repeat" else 0):
            raise ConfigError(f"{k} of {features} features cannot be chosen at every token: choose fewer.")
        self.k, self.masking = k, masking
        self.policy, self.critic = _mlp(d_model, features), _mlp(d_model, 1)

    def logits(self, states: Tensor, previous: Tensor) -> Tensor:
        """Return the features' scores, -inf for those that are masked.

        Args:
            states: ``[N, d_model]`` float32.
            previous: ``[N, k]``, what was added at the token before; -1 at a text's first token.
        """
        scores = self.policy(states)
        if self.masking == "none":
            return scores
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        return scores.masked_fill(blocked.scatter_(-1, previous.clamp(min=0), previous >= 0), -torch.inf)

    def value(self, states: Tensor) -> Tensor:
        """Return V(x), ``[N]``."""
        return self.critic(states)[:, 0]

    @torch.no_grad()
    def sampled(self, states: Tensor, previous: Tensor) -> Tensor:
        """Draw actions from the policy, ``[N, k]``, by torch's global random state."""
        return draw(self.logits(states, previous), self.k)

    @torch.no_grad()
    def best(self, states: Tensor, previous: Tensor) -> Tensor:
        """Return the k features with the largest scores, ``[N, k]``, as used after training."""
        return self.logits(states, previous).topk(self.k, dim=-1).indices


def draw(logits: Tensor, k: int) -> Tensor:
    """Draw k different features for each row without replacement, in order, ``[N, k]``.

    The k largest of logits + Gumbel noise are such a draw (Kool et al. 2019, arXiv 1903.06059, section 2.3).
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).topk(k, dim=-1).indices


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Return ln p of an ordered draw without replacement, ``[N, n]``, ``[N, k]`` -> ``[N]``.

    Plackett-Luce: p(a_1 .. a_k) = prod_i exp l(a_i) / sum over what is left of exp l.
    """
    total, before = torch.zeros(len(logits), device=logits.device), actions[:, :0]
    for number, chosen in enumerate(actions.split(1, dim=-1)):
        if number:
            logits = logits.scatter(-1, before, -torch.inf)
        total, before = total + logits.log_softmax(dim=-1).gather(-1, chosen)[:, 0], chosen
    return total


# -- steering ---------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """What was added to one token of each row.

    Attributes:
        states: ``[B, d_model]`` float32, the input of the choice.
        actions: ``[B, k]``, features; -1 where nothing was added.
    """

    states: Tensor
    actions: Tensor


Chooser = Callable[[Tensor, Tensor], Tensor]
"""(states ``[B, d_model]``, what was added at the token before ``[B, k]``) -> actions ``[B, k]``."""


class Steering:
    """Adds chosen directions at the last position of each forward pass inside the ``with`` block.

    During ``generate`` that is the prompt's last token (in the first pass, where rows are padded on the left) and then
    each token that is fed back. The hook is on the output of the decoder layer for ``resid_post``, and on its input for
    ``resid_pre``. Hooks that were installed earlier on the same layer see what comes before steering.

    Args:
        model: Any HF causal language model.
        directions: What can be added.
        coefficient: c, in units of the directions' length.
        choose: Chooses at each token.
        k: Number of directions that it chooses.
        read: Replaces the states before the choice (a control); None leaves them.

    Raises:
        ModelMismatchError: The directions belong to another model.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        coefficient: float,
        choose: Chooser,
        k: int = 1,
        read: Callable[[Tensor], Tensor] | None = None,
    ):
        check_fits([directions.probe()], model)
        self.layer = decoder_layers(model)[directions.hook_point.layer]
        self.site = directions.hook_point.site
        self.vectors, self.coefficient = directions.vectors.to(input_device(self.layer)), coefficient
        self.choose, self.k, self.read = choose, k, read
        self.texts: list[list[Choice]] = []  # for each generation, a choice for each token
        self.seconds = 0.0
        self._handle: Any = None

    def __enter__(self) -> Steering:
        self.texts, self.seconds = [], 0.0
        if self.site == "resid_post":
            self._handle = self.layer.register_forward_hook(self._after)
        else:
            self._handle = self.layer.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return (self._steered(output[0]), *output[1:]) if isinstance(output, tuple) else self._steered(output)

    def _before(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self._steered(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._steered(kwargs["hidden_states"])}

    @torch.no_grad()
    def _steered(self, hidden: Tensor) -> Tensor:
        """x' = x + c * sum_a W_dec[a] at the last position of ``hidden [B, S, d_model]``."""
        began = time.perf_counter()
        x = hidden[:, -1].float()
        rows = len(x)
        begins = not self.texts or hidden.shape[1] > 1 or len(self.texts[-1][-1].actions) != rows
        if begins:
            self.texts.append([])
            previous = torch.full((rows, self.k), -1, device=x.device)
        else:
            previous = self.texts[-1][-1].actions
        states = x if self.read is None else self.read(x)
        actions = self.choose(states, previous)
        self.texts[-1].append(Choice(states, actions))
        steered = hidden.clone()
        steered[:, -1] = (x + self.coefficient * self.vectors[actions].sum(dim=1)).to(hidden.dtype)
        self.seconds += time.perf_counter() - began
        return steered

    def actions(self) -> list[Tensor]:
        """Return for each generation ``[B, T, k]``: the features behind each of the T generated tokens."""
        return [torch.stack([choice.actions for choice in text], dim=1) for text in self.texts]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Every choice in a batch of rollouts, N tokens in all.

    Attributes:
        states: ``[N, d_model]`` float32.
        actions: ``[N, k]``.
        previous: ``[N, k]``, those at the token before; -1 at a text's first token.
        rollout: ``[N]``, the rollout of each token.
    """

    states: Tensor
    actions: Tensor
    previous: Tensor
    rollout: Tensor


def steered_rollouts(
    model: Any, tokenizer: Any, prompts: Sequence[str], steering: Steering, **generate: Any
) -> tuple[RolloutBatch, Trajectories]:
    """Generate one rollout per prompt, and return what was chosen at each token, up to the first EOS.

    Raises:
        CaptureError: ``generate`` did not feed tokens back one at a time.
    """
    with steering:
        batch = sample(model, tokenizer, prompts, 1, len(prompts), **generate)
    mask = batch.mask(read_last=True)
    passes = len(steering.texts[0])
    if len(steering.texts) != 1 or mask.shape[1] > passes:
        raise CaptureError(
            f"{mask.shape[1]} tokens were written in {sum(map(len, steering.texts))} passes of "
            f"{len(steering.texts)} generations: steering needs one pass for the prompt and one for each later token."
        )
    mask = torch.nn.functional.pad(mask, (0, passes - mask.shape[1])).to(steering.vectors.device)
    states = torch.stack([choice.states for choice in steering.texts[0]], dim=1)
    (actions,) = steering.actions()
    previous = torch.cat([torch.full_like(actions[:, :1], -1), actions[:, :-1]], dim=1)
    return batch, Trajectories(states[mask], actions[mask], previous[mask], mask.nonzero()[:, 0])


# -- PPO --------------------------------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """PPO's settings.

    Attributes:
        clip: epsilon.
        epochs: Passes over a batch of rollouts.
        minibatches: Optimiser steps per pass.
    """

    clip: float = 0.2
    epochs: int = 4
    minibatches: int = 4


def update(
    agent: ActorCritic, optimizer: torch.optim.Optimizer, done: Trajectories, rewards: Tensor, ppo: Clipped
) -> dict[str, float]:
    """Train policy and critic on a batch of rollouts.

    Loss: -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + 1/2 mean (V - R)^2, with rho = pi(a|x) / pi_old(a|x), and
    A = R - V(x) before the update, brought to mean 0 and standard deviation 1 over the batch's tokens
    (arXiv 1707.06347, eq. 7 and 9, without the entropy bonus).

    Args:
        agent: Policy and critic.
        optimizer: The optimiser of both.
        done: What was chosen.
        rewards: ``[B]``, one per rollout.
        ppo: Settings.

    Returns:
        Means over the optimiser's steps; ``first_ratio`` is the largest |rho - 1| before the first of them.
    """
    returns = rewards.to(done.states)[done.rollout]
    with torch.no_grad():
        logits = agent.logits(done.states, done.previous)
        old, values = log_prob(logits, done.actions), agent.value(done.states)
        probabilities = logits.softmax(dim=-1)
        entropy = float(-(probabilities * logits.log_softmax(dim=-1)).nan_to_num().sum(dim=-1).mean())
    advantages = returns - values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logs: dict[str, list[float]] = {"loss/policy": [], "loss/value": [], "clipped": [], "ratio": []}
    for _ in range(ppo.epochs):
        for rows in torch.randperm(len(old)).to(old.device).chunk(ppo.minibatches):
            ratio = (
                log_prob(agent.logits(done.states[rows], done.previous[rows]), done.actions[rows]) - old[rows]
            ).exp()
            gain = torch.minimum(ratio * advantages[rows], ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * advantages[rows])
            error = mse_loss(agent.value(done.states[rows]), returns[rows])
            optimizer.zero_grad()
            (-gain.mean() + 0.5 * error).backward()
            optimizer.step()
            off = (ratio.detach() - 1).abs()
            for name, value in zip(
                logs, (-gain.mean(), error, (off > ppo.clip).float().mean(), off.max()), strict=True
            ):
                logs[name].append(float(value.detach()))
    means = {name: sum(values) / len(values) for name, values in logs.items() if name != "ratio"}
    variance = float(returns.var())
    explained = 1 - float((returns - values).var()) / variance if variance > 0 else 0.0
    return {**means, "first_ratio": logs["ratio"][0], "entropy": entropy, "explained": explained}
