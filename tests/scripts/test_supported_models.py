"""The README's table of supported models: made from code, and every release in it leads somewhere."""

import fnmatch
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

import mechreward as mr
import supported_models
from mechreward.errors import SAEError
from mechreward.sae import registry
from supported_models import SUPPORTED, releases, sae_ids

ROOT = Path(__file__).parents[2]
FIRST_FILES = {  # by format: what is fetched first, from the folder (or the file) that the registry names
    "Gemma Scope (npz": "/params.npz",
    "Gemma Scope 2": "/params.safetensors",
    "Llama Scope (": "/hyperparams.json",
    "Llama Scope R1": "/config.json",
    "dictionary_learning": "/config.json",
    "SAELens": "/cfg.json",
}
NAMED = [name for row in SUPPORTED for name in releases(row)]


class Asked(Exception):
    """Stops before anything is fetched."""


@pytest.fixture
def asked(monkeypatch):
    """``asked(release, sae_id)``: the repository and the file that are wanted first."""

    def download(repo, file, revision=None):
        raise Asked(repo, file)

    monkeypatch.setattr(registry, "download", download)

    def ask(release, sae_id):
        with pytest.raises(Asked) as caught:
            mr.load_sae(release=release, sae_id=sae_id)
        return caught.value.args

    return ask


def test_the_readme_has_the_table_that_the_code_makes():
    readme = (ROOT / "README.md").read_text()
    if f"SAELens {version('sae-lens')}:" not in readme:
        pytest.skip(f"the README's table was made with another SAELens than {version('sae-lens')}")
    assert supported_models.updated(readme) == readme, "run python scripts/supported_models.py"
    assert "no published weights could be fetched" in " ".join(supported_models.table().split())
    assert supported_models.updated(readme.replace("| Llama-3.1-8B |", "| Llama-4 |")) == readme


@pytest.mark.parametrize("row", [row for row in SUPPORTED if row.releases], ids=lambda row: row.format[:30])
def test_every_id_of_every_release_leads_to_its_repository_file_and_layer(asked, row):
    first = next((file for name, file in FIRST_FILES.items() if row.format.startswith(name)), "")
    for pattern in row.releases:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in releases(row)), pattern
    for release in releases(row):
        entry = registry.saelens_directory()[release]
        stored = {str(sae["id"]): str(sae["path"]) for sae in entry["saes"]}
        assert sae_ids(release), release
        for sae_id in sae_ids(release):
            assert asked(release, sae_id) == (entry["repo_id"], stored[sae_id] + first)
            layers = [
                re.search(r"(?:layer_?|blocks\.|^l)(\d+)", sae_id),
                re.search(r"(?:layer_?|blocks\.|-L|/L|SAE-l)(\d+)", stored[sae_id]),
            ]
            if all(layers):
                assert layers[0][1] == layers[1][1], (release, sae_id, stored[sae_id])


def test_no_release_is_in_two_rows():
    assert len(NAMED) == len(set(NAMED)) > 80


def test_every_other_release_is_refused_before_its_weights_are_fetched(monkeypatch, tmp_path):
    wanted = []

    def download(repo, file, revision=None):
        wanted.append(file)
        (tmp_path / "cfg.json").write_text('{"hook_name": "blocks.1.hook_mlp_out", "d_in": 8, "d_sae": 8}')
        return tmp_path / "cfg.json"

    monkeypatch.setattr(registry, "download", download)
    for release in set(registry.saelens_directory()) - set(NAMED):
        sae_id = str(registry.saelens_directory()[release]["saes"][0]["id"])
        with pytest.raises(mr.errors.MechRewardError):
            mr.load_sae(release=release, sae_id=sae_id)
    # SAELens' own format tells what it reads in its configuration alone.
    assert all(file.endswith(("cfg.json", "sae_weights.safetensors")) for file in wanted)
    for release, sae_id in (("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),):
        with pytest.raises(SAEError, match="embedding"):
            mr.load_sae(release=release, sae_id=sae_id)


def test_a_repositorys_name_overrules_the_registrys_model(monkeypatch, tmp_path):
    """SAELens 6.54 calls the model of google/gemma-scope-9b-it-res gemma-2-9b."""
    from test_sae import write_gemma_scope

    write_gemma_scope(tmp_path / "layer_9")
    monkeypatch.setattr(registry, "download", lambda repo, file, revision=None: tmp_path / "layer_9" / "params.npz")
    assert registry.saelens_directory()["gemma-scope-9b-it-res"]["model"] == "gemma-2-9b"
    for release, sae_id in (
        ("gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_14"),
        ("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonical"),
    ):
        assert mr.load_sae(release=release, sae_id=sae_id).model_name == "gemma-2-9b-it"


# The hub's own client, on a hub of our own


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub for one file: its size, its hash, its commit, and its bytes."""

    root: Path
    log: list[tuple[str, str]]
    protocol_version = "HTTP/1.1"

    def answer(self, body: bool):
        type(self).log.append((self.command, self.path))
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = self.root / revision / name
        if not repo.startswith("google/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if (self.root / revision).is_dir() else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", {"main": "a" * 40, "v1": "b" * 40}.get(revision, revision))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with two revisions of an SAE; ``read(revision, **environment)`` is what load_sae does in a new process."""
    from test_sae import write_gemma_scope

    place = "layer_22/width_16k/average_l0_123"
    arrays = {rev: write_gemma_scope(tmp_path / rev / place, seed=i) for i, rev in enumerate(("main", "v1"))}
    handler = type("OneHub", (Hub,), {"root": tmp_path, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import os, sys, time, mechreward as mr
if "IMPATIENT" in os.environ:
    time.sleep = lambda seconds: None  # between the attempts of the hub's client
try:
    name = "gemma-scope-9b-pt-res-canonical", "layer_22/width_16k/canonical"
    handle = mr.load_sae(*name, revision=sys.argv[1] or None)
    print(handle.hook_point, *handle.features([3]).weight.flatten().tolist())
except mr.errors.MechRewardError as error:
    print(f"{type(error).__name__}: {error}")
"""

    def read(revision="", port=server.server_port, **environment):
        handler.log.clear()
        known = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        known |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        run = subprocess.run(
            [sys.executable, "-c", code, revision], capture_output=True, text=True, env=os.environ | known | environment
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.strip(), run.stderr, [method for method, path in handler.log if path.endswith("params.npz")]

    yield arrays, read
    server.shutdown()


@pytest.mark.slow
def test_downloads_show_progress_are_pinned_and_kept_for_offline_use(hub):
    arrays, read = hub

    def column(said):
        assert said.startswith("blocks.22.hook_resid_post ")
        return [float(number) for number in said.split()[1:]]

    said, error, asked = read(TQDM_POSITION="-1")  # as on a terminal
    assert column(said) == pytest.approx(arrays["main"]["W_enc"][:, 3].tolist(), rel=1e-6)
    assert "params.npz" in error and "100%" in error and "GET" in asked
    said, _, asked = read()  # from the cache: only whether it has changed is asked
    assert column(said) == pytest.approx(arrays["main"]["W_enc"][:, 3].tolist(), rel=1e-6) and asked == ["HEAD"]
    said, _, asked = read("v1")
    assert column(said) == pytest.approx(arrays["v1"]["W_enc"][:, 3].tolist(), rel=1e-6)
    said, _, asked = read("b" * 40, HF_HUB_OFFLINE="1")  # the commit that v1 was
    assert column(said) == pytest.approx(arrays["v1"]["W_enc"][:, 3].tolist(), rel=1e-6) and asked == []
    said, _, _ = read("v2")
    assert re.fullmatch(r"SAEError: google/\S+ could not be fetched \(\w+\): connect .*HF_ENDPOINT.* or .*\.", said)


def test_no_network_is_one_sentence_with_three_ways_out(hub):
    _, read = hub
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, _, _ = read(port=port, IMPATIENT="1")
    for way in ("connect to the hub (or set HF_ENDPOINT to a mirror)", "'hf download'", "load_sae(path=...)"):
        assert way in said
    assert "\n" not in said


# Models of the table


def test_qwen_3_5_takes_its_own_saes_and_no_others():
    """Its layers are found, and its name is not taken for Qwen3's."""
    import torch
    import transformers as t

    from conftest import VOCAB, WIDTH
    from mechreward.readout import HookPoint, ReadoutBank, direction
    from mechreward.rollout.batch import RolloutBatch
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import read_forward

    sizes = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2)
    sizes |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    torch.manual_seed(0)
    config = t.Qwen3_5TextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, max_position_embeddings=128, pad_token_id=0, **sizes,
    )  # fmt: skip
    model = t.Qwen3_5ForCausalLM(config).eval()
    readout = replace(direction("a", torch.randn(WIDTH), HookPoint(2)), model_name="Qwen/Qwen3.5-4B")
    check_fits([readout], model)
    for other in ("Qwen/Qwen3-8B-Base", "Qwen/Qwen2.5-7B-Instruct", "gemma-2-9b"):
        with pytest.raises(mr.errors.ModelMismatchError, match="was made for"):
            check_fits([replace(readout, model_name=other)], model)
    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11, 12, 13], [14, 15]]
    batch = RolloutBatch(["p"] * 2, ["c"] * 2, prompts, completions, eos_token_ids=frozenset({2}))
    got = read_forward(model, batch, ReadoutBank([readout]))[readout]
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[3][0]
        want = hidden[len(prompt) : -1] @ readout.weight  # the final token is not read
        torch.testing.assert_close(got.values[i, : len(completion) - 1], want, atol=1e-4, rtol=1e-4)
