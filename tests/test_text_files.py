"""Files of text that a user may hand over, as editors and exports of Windows write them: a byte order mark, CRLF."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

import mechreward as mr
from capability.comparison import CapabilityConfig
from mechreward.features.examples import read_corpus
from mechreward.features.pack import read_pack
from mechreward.files import read_jsonl
from mechreward.report.runs import _json, _yaml
from mechreward.rollout.labelled import holds_rollouts, read_lines
from mechreward.train.config import QuestionSource, read_config
from mechreward.train.data import _from_datasets
from sae_training import read_documents
from sarm.preferences import read_preferences

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mechreward"
CATALOG = SOURCE / "catalogs" / "pocket"
ROLLOUTS = (
    "\n".join(json.dumps({"prompt": f"{i}+1=", "completion": "é x", "label": i % 2 == 0}) for i in range(4)) + "\n"
)
PAIRS = "\n".join(json.dumps({"prompt": "p", "chosen": f"good {i}", "rejected": "bad"}) for i in range(3)) + "\n"


def probe(file):
    """The shipped probe, by a card that was edited."""
    shutil.copy(CATALOG / "correctness_probe.safetensors", file.with_suffix(".safetensors"))
    return mr.load_probe(str(file)).card


def suite(file):
    return read_config(file, CapabilityConfig)


def questions(file):
    return list(_from_datasets(QuestionSource(path=str(file), split="train", prompt="{prompt}", answer="completion")))


READERS = {
    "rollouts": ("a.jsonl", ROLLOUTS, lambda file: list(read_lines(file))),
    "rollouts or questions": ("a.jsonl", ROLLOUTS, holds_rollouts),
    "a corpus of rows": ("a.jsonl", ROLLOUTS, lambda file: list(read_corpus(file))),
    "a corpus of lines": ("a.txt", "one\n\n two\n", lambda file: list(read_corpus(file))),
    "a corpus of blocks": ("a.txt", "one\nmore\n\ntwo\n", lambda file: list(read_corpus(file))),
    "documents of rows": ("a.jsonl", ROLLOUTS, lambda file: list(read_documents([file]))),
    "a document": ("a.txt", "one\ntwo\n", lambda file: list(read_documents([file]))),
    "preferences": ("a.jsonl", PAIRS, lambda file: [vars(pair) for pair in read_preferences(file)]),
    "packed preferences": ("a.jsonl.gz", PAIRS, lambda file: [vars(pair) for pair in read_preferences(file)]),
    "questions": ("a.jsonl", ROLLOUTS, questions),
    "a pack": ("a.json", (CATALOG / "reasoning_pack.json").read_text(), lambda file: read_pack(file).model_dump()),
    "a probe": ("a.json", (CATALOG / "correctness_probe.json").read_text(), probe),
    "an experiment": ("a.yaml", (ROOT / "configs" / "hybrid.yaml").read_text(), read_config),
    "a suite": (
        "a.yaml",
        (ROOT / "experiments/capability/pocket.yaml").read_text(),
        lambda file: read_config(file, CapabilityConfig),
    ),
    "a run's records": ("a.jsonl", ROLLOUTS, read_jsonl),
    "a run's settings": ("a.json", '{"max_steps": 3}\n', _json),
    "a run's configuration": ("a.yaml", "seed: 3\n", _yaml),
}


@pytest.mark.parametrize("what", READERS)
def test_a_byte_order_mark_and_crlf_change_nothing(tmp_path, what):
    name, text, read = READERS[what]
    pack = gzip.compress if name.endswith(".gz") else bytes
    found = []
    for number, data in enumerate(
        (text.encode(), b"\xef\xbb\xbf" + text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    ):
        (tmp_path / str(number)).mkdir()
        file = tmp_path / str(number) / name
        file.write_bytes(pack(data))
        found.append(read(file))
    assert found[0] and found[1] == found[0] and found[2] == found[0]


OURS = {
    # Written and read by this package alone.
    "report/page.py", "verifiers/sandbox.py", "verifiers/code.py", "integrations/server/scorer.py", "unfinished.py",
    "files.py", "families.py", "hacking/redteam/templates.py", "integrations/trl/trainer.py",
    "integrations/verl/trainer.py", "features/neuronpedia.py", "cli/train.py", "train/capability.py",
    "train/lm_eval.py", "sae/registry.py",
}  # fmt: skip


def test_every_other_file_is_read_with_or_without_a_byte_order_mark():
    reading = re.compile(r"\.read_text\([^)]*\)|(?<!\w)(?:open|opened)\([^)]*\"rt?\"[^)]*\)|\.open\(encoding[^)]*\)")
    calls = [
        (file.relative_to(SOURCE).as_posix(), call)
        for file in SOURCE.rglob("*.py")
        for call in reading.findall(file.read_text())
    ]
    assert len(calls) > 30
    assert [(file, call) for file, call in calls if "utf-8-sig" not in call and file not in OURS] == []
