"""Reward servers for tests: the real application with a made-up worker, in a thread, or all of it as a subprocess."""

import asyncio
import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import mechreward
from mechreward.errors import ModelMismatchError, RewardError
from mechreward.integrations.served import Served
from mechreward.integrations.server import app as server
from mechreward.integrations.server.models import ModelLimits
from mechreward.integrations.server.scorer import Score
from mechreward.integrations.server.worker import WorkerDied

SERVED = Served("mechreward/pocket", ("pocket/reasoning_pack",))
POISON, DEADLY = 91, 92  # tokens over which the made-up worker fails, or dies


def made_up(rollout):
    """A score that depends on each token and its place, so that no two rollouts share one by accident."""
    values = [token * (k + 1) for k, token in enumerate([*rollout.prompt_ids, *rollout.response_ids])]
    read = len(rollout.response_ids) - 1
    return Score(
        reward=float(sum(values)) if read > 0 else None,
        version="initial",
        token_rewards=[*map(float, rollout.response_ids[:read]), None],
        features={"pack/1": float(rollout.response_ids[0]) if read > 0 else None},
        flags=["repetition: made up"] if list(rollout.response_ids) == [7, 7, 7, 7] else [],
    )


class MadeUpWorker:
    """In the place of the worker process; ``paused`` holds a batch in the middle."""

    latest: "MadeUpWorker"

    def __init__(self, served, folder):
        self.served, self.folder, self.restarts, self.ready, self.version = served, folder, 0, True, "initial"
        self.limits = ModelLimits(longest=64, vocabulary=97, weights=1 << 20)
        self.batches, self.paused, self.failure = [], False, None
        MadeUpWorker.latest = self

    async def start(self):
        pass

    async def score(self, rollouts):
        self.batches.append(list(rollouts))
        while self.paused:
            await asyncio.sleep(0.001)
        tokens = {token for rollout in rollouts for token in rollout.response_ids}
        if DEADLY in tokens:
            raise WorkerDied
        if POISON in tokens:
            raise RewardError("The rollout is poison.")
        return [made_up(rollout) for rollout in rollouts]

    async def load_weights(self, file, version):
        if file.read_bytes() != b"weights":
            raise ModelMismatchError("These are no weights.")
        self.version = version
        return 1

    def stop(self):
        self.paused = False


tokenizer = functools.cache(server._tokenizer)


@contextmanager
def in_thread(monkeypatch, served=SERVED, options=None, **settings):
    """The application on a port of its own, with a :class:`MadeUpWorker`: ``(url, worker)``."""
    monkeypatch.setattr(server, "Worker", MadeUpWorker)
    monkeypatch.setattr(server, "_tokenizer", tokenizer)
    made = server.create_app(served, server.Settings(**settings))
    worker = MadeUpWorker.latest
    config = uvicorn.Config(made, "127.0.0.1", 0, log_config=None, access_log=False, **(options or {}))
    running = uvicorn.Server(config)
    worker.shut_down = lambda: setattr(running, "should_exit", True)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        until(lambda: running.started)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield f"http{'s' if config.is_ssl else ''}://127.0.0.1:{port}", worker
    finally:
        worker.paused = False
        worker.shut_down()
        thread.join()


class Process:
    """``mechreward serve`` as a process group of its own, with its log in a file."""

    def __init__(self, folder, *arguments, token=None):
        self.log = Path(folder) / "server.log"
        environment = os.environ | {"PYTHONPATH": str(Path(mechreward.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        environment.pop("MECHREWARD_TOKEN", None)
        if token:
            environment["MECHREWARD_TOKEN"] = token
        command = [sys.executable, "-c", "from mechreward.cli import app; app()", "serve", "--port", "0", *arguments]
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
            )
        until(lambda: "Uvicorn running" in self.log.read_text() or self.popen.poll() is not None, 240)
        address = re.search(r"Uvicorn running on (https?://[\d.]+:\d+)", self.log.read_text())
        assert address, self.log.read_text()
        self.url = address[1]

    @property
    def worker(self):
        """The process that holds the model, as psutil sees it."""
        children = psutil.Process(self.popen.pid).children()
        (found,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return found

    def resident(self):
        """MiB that the server's own process holds."""
        return psutil.Process(self.popen.pid).memory_info().rss / 2**20

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


def until(holds, seconds=120.0):
    """Wait until something holds; a test that hangs should fail here and say so."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def measured(client):
    """What ``/metrics`` says: ``{(name, *values of labels): number}``."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name.removeprefix("mechreward_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def http(url, token=None, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # A connection each: one that is kept may be closed by the server just when a slow test uses it again.
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False, limits=limits, **options)


def raw(client):
    """A bare connection to the same server."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)


def head(length, route="/score_tokens", kind="application/json"):
    lines = [f"POST {route} HTTP/1.1", "Host: x", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def answer_on(connection):
    """Everything that comes until the server hangs up, or the whole of one answer."""
    got = b""
    while True:
        piece = connection.recv(65_536)
        got += piece
        body = got.partition(b"\r\n\r\n")[2]
        length = re.search(rb"content-length: (\d+)", got)
        if not piece or (length and len(body) >= int(length[1])):
            return got.decode()
