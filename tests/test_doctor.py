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


def run(*args):
    return CliRunner().invoke(app, ["doctor", *args])


@pytest.fixture
def offline(monkeypatch):
    """Nothing is asked of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def states(result):
    return {finding["area"]: finding["state"] for finding in json.loads(result.stdout)}


def test_this_machine_has_no_problem(offline):
    result = run("--model", "mechreward/pocket", "--sae", "pocket-res-canonical/layer_2/width_2k/canonical", "--json")
    assert result.exit_code == 0, result.output
    found = states(result)
    assert found["hub"] == "warning" and found["mechreward"] == found["sae"] == found["memory"] == "ok"
    printed = run("--model", "mechreward/pocket")
    assert printed.exit_code == 0 and "torch" in printed.stdout and "GiB" in printed.stdout


def test_being_offline_is_said_and_no_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=unreachable))
    found = doctor.hub()
    assert found.state == "warning" and "ConnectionError" in found.says and "pocket needs none" in found.do


def test_the_namesake_on_the_index_is_told_apart(monkeypatch):
    other = {"Summary": "Another library.", "Version": "0.2.0"}
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: other)
    found = doctor.project()
    assert found.state == "problem" and "pip uninstall mechreward" in found.do


def test_the_summary_is_that_of_the_project():
    assert importlib.metadata.metadata("mechreward")["Summary"] == doctor.SUMMARY


def test_a_version_outside_the_range_is_a_problem(monkeypatch, offline):
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.0" if name == "transformers" else true(name))
    result = run("--json")
    assert result.exit_code == 1
    (wrong,) = (f for f in json.loads(result.stdout) if f["state"] == "problem")
    assert "transformers is 4.57.0, and transformers<6,>=5.0 is needed" in wrong["says"] and wrong["do"]


def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch):
    asked = [Requirement("fastapi>=0.132; extra == 'server'"), Requirement("mechreward[client]; extra == 'server'")]
    asked += [Requirement("httpx>=0.27; extra == 'client'"), Requirement("numpy>=1.26")]
    assert [need.name for need in doctor.needs_of("server", asked)] == ["fastapi", "httpx"]
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "fastapi")
    found = doctor.of_extra("server", asked)
    assert found.state == "ok" and "lacks fastapi" in found.says and "pip install '.[server]'" in found.do


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
    needs = doctor.needed(model, 2, 0)
    assert (needs.weights, needs.full, needs.lora) == (2 * parameters, 8 * parameters, 16 * adapter)


def test_an_adapter_has_as_many_parameters_as_peft_makes(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(tmp_path)))
    needs = doctor.needed(model, 4, 0)
    trained = get_peft_model(model, LoraConfig(r=doctor.LORA_RANK, target_modules="all-linear"))
    assert needs.lora == 16 * sum(p.numel() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("gib", "state"),
    [(15, "ok"), (8, "warning"), (2, "problem")],  # weights 2 + encoder 0.5, LoRA + 1, all + 8
)
def test_what_does_not_fit_on_the_card_is_said(monkeypatch, gib, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="card", total_memory=gib * doctor.GIB)
    )
    needs = doctor.Needs(2 * doctor.GIB, doctor.GIB, 8 * doctor.GIB, doctor.GIB // 2)
    found = doctor.memory(needs, "bfloat16")
    assert found.state == state and "= 3.5 GiB" in found.says and "= 10.5 GiB" in found.says


def test_a_topk_keeps_its_whole_dictionary_and_others_their_columns():
    model = doctor.on_meta("mechreward/pocket")
    for sae, columns in (("canonical", 20), ("topk", 2048)):
        size, says = doctor._encoder_bytes(model, f"pocket-res-canonical/layer_2/width_2k/{sae}")
        assert size == columns * (128 + 1) * 4 and f"{columns:,}" in says


def test_an_sae_of_another_model_is_a_problem(tmp_path, offline):
    sae = "pocket-res-canonical/layer_2/width_2k/canonical"
    result = run("--model", tiny(tmp_path), "--sae", sae, "--json")
    assert result.exit_code == 1 and states(result)["sae"] == "problem"


def test_a_driver_without_a_build_for_it_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    found = doctor.torch_build()
    assert found.state == "problem" and "without CUDA" in found.says


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


def test_a_model_that_is_not_there_is_a_problem(offline, tmp_path):
    result = run("--model", str(tmp_path / "none"), "--json")
    assert result.exit_code == 1 and states(result)["model"] == "problem"


def test_help_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from mechreward.cli import app; "
        "result = CliRunner().invoke(app, ['doctor', '--help']); "
        "sys.exit(result.exit_code or 'Example' not in result.output or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
