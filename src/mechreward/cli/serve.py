"""``mechreward serve``."""

from __future__ import annotations

import json
import logging.config
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mechreward.cli.common import Dtype, expanded

TOKEN = "MECHREWARD_TOKEN"
"""Environment variable with the bearer token: an argument would show in the list of processes."""

KEEP_ALIVE = 75
"""Seconds that an idle connection stays: longer than clients keep theirs (httpx 5, aiohttp 15), so that none is closed
just when its client sends the next request."""


@dataclass(frozen=True)
class Rewards:
    """The model that reads, and what rewards are made of."""

    model: Annotated[str, typer.Option(help="The model that reads: a hub id or a folder.")]
    pack: Annotated[list[str] | None, typer.Option(help="A pack to reward by; may be repeated.")] = None
    probe: Annotated[list[str] | None, typer.Option(help="A probe to reward by, its logit; may be repeated.")] = None
    weight: Annotated[list[float] | None, typer.Option(help="One for each pack, then for each probe.")] = None
    verifier: Annotated[str | None, typer.Option(help="Judge outcomes by requests' labels, e.g. math_boxed.")] = None
    mode: Annotated[str, typer.Option(help="sum, or gated: features count only where the verifier passes.")] = "sum"
    guard: Annotated[str | None, typer.Option(help="Detectors on guard: standard, strict or text_only.")] = None
    aggregation: Annotated[str | None, typer.Option(help="In place of the packs' own, e.g. max.")] = None
    dtype: Dtype = "float32"
    vllm: Annotated[
        str | None, typer.Option(help="Read with vLLM: its engine arguments as JSON, e.g. '{}'.", metavar="JSON")
    ] = None


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None


@expanded
def serve(
    *,
    rewards: Rewards,
    live: Annotated[bool, typer.Option(help="Take the policy's weights at POST /weights.")] = False,
    address: Address,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch.")] = 16_384,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may wait; more get status 429.")] = 1 << 20,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that open requests have at the end.")] = 60,
) -> None:
    """Serve rewards over HTTP: by token ids, for OpenRLHF, slime and verl.

    Beyond this machine (any --host but loopback) a bearer token is required, from the environment variable
    MECHREWARD_TOKEN. SIGTERM answers what was taken, and ends.

    Example: mechreward serve --model mechreward/pocket --pack pocket/reasoning_pack
    """
    from mechreward.extras import require

    token = os.environ.get(TOKEN)
    _check(rewards, address, token)
    engine = None if rewards.vllm is None else _engine(rewards.vllm)
    uvicorn = require("uvicorn", "server")
    require("fastapi", "server")
    require("prometheus_client", "server")
    from mechreward.integrations.served import Served, build_reward
    from mechreward.integrations.server.app import Settings, create_app
    from mechreward.integrations.server.log import CONFIG

    served = Served(
        rewards.model, tuple(rewards.pack or ()), tuple(rewards.probe or ()), rewards.weight, rewards.verifier,
        rewards.mode, rewards.guard, rewards.aggregation, rewards.dtype, engine,
    )  # fmt: skip
    logging.config.dictConfig(CONFIG)
    logging.captureWarnings(True)
    build_reward(served)  # so that what cannot be served is said here, in one sentence
    app = create_app(served, Settings(token or None, live, batch_tokens, queue_tokens))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains, and then raises the signal again
    try:
        uvicorn.run(
            app, host=address.host, port=address.port, ssl_certfile=address.tls_certificate,
            ssl_keyfile=address.tls_key, access_log=False, log_config=None, timeout_graceful_shutdown=drain,
            server_header=False, timeout_keep_alive=KEEP_ALIVE,
        )  # fmt: skip
    finally:
        app.state.worker.stop()
        if app.state.worker.failure is not None:
            raise app.state.worker.failure


def _check(rewards: Rewards, address: Address, token: str | None) -> None:
    """Refuse options that cannot be served.

    Raises:
        ConfigError: One of them is impossible.
    """
    from mechreward import verifiers
    from mechreward.errors import ConfigError, nearest

    if not token and not _loopback(address.host):
        raise ConfigError(
            f"--host {address.host} lets other machines in: set the environment variable {TOKEN} to a long random "
            "text, which requests must carry, or listen on 127.0.0.1."
        )
    if (address.tls_certificate is None) != (address.tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key belong together: give both or neither.")
    for file in (address.tls_certificate, address.tls_key):
        if file is not None and not file.is_file():
            raise ConfigError(f"There is no file {file}.")
    choices = (
        ("verifier", rewards.verifier, verifiers.__all__),
        ("mode", rewards.mode, ["sum", "gated"]),
        ("dtype", rewards.dtype, ["float32", "bfloat16", "float16"]),
    )
    for option, chosen, known in choices:
        if chosen is not None and chosen not in known:
            names = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ConfigError(f"--{option} {chosen} is not possible: use {names}.{nearest(chosen, known)}")


def _engine(given: str) -> dict[str, Any]:
    from mechreward.errors import ConfigError
    from mechreward.extras import require

    try:
        engine = json.loads(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--vllm is not JSON ({error}): write e.g. '{{\"enforce_eager\": true}}'.") from error
    if not isinstance(engine, dict):
        raise ConfigError(f"--vllm needs a JSON object of engine arguments, not {given}: write e.g. '{{}}'.")
    for taken in ("model", "dtype", "backend", "readouts"):
        if taken in engine:
            raise ConfigError(f"--vllm cannot set '{taken}': --model and --dtype do, and the rest is the server's.")
    if engine.get("tensor_parallel_size", 1) > 1:
        raise ConfigError("The server's vLLM runs in one process: leave tensor_parallel_size out of --vllm.")
    require("vllm", "vllm")
    return engine


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
