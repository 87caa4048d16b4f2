"""`mechreward doctor`, on this machine and on made-up ones."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from mechreward import doctor
from mechreward.cli import app

SAE = "pocket-res-canonical/layer_2/width_2k/canonical"


def run(*args):
    return CliRunner().invoke(app, ["doctor", *args])


def states(result):
    return {finding["area"]: finding["state"] for finding in json.loads(result.stdout)}


def test_this_machine_has_no_problem():
    result = run("--model", "mechreward/pocket", "--sae", SAE, "--json")
    assert result.exit_code == 0, result.output
    found = states(result)
    assert found["packages"] == found["sae"] == found["memory"] == "ok" and {"extra trl", "sandbox"} <= set(found)
    printed = run("--model", "mechreward/pocket")
    assert printed.exit_code == 0 and "torch" in printed.stdout and "GiB" in printed.stdout


def test_a_version_outside_the_range_is_a_problem(monkeypatch):
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.0" if name == "transformers" else true(name))
    result = run("--json")
    assert result.exit_code == 1
    (wrong,) = (f for f in json.loads(result.stdout) if f["state"] == "problem")
    assert "transformers is 4.57.0, and transformers<6,>=5.0 is needed" in wrong["says"] and wrong["do"]


def test_an_extra_may_be_missing_and_what_is_always_needed_may_not(monkeypatch):
    asked = [Requirement("fastapi>=0.132; extra == 'server'"), Requirement("mechreward[client]; extra == 'server'")]
    asked += [Requirement("httpx>=0.27; extra == 'client'"), Requirement("numpy>=1.26")]
    assert [need.name for need in doctor.needs_of("server", asked)] == ["fastapi", "httpx"]
    assert [need.name for need in doctor.needs_of("", asked)] == ["numpy"]
    monkeypatch.setattr(doctor, "_version", {"httpx": "0.28"}.get)
    found = doctor.of_extra("server", asked)
    assert found.state == "ok" and "lacks fastapi" in found.says and "pip install '.[server]'" in found.do
    needed = doctor.of_extra("", asked)
    assert needed.state == "problem" and needed.says == "numpy is not installed." and "pip install ." in needed.do


def tiny(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_memory_is_the_sum_by_hand(tmp_path):
    model = doctor.on_meta(tiny(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    parameters = 2 * 100 * 16 + 2 * layer + 16
    adapter = 2 * 16 * (4 * (16 + 16) + 3 * (16 + 32))
    assert doctor.needed(model, 2) == (2 * parameters, 16 * adapter, 8 * parameters)


def test_an_adapter_has_as_many_parameters_as_peft_makes(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(tmp_path)))
    _, lora, _ = doctor.needed(model, 4)
    trained = get_peft_model(model, LoraConfig(r=doctor.LORA_RANK, target_modules="all-linear"))
    assert lora == 16 * sum(p.numel() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("gib", "state"),
    [(15, "ok"), (8, "warning"), (2, "problem")],  # weights 2 + encoder 0.5, LoRA + 1, all + 8
)
def test_what_does_not_fit_on_the_card_is_said(monkeypatch, gib, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="card", total_memory=gib * doctor.GIB)
    )
    found = doctor.memory(2 * doctor.GIB, doctor.GIB, 8 * doctor.GIB, doctor.GIB // 2, torch.bfloat16)
    assert found.state == state and "= 3.5 GiB" in found.says and "= 10.5 GiB" in found.says


def test_a_topk_keeps_its_whole_dictionary_and_others_their_columns():
    model = doctor.on_meta("mechreward/pocket")
    for sae, columns in (("canonical", 20), ("topk", 2048)):
        size, says = doctor.encoder_bytes(model, f"pocket-res-canonical/layer_2/width_2k/{sae}")
        assert size == columns * (128 + 1) * 4 and f"{columns:,}" in says


@pytest.mark.parametrize("sae", [SAE, "no-release/at-all"], ids=["of another model", "not there"])
def test_an_sae_that_cannot_be_used_is_a_problem(tmp_path, sae):
    result = run("--model", tiny(tmp_path), "--sae", sae, "--json")
    assert result.exit_code == 1 and states(result)["sae"] == "problem" and "memory" not in states(result)


def test_a_model_that_is_not_there_is_a_problem(tmp_path):
    result = run("--model", str(tmp_path / "none"), "--json")
    assert result.exit_code == 1 and states(result)["model"] == "problem"


def test_a_driver_without_a_build_for_it_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    found = doctor.gpu()
    assert found.state == "problem" and "cannot use a GPU" in found.says


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--dtype", "bfloat"], "There is no dtype 'bfloat'"),
        (["--sae", "a/b"], "name it with --model"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(args, said):
    result = run(*args)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_help_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from mechreward.cli import app; "
        "result = CliRunner().invoke(app, ['doctor', '--help']); "
        "sys.exit(result.exit_code or 'Example' not in result.output or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
