"""Neuronpedia's client, cache and retries, against a local server that answers in Neuronpedia's form."""

import contextlib
import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from typer.testing import CliRunner

from mechreward import retry
from mechreward.cli import app
from mechreward.errors import MissingExtraError, SAEError, ServiceError
from mechreward.features import neuronpedia as module
from mechreward.features.neuronpedia import cache_folder, neuronpedia_id, published_feature

pytest.importorskip("neuronpedia")

NP_ID = "gemma-2-2b/12-gemmascope-res-16k"
HOSTILE = "<script>alert('x')</script> [bold]words[/bold] & \x1b[2J"


def record(index: int = 123) -> dict:
    """A feature as /api/feature/{model}/{source}/{index} gives it (shortened lists, the same keys and types)."""
    return {
        "modelId": "gemma-2-2b",
        "layer": "12-gemmascope-res-16k",
        "index": str(index),
        "sourceSetName": "gemmascope-res-16k",
        "creatorId": "clkht01d40000jv08hvalcvly",
        "createdAt": "2024-07-31T04:03:00.000Z",
        "maxActApprox": 61.5,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "hookName": None,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        "neuron_alignment_indices": [5, 9],
        "neuron_alignment_values": [0.1, 0.05],
        "correlated_neurons_indices": [],
        "neg_str": ["▁foo", "bar"],
        "neg_values": [-0.61, -0.5],
        "pos_str": ["▁equals", "▁sum"],
        "pos_values": [1.25, 1.0],
        "frac_nonzero": 0.00374,
        "freq_hist_data_bar_heights": [10, 5],
        "freq_hist_data_bar_values": [1.2, 3.6],
        "logits_hist_data_bar_heights": [1],
        "logits_hist_data_bar_values": [0.0],
        "decoder_weights_dist": [],
        "explanations": [
            {
                "id": "clz1",
                "modelId": "gemma-2-2b",
                "layer": "12-gemmascope-res-16k",
                "index": str(index),
                "description": " sums and totals",
                "authorId": "clkht01d40000jv08hvalcvly",
                "triggeredByUserId": None,
                "notes": None,
                "scoreV1": 0,
                "scoreV2": None,
                "umap_x": 0,
                "typeName": "oai_token-act-pair",
                "explanationModelName": "gpt-4o-mini",
                "scores": [],
            },
            {"id": "clz2", "description": HOSTILE, "typeName": None, "explanationModelName": None},
            {"id": "clz3", "description": ""},
        ],
        "activations": [
            {
                "id": "clz9",
                "tokens": ["<bos>", "▁Two", "▁equals", "<b>"],
                "dataIndex": None,
                "index": str(index),
                "layer": "12-gemmascope-res-16k",
                "modelId": "gemma-2-2b",
                "dataSource": "Open",
                "maxValue": 61.5,
                "maxValueTokenIndex": 2,
                "minValue": 0,
                "values": [0, 0, 61.5, 12.25],
                "dfaValues": [],
                "binMin": 40.5,
                "binMax": 61.5,
                "binContains": 0.01,
                "qualifyingTokenIndex": None,
            }
        ],
        "comments": [],
        "lists": [],
        "creator": {"name": "neuronpedia"},
    }


class Server:
    """Answers ``(status, headers, body)`` one after the other, the last one for ever."""

    def __init__(self):
        self.answers, self.asked, self.delay = [(200, {}, record())], [], 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, dict(self.headers)))
                threading.Event().wait(outer.delay)  # time.sleep is the tests'
                status, headers, body = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                with contextlib.suppress(OSError):  # who asked may be gone
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHREWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    running = Server()
    monkeypatch.setattr("neuronpedia.requests.base_request.NPRequest.BASE_URL", running.url)
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    return waited


def ask(index=123, offline=False):
    return published_feature(NP_ID, index, offline=offline)


def test_what_neuronpedia_says(server, capfd):
    found = ask()
    assert found.url == "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/123"
    assert [(e.text, e.method, e.model) for e in found.explanations] == [
        ("sums and totals", "oai_token-act-pair", "gpt-4o-mini"),
        (HOSTILE, None, None),
    ]
    assert found.density == 0.00374
    assert found.promoted == (("▁equals", 1.25), ("▁sum", 1.0)) and found.suppressed[0] == ("▁foo", -0.61)
    assert found.activations[0].tokens[2] == "▁equals" and found.activations[0].values == (0, 0, 61.5, 12.25)
    path, headers = server.asked[0]
    assert path == "/api/feature/gemma-2-2b/12-gemmascope-res-16k/123"
    assert "X-Api-Key" not in headers  # reading needs none
    assert capfd.readouterr().out == ""  # the client prints


def test_the_users_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "sk-np-1")
    ask()
    assert server.asked[0][1]["X-Api-Key"] == "sk-np-1"


def test_answers_are_kept(server):
    first = ask()
    assert ask() == first and ask(offline=True) == first and len(server.asked) == 1
    (file,) = (each for each in cache_folder().rglob("*") if each.is_file())
    assert json.loads(file.read_text()) == record()
    file.write_text("{ damaged")
    assert ask() == first and len(server.asked) == 2
    ask(index=7)
    assert len(server.asked) == 3


def test_a_cache_that_cannot_be_written_is_no_error(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHREWARD_CACHE", str(tmp_path / "file"))
    assert ask().density == 0.00374


def test_offline_is_one_sentence(server, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(ServiceError, match=r"Feature 123 of .* is not in the cache .* offline"):
        ask(offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="offline"):
        published_feature(NP_ID, 123)
    assert server.asked == []


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("MECHREWARD_CACHE", "/one")
    assert str(cache_folder()) == "/one/neuronpedia"
    monkeypatch.delenv("MECHREWARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert str(cache_folder()) == "/two/mechreward/neuronpedia"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert str(cache_folder()) == "/three/.cache/mechreward/neuronpedia"


def test_a_busy_server_is_asked_again(server, waits):
    server.answers = [(429, {"Retry-After": "7"}, {}), (503, {}, b"busy"), (200, {}, record())]
    assert ask().density == 0.00374
    assert waits == [7.0, 2.0] and len(server.asked) == 3


def test_retry_after_may_be_a_date(server, waits):
    server.answers = [(503, {"Retry-After": formatdate(time.time() + 20, usegmt=True)}, {}), (200, {}, record())]
    ask()
    assert len(waits) == 1 and 15 < waits[0] <= 20
    assert retry.retry_after({"Retry-After": "soon"}) is None
    assert retry.retry_after({"Retry-After": formatdate(0, usegmt=True)}) == 0.0


def test_retries_have_an_end(server, waits):
    server.answers = [(500, {}, {})]
    with pytest.raises(ServiceError, match=r"failed \(status 500\)"):
        ask()
    assert waits == [1, 2, 4, 8] and len(server.asked) == 5
    server.answers, server.asked = [(429, {"Retry-After": "3600"}, {})], []
    with pytest.raises(ServiceError, match="asks to wait 3600 s"):
        ask()
    assert len(server.asked) == 1


def test_a_server_that_is_not_there(server, waits):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ServiceError, match=r"Asking Neuronpedia for feature 123 .*ConnectionError"):
        ask()
    assert len(waits) == 4


def test_a_server_that_hangs(server, waits, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    server.delay = 1.0
    start = time.monotonic()
    with pytest.raises(ServiceError, match="ReadTimeout"):
        ask()
    assert len(waits) == 4 and time.monotonic() - start < 5 * server.delay


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, {"message": "not found"}, "status 404; check the feature.s index"),
        (200, None, "has no feature 123"),
        (401, {}, "NEURONPEDIA_API_KEY"),
        (400, b"<html>", "status 400"),
        (200, b"<html>", "not JSON"),
        (200, [1], "not of the known form"),
        (200, {"explanations": [3]}, "not of the known form"),
        (200, record() | {"frac_nonzero": "often"}, "not of the known form"),
    ],
)
def test_refusals_are_one_sentence_and_not_kept(server, waits, status, body, says):
    server.answers = [(status, {}, body)]
    with pytest.raises(ServiceError, match=says):
        ask()
    assert len(server.asked) == 1 and waits == []
    assert list(cache_folder().rglob("*.json")) == []


def test_sparse_records(server):
    server.answers = [(200, {}, {"modelId": "m", "explanations": None, "activations": []})]
    found = ask()
    assert (found.explanations, found.activations, found.density, found.promoted) == ((), (), None, ())


def test_names_come_from_saelens_list():
    assert neuronpedia_id("gemma-scope-9b-pt-res-canonical/layer_22/width_16k/canonical") == (
        "gemma-2-9b/22-gemmascope-res-16k"
    )
    for unknown in (
        "pocket-res-canonical/layer_2/width_2k/canonical",
        "gemma-scope-9b-pt-res-canonical/layer_22/width_3k/canonical",
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",  # listed, without a name of Neuronpedia's
        "no-release/x",
        "a/local/folder",
    ):
        with pytest.raises(SAEError, match="no page on Neuronpedia that is known"):
            neuronpedia_id(unknown)


def test_without_the_client(server, monkeypatch):
    ask()
    monkeypatch.setitem(__import__("sys").modules, "neuronpedia", None)
    assert ask().density == 0.00374  # from the cache
    with pytest.raises(MissingExtraError, match=r"\.\[interp\]"):
        ask(index=1)


def test_show_with_neuronpedia(server, monkeypatch, tmp_path):
    """On the command line: what outsiders wrote is text in the terminal and on the page."""
    monkeypatch.setattr(module, "neuronpedia_id", lambda _: NP_ID)
    monkeypatch.setattr(
        module,
        "published_feature",
        lambda np_id, index, offline: published_feature(np_id, index, offline=False),
    )
    page = tmp_path / "page.html"
    arguments = ["features", "show", "pocket/reasoning_pack", "--feature", "1905", "--texts", "10", "--neuronpedia"]
    result = CliRunner().invoke(app, [*arguments, "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "sums and totals" in result.output and "gpt-4o-mini" in result.output
    assert "<script>alert('x')</script> [bold]words[/bold] & \ufffd[2J" in result.output
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; [bold]words" in html
    assert 'href="https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/1905"' in html
    assert "0.374 %" in html and 'title="61.5"> equals</i>' in html and "&lt;b&gt;</i>" in html
    assert np.all([token in html for token in ("▁sum", "▁foo")])
