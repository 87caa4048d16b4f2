"""Make `pocket` from nothing: data, tokenizer, language model, SAEs, probes, packs, model card.

    python scripts/build_pocket.py            # all stages; a finished stage is not run again
    python scripts/build_pocket.py --only lm  # one stage

Work in progress lives in `build/pocket`; what is shipped is copied to `src/mechreward/pocket/files` and
`src/mechreward/catalogs/pocket`. Seeds are fixed, and threads too, since float sums depend on them.
"""

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mechreward.pocket.questions import corpus_completion, questions

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "pocket"
SHIPPED = ROOT / "src" / "mechreward" / "pocket" / "files"

LM_STEPS, LM_BATCH, LM_LR = 2000, 64, 3e-3


def progress(label: str, total: int) -> tuple[Progress, int]:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return bar, bar.add_task(label, total=total)


def corpus(seed: int):
    """(prompt, completion) pairs: three word problems to one fact."""
    rng = random.Random(seed)
    word_problems, facts = questions("corpus", seed, "reasoning"), questions("corpus", seed, "retrieval")
    while True:
        question = next(facts if rng.random() < 0.25 else word_problems)
        yield question.prompt, corpus_completion(question, rng)


def build_tokenizer() -> None:
    """Byte-level BPE on the corpus with single digits, so that any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    text = ("".join(pair) for pair in itertools.islice(corpus(0), 20_000))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
        "Answer:{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% else %}"
        "{{ message.content }}\n{% endif %}{% endfor %}"
    )
    fast.save_pretrained(WORK / "lm")


def lm_batch(pairs, tokenizer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and loss weights [B, T]: answers count fully, questions a tenth."""
    rows = []
    for prompt, completion in itertools.islice(pairs, size):
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append((prompt_ids + answer_ids, [0.1] * len(prompt_ids) + [1.0] * len(answer_ids)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])
    return ids, weights


def build_lm() -> None:
    """A four-layer Gemma-2 of about a million parameters, trained on the corpus."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WORK / "lm")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=128,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Gemma2ForCausalLM(config)
    model.generation_config.update(
        do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=64
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=LM_LR, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / LM_STEPS))),
    )
    pairs, first = corpus(1), 0
    checkpoint = WORK / "lm" / "training.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        for _ in itertools.islice(pairs, first * LM_BATCH):
            pass
    bar, task = progress("language model", LM_STEPS)
    with bar:
        bar.update(task, completed=first)
        for step in range(first, LM_STEPS):
            ids, weights = lm_batch(pairs, tokenizer, LM_BATCH)
            logits = model(input_ids=ids[:, :-1], attention_mask=(ids != tokenizer.pad_token_id).long()[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"language model, loss {loss.item():.3f}")
            if (step + 1) % 100 == 0:
                print(step + 1, f"{loss.item():.4f}", flush=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"schedule": schedule.state_dict()}, checkpoint)
    model.save_pretrained(WORK / "lm")


STAGES = {"tokenizer": build_tokenizer, "lm": build_lm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run this stage alone, again if it is finished")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    done_file = WORK / "done.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    for name, stage in STAGES.items():
        if name != only and (only or name in done):
            continue
        began = time.monotonic()
        stage()
        done[name] = round(time.monotonic() - began)
        done_file.write_text(json.dumps(done, indent=2))
        print(f"{name}: {done[name]} s", flush=True)


if __name__ == "__main__":
    main()
