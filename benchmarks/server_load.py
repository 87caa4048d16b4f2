"""What the reward server's HTTP, batching and processes cost: throughput beside direct scoring, latency under load.

    python benchmarks/server_load.py [--model mechreward/pocket --pack pocket/reasoning_pack] [--rounds 5]

Direct scoring is `Scorer.score` in this process on the same requests in the same order, joined to batches of the same
size as the server's. For each number of clients, each with a connection of its own:

- closed loop: a client sends its next request as soon as it has the answer; the throughput is compared with direct
  scoring;
- open loop: requests arrive as a Poisson process at a share of that throughput, whether or not earlier ones have been
  answered. Latency counts from the arrival, so that waiting for the client's own earlier request counts too.

All take turns in a new order every round; ratios are taken within a round. Every answer is compared with direct scoring
of the request alone. The clients share the machine with the server, and write and read HTTP by hand to take little of
it. Leaves `benchmarks/results/server.json` and a page made from it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

import mechreward as mr
from mechreward.files import made_now, made_sentence
from mechreward.integrations.served import Served
from mechreward.integrations.server.scorer import Rollout, Scorer
from mechreward.pocket.questions import questions

RESULTS = Path(__file__).parent / "results"

CLIENTS = (1, 4, 16, 64, 256)

MIN_RATIO = 0.8
"""Target: the server's throughput over direct scoring's, with as many clients as fill its batches."""

LOAD = 0.7
"""Share of the closed loop's throughput at which requests arrive in the open loop."""

TOLERANCE = 1e-3
"""How far a reward may lie from direct scoring's of the request alone, as a share of the largest: float32 rounds
otherwise in a batch of another shape. Beyond it the answer is another request's."""


@dataclass(frozen=True)
class Request:
    """One request: its rollouts, how it looks on the wire, and the rewards of direct scoring alone."""

    rollouts: Sequence[Rollout]
    wire: bytes
    rewards: Sequence[float | None]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rollouts))


@dataclass
class Turn:
    """What one turn saw.

    Attributes:
        seconds: From the first request to the last answer.
        tokens: In the requests that were answered.
        latencies: Seconds from each arrival to its answer.
        lost: Requests without an answer, or with an error.
        duplicated: Bytes that came without having been asked for.
        difference: Largest distance of a reward from direct scoring's.
    """

    seconds: float = 0.0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    difference: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


# -- what is asked -----------------------------------------------------------------------------------------------------


def made(scorer: Scorer, count: int, each: int) -> list[Request]:
    """Requests of ``each`` rollouts of one prompt: pocket's word problems and parts of their solutions."""
    draw, found = random.Random(0), []
    for question in itertools.islice(questions("gate", 0, "reasoning"), count):
        prompt = scorer.model.tokenizer(question.prompt).input_ids
        solution = scorer.model.tokenizer(question.solution, add_special_tokens=False).input_ids
        parts = [solution[: draw.randint(min(8, len(solution)), len(solution))] for _ in range(each)]
        rollouts = [Rollout(prompt, part, group=each) for part in parts]
        body = json.dumps(
            {"prompt_ids": [prompt] * each, "response_ids": parts, "num_generations": each}, separators=(",", ":")
        ).encode()
        head = (
            f"POST /score_tokens HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        wire = head.encode() + b"\r\n\r\n" + body
        found.append(Request(rollouts, wire, [score.reward for score in scorer.score(rollouts)]))
    return found


def distance(got: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Largest difference; infinite where one has a reward and the other has none."""
    if len(got) != len(expected) or any((a is None) != (b is None) for a, b in zip(got, expected, strict=True)):
        return float("inf")
    return max((abs(a - b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None), default=0.0)


# -- the ways to ask ---------------------------------------------------------------------------------------------------


def direct(scorer: Scorer, requests: Sequence[Request], batch_tokens: int) -> Turn:
    """Batches of whole requests, in their order, as many as fit."""
    turn, began = Turn(), time.perf_counter()
    waiting = list(requests)
    while waiting:
        batch = [waiting.pop(0)]
        while waiting and sum(r.tokens for r in batch) + waiting[0].tokens <= batch_tokens:
            batch.append(waiting.pop(0))
        scores = iter(scorer.score([rollout for request in batch for rollout in request.rollouts]))
        for request in batch:
            rewards = [next(scores).reward for _ in request.rollouts]
            turn.difference = max(turn.difference, distance(rewards, request.rewards))
            turn.tokens += request.tokens
    turn.seconds = time.perf_counter() - began
    return turn


class Client:
    """A connection, on which one request is answered after the other."""

    def __init__(self, turn: Turn, address: tuple[str, int]):
        self.turn, self.address = turn, address
        self.reader: Any = None

    async def begin(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(*self.address, limit=1 << 24)

    async def end(self) -> None:
        """Hang up; until the server does so too, it may send what nobody asked for."""
        self.writer.write_eof()
        self.turn.duplicated += len(await self.reader.read())
        self.writer.close()

    async def ask(self, request: Request, arrived: float) -> None:
        """Send, wait, compare. A connection that the server has closed for idleness is opened anew."""
        for _ in range(2):
            try:
                self.writer.write(request.wire)
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                body = await self.reader.readexactly(int(length[1]) if length else 0)
                break
            except (OSError, asyncio.IncompleteReadError):
                await self.begin()
        else:
            self.turn.lost += 1
            return
        self.turn.latencies.append(time.perf_counter() - arrived)
        if not head.startswith(b"HTTP/1.1 200"):
            self.turn.lost += 1
            return
        self.turn.difference = max(self.turn.difference, distance(json.loads(body)["rewards"], request.rewards))
        self.turn.tokens += request.tokens


async def with_clients(
    address: tuple[str, int], count: int, play: Callable[[Client], Awaitable[None]], turn: Turn
) -> Turn:
    """All clients at once, each doing as ``play`` says."""
    clients = [Client(turn, address) for _ in range(count)]
    await asyncio.gather(*(client.begin() for client in clients))
    began = time.perf_counter()
    await asyncio.gather(*(play(client) for client in clients))
    turn.seconds = time.perf_counter() - began
    await asyncio.gather(*(client.end() for client in clients))
    return turn


async def closed(address: tuple[str, int], count: int, requests: Sequence[Request]) -> Turn:
    """Each client sends the next request as soon as it has the answer."""
    waiting = iter(requests)

    async def play(client: Client) -> None:
        for request in waiting:
            await client.ask(request, time.perf_counter())

    return await with_clients(address, count, play, Turn())


async def opened(address: tuple[str, int], count: int, requests: Sequence[Request], rate: float, seed: int) -> Turn:
    """Requests arrive at random, ``rate`` a second on average, each at a client drawn at random."""
    draw, turn = random.Random(seed), Turn()
    arrivals = list(itertools.accumulate(draw.expovariate(rate) for _ in requests))
    own: dict[int, list[tuple[float, Request]]] = {client: [] for client in range(count)}
    for arrival, request in zip(arrivals, requests, strict=True):
        own[draw.randrange(count)].append((arrival, request))
    queues = iter(own.values())
    began = time.perf_counter()

    async def play(client: Client) -> None:
        for arrival, request in next(queues):
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            await client.ask(request, began + arrival)

    return await with_clients(address, count, play, turn)


# -- the server --------------------------------------------------------------------------------------------------------


class Server:
    """``mechreward serve`` on a free port of loopback."""

    def __init__(self, served: Served, batch_tokens: int, threads: int, log: IO[bytes]):
        self.log = log
        command = [sys.executable, "-c", "from mechreward.cli import app; app()", "serve", "--model", served.model]
        command += [f"--pack={pack}" for pack in served.packs]
        command += ["--port", "0", "--batch-tokens", str(batch_tokens), "--queue-tokens", str(1 << 30)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("MECHREWARD_TOKEN", None)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        while not (address := re.search(rb"running on http://([\d.]+):(\d+)", self.said())):
            if self.process.poll() is not None:
                raise SystemExit(self.said().decode())
            time.sleep(0.1)
        self.address = (address[1].decode(), int(address[2]))

    def said(self) -> bytes:
        self.log.seek(0)
        return self.log.read()

    def answered(self) -> int:
        """Requests that the server says it has answered."""
        with urllib.request.urlopen("http://{}:{}/metrics".format(*self.address)) as metrics:
            text = metrics.read().decode()
        found = re.search(r'requests_total\{route="/score_tokens",status="200"\} (\S+)', text)
        return int(float(found[1])) if found else 0

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


# -- the comparison ----------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace, log: IO[bytes]) -> dict[str, Any]:
    """All turns, and what is made of them."""
    torch.set_num_threads(options.threads)
    served = Served(options.model, tuple(options.pack))
    scorer = Scorer(served)
    requests = made(scorer, options.requests, options.each)
    server = Server(served, options.batch_tokens, options.threads, log)
    turns: dict[str, list[Turn]] = {"direct": []}
    turns |= {f"{loop} {count}": [] for loop in ("closed", "open") for count in options.clients}
    try:
        direct(scorer, requests, options.batch_tokens)  # warm up, both
        asyncio.run(closed(server.address, 16, requests))
        before, asked = server.answered(), 0
        for number in range(options.rounds):
            for count in random.Random(number).sample([0, *options.clients], 1 + len(options.clients)):
                if count == 0:
                    turns["direct"].append(direct(scorer, requests, options.batch_tokens))
                    continue
                full = asyncio.run(closed(server.address, count, requests))
                rate = LOAD * len(requests) / full.seconds
                turns[f"closed {count}"].append(full)
                turns[f"open {count}"].append(asyncio.run(opened(server.address, count, requests, rate, number)))
                asked += 2 * len(requests)
        answered = server.answered() - before
    finally:
        server.stop()
    largest = max(abs(reward) for request in requests for reward in request.rewards if reward is not None)
    everything = [turn for each in turns.values() for turn in each]
    return {
        "requests": len(requests),
        "rollouts": options.each,
        "tokens": sum(request.tokens for request in requests),
        "direct": spread([turn.rate for turn in turns["direct"]]),
        "clients": [of_clients(turns, count) for count in options.clients],
        "asked": asked,
        "answered": answered,
        "lost": sum(turn.lost for turn in everything),
        "duplicated_bytes": sum(turn.duplicated for turn in everything),
        "largest_difference": max(turn.difference for turn in everything),
        "largest_reward": largest,
        "same_rewards": all(turn.difference <= TOLERANCE * largest for turn in everything),
    }


def of_clients(turns: dict[str, list[Turn]], count: int) -> dict[str, Any]:
    full, arriving = turns[f"closed {count}"], turns[f"open {count}"]
    ratios = [turn.rate / plain.rate for turn, plain in zip(full, turns["direct"], strict=True)]
    latencies = {
        "closed": sorted(itertools.chain.from_iterable(turn.latencies for turn in full)),
        "open": sorted(itertools.chain.from_iterable(turn.latencies for turn in arriving)),
    }
    return {
        "clients": count,
        "throughput": spread([turn.rate for turn in full]),
        "ratio": spread(ratios),
        "arriving": spread([turn.rate for turn in arriving]),
        **{
            f"{loop}_p{percent}": values[min(len(values) - 1, len(values) * percent // 100)] if values else None
            for loop, values in latencies.items()
            for percent in (50, 99)
        },
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    def within(values: dict[str, float], form: str) -> str:
        return f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})"

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{1000 * seconds:,.1f}"

    best = max(case["ratio"]["median"] for case in report["clients"])
    lines = [
        "# Reward server",
        "",
        f"`{report['command']}` on {report['machine']}; {report['versions']}. {made_sentence(report)}",
        "",
        f"{report['requests']} requests of {report['rollouts']} rollouts, {report['tokens']:,} tokens in all, to a "
        f"server of {report['model']}. Direct batched scoring: {within(report['direct'], ',.0f')} tokens a second.",
        "",
        "| clients | closed loop: tokens a second | of direct scoring | p50, p99 (ms) | open loop: tokens a second "
        "| p50, p99 (ms) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in report["clients"]:
        lines.append(
            f"| {case['clients']} | {within(case['throughput'], ',.0f')} | {within(case['ratio'], '.2f')} "
            f"| {ms(case['closed_p50'])}, {ms(case['closed_p99'])} | {within(case['arriving'], ',.0f')} "
            f"| {ms(case['open_p50'])}, {ms(case['open_p99'])} |"
        )
    lines += [
        "",
        f"Medians of {report['rounds']} rounds (lowest to highest). Target for throughput: {MIN_RATIO} of direct "
        f"scoring; reached: {best:.2f}. Open loop: Poisson arrivals at {LOAD:.0%} of the closed loop's throughput of "
        "the round, latency from the arrival.",
        "",
        f"Of {report['asked']:,} requests {report['lost']:,} were lost, and the server counts {report['answered']:,} "
        f"answers; {report['duplicated_bytes']:,} bytes came unasked. Largest difference of a reward from that of its "
        f"request scored alone: {report['largest_difference']:.1e} (the largest reward is "
        f"{report['largest_reward']:.1f}).",
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} processors{gpu}"


def command(options: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """What was run, without folders of this machine."""
    given = []
    for name, value in vars(options).items():
        if name != "out" and value != getattr(defaults, name):
            values = value if isinstance(value, list) else [value]
            given += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(["python benchmarks/server_load.py", *given])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mr.pocket.MODEL_ID)
    parser.add_argument("--pack", nargs="+", default=["pocket/reasoning_pack"])
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--requests", type=int, default=1024, help="in each turn")
    parser.add_argument("--each", type=int, default=8, help="rollouts in a request")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="as mechreward serve's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in direct scoring and in the server")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("mechreward").setLevel(logging.ERROR)
    report = {
        "command": command(options, parser.parse_args([])),
        "made": made_now(),
        "machine": machine(),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "fastapi", "uvicorn")
        ),
        "model": options.model,
        "rounds": options.rounds,
    }
    with tempfile.TemporaryFile() as log:
        report |= measured(options, log)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "server.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "server.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
