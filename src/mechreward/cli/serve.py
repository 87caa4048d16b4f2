"""``mechreward serve``."""

from __future__ import annotations

import json
import logging.config
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

TOKEN = "MECHREWARD_TOKEN"
"""Environment variable with the bearer token: an argument would show in the list of processes."""

KEEP_ALIVE = 75
"""Seconds that an idle connection stays: longer than clients keep theirs (httpx 5, aiohttp 15), so that none is closed
just when its client sends the next request."""


def serve(
    model: Annotated[str, typer.Option(help="The model that reads: a hub id or a folder.")],
    pack: Annotated[list[str] | None, typer.Option(help="A pack to reward by; may be repeated.")] = None,
    probe: Annotated[list[str] | None, typer.Option(help="A probe to reward by, its logit; may be repeated.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="One for each pack, then for each probe.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Judge outcomes by requests' labels, e.g. math_boxed.")] = None,
    mode: Annotated[str, typer.Option(help="sum, or gated: features count only where the verifier passes.")] = "sum",
    guard: Annotated[str | None, typer.Option(help="Detectors on guard: standard, strict or text_only.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="In place of the packs' own, e.g. max.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")] = "float32",
    vllm: Annotated[
        str | None, typer.Option(help="Read with vLLM: its engine arguments as JSON, e.g. '{}'.", metavar="JSON")
    ] = None,
    live: Annotated[bool, typer.Option(help="Take the policy's weights at POST /weights.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch.")] = 16_384,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may wait; more get status 429.")] = 1 << 20,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that open requests have at the end.")] = 60,
) -> None:
    """Serve rewards over HTTP: by token ids, for OpenRLHF, slime and verl.

    Beyond this machine (any --host but loopback) a bearer token is required, from the environment variable
    MECHREWARD_TOKEN. SIGTERM answers what was taken, and ends.

    Example: mechreward serve --model mechreward/pocket --pack pocket/reasoning_pack
    """
    from mechreward import verifiers
    from mechreward.errors import ConfigError, nearest
    from mechreward.extras import require

    token = os.environ.get(TOKEN)
    if not token and not _loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in: set the environment variable {TOKEN} to a long random text, which "
            "requests must carry, or listen on 127.0.0.1."
        )
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key belong together: give both or neither.")
    for file in (tls_certificate, tls_key):
        if file is not None and not file.is_file():
            raise ConfigError(f"There is no file {file}.")
    if verifier is not None and verifier not in verifiers.__all__:
        raise ConfigError(f"There is no verifier '{verifier}'.{nearest(verifier, verifiers.__all__)}")
    if mode not in ("sum", "gated"):
        raise ConfigError(f"--mode {mode} is not possible: use sum or gated.{nearest(mode, ['sum', 'gated'])}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype} is not possible: use float32, bfloat16 or float16.")
    engine = None if vllm is None else _engine(vllm)
    uvicorn = require("uvicorn", "server")
    require("fastapi", "server")
    require("prometheus_client", "server")
    from mechreward.integrations.served import Served, build_reward
    from mechreward.integrations.server.app import Settings, create_app
    from mechreward.integrations.server.log import CONFIG

    served = Served(
        model=model, packs=tuple(pack or ()), probes=tuple(probe or ()), weights=weight, verifier=verifier, mode=mode,
        guard=guard, aggregation=aggregation, dtype=dtype, vllm=engine,
    )  # fmt: skip
    logging.config.dictConfig(CONFIG)
    logging.captureWarnings(True)
    build_reward(served)  # so that what cannot be served is said here, in one sentence
    app = create_app(served, Settings(token or None, live, batch_tokens, queue_tokens))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains, and then raises the signal again
    try:
        uvicorn.run(
            app, host=host, port=port, ssl_certfile=tls_certificate, ssl_keyfile=tls_key, access_log=False,
            log_config=None, timeout_graceful_shutdown=drain, server_header=False, timeout_keep_alive=KEEP_ALIVE,
        )  # fmt: skip
    finally:
        app.state.worker.stop()
        if app.state.worker.failure is not None:
            raise app.state.worker.failure


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
