"""What goes over the wire: requests and replies of the reward server, checked on both sides."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mechreward.schema import Strict


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""JSON can spell strings that no tokenizer takes, and that no answer could repeat."""

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Detail = Literal["token_rewards", "features", "flags"]


class ScoreRequest(Strict):
    """``POST /score_tokens``: B rollouts by their exact token ids.

    Attributes:
        prompt_ids: B prompts, as the model reads them: special tokens included, no padding.
        response_ids: B completions, as they were sampled; of several turns, with what tools and users wrote between.
        response_mask: For several turns, B lists with a flag per token of ``response_ids``: 1 where the model wrote the
            token. The other tokens are context: they are neither read nor judged, and get no reward. Without it, a
            completion is one turn that ends with its first end token.
        labels: B right answers, where the server verifies outcomes; null where there is none.
        num_generations: Rollouts per prompt, groups contiguous; only guards that compare within groups look at it.
        include: What the reply should hold besides the rewards.
    """

    prompt_ids: Annotated[list[Ids], Field(min_length=1)]
    response_ids: Annotated[list[Ids], Field(min_length=1)]
    response_mask: list[list[bool | Annotated[int, Field(ge=0, le=1)]]] | None = None
    labels: list[Text | None] | None = None
    num_generations: Annotated[int, Field(ge=1)] = 1
    include: list[Detail] = Field(default=[])

    @model_validator(mode="after")
    def _one_row_each(self) -> ScoreRequest:
        counts = {"prompt_ids": len(self.prompt_ids), "response_ids": len(self.response_ids)}
        if self.labels is not None:
            counts["labels"] = len(self.labels)
        if self.response_mask is not None:
            counts["response_mask"] = len(self.response_mask)
        if len(set(counts.values())) > 1:
            raise ValueError("has " + ", ".join(f"{n} {name}" for name, n in counts.items()) + ": give one of each")
        if len(self.prompt_ids) % self.num_generations:
            raise ValueError(f"has {len(self.prompt_ids)} rollouts, which are no groups of {self.num_generations}")
        for row, (mask, ids) in enumerate(zip(self.response_mask or [], self.response_ids, strict=False)):
            if len(mask) != len(ids):
                raise ValueError(f"has {len(mask)} flags in response_mask for the {len(ids)} tokens of rollout {row}")
            if not any(mask):
                raise ValueError(f"has no token in rollout {row} that the model wrote: its response_mask is all 0")
        return self


class ScoreReply(Strict):
    """The answer to a :class:`ScoreRequest`.

    Attributes:
        rewards: B rewards; null where there is neither a token to read in the rollout's group nor an outcome, or a
            guard drops the rollout. Where the rollout alone has no token to read, its features count as the least
            favourable of its group.
        version: Of the weights that were read: ``"initial"``, or what ``POST /weights`` called them.
        token_rewards: For each response token its part of the rollout's reward, for trainers that take one number a
            token: the weighted reward of each token read divided by how many are read, and the outcome's at the last
            real token, which is the first end token if there is one. They sum to the reward where the features are
            aggregated by their mean. Null where a token has no part: what is not read, which is the last sampled token
            (without an outcome) and what follows the first end token, and all of a rollout whose reward is null.
        features: For each reward's columns B values, means over the tokens read; null where none was.
        flags: B lists of what guards said, in words.
    """

    rewards: list[float | None]
    version: str
    token_rewards: list[list[float | None]] | None = None
    features: dict[str, list[float | None]] | None = None
    flags: list[list[str]] | None = None


class OpenRLHFRequest(Strict):
    """``POST /get_reward``, as OpenRLHF 0.11 sends it.

    Attributes:
        query: B texts, prompt and response, special tokens included.
        prompts: Their prompts.
        labels: Their right answers.
    """

    query: Annotated[list[Text], Field(min_length=1)]
    prompts: Annotated[list[Text], Field(min_length=1)]
    labels: list[Text | None] | None = None

    @model_validator(mode="after")
    def _one_row_each(self) -> OpenRLHFRequest:
        counts = {len(self.query), len(self.prompts), len(self.labels) if self.labels is not None else len(self.query)}
        if len(counts) > 1:
            raise ValueError("needs one prompt, and one label if any, for each query")
        return self


class OpenRLHFReply(Strict):
    """What OpenRLHF reads.

    Attributes:
        rewards: B rewards: what is optimised.
        scores: The same, for OpenRLHF's dynamic filtering.
        extra_logs: Logged by name.
    """

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class SlimeRequest(Strict):
    """``POST /slime``, as slime's remote reward model sends it; the answer is a bare number."""

    prompt: Text
    response: Text
    label: Text | None = None


class WeightsReply(Strict):
    """The answer to ``POST /weights``.

    Attributes:
        version: What replies carry from now on.
        tensors: How many were taken.
    """

    version: str
    tensors: int


class Problem(Strict):
    """An error's body: one sentence that says what is wrong and what to do."""

    detail: str
