"""A model's own answers to questions, as JSONL: text to train an SAE on, and rollouts to find and test features with.

    python scripts/sample_rollouts.py --model runs/smollm2 --questions gsm8k/train.jsonl --count 160 --each 4 \
        --out runs/smollm2-train.jsonl

A question is the "question" (or "prompt") of a JSONL row; the model's chat template is applied where it has one. Each
line of the output is one rollout: ``prompt`` (as the model read it), ``completion``, ``completion_ids``,
``temperature``, ``question``, and ``answer`` (the row's own). Questions already in the output are not asked again, so a
killed run goes on where it was. For `mechreward discover` and `gate`, add a ``label``:
docs/training_new_sae.md shows how.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechreward import pocket
from mechreward.errors import ConfigError, MechRewardError
from mechreward.rollout.sampling import keeping_softcap, sample


def rendered(tokenizer: Any, question: str) -> str:
    """The prompt as text, such that tokenising it gives one BOS, where there is one."""
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # Some templates write a BOS that the tokenizer adds as well.
    twice = tokenizer(text).input_ids[:2] == [tokenizer.bos_token_id] * 2
    return text.removeprefix(tokenizer.bos_token) if twice else text


def read_questions(file: Path, first: int, count: int) -> list[dict[str, str]]:
    if not file.is_file():
        raise ConfigError(f"There is no file {file}: pass a JSONL file with a column 'question' or 'prompt'.")
    rows = [json.loads(line) for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    found = [
        {"question": row.get("question") or row.get("prompt"), "answer": row.get("answer", "")}
        for row in rows[first : first + count]
    ]
    if not found or not all(isinstance(row["question"], str) for row in found):
        raise ConfigError(f"{file} has no questions from row {first} on: give text as 'question' or 'prompt'.")
    return found


def run(options: argparse.Namespace) -> None:
    asked = read_questions(options.questions, options.first, options.count)
    name = pocket.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, options.dtype), **keeping_softcap(name))
    model.to(options.device).eval()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = options.out.read_text() if options.out.exists() else ""
    written = written[: written.rfind("\n") + 1]  # a killed run may have left half a line
    per_batch = max(1, options.batch // options.each)
    # Whole questions only: what a batch left behind in part is asked again.
    done = written.count("\n") // options.each
    options.out.write_text("".join(written.splitlines(keepends=True)[: done * options.each]))
    if done:
        print(f"{options.out} has the answers to {done} questions already: going on from there.", flush=True)
    began = time.monotonic()
    for start in range(done, len(asked), per_batch):
        batch = asked[start : start + per_batch]
        torch.manual_seed(options.seed * 1_000_003 + start)
        rollouts = sample(
            model,
            tokenizer,
            [rendered(tokenizer, row["question"]) for row in batch],
            options.each,
            batch_size=options.batch,
            max_new_tokens=options.max_new_tokens,
            do_sample=True,
            temperature=options.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        with options.out.open("a") as file:
            for i in range(len(rollouts)):
                rollout = {
                    "prompt": rollouts.prompts[i],
                    "completion": rollouts.completions[i],
                    "completion_ids": rollouts.completion_ids[i],
                    "temperature": options.temperature,
                }
                file.write(json.dumps(rollout | batch[i // options.each]) + "\n")
        print(f"{start + len(batch)} of {len(asked)} questions, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id; mechreward/pocket is the embedded model")
    parser.add_argument("--questions", type=Path, required=True, help="JSONL with 'question' (or 'prompt'), 'answer'")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--first", type=int, default=0, help="the first row to ask")
    parser.add_argument("--count", type=int, default=200, help="how many questions")
    parser.add_argument("--each", type=int, default=4, help="answers to each")
    parser.add_argument("--batch", type=int, default=64, help="rollouts sampled together")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        run(parser.parse_args())
    except MechRewardError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
