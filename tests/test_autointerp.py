"""Explanations and their scores, against a local server whose answers are known."""

import asyncio
import itertools
import json
import re
import sys
import threading
import types
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mechreward import retry
from mechreward.cli import app
from mechreward.errors import ConfigError, DataError, ServiceError
from mechreward.features import autointerp as module
from mechreward.features.autointerp import (
    Chat,
    Score,
    active,
    deal,
    explain,
    explain_with_delphi,
    highlighted,
    judge,
    mean_marks,
    parse_explanation,
    parse_verdicts,
    plain,
    random_marks,
    score,
)
from mechreward.features.examples import Example, FeatureExamples

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

    def judging(self, detects, fuzzes, explanation="equals signs"):
        """Explains, and judges each text by a rule."""

        def reply(messages):
            system, user = (message["content"] for message in messages)
            if "You study a feature" in system:
                return json.dumps({"explanation": explanation})
            asked = json.loads(user)
            assert asked["explanation"] == explanation
            rule = fuzzes if "tokens between << and >>" in system else detects
            return json.dumps([int(rule(text)) for text in asked["texts"].values()])

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


# The scores, by hand.


def test_a_score_by_hand():
    texts = [("a", True), ("b", True), ("c", False), ("d", False), ("e", False)]
    says = {"a": 1, "b": 0, "c": 0, "d": 1, "e": 0}
    found = judge(texts, lambda some: json.dumps([says[text] for text in some]), np.random.default_rng(0))
    assert found == Score(hits=1, misses=1, rejections=2, false_alarms=1, unparsed=0)
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert str(found) == (
        "balanced accuracy 0.583 (1 of 2 that fire, 2 of 3 that do not; 0 of 5 answers could not be read)"
    )


def test_answers_that_cannot_be_read_are_counted():
    texts = [(f"{i}=", True) for i in range(6)] + [(str(i), False) for i in range(6)]
    batches = []

    def ask(some):
        batches.append(some)
        return "I would rather not say." if len(batches) == 2 else json.dumps(["=" in text for text in some])

    found = judge(texts, ask, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [5, 5, 2] and sorted(itertools.chain(*batches)) == sorted(
        t for t, _ in texts
    )
    lost = sum("=" in text for text in batches[1])
    assert found == Score(6 - lost, 0, 6 - (5 - lost), 0, 5)
    assert found.balanced_accuracy == 1.0 and "5 of 12 answers could not be read" in str(found)
    nothing = judge(texts, lambda some: "", np.random.default_rng(0))
    assert nothing == Score(0, 0, 0, 0, 12) and nothing.balanced_accuracy is None and "n/a" in str(nothing)
    assert score([(True, True), (True, None)]).balanced_accuracy is None


def test_what_is_judged_is_shuffled_by_the_seed():
    def order(seed):
        seen = []
        judge([(str(i), True) for i in range(12)], lambda some: seen.extend(some) or "", np.random.default_rng(seed))
        return seen

    assert order(0) == order(0) != order(1) and sorted(order(0)) == sorted(order(1)) and order(0) != sorted(order(0))


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("```json\n[true, false, 1]\n```", [True, False, True]),
        ('{"answers": [0, 0, 1]}', [False, False, True]),
        ("Texts [1, 2] differ, so at first [0,0,0]; but no: [1, 1, 0].", [True, True, False]),
        ("<think>[1, 1, 1]</think>[0, 0, 0]", [False, False, False]),
        ('[1, "maybe", null]', [True, None, None]),
        ("[1, 2, 0]", [True, None, False]),
        ("[[1], 0, 1]", [None] * 3),
        ('{"1": 1, "2": 0, "3": 1}', [None] * 3),
        ("[1, 0]", [None] * 3),
        ("[1, 0, 1, 1]", [None] * 3),
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
        ('{"explanation": " sums "}', "sums"),
        ('Well:\n```json\n{"explanation": "a {brace} in it"}\n```', "a {brace} in it"),
        ('<think>{"explanation": "no"}</think>\n{"explanation": "yes"}', "yes"),
        ("[EXPLANATION]: sums\nof numbers", "sums\nof numbers"),
        ("Explanation: sums", "sums"),
        ('{"explanation": ""}', None),
        ('{"explanation": 3}', None),
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
    assert active(e).tolist() == [False, False, True, True, False, True]  # above .3 x 4
    assert highlighted(e, active(e)) == "a<< < <b>>> ><<c>>"
    assert plain(e) == "a < <b> >c"
    marks = random_marks(e, 2, np.random.default_rng(0))
    assert marks.sum() == 2 and not marks[0]
    assert random_marks(e, 99, np.random.default_rng(0)).sum() == 5
    assert mean_marks([e, example("1=2", 0, 1.0)]) == 2  # of 3 and 1
    assert not active(example("silent", 0)).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(0, 40), st.integers(0, 5))
def test_nothing_that_explains_is_judged(fires, silent, seed):
    given_feature = feature(fires, silent)
    if fires < 7 or silent == 0:  # six strongest explain
        with pytest.raises(DataError, match=r"feature_7 (fires in too few|is never silent)"):
            deal(given_feature, seed)
        return
    sets = deal(given_feature, seed)
    shown, judged = {e.text for e in sets.shown}, {e.text for e in sets.fires}
    assert not shown & judged and len(judged) == len(sets.fires) and {0, 1, 2, 3, 4, 5} <= shown
    assert len(shown) <= module.SHOWN and len(judged) == min(module.JUDGED, fires - len(shown))
    assert len(sets.silent) == min(silent, len(judged))
    if fires >= 40:  # of every strength
        assert min(judged) < fires / 4 and max(judged) > 3 * fires / 4


def test_windows_with_the_same_tokens_count_once():
    twice = feature(20, 10)
    twice.sample.extend([example("3=x", 99, 50.0), example("q19=x", 98, 50.0, unread=1)])
    twice.controls.extend(twice.controls[:3])
    sets = deal(twice)
    texts = [plain(e) for e in sets.shown + sets.fires]
    assert len(set(texts)) == len(texts) == 20
    assert len({plain(e) for e in sets.silent}) == len(sets.silent) == 10


# Over the wire.


def test_a_judge_that_knows(server):
    server.judging(lambda text: "=" in text, lambda text: "<<=>>" in text)
    found = explain(feature(), Chat(server.url, "a-model"))
    assert (found.explanation, found.engine, found.model) == ("equals signs", "builtin", "a-model")
    assert found.detection == found.fuzzing == Score(20, 0, 20, 0, 0)
    assert found.detection.balanced_accuracy == 1.0
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "a-model" and body["temperature"] == 0
    lines = [json.loads(line) for line in body["messages"][1]["content"].splitlines()]
    assert len(lines) == 12 and lines[0] == {"text": "0<<=>>x", "strength": 10}
    assert lines[-1]["strength"] < 7  # 100 down to 41
    assert len(server.asked) == 17
    assert all("<<" not in body["messages"][1]["content"] for _, _, body in server.asked[1:9])


def test_judges_that_do_not_know(server):
    server.judging(lambda text: True, lambda text: "<<" in text)  # both always yes
    found = explain(feature(), Chat(server.url, "a-model"))
    assert found.detection == found.fuzzing == Score(20, 0, 0, 20, 0)
    assert found.detection.balanced_accuracy == 0.5


def test_a_judge_that_is_partly_right(server):
    server.judging(lambda text: ("=" in text and int(text[0]) % 2 == 0) or text == "silence 3", lambda text: False)
    found = explain(feature(), Chat(server.url, "a-model"), seed=3)
    judged = deal(feature(), seed=3).fires
    even = sum(int(str(e.text)[0]) % 2 == 0 for e in judged)
    assert 0 < even < 20
    assert found.detection == Score(even, 20 - even, 19, 1, 0)
    assert found.detection.balanced_accuracy == pytest.approx((even / 20 + 19 / 20) / 2)
    assert found.fuzzing == Score(0, 20, 20, 0, 0)


def test_controls_have_as_many_marks(server):
    seen = []
    server.judging(lambda text: True, lambda text: seen.append(text) or True)
    explain(feature(), Chat(server.url, "a-model"))
    silent = [text for text in seen if "=" not in text]
    assert len(silent) == 20 and all(re.sub("<<|>>", "", text).startswith("silence ") for text in silent)
    assert [len("".join(re.findall("<<(.*?)>>", text))) for text in silent] == [1] * 20
    assert len({text.index("<<") for text in silent}) > 3  # not always the same place


def test_the_seed_decides_everything(server):
    server.judging(lambda text: True, lambda text: True)
    runs = []
    for seed in (0, 0, 1):
        server.asked.clear()
        explain(feature(), Chat(server.url, "m"), seed)
        runs.append([body for _, _, body in server.asked])
    assert runs[0] == runs[1] != runs[2]


def test_keys(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    Chat(server.url + "/", "m").ask([])
    Chat(server.url + "/chat/completions", "m", key="sk-2").ask([])
    assert [(path, headers["Authorization"]) for path, headers, _ in server.asked] == [
        ("/v1/chat/completions", "Bearer sk-1"),
        ("/v1/chat/completions", "Bearer sk-2"),
    ]


def test_patience(server, waits):
    answers = [(429, {"Retry-After": "3"}, {}), (500, {}, {}), "fine"]
    server.reply = lambda messages: answers.pop(0)
    assert Chat(server.url, "m").ask([]) == "fine"
    assert waits == [3.0, 2.0]
    server.reply = lambda messages: (503, {}, {})
    with pytest.raises(ServiceError, match=r"Asking m at .* failed 5 times, last with status 503"):
        Chat(server.url, "m").ask([])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, {}, {}), "set OPENAI_API_KEY"),
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
        Chat(server.url, "m").ask([])
    assert len(str(caught.value)) < 500 and waits == [] and len(server.asked) == 1


def test_an_endpoint_that_is_not_there(server, waits):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ServiceError, match="ConnectError"):
        Chat(server.url, "m").ask([])
    with pytest.raises(ConfigError, match="is not an endpoint"):
        Chat("localhost:8000", "m")


def test_no_explanation_is_an_error(server):
    for answer in ("I cannot.", None):
        server.reply = lambda messages, answer=answer: answer
        with pytest.raises(ServiceError, match="no explanation of feature_7"):
            explain(feature(), Chat(server.url, "m"))


# Delphi: a stand-in with the real package's names and signatures, as read in its source.


@pytest.fixture
def delphi(monkeypatch):
    @dataclass
    class Latent:
        module_name: str
        latent_index: int

    @dataclass
    class ActivatingExample:
        tokens: Any
        activations: Any
        normalized_activations: Any = None
        str_tokens: list | None = None
        quantile: int = 0

    @dataclass
    class NonActivatingExample:
        tokens: Any
        activations: Any
        str_tokens: list
        distance: float = 0.0

    @dataclass
    class LatentRecord:
        latent: Latent
        examples: list = field(default_factory=list)
        not_active: list = field(default_factory=list)
        train: list = field(default_factory=list)
        test: list = field(default_factory=list)
        explanation: str = ""

    class OpenRouter:
        def __init__(self, model, api_key=None, base_url="", max_tokens=3000, temperature=1.0):
            assert api_key and base_url.endswith("/v1/chat/completions")
            self.model, self.temperature, self.fails = model, temperature, model == "broken"

        async def generate(self, prompt, max_retries=1, **kwargs):
            await asyncio.sleep(0)
            if self.fails:
                raise RuntimeError("Failed to generate text after multiple attempts.")
            return types.SimpleNamespace(text=prompt)

    @dataclass
    class DefaultExplainer:
        client: Any
        verbose: bool = False
        threshold: float = 0.3
        temperature: float = 0.0
        generation_kwargs: dict = field(default_factory=dict)
        activations: bool = True
        cot: bool = False

        async def __call__(self, record):
            for e in record.train:
                assert len(e.tokens) == len(e.activations) == len(e.str_tokens) == len(e.normalized_activations)
                assert e.normalized_activations.min() >= 0 and e.normalized_activations.max() <= 10
            answer = await self.client.generate([{"role": "user", "content": "?"}], temperature=self.temperature)
            text = "equals signs" if self.client.model != "mute" else "Explanation could not be parsed."
            assert answer.text
            return types.SimpleNamespace(record=record, explanation=text)

    class Scorer:
        def __init__(self, client, verbose=False, n_examples_shown=1, log_prob=False, temperature=0.0, **kwargs):
            assert n_examples_shown == 1 and not verbose and not log_prob
            self.client = client

        async def __call__(self, record):
            assert record.explanation == "equals signs" and record.latent.latent_index == 7
            outputs = []
            for e in [*record.not_active, *record.test]:
                activating = isinstance(e, ActivatingExample)
                prediction = None if e is record.test[0] else self.predict("".join(e.str_tokens))
                outputs.append(types.SimpleNamespace(activating=activating, prediction=prediction))
            return types.SimpleNamespace(record=record, score=outputs)

    class DetectionScorer(Scorer):
        def predict(self, text):
            return "=" in text

    class FuzzingScorer(Scorer):
        def __init__(self, client, verbose=False, n_examples_shown=1, threshold=0.3, log_prob=False, **kwargs):
            super().__init__(client, verbose, n_examples_shown, log_prob, **kwargs)

        def predict(self, text):
            return 1

    parts = {
        "delphi": {},
        "delphi.clients": {"OpenRouter": OpenRouter},
        "delphi.explainers": {"DefaultExplainer": DefaultExplainer},
        "delphi.scorers": {"DetectionScorer": DetectionScorer, "FuzzingScorer": FuzzingScorer},
        "delphi.latents": {},
        "delphi.latents.latents": {
            each.__name__: each for each in (Latent, ActivatingExample, NonActivatingExample, LatentRecord)
        },
    }
    for name, members in parts.items():
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)


def test_delphi(delphi, server):
    found = explain_with_delphi(feature(), Chat(server.url, "a-model"))
    assert (found.explanation, found.engine) == ("equals signs", "delphi")
    assert found.detection == Score(19, 0, 20, 0, 1)
    assert found.fuzzing == Score(19, 0, 0, 20, 1)
    with pytest.raises(ServiceError, match=r"Delphi could not explain feature_7 .* multiple attempts"):
        explain_with_delphi(feature(), Chat(server.url, "broken"))
    with pytest.raises(ServiceError, match="no explanation of feature_7"):
        explain_with_delphi(feature(), Chat(server.url, "mute"))


def test_without_delphi(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "delphi", None)
    with pytest.raises(ConfigError, match="pip install eai-delphi"):
        explain_with_delphi(feature(), Chat(server.url, "m"))


# The command line, on pocket: feature 1905 fires on the full stop after a step.


def test_explain_on_the_command_line(server):
    server.judging(lambda text: "=" in text, lambda text: "<<.>>" in text, "[bold]full stops[/bold]")
    arguments = ["features", "explain", "pocket/reasoning_pack", "--feature", "1905", "--texts", "60"]
    arguments += ["--endpoint", server.url, "--model-name", "judge"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "feature 1905: [bold]full stops[/bold]" in result.output and "detection: balanced accuracy" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json"])
    (found,) = json.loads(result.stdout)
    assert found["index"] == 1905 and found["model"] == "judge"
    fires = found["fuzzing"]["hits"] + found["fuzzing"]["misses"]
    assert fires >= 10 and found["fuzzing"]["hits"] >= 0.8 * fires and found["fuzzing"]["unparsed"] == 0
    assert found["detection"]["hits"] == fires  # each of these texts has a step


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--endpoint", "nowhere"], "is not an endpoint"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--engine", "oracle"], "choose builtin or delphi"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--texts", "3"], "give a larger corpus"),
    ],
)
def test_what_goes_wrong_is_one_sentence(more, says):
    arguments = ["features", "explain", "pocket/reasoning_pack", "--feature", "1905", "--model-name", "m", *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and says in " ".join(result.output.split()) and "Traceback" not in result.output
