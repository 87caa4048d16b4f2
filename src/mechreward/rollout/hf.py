"""Readings by one truncated forward pass of a Hugging Face model, and rollouts sampled from one."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mechreward import pocket
from mechreward.aggregation import Aggregate, aggregation
from mechreward.errors import ConfigError, RewardError, nearest
from mechreward.readout import HookPoint, Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import Call, RolloutBatch, Text, holds_others_turns, plain_text
from mechreward.rollout.capture import (
    ResidualTap,
    SequenceReader,
    check_fits,
    input_device,
    is_sharded,
    leaves_out_softcap,
    truncated_forward,
    unwrap,
)
from mechreward.unfinished import Steps, Tell, digest, silent

if TYPE_CHECKING:
    from mechreward.reward.base import Reward, Scores

MAX_TOKENS = 4096
"""Padded tokens in one forward pass of our own: more would take more memory than the trainer's own passes."""

MAX_NUMBERS = 1 << 26
"""Readings held at once where every latent is read: 256 MiB."""


def read_forward(
    model: nn.Module,
    batch: RolloutBatch,
    bank: ReadoutBank,
    read_last: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_tokens: int = MAX_TOKENS,
    tell: Tell = silent,
) -> dict[Readout, Readings]:
    """Read a batch's completions with forward passes of our own, truncated after the deepest hook.

    Rows are padded on the right, so that positions are right even for models that look them up in a table, and sorted
    by length, so that little is padded. The model is in eval mode meanwhile. A sharded model (FSDP, ZeRO-3) runs whole
    passes, and as many on each process: all processes must call this function together.

    Args:
        model: Any HF causal language model, wrapped or not.
        batch: B rollouts, T tokens in the longest completion.
        bank: What to read.
        read_last: Include the final sampled token.
        autocast: The precision context of the trainer's own passes.
        max_tokens: Padded tokens in one pass.
        tell: Called with the rollouts that were read, and how many there are.

    Returns:
        For each readout, values ``[B, T, K']`` float32 and mask ``[B, T]``, on the model's device.

    Raises:
        CaptureError: The model's layout is not supported.
    """
    device = input_device(model)
    mask = batch.mask(read_last)
    values = torch.zeros(*mask.shape, len(bank), device=device)
    rows = [list(p) + list(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    chunks = _chunks([i for i in range(len(rows)) if mask[i].any()], rows, max_tokens)
    tap, done = ResidualTap(model, bank.hook_points), len(rows) - sum(map(len, chunks))
    try:
        # Agreed before the first pass: a sharded model's processes must do the same things in the same order.
        idle = _most(len(chunks), device) - len(chunks) if is_sharded(model) else 0
        for chunk in chunks:
            width = max(len(rows[i]) for i in chunk)
            ids = torch.zeros(len(chunk), width, dtype=torch.long)
            attention = torch.zeros_like(ids)
            positions = torch.zeros_like(ids, dtype=torch.bool)
            for k, i in enumerate(chunk):
                ids[k, : len(rows[i])] = torch.tensor(rows[i])
                attention[k, : len(rows[i])] = 1
                start, length = len(batch.prompt_ids[i]), len(batch.completion_ids[i])
                positions[k, start : start + length] = mask[i, :length]
            reader = SequenceReader(bank, positions)
            inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "use_cache": False}
            with autocast():
                truncated_forward(model, tap, reader, inputs)
            block = torch.zeros(len(chunk), *values.shape[1:], device=device)
            block[mask[chunk].to(device)] = reader.values().to(device)  # FSDP may keep the parameters elsewhere
            values[chunk] = block
            done += len(chunk)
            tell(done, len(rows))
        for _ in range(idle):
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            with autocast():
                truncated_forward(model, tap, _read_nothing, {"input_ids": token, "use_cache": False})
    finally:
        tap.close()
    return bank.split(values, mask.to(device))


def _chunks(chosen: Sequence[int], rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The chosen rows, the longest first, in chunks of at most ``max_tokens`` padded tokens, and one row at least."""
    order, chunks = sorted(chosen, key=lambda i: len(rows[i])), []
    while order:
        count = max(1, max_tokens // len(rows[order[-1]]))
        chunks.append(order[-count:])
        order = order[:-count]
    return chunks


def _most(count: int, device: torch.device) -> int:
    """The largest of all processes' counts."""
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _read_nothing(point: HookPoint, hidden: Tensor) -> None:
    """For passes that only the other processes need."""


def read_in_pieces(
    model: nn.Module, batch: RolloutBatch, readouts: Sequence[Readout], tell: Tell = silent
) -> Iterator[tuple[RolloutBatch, list[Readings]]]:
    """Read a batch a few rollouts at a time, so that all latents of whole dictionaries can be read.

    Args:
        model: Any HF causal language model.
        batch: Rollouts.
        readouts: What to read.
        tell: Called with the rollouts that were read, and how many there are.

    Yields:
        The next rollouts, and their readings by each readout, values ``[b, T, K]``.
    """
    bank = ReadoutBank(readouts)
    step = max(1, MAX_NUMBERS // (batch.longest * len(bank)))
    for start in range(0, len(batch), step):
        piece = batch.take(range(start, min(start + step, len(batch))))
        read = read_forward(model, piece, bank, tell=lambda done, _, start=start: tell(start + done, len(batch)))
        yield piece, [read[readout] for readout in readouts]


def pooled(
    model: nn.Module, batch: RolloutBatch, readouts: Sequence[Readout], how: str = "mean", tell: Tell = silent
) -> Iterator[Tensor]:
    """Readings aggregated over each rollout's tokens, a few rollouts at a time.

    Yields:
        ``[b, K]`` float32 on the CPU, K the columns of all readouts, in their order; NaN where no token is read.
    """
    aggregate = aggregation(how)
    for _, readings in read_in_pieces(model, batch, readouts, tell):
        yield torch.cat([over_tokens(each, aggregate) for each in readings], dim=1)


def over_tokens(readings: Readings, aggregate: Aggregate) -> Tensor:
    """Each column over each rollout's tokens, ``[B, T, K] -> [B, K]`` on the CPU."""
    rows, _, columns = readings.values.shape
    each = readings.values.transpose(1, 2).reshape(rows * columns, -1)
    return aggregate(each, readings.mask.repeat_interleave(columns, dim=0)).view(rows, columns).cpu()


def group_requests(requests: Sequence[Request], apart: Collection[Readout] = ()) -> dict[tuple[str, bool], ReadoutBank]:
    """One bank for each (reads, read_last) that is asked for; ``apart`` as in :class:`ReadoutBank`."""
    groups: dict[tuple[str, bool], list[Readout]] = {}
    for request in requests:
        groups.setdefault((request.reads, request.read_last), []).append(request.readout)
    return {key: ReadoutBank(readouts, apart) for key, readouts in groups.items()}


class HFSource:
    """Activation source for rewards that are called without a trainer: a model and its tokenizer.

    Args:
        model: The model whose activations are read (``reads="policy"``).
        tokenizer: Its tokenizer, which encodes prompts, and completions that come without ids.
        reference: The model for ``reads="reference"``; without one, such rewards are refused.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, reference: nn.Module | None = None):
        self.models = {"policy": model, "reference": reference}
        self.tokenizer = tokenizer

    def batch(self, call: Call) -> RolloutBatch:
        """Tokenise what a reward was called with; a completion without ids is taken to have ended.

        Where neither the tokenizer nor the model knows a token to end with, it was cut off: as everywhere, its last
        token is then left out. Messages that the model did not write are read as context, and masked.

        Raises:
            RewardError: Token ids of such a conversation, which do not say whose they are.
        """
        several = any(map(holds_others_turns, call.completions))
        completion_ids, masks = call.completion_ids, None
        if several and completion_ids is not None:
            raise RewardError(
                "A completion holds messages that the model did not write, and completion_ids do not say which tokens "
                "are its own: leave completion_ids out, or use MechRewardGRPOTrainer, which knows the mask."
            )
        if completion_ids is None:
            encoded = [self._completion_ids(completion) for completion in call.completions]
            completion_ids, masks = [ids for ids, _ in encoded], [mask for _, mask in encoded]
        return RolloutBatch(
            prompts=call.prompts,
            completions=call.completions,
            prompt_ids=[self._prompt_ids(p) for p in call.prompts],
            completion_ids=completion_ids,
            columns=call.columns,
            num_generations=len(call.prompts) or 1,
            eos_token_ids=end_tokens(self.models["policy"], self.tokenizer),
            tool_mask=masks if several else None,
        )

    def _completion_ids(self, completion: Text) -> tuple[list[int], list[int]]:
        """A completion's token ids, and for each 1 where the model wrote it."""
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        ids, mask = [], []
        for number, message in enumerate(messages):
            text = plain_text([message]) + ("\n" if number < len(messages) - 1 else "")
            own = self.tokenizer(text, add_special_tokens=False).input_ids
            ids += own
            mask += [int(not holds_others_turns([message]))] * len(own)
        # What ends with a tool's or a user's message is under way: the model has written no end.
        ended = not messages or not holds_others_turns([messages[-1]])
        end = end_token(self.models["policy"], self.tokenizer) if ended else []
        return [*ids, *end], [*mask, *[1] * len(end)]

    def _prompt_ids(self, prompt: Text) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True).input_ids

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        """Readings for each request, by one truncated forward a model."""
        found: dict[Request, Readings] = {}
        for (reads, read_last), bank in group_requests(requests).items():
            model = self.models[reads]
            if model is None:
                raise RewardError('A reward with reads="reference" needs HFSource(model, tokenizer, reference=...).')
            check_fits(bank.readouts, model)
            by_readout = read_forward(model, batch, bank, read_last)
            found |= {Request(r, reads, read_last): readings for r, readings in by_readout.items()}  # pyright: ignore
        return found

    def accept(self, reward: Reward, batch: RolloutBatch, scores: Scores) -> None:
        """Dense rewards have nowhere to go without our trainer."""
        refuse_dense(scores)


def refuse_dense(scores: Scores) -> None:
    """A list of numbers cannot carry per-token rewards.

    Raises:
        RewardError: There are some.
    """
    if scores.dense:
        raise RewardError(
            'aggregation="per_token" needs dense advantages, which only MechRewardGRPOTrainer can give: use it in '
            "place of GRPOTrainer, or choose another aggregation."
        )


def end_tokens(model: Any, tokenizer: Any, chosen: int | Sequence[int] | None = None) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those at which `generate` stops (chat models have several)."""
    return frozenset(_ends(model, tokenizer, chosen))


def end_token(model: Any, tokenizer: Any) -> list[int]:
    """The token that ends a completion: the tokenizer's, else the first at which `generate` stops, else none."""
    return _ends(model, tokenizer, None)[:1]


def _ends(model: Any, tokenizer: Any, chosen: int | Sequence[int] | None) -> list[int]:
    if chosen is None:
        chosen = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    others = [chosen] if isinstance(chosen, int) or chosen is None else chosen
    return [token for token in (tokenizer.eos_token_id, *others) if token is not None]


def load_model(name: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """A causal language model in eval mode, on this process's GPU if there is one, and its tokenizer.

    Args:
        name: A folder, an id of the Hugging Face hub, or ``mechreward/pocket``.
        dtype: Of its weights; ``"auto"`` is the one that they are stored in.

    Raises:
        ConfigError: It cannot be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pocket.resolve(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"The model {name} cannot be loaded ({type(error).__name__}: {said[:200]}): give a folder, an id of the "
            f"hub, or {pocket.MODEL_ID}."
        ) from error
    if leaves_out_softcap(model):
        model.set_attn_implementation("eager")
    return model.to(_own_device()).eval(), tokenizer


def _own_device() -> torch.device:
    """This process's GPU, where a launcher has started one process for each; else the first; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher that shows each process a GPU of its own counts LOCAL_RANK all the same.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def keeping_softcap(name: str) -> dict[str, str]:
    """Options of `from_pretrained` under which a model's attention logits are capped where they should be (Gemma-2)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pocket.resolve(name)).get_text_config()
    return {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}


def parse_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ConfigError: It is none of these.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"There is no dtype '{name}' for a model here.{nearest(name, known)}")
    return known[name]


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    num_generations: int,
    batch_size: int = 256,
    kept: Steps | None = None,
    tell: Tell = silent,
    **generate: Any,
) -> RolloutBatch:
    """Sample rollouts with HF `generate`, ``num_generations`` a prompt, groups contiguous.

    Uses the model's own generation settings unless ``generate`` overrides them; torch's global seed decides. With each
    kept batch the state of torch's generator is kept, so that sampling goes on as if it had never stopped.

    Args:
        model: Any HF causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain texts.
        num_generations: Rollouts a prompt.
        batch_size: Rollouts sampled at once.
        kept: Batches that were sampled before, decided by :func:`samples_depend_on`; new ones are added.
        tell: Called with the rollouts that are there, and how many there will be.
        generate: Options of HF `generate`.
    """
    repeated = [p for p in prompts for _ in range(num_generations)]
    kept = Steps() if kept is None else kept  # an empty one is false
    ends, prompt_ids, completion_ids = end_tokens(model, tokenizer, generate.get("eos_token_id")), [], []
    for number, start in enumerate(range(0, len(repeated), batch_size)):
        asked = [list(ids) for ids in tokenizer(repeated[start : start + batch_size]).input_ids]
        if number < len(kept.done):
            completions, states = kept.done[number]
            if number == len(kept.done) - 1:
                _set_generator(model.device, states)
        else:
            completions = _completions(model, asked, ends, generate)
            kept.add([completions, _generator(model.device)])
        prompt_ids += asked
        completion_ids += completions
        tell(len(completion_ids), len(repeated))
    return RolloutBatch(
        prompts=repeated,
        completions=tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        num_generations=num_generations,
        eos_token_ids=ends,
    )


def _completions(
    model: Any, asked: list[list[int]], ends: frozenset[int], generate: Mapping[str, Any]
) -> list[list[int]]:
    """What the model writes behind each of a batch of prompts, up to and including the first end token."""
    width = max(map(len, asked))
    # Padded by hand: many base models' tokenizers have no token for it, and any will do where nothing is read.
    ids = torch.tensor([[0] * (width - len(own)) + own for own in asked], device=model.device)
    attention = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in asked], device=model.device)
    output: Tensor = model.generate(input_ids=ids, attention_mask=attention, **generate)
    completions = []
    for row in output.tolist():
        completion = row[width:]
        end = next((t + 1 for t, token in enumerate(completion) if token in ends), len(completion))
        completions.append(completion[:end])
    return completions


def samples_depend_on(
    model: Any, prompts: Sequence[str], num_generations: int, batch_size: int, seed: int, generate: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides what :func:`sample` gives, for :meth:`mechreward.unfinished.Unfinished.steps`."""
    return {
        "seed": seed,
        "set of questions": digest(list(prompts)),
        "number of rollouts a question": num_generations,
        "batch size": batch_size,
        "way of sampling": dict(generate),
        "model": fingerprint(model),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def fingerprint(model: nn.Module) -> str:
    """Tells a model from one that was trained further or rounded, by up to 64 numbers of each parameter."""
    seen = hashlib.sha256(str(getattr(model, "generation_config", None)).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        seen.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
    return seen.hexdigest()[:12]


def _generator(device: torch.device) -> list[str]:
    """The state of torch's generator, of the CPU and of the model's GPU."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_generator(device: torch.device, states: Sequence[str]) -> None:
    of_cpu, *of_gpu = (torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in states)
    torch.set_rng_state(of_cpu)
    if of_gpu:
        torch.cuda.set_rng_state(of_gpu[0], device)
