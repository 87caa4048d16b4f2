"""The reward server under many requests and strange ones: nothing is lost, nothing grows, nothing breaks."""

import asyncio
import random
import subprocess
import sys
from collections import Counter

import httpx
import pytest
import torch
from serving import Process, http, measured

pytestmark = [pytest.mark.load, pytest.mark.timeout(3600)]

TOKEN = "a-token"


@pytest.fixture
def process(tmp_path):
    running = Process(
        tmp_path,
        *("--model", "mechreward/pocket", "--probe", "pocket/correctness_probe", "--batch-tokens", "2048"),
        token=TOKEN,
    )
    yield running
    running.end()


async def one(client, asked, leaves_after):
    """The answer, or None where we leave before it."""
    call = asyncio.ensure_future(client.post("/score_tokens", json=asked))
    if leaves_after is None:
        return await call
    done, _ = await asyncio.wait([call], timeout=leaves_after)
    if done:
        return call.result()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    return None


def test_of_ten_thousand_requests_each_that_stays_gets_its_own_answer_and_memory_is_flat(process):
    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    lengths = torch.randint(2, 24, (400,), generator=generator).tolist()
    rollouts = [
        ([1, 5 + k % 40], torch.randint(3, 50, (n,), generator=generator).tolist()) for k, n in enumerate(lengths)
    ]
    with http(process.url, TOKEN) as client:
        prompts, responses = map(list, zip(*rollouts, strict=True))
        own = client.post("/score_tokens", json={"prompt_ids": prompts, "response_ids": responses}).json()["rewards"]
    assert len({round(reward, 3) for reward in own}) > 380  # to be told from one another
    before, results, resident = {}, Counter(), {}

    async def send(number, client, places):
        rows = chance.choices(range(400), k=chance.randint(1, 4))
        asked = {"prompt_ids": [prompts[k] for k in rows], "response_ids": [responses[k] for k in rows]}
        leaves_after = chance.expovariate(1 / 0.02) if chance.random() < 0.3 else None
        async with places:
            answer = await one(client, asked, leaves_after)
        if answer is None:
            results["left"] += 1
            return
        results[answer.status_code] += 1
        for got, row in zip(answer.json()["rewards"], rows, strict=True):
            assert abs(got - own[row]) < 1e-3, f"request {number} got another's reward"

    async def play():
        places = asyncio.Semaphore(64)
        limits = httpx.Limits(max_connections=64)
        token = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=process.url, headers=token, limits=limits, timeout=600) as client:
            for upto in range(1000, 11_000, 1000):
                await asyncio.gather(*(send(n, client, places) for n in range(upto - 1000, upto)))
                resident[upto] = process.resident(), process.worker.memory_info().rss / 2**20

    with http(process.url, TOKEN) as client:
        before = measured(client)
        asyncio.run(play())
        after = measured(client)
    assert results.keys() == {200, "left"} and results.total() == 10_000 and results["left"] > 500
    answered = after["requests_total", "/score_tokens", "200"] - before["requests_total", "/score_tokens", "200"]
    gone = after["requests_total", "/score_tokens", "499"]
    assert results[200] <= answered <= answered + gone <= 10_000  # some left before the server heard of them
    assert gone > 100 and after["waiting_tokens",] == 0
    assert {key[2] for key in after if key[:2] == ("requests_total", "/score_tokens")} == {"200", "499"}
    grown = [late - early for early, late in zip(resident[2000], resident[10_000], strict=True)]
    assert grown[0] < 4, f"MiB of the server's process after so many requests: {resident}"
    assert grown[1] < 32, f"MiB of the worker, whose buffers follow the largest batch: {resident}"


def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(process):
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", "--seed", "1",
            "--max-examples", "100", "--continue-on-failure", "--suppress-health-check", "all",
            # Schemathesis thinks that whatever is formed well must be taken: a token may lie outside the vocabulary.
            "--exclude-checks", "positive_data_acceptance", "--header", f"Authorization: Bearer {TOKEN}",
        ],
        capture_output=True, text=True, cwd=process.log.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with http(process.url, TOKEN) as client:
        figures = measured(client)
        assert client.get("/readyz").status_code == 200
    assert not [key for key in figures if key[0] == "requests_total" and key[2].startswith("5")]
    assert sum(number for key, number in figures.items() if key[0] == "requests_total") > 500
