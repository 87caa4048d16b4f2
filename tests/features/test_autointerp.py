"""Explanations and their scores against a local server whose answers are known, and what is written for Delphi."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mechreward import pocket, retry
from mechreward.cli import app
from mechreward.errors import ConfigError, DataError, ServiceError
from mechreward.features import autointerp as module
from mechreward.features.autointerp import (
    Chat,
    Score,
    Sets,
    deal,
    detect,
    explain,
    export_for_delphi,
    highlighted,
    parse_explanation,
    parse_verdicts,
    plain,
)
from mechreward.features.examples import Example, FeatureExamples, collect, pocket_corpus
from mechreward.rollout.hf import load_model
from mechreward.sae.registry import load_sae

pytest.importorskip("httpx")


class Server:
    """An OpenAI-compatible endpoint: ``reply(messages)`` is what the model says, or ``(status, headers, body)``."""

    def __init__(self):
        self.asked, self.reply = [], lambda messages: "[]"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                answer = outer.reply(body["messages"])
                if isinstance(answer, str) or answer is None:
                    message = {"role": "assistant", "content": answer}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    answer = (200, {}, {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]})
                status, headers, content = answer
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def judging(self, detects, explanation="equals signs"):
        """Explains, and judges each text by a rule."""

        def reply(messages):
            system, user = (message["content"] for message in messages)
            if "You study a feature" in system:
                return f"Let me see.\nExplanation: {explanation}"
            asked = json.loads(user)
            assert asked["explanation"] == explanation
            return json.dumps([int(detects(text)) for text in asked["texts"].values()])

        self.reply = reply


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    return waited


def example(text: str, number: int, strength: float = 0.0, unread: int = 0) -> Example:
    """A character a token; it fires on ``=``."""
    activations = np.array([strength * (c == "=") for c in text], np.float32)
    return Example(
        tokens=tuple(text),
        token_ids=tuple(map(ord, text)),
        activations=activations,
        read=np.arange(len(text)) >= unread,
        peak=int(activations.argmax()),
        text=number,
        start=0,
    )


def feature(fires: int = 60, silent: int = 40) -> FeatureExamples:
    """Texts ``"<n>=x"`` of falling strength, and silent ones ``"silence <n>"``."""
    active = [example(f"{i}=x", i, float(100 - i)) for i in range(fires)]
    return FeatureExamples(
        name="feature_7",
        top=active[:20],
        sample=active,
        controls=[example(f"silence {i}", 1000 + i) for i in range(silent)],
        tokens=1000,
        fired=fires,
        texts=fires + silent,
        texts_fired=fires,
        counts=np.zeros(64, np.int64),
        edges=np.linspace(0, 128, 65),
    )


# The score, by hand.


class Judge:
    """A chat that answers each question about texts by a rule, and keeps the texts."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def ask(self, task, data):
        self.asked.append(list(json.loads(data)["texts"].values()))
        return self.answer(self.asked[-1])


def judged(answer, fires, silent, seed=0):
    chat = Judge(answer)
    sets = Sets([], [example(text, 0) for text in fires], [example(text, 0) for text in silent])
    return detect("equals signs", sets, chat, np.random.default_rng(seed)), chat.asked


def test_a_score_by_hand():
    says = {"a": 1, "b": 0, "c": 0, "d": 1, "e": 0}
    found, _ = judged(lambda some: json.dumps([says[text] for text in some]), "ab", "cde")
    assert found == Score(hits=1, misses=1, rejections=2, false_alarms=1, unparsed=0)
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert str(found) == (
        "balanced accuracy 0.583 (1 of 2 that fire, 2 of 3 that do not; 0 of 5 answers could not be read)"
    )


def test_answers_that_cannot_be_read_are_counted():
    asked = []

    def answer(some):
        asked.append(some)
        return "I would rather not say." if len(asked) == 2 else json.dumps([int("=" in text) for text in some])

    fires, silent = [f"{i}=" for i in range(6)], [str(i) for i in range(6)]
    found, asked_of = judged(answer, fires, silent)
    assert [len(batch) for batch in asked_of] == [5, 5, 2] and sorted(t for some in asked_of for t in some) == sorted(
        fires + silent
    )
    lost = sum("=" in text for text in asked[1])
    assert found == Score(6 - lost, 0, 6 - (5 - lost), 0, 5)
    assert found.balanced_accuracy == 1.0 and "5 of 12 answers could not be read" in str(found)
    nothing, _ = judged(lambda some: "", fires, silent)
    assert nothing == Score(0, 0, 0, 0, 12) and nothing.balanced_accuracy is None and "n/a" in str(nothing)


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("```json\n[1,0,1]\n```", [True, False, True]),
        ("Texts [1, 2] differ, so at first [0,0,0]; but no: [1, 1, 0].", [True, True, False]),
        ("[[1], 0, 1]", [None] * 3),
        ('{"1": 1, "2": 0, "3": 1}', [None] * 3),
        ("[1, 0]", [None] * 3),
        ("[1, 0, 1, 1]", [None] * 3),
        ("[1, 2, 0]", [None] * 3),
        ("[10, 1]", [None] * 3),
        ("1, 0, 1", [None] * 3),
        ("", [None] * 3),
        ("[" * 5000, [None] * 3),
    ],
)
def test_verdicts(answer, verdicts):
    assert parse_verdicts(answer, 3) == verdicts


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("Explanation: sums", "sums"),
        ("The marks are on =.\n\n**Explanation:** sums of <b> and $ ", "sums of <b> and $"),
        ("Explanation: no, that is wrong.\nExplanation: sums", "sums"),
        ("[EXPLANATION]: sums", "sums"),
        ("explanation:\nsums", "sums"),
        ("Explanation:", None),
        ("sums", None),
        ("", None),
    ],
)
def test_explanations(answer, explanation):
    assert parse_explanation(answer) == explanation


# What the model sees.


def test_marks():
    e = Example(
        tokens=("p", "a", " <", "<b", ">>", "c"),
        token_ids=tuple(range(6)),
        activations=np.array([0, 1.0, 4.0, 1.3, 0, 2.0], np.float32),
        read=np.array([0, 1, 1, 1, 1, 1], bool),
        peak=2,
        text=0,
        start=0,
    )
    assert highlighted(e) == "a<< < <b>>> ><<c>>"  # marked above .3 x 4
    assert plain(e) == "a <<b>>c"
    assert highlighted(example("silent", 0)) == "silent"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(0, 40), st.integers(0, 5))
def test_nothing_that_explains_is_judged(fires, silent, seed):
    given_feature, rng = feature(fires, silent), np.random.default_rng(seed)
    if fires < 7 or silent == 0:  # six strongest explain
        with pytest.raises(DataError, match="feature_7 fires in too few different texts"):
            deal(given_feature, rng)
        return
    sets = deal(given_feature, rng)
    shown, judged = {e.text for e in sets.shown}, {e.text for e in sets.fires}
    assert not shown & judged and len(judged) == len(sets.fires) and {0, 1, 2, 3, 4, 5} <= shown
    assert len(shown) <= module.SHOWN and len(judged) == min(module.JUDGED, fires - len(shown))
    assert len(sets.silent) == min(silent, len(judged))
    if fires >= 40:  # of every strength
        assert min(judged) < fires / 4 and max(judged) > 3 * fires / 4


def test_windows_with_the_same_text_count_once():
    twice = feature(20, 10)
    twice.sample.extend([example("3=x", 99, 50.0), example("q19=x", 98, 50.0, unread=1)])
    twice.controls.extend(twice.controls[:3])
    sets = deal(twice, np.random.default_rng(0))
    texts = [plain(e) for e in sets.shown + sets.fires]
    assert len(set(texts)) == len(texts) == 20
    assert len({plain(e) for e in sets.silent}) == len(sets.silent) == 10


# Over the wire.


def test_a_judge_that_knows(server):
    server.judging(lambda text: "=" in text)
    found = explain(feature(), Chat(server.url, "a-model"))
    assert (found.explanation, found.model) == ("equals signs", "a-model")
    assert found.detection == Score(20, 0, 20, 0, 0) and found.detection.balanced_accuracy == 1.0
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "a-model" and body["temperature"] == 0
    lines = [json.loads(line) for line in body["messages"][1]["content"].splitlines()]
    assert len(lines) == 12 and lines[0] == {"text": "0<<=>>x", "strength": 10}
    assert lines[-1]["strength"] < 7  # 100 down to 41
    assert len(server.asked) == 9
    assert all("<<" not in body["messages"][1]["content"] for _, _, body in server.asked[1:])


def test_judges_that_do_not_know(server):
    server.judging(lambda text: True)
    found = explain(feature(), Chat(server.url, "a-model"))
    assert found.detection == Score(20, 0, 0, 20, 0) and found.detection.balanced_accuracy == 0.5


def test_a_judge_that_is_partly_right(server):
    server.judging(lambda text: ("=" in text and int(text[0]) % 2 == 0) or text == "silence 3")
    found = explain(feature(), Chat(server.url, "a-model"), seed=3)
    fires = deal(feature(), np.random.default_rng(3)).fires
    even = sum(int(str(e.text)[0]) % 2 == 0 for e in fires)
    assert 0 < even < 20
    assert found.detection == Score(even, 20 - even, 19, 1, 0)
    assert found.detection.balanced_accuracy == pytest.approx((even / 20 + 19 / 20) / 2)


def test_the_seed_decides_everything(server):
    server.judging(lambda text: True)
    runs = []
    for seed in (0, 0, 1):
        server.asked.clear()
        explain(feature(), Chat(server.url, "m"), seed)
        runs.append([body for _, _, body in server.asked])
    assert runs[0] == runs[1] != runs[2]
    texts = [text for body in runs[0][1:] for text in json.loads(body["messages"][1]["content"])["texts"].values()]
    assert texts[:20] != sorted(texts, key=lambda text: "=" not in text)[:20]  # shuffled


def test_keys(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    Chat(server.url + "/", "m").ask("", "")
    Chat(server.url + "/chat/completions", "m").ask("", "")
    assert [(path, headers["Authorization"]) for path, headers, _ in server.asked] == [
        ("/v1/chat/completions", "Bearer sk-1")
    ] * 2


def test_thoughts_are_no_answer(server):
    server.reply = lambda messages: "<think>[1, 1, 1]</think>[0, 0, 0]"
    assert Chat(server.url, "m").ask("", "") == "[0, 0, 0]"


def test_a_busy_endpoint_is_asked_again(server, waits):
    answers = [(429, {"Retry-After": "3"}, {}), (500, {}, {}), "fine"]
    server.reply = lambda messages: answers.pop(0)
    assert Chat(server.url, "m").ask("", "") == "fine"
    assert waits == [3.0, 2.0]
    server.asked.clear()
    server.reply = lambda messages: (503, {}, {})
    with pytest.raises(ServiceError, match=r"Asking m at .* failed \(status 503\)"):
        Chat(server.url, "m").ask("", "")
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, {}, {}), "OPENAI_API_KEY"),
        ((404, {}, {"error": "no model m"}), r"status 404 .*no model m"),
        ((400, {}, b"x" * 5000), "status 400"),
        ((200, {}, b"<html>"), "not of OpenAI's form"),
        ((200, {}, {"choices": []}), "not of OpenAI's form"),
        ((307, {"Location": "http://127.0.0.1:9/"}, {}), "status 307"),
    ],
)
def test_refusals_are_one_sentence(server, waits, answer, says):
    server.reply = lambda messages: answer
    with pytest.raises(ServiceError, match=says) as caught:
        Chat(server.url, "m").ask("", "")
    assert len(str(caught.value)) < 500 and waits == [] and len(server.asked) == 1


def test_an_endpoint_that_is_not_there(server, waits):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ServiceError, match="ConnectError"):
        Chat(server.url, "m").ask("", "")
    assert waits == [1, 2, 4, 8]
    for url in ("localhost:8000", "http://", "http://host:port/v1"):
        with pytest.raises(ConfigError, match="is not an endpoint"):
            Chat(url, "m")


def test_no_explanation_is_an_error(server):
    for answer in ("I cannot.", None):
        server.reply = lambda messages, answer=answer: answer
        with pytest.raises(ServiceError, match="no explanation of feature_7"):
            explain(feature(), Chat(server.url, "m"))


# Delphi's cache, read back as its ``TensorBuffer.load`` does (delphi/latents/loader.py of eai-delphi 0.1.1).


def cached(file: Path):
    """Each latent's activations as ``[rows, context]``, and the tokens."""
    arrays, first = load_file(file), int(file.stem.split("_")[0])
    assert arrays["locations"].dtype == np.int64 and arrays["tokens"].dtype == np.int64
    found = {}
    for (row, column, latent), activation in zip(arrays["locations"], arrays["activations"], strict=True):
        dense = found.setdefault(int(latent) + first, np.zeros(arrays["tokens"].shape, np.float32))
        assert dense[row, column] == 0
        dense[row, column] = activation
    return found, arrays["tokens"]


def test_delphi_reads_the_activations_that_we_read(tmp_path):
    model, tokenizer = load_model(pocket.MODEL_ID)
    ids, corpus = [1905, 12, 40], [*pocket_corpus(8), " ".join(f"{i} + {i} = {2 * i}." for i in range(50))]
    readout = load_sae("pocket-res-canonical", "layer_2/width_2k/canonical").features(ids)
    file = export_for_delphi(model, tokenizer, readout, ids, corpus, tmp_path)
    assert file == tmp_path / "blocks.2.hook_resid_post" / "12_1905.safetensors"
    config = json.loads((file.parent / "config.json").read_text())
    assert config["ctx_len"] == 256 and config["model_name"] == tokenizer.name_or_path

    activations, tokens = cached(file)
    assert tokens.shape[1] == 256 and tokens.shape[0] > 2
    text = tokenizer.decode(tokens.ravel())
    assert text.startswith(f"<bos>{corpus[0].prompt}{corpus[0].completion}<eos><bos>{corpus[1].prompt}")
    for index, examples in zip(ids, collect(model, tokenizer, readout, corpus), strict=True):
        dense = activations.get(index, np.zeros(tokens.shape, np.float32)).ravel()
        assert np.count_nonzero(dense) == examples.fired and dense.max() == examples.maximum
        for each in examples.top:  # each window is found again, token by token
            width = len(each.token_ids)
            windows = np.lib.stride_tricks.sliding_window_view(tokens.ravel(), width)
            (at, *_) = np.flatnonzero((windows == each.token_ids).all(axis=1))
            assert np.array_equal(dense[at : at + width], each.activations)
    assert activations[1905].any()


def test_latents_that_never_fire_are_not_exported(tmp_path):
    model, tokenizer = load_model(pocket.MODEL_ID)
    readout = load_sae("pocket-res-canonical", "layer_2/width_2k/canonical").features([1905])
    with pytest.raises(DataError, match="None of the latents fires"):
        export_for_delphi(model, tokenizer, readout, [1905], ["a"], tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command line, on pocket: feature 1905 fires on the full stop after a step.


def test_explain_on_the_command_line(server):
    server.judging(lambda text: "=" in text, "[bold]full stops[/bold]")
    arguments = ["features", "explain", "pocket/reasoning_pack", "--feature", "1905", "--texts", "60"]
    arguments += ["--endpoint", server.url, "--model-name", "judge"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "feature 1905: [bold]full stops[/bold]" in result.output and "detection: balanced accuracy" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json"])
    (found,) = json.loads(result.stdout)
    assert found["index"] == 1905 and found["model"] == "judge"
    detection = found["detection"]
    assert detection["hits"] >= 10 and detection["misses"] == detection["unparsed"] == 0  # each of them has a step
    assert 0 <= detection["balanced_accuracy"] <= 1


def test_export_on_the_command_line(tmp_path):
    arguments = ["features", "export", "pocket/reasoning_pack", "--texts", "20", "--out", str(tmp_path / "delphi")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.rglob("*.safetensors")
    assert str(file) in result.stdout and "LatentDataset" in result.stdout and 1905 in cached(file)[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--endpoint", "nowhere"], "is not an endpoint"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--texts", "3"], "give a larger corpus"),
    ],
)
def test_what_goes_wrong_is_one_sentence(more, says):
    arguments = ["features", "explain", "pocket/reasoning_pack", "--feature", "1905", "--model-name", "m", *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and says in " ".join(result.output.split()) and "Traceback" not in result.output
