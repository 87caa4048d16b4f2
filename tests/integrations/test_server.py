"""The reward server: what it answers, what it refuses, and that nothing is lost when something goes wrong."""

import asyncio
import hmac
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import stand_in
import torch
from by_hand import saelens
from safetensors.torch import load_file, save
from serving import (
    DEADLY,
    POISON,
    MadeUpWorker,
    Process,
    answer_on,
    head,
    http,
    in_thread,
    made_up,
    measured,
    raw,
    tokenizer,
    until,
)  # fmt: skip
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mechreward as mr
from mechreward.errors import ConfigError
from mechreward.hacking.adversarial import AdversarialSuite
from mechreward.integrations.served import Served, build_reward
from mechreward.integrations.server import app as server
from mechreward.integrations.server import worker as worker_module
from mechreward.integrations.server.scorer import Rollout, Scorer
from mechreward.integrations.server.worker import Worker, WorkerDied
from mechreward.pocket.questions import questions

BYTES = {"Content-Type": "application/octet-stream"}
CATALOG = Path(mr.__file__).parent / "catalogs" / "pocket"

ASK = {"prompt_ids": [[1, 2, 3], [4]], "response_ids": [[5, 6, 7], [8, 9]]}
ROWS = [made_up(Rollout(p, r)) for p, r in zip(ASK["prompt_ids"], ASK["response_ids"], strict=True)]
ONE = json.dumps({"prompt_ids": [[1]], "response_ids": [[2, 3]]}).encode()


@pytest.fixture(scope="module")
def running():
    with pytest.MonkeyPatch.context() as monkeypatch, in_thread(monkeypatch) as (url, worker), http(url) as client:
        yield client, worker


@pytest.fixture
def plain(running):
    """A server on loopback with a made-up worker as good as new: a client, and the worker."""
    client, worker = running
    worker.__init__(worker.served, worker.folder)
    return client, worker


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_reply_holds_what_was_asked_for_and_nothing_else(plain):
    client, _ = plain
    bare = client.post("/score_tokens", json=ASK)
    assert bare.status_code == 200
    assert bare.json() == {
        "rewards": [row.reward for row in ROWS],
        "version": "initial",
        "token_rewards": None,
        "features": None,
        "flags": None,
    }
    full = client.post("/score_tokens", json=ASK | {"include": ["features", "token_rewards", "flags"]}).json()
    assert full["token_rewards"] == [[5, 6, None], [8, None]]
    assert full["features"] == {"pack/1": [5, 8]} and full["flags"] == [[], []]


def test_a_rollout_without_a_token_to_read_has_no_reward(plain):
    client, _ = plain
    asked = {"prompt_ids": [[1]], "response_ids": [[2]], "include": ["token_rewards"]}
    found = client.post("/score_tokens", json=asked).json()
    assert found["rewards"] == [None] and found["token_rewards"] == [[None]]


def test_both_routes_that_take_text_score_the_ids_that_the_tokenizer_gives(plain):
    client, worker = plain
    encode = tokenizer("mechreward/pocket")
    worker.limits = type(worker.limits)(512, len(encode), 1)
    prompts = ["<bos>Ada has 3 apples.\nAnswer:", "<bos>Bo has 4 pears.\nAnswer:"]
    responses = [" 3+4=7.<eos>", " 12"]
    rollouts = [
        Rollout(*(encode(text, add_special_tokens=False).input_ids for text in pair))
        for pair in zip(prompts, responses, strict=True)
    ]
    assert rollouts[0].prompt_ids[0] == encode.bos_token_id  # a special token, not its letters
    assert rollouts[0].response_ids[-1] == encode.eos_token_id
    expected = [made_up(rollout).reward for rollout in rollouts]
    query = [p + r for p, r in zip(prompts, responses, strict=True)]
    by_openrlhf = client.post("/get_reward", json={"query": query, "prompts": prompts, "labels": ["7", None]})
    assert by_openrlhf.json() == {
        "rewards": expected,
        "scores": expected,
        "extra_logs": {"flagged": [0.0, 0.0], "unscored": [0.0, 0.0]},
    }
    assert [rollout.label for rollout in worker.batches[-1]] == ["7", None]
    by_slime = [
        client.post("/slime", json={"prompt": p, "response": r, "label": "7"}).json()
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert by_slime == expected


def test_text_of_which_no_token_can_be_read_counts_as_zero_and_is_told(plain):
    client, worker = plain
    worker.limits = type(worker.limits)(512, 10**6, 1)
    assert client.post("/slime", json={"prompt": "1+1=", "response": ""}).json() == 0.0
    found = client.post("/get_reward", json={"query": ["1+1="], "prompts": ["1+1="]}).json()
    assert found["rewards"] == [0.0] and found["extra_logs"]["unscored"] == [1.0]


def test_a_query_that_does_not_begin_with_its_prompt_is_refused_with_the_way_out(plain):
    client, worker = plain
    refused = client.post("/get_reward", json={"query": ["abc"], "prompts": ["xyz"]})
    assert refused.status_code == 422 and "AgentExecutor" in refused.json()["detail"]
    assert not worker.batches


def test_rewards_do_not_depend_on_who_shares_the_batch(plain):
    client, worker = plain
    asked = [{"prompt_ids": [[k, 1]], "response_ids": [[2, k, 3]]} for k in range(40)]
    alone = [client.post("/score_tokens", json=each).json()["rewards"] for each in asked]
    worker.paused = True
    with ThreadPoolExecutor(41) as pool:
        busy = pool.submit(client.post, "/score_tokens", json=ASK)
        until(lambda: len(worker.batches) == 41)
        waiting = [pool.submit(client.post, "/score_tokens", json=each) for each in asked]
        until(lambda: measured(client)["waiting_tokens",] == 5 * 40)
        worker.paused = False
        assert [each.result().json()["rewards"] for each in waiting] == alone
        assert busy.result().status_code == 200
    assert [len(batch) for batch in worker.batches[40:]] == [2, 40]


def test_the_page_of_the_routes_is_there(plain):
    client, _ = plain
    assert client.get("/docs").status_code == 200
    routes = client.get("/openapi.json").json()["paths"]
    assert set(routes) == {
        "/score_tokens", "/get_reward", "/slime", "/weights", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, says",
    [
        (ASK | {"response_ids": [[1]]}, "2 prompt_ids, 1 response_ids: give one of each"),
        (ASK | {"response_ids": [[1], []]}, "response_ids[1]"),
        (ASK | {"response_ids": [[1], [-1]]}, "response_ids[1][0]"),
        (ASK | {"response_ids": [[1], [True]]}, "response_ids[1][0]"),
        (ASK | {"response_ids": [[1], [1.0]]}, "response_ids[1][0]"),
        (ASK | {"num_generations": 3}, "no groups of 3"),
        (ASK | {"include": ["everything"]}, "include[0]"),
        (ASK | {"temperature": 1}, "temperature"),
        (ASK | {"labels": ["7"]}, "1 labels"),
        (ASK | {"response_ids": [[1], [97]]}, "vocabulary of 97"),
        (ASK | {"response_ids": [[1], [10**30]]}, "vocabulary of 97"),
        (ASK | {"response_ids": [[1], [1] * 64]}, "Rollout 1 has 65 tokens, and the model takes 64"),
        ({}, "prompt_ids"),
        ([], "The request"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_sentence_that_names_it(plain, asked, says):
    client, worker = plain
    refused = client.post("/score_tokens", json=asked)
    assert refused.status_code == 422
    assert says in refused.json()["detail"] and "\n" not in refused.json()["detail"]
    assert not worker.batches


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt_ids": [[1]], "response_ids"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"null", b"nan",
        b'{"\\ud800": 1}', b'{"prompt_ids": [[1]], "response_ids": [[1]], "labels": ["\\ud800"]}',
    ],
)  # fmt: skip
def test_malformed_json_is_refused_and_nothing_breaks(plain, body):
    client, _ = plain
    refused = client.post("/score_tokens", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 422) and isinstance(refused.json()["detail"], str)
    assert client.post("/score_tokens", json=ASK).status_code == 200


@pytest.mark.parametrize("field", ["prompt", "response", "label"])
def test_half_a_surrogate_pair_is_no_text(plain, field):
    client, _ = plain
    asked = {"prompt": "a", "response": "b", "label": "c", field: "\ud800"}
    refused = client.post("/slime", content=json.dumps(asked), headers={"Content-Type": "application/json"})
    assert refused.status_code == 422 and field in refused.json()["detail"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_named_as_what_is_wrong(plain, kind):
    client, _ = plain
    headers = {} if kind is None else {"Content-Type": kind}
    refused = client.post("/score_tokens", content=json.dumps(ASK), headers=headers)
    assert refused.status_code == 415 and "Content-Type: application/json" in refused.json()["detail"]


def test_a_body_beyond_the_limit_is_refused_whether_or_not_it_says_its_length(monkeypatch):
    with in_thread(monkeypatch, max_body=10_000) as (url, worker), http(url) as client:
        large = json.dumps(ASK | {"labels": ["x" * 10_000, "y"]}).encode()
        pieces = (large[k : k + 1000] for k in range(0, len(large), 1000))
        kind = {"Content-Type": "application/json"}
        for content in (large, pieces):
            refused = client.post("/score_tokens", content=content, headers=kind)
            assert refused.status_code == 413 and "10000 bytes" in refused.json()["detail"]
        assert client.post("/score_tokens", json=ASK).status_code == 200
        assert len(worker.batches) == 1


def test_ten_megabytes_are_refused_before_they_are_read(plain):
    client, _ = plain
    with raw(client) as connection:
        connection.sendall(head(10 << 20))  # and nothing of the body
        assert " 413 " in answer_on(connection).splitlines()[0]
    body = b'{"prompt_ids": [[' + b"1," * (5 << 20)
    assert client.post("/score_tokens", content=body, headers={"Content-Type": "application/json"}).status_code == 413


def test_too_many_rollouts_in_one_request_are_refused(monkeypatch):
    with in_thread(monkeypatch, max_rollouts=3) as (url, _), http(url) as client:
        refused = client.post("/score_tokens", json={"prompt_ids": [[1]] * 4, "response_ids": [[1, 2]] * 4})
        assert refused.status_code == 413 and "at most 3" in refused.json()["detail"]
        asked = {"prompt_ids": [[1]] * 3, "response_ids": [[1, 2]] * 3}
        assert client.post("/score_tokens", json=asked).status_code == 200


def test_a_verifier_needs_labels(monkeypatch):
    served = Served("mechreward/pocket", ("pocket/reasoning_pack",), verifier="exact_match")
    with in_thread(monkeypatch, served) as (url, _), http(url) as client:
        refused = client.post("/score_tokens", json=ASK | {"labels": ["1", None]})
        assert refused.status_code == 422 and "Rollout 1 has no label" in refused.json()["detail"]
        assert client.post("/score_tokens", json=ASK | {"labels": ["1", "2"]}).status_code == 200


def test_a_full_queue_answers_429_with_the_seconds_to_wait(monkeypatch):
    with in_thread(monkeypatch, batch_tokens=5, queue_tokens=9) as (url, worker), http(url) as client:
        worker.paused = True
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.post, "/score_tokens", json=ASK)]
            until(lambda: worker.batches)
            waiting += [pool.submit(client.post, "/score_tokens", json=ASK)]
            until(lambda: measured(client)["waiting_tokens",] == 9)
            refused = client.post("/score_tokens", json=ASK)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            worker.paused = False
            assert [each.result().status_code for each in waiting] == [200, 200]
        assert client.post("/score_tokens", json=ASK).status_code == 200


def test_a_rollout_that_cannot_be_scored_is_an_error_for_its_own_request_alone(plain):
    client, worker = plain
    asked = [{"prompt_ids": [[k]], "response_ids": [[token, 1]]} for k, token in enumerate([1, POISON, 3])]
    worker.paused = True
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/score_tokens", json=ASK)
        until(lambda: len(worker.batches) == 1)
        waiting = [pool.submit(client.post, "/score_tokens", json=each) for each in asked]
        until(lambda: measured(client)["waiting_tokens",] == 9)
        worker.paused = False
        assert first.result().status_code == 200
        assert [each.result().status_code for each in waiting] == [200, 500, 200]
    assert waiting[1].result().json() == {"detail": "The rollout is poison."}


def test_a_batch_over_which_the_worker_dies_is_to_be_sent_again(plain):
    client, _ = plain
    refused = client.post("/score_tokens", json={"prompt_ids": [[1]], "response_ids": [[DEADLY, 1]]})
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert client.post("/score_tokens", json=ASK).status_code == 200


def test_readiness_is_the_workers_and_health_the_servers(plain):
    client, worker = plain
    assert client.get("/readyz").json() == {"status": "ready", "version": "initial"}
    worker.ready = False
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").json() == {"status": "ok"}


# -- who may ask -------------------------------------------------------------------------------------------------------


def test_without_the_right_token_only_the_open_routes_answer(monkeypatch):
    compared = []

    def compare_digest(given, right):
        compared.append((given, right))
        return hmac.compare_digest(given, right)

    monkeypatch.setattr(server, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare_digest)}))
    with in_thread(monkeypatch, token="sésame") as (url, worker), http(url) as client:
        right = b"Bearer " + "sésame".encode()
        for wrong in (None, b"Bearer", b"Bearer sesame", b"Basic " + right[7:], right[7:], right + b"x"):
            headers = {} if wrong is None else {b"Authorization": wrong}
            for method, route in [
                ("POST", "/score_tokens"), ("POST", "/get_reward"), ("POST", "/slime"), ("POST", "/weights"),
                ("GET", "/metrics"), ("GET", "/redoc"), ("GET", "/nowhere"),
            ]:  # fmt: skip
                refused = client.request(method, route, headers=headers)
                assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
                assert compared.pop()[1] == "sésame".encode()  # the one comparison is hmac's, in constant time
                assert not compared
        for route in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert client.get(route).status_code == 200
        for scheme in (b"Bearer ", b"bearer "):
            headers = {b"Authorization": scheme + "sésame".encode()}
            assert client.post("/score_tokens", json=ASK, headers=headers).status_code == 200
        assert len(worker.batches) == 2


def test_a_stranger_is_refused_before_anything_of_his_body_is_read(monkeypatch):
    with in_thread(monkeypatch, token="t") as (url, _), http(url) as client, raw(client) as connection:
        connection.sendall(head(1 << 20))
        assert " 401 " in answer_on(connection).splitlines()[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_loopback_the_command_line_demands_a_token(monkeypatch, host):
    from mechreward.cli import app

    monkeypatch.delenv("MECHREWARD_TOKEN", raising=False)
    refused = CliRunner().invoke(
        app, ["serve", "--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--host", host]
    )
    assert refused.exit_code == 2 and "MECHREWARD_TOKEN" in refused.stderr


@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
@pytest.mark.parametrize("host, open_to", [("127.0.0.1", None), ("::1", None), ("localhost", None), ("0.0.0.0", "t")])
def test_on_loopback_or_with_a_token_it_serves(monkeypatch, tmp_path, host, open_to):
    import uvicorn

    from mechreward.cli import app

    ran = []
    monkeypatch.setattr(uvicorn, "run", lambda made, **options: ran.append(options))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    monkeypatch.setattr("logging.captureWarnings", lambda _: None)
    monkeypatch.setenv("MECHREWARD_TOKEN", open_to or "")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    key.touch()
    certificate.touch()
    arguments = ["serve", "--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--host", host]
    arguments += ["--port", "1234", "--tls-key", str(key), "--tls-certificate", str(certificate), "--drain", "7"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (options,) = ran
    assert (options["host"], options["port"], options["timeout_graceful_shutdown"]) == (host, 1234, 7)
    assert (options["ssl_keyfile"], options["ssl_certfile"]) == (key, certificate)


@pytest.mark.parametrize(
    "given, says",
    [
        (["--pack", "pocket/reason_pack"], "reason_pack"),
        (["--pack", "pocket/reasoning_pack", "--weight", "1", "--weight", "2"], "2 weights"),
        ([], "nothing to serve"),
        (["--pack", "pocket/reasoning_pack", "--mode", "gate"], "use sum or gated"),
        (["--pack", "pocket/reasoning_pack", "--mode", "gated"], "needs a verifier"),
        (["--pack", "pocket/reasoning_pack", "--verifier", "gsm8"], "gsm8k"),
        (["--pack", "pocket/reasoning_pack", "--dtype", "int8"], "float32"),
        (["--pack", "pocket/reasoning_pack", "--guard", "strikt"], "strict"),
        (["--pack", "pocket/reasoning_pack", "--tls-key", "k.pem"], "belong together"),
        (["--pack", "pocket/reasoning_pack", "--tls-key", "k.pem", "--tls-certificate", "c.pem"], "no file"),
    ],
)
@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
def test_what_cannot_be_served_is_said_in_one_sentence(monkeypatch, given, says):
    from mechreward.cli import app

    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    monkeypatch.setattr("logging.captureWarnings", lambda _: None)
    refused = CliRunner().invoke(app, ["serve", "--model", "mechreward/pocket", *given])
    assert refused.exit_code == 2, refused.output
    assert refused.stderr.startswith("Error: ") and says in refused.stderr


# -- bad company -------------------------------------------------------------------------------------------------------


def test_a_body_that_stops_coming_is_given_up(plain, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.2)
    client, worker = plain
    with raw(client) as connection:
        connection.sendall(head(len(ONE)) + ONE[:5])
        found = answer_on(connection)
        assert " 408 " in found.splitlines()[0] and "connection: close" in found.lower()
        assert connection.recv(1) == b"" and not worker.batches


def test_a_slow_client_is_served_and_holds_nobody_up(plain):
    client, _ = plain
    with raw(client) as connection:
        connection.sendall(head(len(ONE)))
        for byte in ONE[:-1]:
            connection.sendall(bytes([byte]))
            if byte == ord("["):
                assert client.post("/score_tokens", json=ASK).status_code == 200
        connection.sendall(ONE[-1:])
        assert " 200 " in answer_on(connection).splitlines()[0]


def test_a_client_that_does_not_read_its_answer_holds_nobody_up(plain):
    client, _ = plain
    body = json.dumps(
        {"prompt_ids": [[1]] * 1000, "response_ids": [[2] * 60] * 1000, "include": ["token_rewards"]}
    ).encode()
    with raw(client) as deaf:
        deaf.sendall(head(len(body)) + body)
        assert client.post("/score_tokens", json=ASK).status_code == 200


@pytest.mark.parametrize("sent", [0, 5, len(ONE)])
def test_a_half_closed_connection_is_a_client_that_has_left(plain, sent):
    client, worker = plain
    before = gone(client)
    worker.paused = True
    with raw(client) as connection:
        connection.sendall(head(len(ONE)) + ONE[:sent])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    until(lambda: gone(client) == before + 1)
    worker.paused = False
    assert client.post("/score_tokens", json=ASK).status_code == 200


def gone(client):
    return measured(client).get(("requests_total", "/score_tokens", "499"), 0)


def test_a_client_that_leaves_the_queue_is_not_computed(plain):
    client, worker = plain
    before = gone(client)
    worker.paused = True
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(client.post, "/score_tokens", json=ASK)
        until(lambda: len(worker.batches) == 1)
        with raw(client) as leaving:
            leaving.sendall(head(len(ONE)) + ONE)
            until(lambda: measured(client)["waiting_tokens",] == 3)
        until(lambda: measured(client)["waiting_tokens",] == 0)
        worker.paused = False
        assert busy.result().status_code == 200
    assert client.post("/score_tokens", json=ASK).status_code == 200
    assert [len(batch) for batch in worker.batches] == [2, 2]  # the one that left was in neither
    assert gone(client) == before + 1


def test_a_drain_whose_time_is_over_tells_those_who_still_wait(monkeypatch):
    with (
        in_thread(monkeypatch, options={"timeout_graceful_shutdown": 0}) as (url, worker),
        http(url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        worker.paused = True
        waiting = pool.submit(client.post, "/score_tokens", json=ASK)
        until(lambda: worker.batches)
        worker.shut_down()
        assert waiting.result().status_code == 503 and "ask another one" in waiting.result().json()["detail"]


def test_nonsense_on_the_wire_is_refused(plain):
    client, _ = plain
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", head("x")):
        with raw(client) as connection:
            connection.sendall(nonsense)
            assert " 400 " in answer_on(connection).splitlines()[0]
    assert client.get("/healthz").status_code == 200


def test_an_error_of_our_own_is_counted_as_one_and_logged_without_what_was_sent(plain, monkeypatch, caplog):
    from mechreward.integrations.server.log import JSONLines

    client, worker = plain
    before = measured(client).get(("requests_total", "/score_tokens", "500"), 0)

    async def broken(rollouts):
        raise KeyError(f"label {rollouts[0].label}")

    monkeypatch.setattr(worker, "score", broken)
    with caplog.at_level("ERROR"):
        asked = {"prompt_ids": [[1]], "response_ids": [[2, 3]], "labels": ["a secret"]}
        assert client.post("/score_tokens", json=asked).status_code == 500
    assert measured(client)["requests_total", "/score_tokens", "500"] == before + 1
    (line,) = [JSONLines().format(record) for record in caplog.records if record.exc_info]
    assert "KeyError" in line and "in broken" in line and "secret" not in line


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_metrics_agree_with_what_was_sent(plain):
    client, _ = plain
    client.post("/score_tokens", json=[])  # so that its figures are there
    before = measured(client)
    assert client.post("/score_tokens", json=ASK).status_code == 200
    flagged = {"prompt_ids": [[1], [2]], "response_ids": [[7, 7, 7, 7], [1]]}
    assert client.post("/score_tokens", json=flagged).status_code == 200
    client.post("/score_tokens", json=ASK | {"response_ids": []})
    client.post("/score_tokens", json={"prompt_ids": [[1]], "response_ids": [[POISON]]})
    client.get("/nowhere/" + "x" * 50)
    client.post("/weights", params={"version": "1"})
    found = measured(client)
    assert found["request_seconds_count", "/score_tokens"] == before["request_seconds_count", "/score_tokens"] + 4
    gained = {key: value - before.get(key, 0.0) for key, value in found.items() if "seconds" not in key[0]}
    assert {key: value for key, value in gained.items() if value and not key[0].endswith(("_created", "_bucket"))} == {
        ("requests_total", "/score_tokens", "200"): 2,
        ("requests_total", "/score_tokens", "422"): 1,
        ("requests_total", "/score_tokens", "500"): 1,
        ("requests_total", "/weights", "409"): 1,
        ("requests_total", "/metrics", "200"): 1,
        ("requests_total", "unknown", "404"): 1,
        ("rollouts_total",): 4,
        ("tokens_total",): 9 + 7,
        ("flagged_rollouts_total",): 1,
        ("unscored_rollouts_total",): 1,
        ("batch_rollouts_count",): 3,
        ("batch_rollouts_sum",): 5,
    }


# -- weights, with a worker that is made up ----------------------------------------------------------------------------


def test_frozen_weights_stay_what_they_are(plain):
    client, worker = plain
    refused = client.post("/weights", params={"version": "2"}, content=b"weights")
    assert refused.status_code == 409 and "--live" in refused.json()["detail"] and worker.version == "initial"


def test_pushed_weights_need_a_version_and_a_right_file_and_leave_nothing_behind(monkeypatch):
    with in_thread(monkeypatch, live=True) as (url, worker), http(url) as client:
        for version in (None, "", "a b", "x" * 65, "../up", "ü\n"):
            params = {} if version is None else {"version": version}
            assert client.post("/weights", params=params, content=b"weights", headers=BYTES).status_code == 422
        for other in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}):
            refused = client.post("/weights", params={"version": "2"}, content=b"weights", headers=other)
            assert refused.status_code == 415 and "application/octet-stream" in refused.json()["detail"]
        refused = client.post("/weights", params={"version": "2"}, content=b"junk", headers=BYTES)
        assert refused.status_code == 422 and refused.json() == {"detail": "These are no weights."}
        refused = client.post("/weights", params={"version": "2"}, content=b"x" * (2 << 20), headers=BYTES)
        assert refused.status_code == 413 and worker.version == "initial"
        with raw(client) as connection:  # who leaves in the middle of a file leaves no file
            connection.sendall(head(1000, "/weights?version=2", *BYTES.values()) + b"x" * 100)
            until(lambda: list(worker.folder.iterdir()))
        until(lambda: not list(worker.folder.iterdir()))
        assert measured(client)["weight_pushes_total",] == 0
        taken = client.post("/weights", params={"version": "step-2.1"}, content=b"weights", headers=BYTES)
        assert taken.json() == {"version": "step-2.1", "tensors": 1}
        assert measured(client)["weight_pushes_total",] == 1 and client.get("/readyz").json()["version"] == "step-2.1"


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_tls_with_a_certificate_that_the_client_trusts(monkeypatch, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    options = {"ssl_keyfile": key, "ssl_certfile": certificate}
    with in_thread(monkeypatch, options=options) as (url, _):
        assert url.startswith("https")
        with http(url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
            assert client.post("/score_tokens", json=ASK).json()["rewards"] == [row.reward for row in ROWS]
        with http(url) as client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get("/healthz")


# -- the worker, with a process that stands in for the model's ---------------------------------------------------------


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """A worker whose process is tests/stand_in.py's; ``served`` is a folder with a file for each start."""
    monkeypatch.setattr(worker_module, "_work", stand_in.work)
    (tmp_path / "served").mkdir()
    (tmp_path / "kept").mkdir()
    return Worker(tmp_path / "served", tmp_path / "kept")


def played(worker, play):
    async def whole():
        await worker.start()
        try:
            return await asyncio.wait_for(play(), 250)
        finally:
            worker.stop()
            assert not worker._process.is_alive()

    return asyncio.run(whole())


def test_a_worker_that_dies_is_started_again_although_nobody_asks_and_has_the_pushed_weights(worker, tmp_path):
    (tmp_path / "1").write_text("")
    (tmp_path / "2").write_text("")

    async def play():
        assert worker.limits == "limits of 0"
        assert await worker.score(["a"]) == ("a", "initial")
        assert await worker.load_weights(tmp_path / "1", "one") == 1
        assert await worker.load_weights(tmp_path / "2", "two") == 1
        assert not (tmp_path / "1").exists() and (tmp_path / "2").exists()  # one version is kept
        with pytest.raises(WorkerDied):
            await worker.score(["die"])
        assert not worker.ready
        while not worker.ready:  # as /readyz would say: no request may be needed for it
            await asyncio.sleep(0.01)
        assert worker.restarts == 1
        assert await worker.score(["b"]) == ("b", "two")

    played(worker, play)


def test_a_worker_that_was_killed_while_idle_is_started_again_for_the_next_request(worker):
    async def play():
        worker._process.kill()
        worker._process.join()
        assert await worker.score(["a"]) == ("a", "initial")
        assert worker.restarts == 1

    played(worker, play)


def test_an_answer_that_nobody_waits_for_is_not_given_to_the_next(worker):
    async def play():
        for command in ("dawdle", "a"):
            left = asyncio.create_task(worker.score([command]))
            await asyncio.sleep(0.1)
            left.cancel()
        assert await worker.score(["b"]) == ("b", "initial")
        assert worker.restarts == 0

    played(worker, play)


def test_a_worker_that_refuses_goes_on_and_one_that_cannot_start_again_is_tried_again(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "PAUSE", 0.01)

    async def play():
        with pytest.raises(ConfigError, match=r"Refused\."):
            await worker.score(["refuse"])
        assert worker.restarts == 0
        (worker.served / "broken").touch()
        with pytest.raises(WorkerDied):
            await worker.score(["die"])
        with pytest.raises(WorkerDied, match=r"It cannot be loaded\."):
            await worker.score(["a"])
        (worker.served / "broken").unlink()
        while not worker.ready:
            await asyncio.sleep(0.01)
        assert await worker.score(["a"]) == ("a", "initial")

    played(worker, play)


def test_a_worker_that_cannot_be_started_says_why(worker):
    (worker.served / "broken").touch()

    async def start():
        await worker.start()

    with pytest.raises(ConfigError, match=r"It cannot be loaded\."):
        asyncio.run(start())
    assert str(worker.failure) == "It cannot be loaded."
    worker.stop()


@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
def test_the_command_line_says_so_in_one_sentence(monkeypatch):
    from mechreward.cli import app

    class Broken(MadeUpWorker):
        async def start(self):
            self.failure = ConfigError("It cannot be loaded.")
            raise self.failure

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(server, "Worker", Broken)
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    monkeypatch.setattr("logging.captureWarnings", lambda _: None)
    try:
        refused = CliRunner().invoke(
            app, ["serve", "--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--port", "0"]
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert refused.exit_code == 2 and "Error: It cannot be loaded." in refused.stderr


# -- outcomes and guards -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
@pytest.mark.parametrize("guard", ["text_only", "standard"])
def test_what_a_guard_has_learned_outlives_the_worker(monkeypatch, tmp_path, guard):
    of = AdversarialSuite.from_preset
    monkeypatch.setattr(AdversarialSuite, "from_preset", lambda name: of(name, clean=200))
    served = Served("mechreward/pocket", ("pocket/reasoning_pack",), guard=guard)
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout([1, 5], torch.randint(3, 50, (int(length),), generator=generator).tolist())
        for length in torch.randint(5, 15, (240,), generator=generator)
    ]
    batches = [rollouts[start : start + 40] for start in range(0, 240, 40)]
    through = Scorer(served)
    expected = [through.score(batch) for batch in batches]
    again, found = None, []
    for batch in batches:
        again = Scorer(served, tmp_path / "guards.json")  # every batch another worker's
        found.append(again.score(batch))
    assert again is not None and again.reward.guards and through.reward.guards
    assert again.reward.guards[0].thresholds == through.reward.guards[0].thresholds
    assert len(through.reward.guards[0].thresholds) > 2
    assert found == expected and not (tmp_path / "guards.part").exists()


@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
def test_a_verifier_judges_by_the_labels_and_may_gate_the_features(rollouts):
    prompts, responses = ([ids[k] for k in (0, 1, 2, 9)] for ids in rollouts)
    answers = [q.answer for q in itertools.islice(questions("gate", 0, "reasoning"), 12)]
    labels, right = [answers[0], "-1", answers[2], "-1"], torch.tensor([1.0, 0.0, 1.0, 0.0])
    asked = [Rollout(*row) for row in zip(prompts, responses, labels, strict=True)]

    def rewards(**options):
        served = Served("mechreward/pocket", ("pocket/reasoning_pack",), **options)
        return torch.tensor([score.reward for score in Scorer(served).score(asked)])

    features = rewards()
    torch.testing.assert_close(rewards(verifier="gsm8k"), features + right)
    torch.testing.assert_close(rewards(verifier="gsm8k", mode="gated"), right * (features + 1))
    torch.testing.assert_close(rewards(verifier="gsm8k", weights=[0.5]), 0.5 * features + right)


@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
@pytest.mark.parametrize("mode", ["sum", "gated"])
def test_token_rewards_sum_to_the_reward(rollouts, mode):
    """Of good, cut, resumed, repeating and empty responses, with right, wrong and no labels."""
    answers = [q.answer for q in itertools.islice(questions("gate", 0, "reasoning"), 12)]
    labels = [*answers[:8], answers[8], "-1", None, answers[11]]
    packs, probes = tuple(f"pocket/{name}" for name in PACKS), (f"pocket/{PROBE[0]}",)
    served = Served(
        "mechreward/pocket", packs, probes, [1.0, -0.5, 0.25], verifier="gsm8k", mode=mode, aggregation="mean"
    )
    scores = Scorer(served).score([Rollout(*row) for row in zip(*rollouts, labels, strict=True)])
    assert scores[5].flags and any(score.reward and abs(score.reward) > 1 for score in scores)
    for score, response in zip(scores, rollouts[1], strict=True):
        tokens = score.token_rewards
        if score.reward is None:
            assert tokens == [None] * len(response)
            continue
        assert sum(filter(None, tokens)) == pytest.approx(score.reward, abs=1e-4)
        end = response.index(EOS) + 1 if EOS in response else len(response)
        judged = end if score is not scores[10] else end - 1  # without a label the last token has no part
        assert [t is not None for t in tokens] == [True] * judged + [False] * (len(response) - judged)
    assert (scores[10].reward is None) == (mode == "gated")
    if mode == "gated":
        wrong = scores[9].token_rewards
        assert set(filter(None, wrong)) == set() and wrong[-1] == 0


# -- all of it, on pocket ----------------------------------------------------------------------------------------------

TOKEN = "a-long-random-text"
PACKS = {"reasoning_pack": 1.0, "confidence_pack": -0.5}
PROBE = ("correctness_probe", 0.25)
DETAILS = {"include": ["token_rewards", "features", "flags"]}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """``mechreward serve`` with two packs and a probe, as a process; the last test ends it."""
    weights = [*PACKS.values(), PROBE[1]]
    process = Process(
        tmp_path_factory.mktemp("server"),
        "--model", "mechreward/pocket", "--live", "--batch-tokens", "2000",
        *(f"--pack=pocket/{name}" for name in PACKS), f"--probe=pocket/{PROBE[0]}",
        *(f"--weight={weight}" for weight in weights),
        token=TOKEN,
    )  # fmt: skip
    yield process
    process.end()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(mr.pocket.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rollouts():
    """Prompts and completions of pocket's task, and the odd cases: ended early, said over and over, hardly begun."""
    encode = tokenizer("mechreward/pocket")
    asked = list(itertools.islice(questions("gate", 0, "reasoning"), 12))
    prompts = [encode(q.prompt).input_ids for q in asked]
    responses = [[*encode(q.solution, add_special_tokens=False).input_ids, EOS] for q in asked]
    responses[3] = responses[3][:-1]  # cut off
    responses[4] = [*responses[4][:20], EOS, *responses[4][20:]]  # and goes on after its end
    responses[5] = responses[5][:6] * 12
    responses[6] = responses[6][:1]
    responses[7] = [EOS, *responses[7]]
    responses[8] = responses[8][:2]
    return prompts, responses


EOS = 2


@torch.no_grad()
def by_hand(model, prompt, response):
    """What a rollout earns, by Hugging Face's hidden states, SAELens' encode and the packs' files.

    Returns:
        The reward, the tokens' rewards, the features' means.
    """
    end = response.index(EOS) + 1 if EOS in response else len(response)
    read = response[: end - 1]  # the last sampled token is never read
    if not read:
        return None, [None] * len(response), None
    hidden = model(input_ids=torch.tensor([prompt + read]), output_hidden_states=True).hidden_states[3][0]
    hidden = hidden[len(prompt) :]
    fired = saelens("jumprelu").encode(hidden).double()
    grams = [tuple(response[:end][k : k + 4]) for k in range(end - 3)]
    flagged = len(grams) >= 16 and 1 - len(set(grams)) / len(grams) > 0.5
    parts, features = [], {}
    for name, weight in PACKS.items():
        pack = json.loads((CATALOG / f"{name}.json").read_text())
        ids = [feature["id"] for feature in pack["features"]]
        features |= {f"{name}/feature_{i}": float(fired[:, i].mean()) for i in ids}
        parts.append((weight, fired[:, ids] @ torch.tensor([f["weight"] for f in pack["features"]]).double()))
    probe = load_file(CATALOG / f"{PROBE[0]}.safetensors")
    logits = hidden.double() @ probe["weight"].double().flatten() + probe["bias"].double()
    features[f"pocket/{PROBE[0]}/pocket/{PROBE[0]}"] = float(logits.mean())
    parts.append((PROBE[1], logits))

    def left(weight, value):
        return 0.0 if flagged and weight * value > 0 else weight

    reward = sum(left(weight, tokens[-32:].mean()) * tokens[-32:].mean() for weight, tokens in parts)
    tokens = sum(left(weight, tokens.mean()) * tokens / len(read) for weight, tokens in parts).tolist()
    return float(reward), tokens + [None] * (len(response) - len(read)), features


def assert_close(got, expected):
    """Equal, as far as float32 goes: a padded batch rounds otherwise than a sequence alone; None is None."""
    assert [x is None for x in got] == [x is None for x in expected]
    numbers = [(a, b) for a, b in zip(got, expected, strict=True) if b is not None]
    assert all(abs(a - b) <= 2e-4 * max(1, abs(b)) for a, b in numbers), max(abs(a - b) for a, b in numbers)


def assert_by_hand(found, model, prompts, responses):
    expected = [by_hand(model, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert_close(found["rewards"], [reward for reward, _, _ in expected])
    for got, (_, tokens, _) in zip(found["token_rewards"], expected, strict=True):
        assert_close(got, tokens)
    names = next(features for _, _, features in expected if features).keys()
    assert found["features"].keys() == names
    for name in names:
        assert_close(found["features"][name], [features and features[name] for _, _, features in expected])


def scored(client, prompts, responses):
    answer = client.post("/score_tokens", json={"prompt_ids": prompts, "response_ids": responses} | DETAILS)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_rewards_tokens_and_features_equal_those_by_hand(real, model, rollouts):
    with http(real.url, TOKEN) as client:
        found = scored(client, *rollouts)
        assert_by_hand(found, model, *rollouts)
        assert [bool(flags) for flags in found["flags"]] == [row == 5 for row in range(12)]
        assert found["flags"][5][0].startswith("repetition")
        assert found["rewards"][6] is None and found["rewards"][7] is None and found["version"] == "initial"
        rewards = [scored(client, [p], [r])["rewards"][0] for p, r in zip(*rollouts, strict=True)]  # one by one
        assert_close(rewards, found["rewards"])


def test_text_and_ids_of_the_same_rollouts_earn_the_same(real, rollouts):
    encode = tokenizer("mechreward/pocket")
    prompts, responses = ([ids[k] for k in (0, 1, 2, 3, 8, 9)] for ids in rollouts)
    texts = [[encode.decode(ids) for ids in column] for column in (prompts, responses)]
    with http(real.url, TOKEN) as client:
        by_ids = scored(client, prompts, responses)["rewards"]
        query = [p + r for p, r in zip(*texts, strict=True)]
        assert_close(client.post("/get_reward", json={"query": query, "prompts": texts[0]}).json()["rewards"], by_ids)
        by_slime = [
            client.post("/slime", json={"prompt": p, "response": r}).json() for p, r in zip(*texts, strict=True)
        ]
        assert_close(by_slime, by_ids)


def without_head(state):
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}  # it is tied


def test_pushed_weights_are_read_and_echoed_and_what_does_not_fit_changes_nothing(real, model, rollouts):
    generator = torch.Generator().manual_seed(0)
    pushed = AutoModelForCausalLM.from_pretrained(mr.pocket.path(), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in pushed.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    own, original = (without_head(m.state_dict()) for m in (pushed, model))
    wrong = {
        "no tensor 'policy.": {f"policy.{name}": tensor for name, tensor in own.items()},
        "has shape [7, 3]": own | {"model.embed_tokens.weight": torch.zeros(7, 3)},
        "is missing": {name: tensor for name, tensor in own.items() if ".1." not in name},
        "not whole safetensors": save(own)[:-100],
        "not whole safetensors ": b"\x80\x04.",
        "not whole safetensors  ": b"",
    }

    def push(content, version):
        content = content if isinstance(content, bytes) else save(content)
        return client.post("/weights", params={"version": version}, content=content, headers=BYTES)

    with http(real.url, TOKEN) as client:
        before = scored(client, *rollouts)
        for says, content in wrong.items():
            refused = push(content, "never")
            assert refused.status_code == 422 and says.strip() in refused.json()["detail"], refused.text
            assert scored(client, *rollouts) == before
        assert push(own, "step-1").json() == {"version": "step-1", "tensors": len(own)}
        found = scored(client, *rollouts)
        assert found["version"] == "step-1"
        assert_by_hand(found, pushed, *rollouts)
        assert abs(found["rewards"][0] - before["rewards"][0]) > 0.01

        # A worker that is killed in the middle of a batch: its request is told so, the next are served, and by the
        # same weights.
        figures = measured(client)
        with ThreadPoolExecutor(4) as pool:
            killed = real.worker
            os.kill(killed.pid, signal.SIGSTOP)
            in_hand = pool.submit(client.post, "/score_tokens", json={"prompt_ids": [[1]], "response_ids": [[2, 3]]})
            until(lambda: measured(client)["batch_rollouts_count",] == figures["batch_rollouts_count",] + 1)
            waiting = [pool.submit(scored, client, *rollouts) for _ in range(2)]
            until(lambda: measured(client)["waiting_tokens",] > 0)
            os.kill(killed.pid, signal.SIGKILL)
            assert in_hand.result().status_code == 503 and int(in_hand.result().headers["Retry-After"]) > 0
            assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
            for each in waiting:
                assert_by_hand(each.result(), pushed, *rollouts)
                assert each.result()["version"] == "step-1"
        assert client.get("/readyz").json() == {"status": "ready", "version": "step-1"}
        assert real.worker.pid != killed.pid
        assert measured(client)["worker_restarts",] == figures["worker_restarts",] + 1

        assert push(original, "step-0").json()["version"] == "step-0"
        assert scored(client, *rollouts) == before | {"version": "step-0"}


def test_at_the_end_all_that_was_taken_is_answered_and_nothing_is_left(real, rollouts):
    """SIGTERM to the whole process group, as a service manager may send it, while requests wait."""
    with http(real.url, TOKEN) as client, ThreadPoolExecutor(9) as pool:
        secret = {"prompt": "Zanzibar has 3 apples.\nAnswer:", "response": " 3 Zanzibars", "label": "Zanzibar"}
        assert client.post("/slime", json=secret).status_code == 200
        assert client.post("/score_tokens", content=b'{"Zanzibar": 1}').status_code == 415
        assert client.post("/score_tokens", json={"Zanzibar": 1}).status_code == 422
        assert client.get("/Zanzibar").status_code == 404
        expected, before = scored(client, *rollouts)["rewards"], measured(client)
        worker, tokens = real.worker, sum(len(p) + len(r) for p, r in zip(*rollouts, strict=True))
        os.kill(worker.pid, signal.SIGSTOP)
        waiting = [pool.submit(scored, client, *rollouts)]
        until(lambda: measured(client)["batch_rollouts_count",] == before["batch_rollouts_count",] + 1)
        waiting += [pool.submit(scored, client, *rollouts) for _ in range(7)]
        until(lambda: measured(client)["waiting_tokens",] == 7 * tokens)
        os.killpg(real.popen.pid, signal.SIGTERM)
        until(lambda: "Shutting down" in real.log.read_text())
        with pytest.raises(httpx.ConnectError):
            http(real.url, TOKEN).get("/healthz")
        os.kill(worker.pid, signal.SIGCONT)
        for each in waiting:
            assert_close(each.result()["rewards"], expected)
    assert real.popen.wait(120) == 0
    assert not worker.is_running()

    lines = real.lines()  # each is JSON
    assert "Zanzibar" not in real.log.read_text() and TOKEN not in real.log.read_text()
    asked = [line for line in lines if line.get("route")]
    assert {"method": "POST", "route": "/score_tokens", "status": 200, "rollouts": 12, "tokens": tokens}.items() <= (
        asked[-1] | {"ms": 0}
    ).items()
    assert {line["status"] for line in asked} >= {200, 404, 415, 422}


def test_a_served_probe_is_its_pooled_logit(caplog):
    """Calibrated or not, and whatever the server's aggregation is."""
    for how, pooled in ((None, "mean_last_32_tokens"), ("max", "max")):
        (part,) = build_reward(
            Served("mechreward/pocket", probes=["pocket/correctness_probe"], aggregation=how)
        ).rewards
        assert (part.scale, part.aggregation) == ("logit", pooled)
    assert not caplog.records
