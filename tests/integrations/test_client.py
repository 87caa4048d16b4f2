"""The reward server's client: patient where that helps, and clear where it does not. The server is a script."""

import asyncio
import json
import pickle
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from mechreward.errors import RewardError, ServiceError
from mechreward.integrations import client as module
from mechreward.integrations.client import RewardClient

REPLY = {"rewards": [0.5, None], "version": "initial", "token_rewards": None, "features": None, "flags": None}
ASK = ([[1, 2], [3]], [[4], [5, 6]])
HANG, DROP, CUT = "hang", "drop", "cut"


class Script:
    """An HTTP server on loopback that gives the next of its answers to each request, and keeps what was asked.

    An answer is a body, a (status, body, headers), or: HANG says nothing, DROP hangs up, CUT does so in the middle.
    """

    def __init__(self, *answers):
        self.answers, self.asked, self.server = list(answers), [], None

    async def start(self, port=0):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        top = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in top[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.asked.append((top[0].removesuffix(" HTTP/1.1"), headers, body))
        answer = self.answers.pop(0)
        if answer == HANG:
            await reader.read()
        elif answer != DROP:
            status, body, more = answer if isinstance(answer, tuple) else (200, answer, {})
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in more.items()]
            writer.write(
                "\r\n".join([*lines, "", ""]).encode() + content[: len(content) // 2 if answer == CUT else None]
            )
        writer.close()


@asynccontextmanager
async def talking_to(*answers, **options):
    script = Script(*answers)
    await script.start()
    async with script.server, RewardClient(f"http://127.0.0.1:{script.port}/", **options) as client:
        yield client, script


@pytest.fixture
def pauses(monkeypatch):
    """The client's pauses in seconds, which pass at once, on the clock of its deadline too."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep, timeout=asyncio.timeout))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 1000.0 + sum(slept)))
    return slept


def fails(*answers, ask=ASK, **options):
    """The error of a call, and how often the server was asked."""

    async def play():
        async with talking_to(*answers, **options) as (client, script):
            with pytest.raises(ServiceError) as error:
                await client.score_tokens(*ask)
            return error.value, len(script.asked)

    return asyncio.run(play())


def test_a_call_sends_the_request_and_the_token_and_understands_the_reply():
    async def play():
        reply = REPLY | {"flags": [[], ["repetition"]]}
        taken, texts = {"version": "7", "tensors": 3}, {"rewards": [1.0], "scores": [1.0], "extra_logs": {}}
        async with talking_to(reply, taken, texts, token="secret") as (client, script):
            found = await client.score_tokens(*ASK, labels=["a", None], num_generations=2, include=["flags"])
            assert found.rewards == [0.5, None] and found.flags == [[], ["repetition"]] and found.version == "initial"
            assert (await client.push_weights(b"weights", "step-7")).tensors == 3
            assert (await client.get_reward(["ab"], ["a"], ["b"])).rewards == [1.0]
        (line, headers, body), pushed, text = script.asked
        assert line == "POST /score_tokens" and headers["authorization"] == "bearer secret"
        assert headers["content-type"] == "application/json"
        assert json.loads(body) == {
            "prompt_ids": ASK[0],
            "response_ids": ASK[1],
            "response_mask": None,
            "labels": ["a", None],
            "num_generations": 2,
            "include": ["flags"],
        }
        assert pushed[0] == "POST /weights?version=step-7" and pushed[2] == b"weights"
        assert pushed[1]["content-type"] == "application/octet-stream"
        assert text[0] == "POST /get_reward"
        assert json.loads(text[2]) == {"query": ["ab"], "prompts": ["a"], "labels": ["b"]}

    asyncio.run(play())


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504])
def test_a_busy_server_is_asked_again_after_the_time_that_it_names(pauses, status):
    async def play():
        busy = (status, {"detail": "Later."}, {"Retry-After": "7"})
        async with talking_to(busy, busy, REPLY) as (client, script):
            assert (await client.score_tokens(*ASK)).rewards == [0.5, None]
            assert len(script.asked) == 3 and len({body for _, _, body in script.asked}) == 1

    asyncio.run(play())
    assert pauses == [7.0, 7.0]


def test_a_time_to_come_back_may_be_a_date(pauses):
    async def play():
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
        async with talking_to((503, {}, {"Retry-After": date}), REPLY) as (client, _):
            await client.score_tokens(*ASK)

    asyncio.run(play())
    assert 0 < pauses[0] <= 100


def test_without_one_the_pauses_double_are_bounded_and_differ_between_clients(pauses):
    async def play():
        async with talking_to(*[(503, {}, {})] * 9, REPLY) as (client, _):
            await client.score_tokens(*ASK)

    asyncio.run(play())
    asyncio.run(play())
    for drawn in (pauses[:9], pauses[9:]):
        limits = [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]
        assert all(limit / 2 <= pause <= limit for limit, pause in zip(limits, drawn, strict=True))
    assert pauses[:9] != pauses[9:]


def test_a_server_that_is_not_there_yet_is_waited_for(pauses, monkeypatch):
    async def play():
        script = Script(DROP, CUT, REPLY)
        await script.start()
        script.server.close()
        await script.server.wait_closed()
        slept = module.asyncio.sleep

        async def sleep(seconds):
            await slept(seconds)
            if len(pauses) == 2:
                await script.start(script.port)

        monkeypatch.setattr(module.asyncio, "sleep", sleep)
        async with RewardClient(f"http://127.0.0.1:{script.port}") as client:
            assert (await client.score_tokens(*ASK)).version == "initial"
        script.server.close()
        assert len(script.asked) == 3

    asyncio.run(play())
    assert len(pauses) == 4  # not there twice, hung up once, an answer cut in half


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 415, 422, 500, 301])
def test_what_would_not_be_better_a_second_time_is_not_sent_again(pauses, status):
    error, asked = fails((status, {"detail": "Rollout 1 is too long."}, {"Retry-After": "1"}))
    assert asked == 1 and not pauses
    assert "Rollout 1 is too long." in str(error) and str(status) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("body", [b"<html>\n<b>no</b></html>", b"", b"[]", b'{"detail": 3}', b"\xff" * 3000])
def test_a_refusal_that_is_not_the_servers_own_is_told_in_short(body):
    error, _ = fails((404, body, {}))
    assert len(str(error)) < 400 and "\n" not in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        [1.0],
        {},
        REPLY | {"rewards": ["1", "2"]},
        REPLY | {"more": 1},
        {"rewards": [1.0]},
        b'{"rewards": [NaN, 1.0], "version": "initial"}',
        REPLY | {"rewards": [1.0]},
        REPLY | {"rewards": [1.0, 2.0, 3.0]},
    ],
)
def test_an_answer_of_another_shape_is_refused(pauses, body):
    error, asked = fails(body)
    assert asked == 1 and not pauses and "\n" not in str(error)


def test_as_many_rewards_by_text_as_texts():
    async def play():
        async with talking_to({"rewards": [1.0], "scores": [1.0], "extra_logs": {}}) as (client, _):
            with pytest.raises(ServiceError, match="1 rewards for 2"):
                await client.get_reward(["ab", "ac"], ["a", "a"])

    asyncio.run(play())


def test_the_last_word_says_what_happened_how_often_and_where_to_look_and_can_be_pickled(pauses):
    error, asked = fails(*[(429, {"detail": "The queue is full."}, {"Retry-After": "4"})] * 9, deadline=30)
    assert asked == 8 and sum(pauses) == 28  # an eighth pause would end after the deadline
    said = str(error)
    assert "within 30 s" in said and "8 attempts" in said and "429" in said and "The queue is full." in said
    assert "/readyz" in said and "\n" not in said
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ServiceError and str(again) == said


def test_a_wait_beyond_the_deadline_is_not_begun(pauses):
    error, asked = fails((503, {"detail": "It starts."}, {"Retry-After": "31"}), deadline=30)
    assert asked == 1 and not pauses and "It starts." in str(error)


def test_a_server_that_never_answers_is_given_up_at_the_deadline():
    error, asked = fails(HANG, deadline=0.3)
    assert asked == 1 and "within 0.3 s" in str(error) and "the deadline" in str(error)


def test_one_attempt_may_be_given_up_before_the_deadline(pauses):
    async def play():
        async with talking_to(HANG, REPLY, timeout=0.2) as (client, script):
            await client.score_tokens(*ASK)
            assert len(script.asked) == 2

    asyncio.run(play())
    assert len(pauses) == 1


def test_nobody_there_until_the_deadline(pauses):
    async def play():
        async with RewardClient("http://127.0.0.1:9", deadline=5) as client:
            with pytest.raises(ServiceError, match="ConnectError"):
                await client.score_tokens(*ASK)

    asyncio.run(play())
    assert len(pauses) >= 4


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:8000", "http://", "http://127.0.0.1:port"])
def test_an_address_that_is_none_is_said_at_once(pauses, url):
    async def play():
        async with RewardClient(url) as client:
            with pytest.raises(ServiceError) as error:
                await client.score_tokens(*ASK)
            assert "\n" not in str(error.value)

    asyncio.run(play())
    assert not pauses


@pytest.mark.parametrize(
    "ask",
    [([[1]], [[1], [2]]), ([], []), ([[1]], [[]]), ([[1]], [[-1]]), ([[1]], [[1.5]]), ([[1]], [["1"]])],
)
def test_what_is_no_request_is_not_sent(ask):
    async def play():
        async with talking_to() as (client, script):
            with pytest.raises(RewardError) as error:
                await client.score_tokens(*ask)
            assert not script.asked and "\n" not in str(error.value)

    asyncio.run(play())


def test_a_call_can_be_cancelled_while_it_waits():
    async def play():
        async with talking_to(HANG, REPLY) as (client, script):
            call = asyncio.create_task(client.score_tokens(*ASK))
            while not script.asked:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await client.score_tokens(*ASK)).rewards == [0.5, None]

    asyncio.run(play())


def test_the_client_needs_neither_torch_nor_a_web_server():
    code = (
        "import sys, mechreward.integrations.client as c; c.RewardClient('http://x');"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
