"""The reward server's HTTP side: routes, limits, tokens, metrics and logs. Models live in the worker."""

from __future__ import annotations

import asyncio
import hmac
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mechreward import pocket
from mechreward.errors import ConfigError, MechRewardError
from mechreward.integrations.protocol import (
    OpenRLHFReply,
    OpenRLHFRequest,
    Problem,
    ScoreReply,
    ScoreRequest,
    SlimeRequest,
    WeightsReply,
)
from mechreward.integrations.served import Served
from mechreward.integrations.server.batching import Batcher
from mechreward.integrations.server.refusal import RESTART, Refused
from mechreward.integrations.server.scorer import Rollout, Score
from mechreward.integrations.server.worker import Worker, WorkerDied

logger = logging.getLogger("mechreward.server")

T = TypeVar("T")

OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""Routes that need no token: they tell nothing of anybody's rollouts."""

BYTES = "application/octet-stream"
"""Content type of pushed weights."""

GONE = 499
"""Status in logs and metrics of a request whose client left before the answer (nginx's)."""

PATIENCE = 30.0
"""Seconds that may pass between two pieces of a request's body."""


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        token: Bearer token that requests must carry; None for none.
        live: Whether ``POST /weights`` is allowed.
        batch_tokens: Tokens in a batch.
        queue_tokens: Tokens that may wait.
        max_rollouts: In one request.
        max_body: Bytes in a request's body, weights aside.
    """

    token: str | None = None
    live: bool = False
    batch_tokens: int = 16_384
    queue_tokens: int = 1 << 20
    max_rollouts: int = 1024
    max_body: int = 8 << 20


class Metrics:
    """What Prometheus is told."""

    def __init__(self):
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mechreward_requests", "Requests, by route and status.", ["route", "status"], **named)
        self.seconds = Histogram("mechreward_request_seconds", "From first byte to answer.", ["route"], **named)
        self.rollouts = Counter("mechreward_rollouts", "Rollouts scored.", **named)
        self.tokens = Counter("mechreward_tokens", "Tokens of scored rollouts, prompts included.", **named)
        self.flagged = Counter("mechreward_flagged_rollouts", "Rollouts that a guard flagged.", **named)
        self.unscored = Counter("mechreward_unscored_rollouts", "Rollouts without a reward.", **named)
        self.batch = Histogram(
            "mechreward_batch_rollouts", "Rollouts in a batch.", buckets=[2**k for k in range(11)], **named
        )
        self.waiting = Gauge("mechreward_waiting_tokens", "Tokens in the queue.", **named)
        self.restarts = Gauge("mechreward_worker_restarts", "Times that the worker had to be started anew.", **named)
        self.pushes = Counter("mechreward_weight_pushes", "Pushed weights that were taken.", **named)


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": why}
    for status, why in {
        400: "The body is no JSON.",
        401: "The token is missing or wrong.",
        408: "The body came too slowly.",
        413: "The body, or the number of rollouts, is too large.",
        415: "The body is not sent as what it is.",
        422: "The request is not understood.",
        429: "The queue is full: try again after Retry-After seconds.",
        500: "The batch could not be scored.",
        503: "The worker is starting, or the server is stopping: try again after Retry-After seconds.",
    }.items()
}
"""Answers that any route may give, for the schema."""


def create_app(served: Served, settings: Settings) -> FastAPI:
    """Return the server's ASGI application; the worker starts with it.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
    """
    server = RewardServer(served, settings)
    app = FastAPI(
        title="mechreward",
        description="Rewards from a language model's residual stream.",
        lifespan=server.lifespan,
        responses=PROBLEMS,
    )
    app.state.worker, app.state.batcher = server.worker, server.batcher
    app.add_middleware(Gatekeeper, settings=settings, metrics=server.metrics)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(RequestValidationError, misunderstood)  # pyright: ignore[reportArgumentType]

    bearer = [Security(HTTPBearer(auto_error=False))] if settings.token else []  # for the schema; see Gatekeeper
    for route in (server.score_tokens, server.get_reward, server.slime):
        app.post(f"/{route.__name__}", dependencies=bearer)(route)
    app.post(
        "/weights",
        dependencies=bearer,
        responses={409: {"model": Problem, "description": "The server's weights are frozen."}},
        openapi_extra={"requestBody": {"content": {BYTES: {}}, "required": True}},
    )(server.weights)
    app.get("/healthz")(server.healthz)
    app.get("/readyz")(server.readyz)
    app.get("/metrics", dependencies=bearer, responses={200: {"content": {"text/plain": {}}}})(server.metrics_)
    return app


class RewardServer:
    """The routes of one server, and the queue and the worker behind them."""

    def __init__(self, served: Served, settings: Settings):
        self.served, self.settings, self.metrics = served, settings, Metrics()
        self.tokenizer = _tokenizer(served.model)
        self.folder = tempfile.TemporaryDirectory(prefix="mechreward-")
        self.worker = Worker(served, Path(self.folder.name))
        self.batcher = Batcher(self.scored, settings.batch_tokens, settings.queue_tokens)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting_tokens)
        self.metrics.restarts.set_function(lambda: self.worker.restarts)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self.worker.start()
        logger.info({"event": "ready", "model": self.served.model})
        yield
        await self.batcher.drain()
        self.worker.stop()
        self.folder.cleanup()

    async def scored(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.metrics.batch.observe(len(rollouts))
        return await self.worker.score(rollouts)

    async def ask(self, request: Request, rollouts: Sequence[Rollout]) -> list[Score]:
        _check(rollouts, self.worker, self.served, self.settings)
        request.state.rollouts, request.state.tokens = len(rollouts), sum(map(len, rollouts))
        with refusing(500, "this batch"):
            scores = await unless_gone(request, self.batcher.submit(rollouts))
        self.metrics.rollouts.inc(len(scores))
        self.metrics.tokens.inc(request.state.tokens)
        self.metrics.flagged.inc(sum(bool(score.flags) for score in scores))
        self.metrics.unscored.inc(sum(score.reward is None for score in scores))
        return scores

    def from_text(self, prompt: str, response: str, label: str | None) -> Rollout:
        asked, answered = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
        if not asked:
            raise Refused(422, "A prompt is empty: send what the model was given.")
        return Rollout(asked, answered, label)

    async def score_tokens(self, asked: ScoreRequest, request: Request) -> ScoreReply:
        """Score rollouts by their exact token ids."""
        labels = asked.labels or [None] * len(asked.prompt_ids)
        masks = asked.response_mask or [None] * len(asked.prompt_ids)
        rows = zip(asked.prompt_ids, asked.response_ids, labels, masks, strict=True)
        rollouts = [Rollout(p, r, label, asked.num_generations, mask) for p, r, label, mask in rows]
        scores = await self.ask(request, rollouts)
        return ScoreReply(
            rewards=[score.reward for score in scores],
            version=scores[0].version,
            token_rewards=[s.token_rewards for s in scores] if "token_rewards" in asked.include else None,
            features={name: [s.features[name] for s in scores] for name in scores[0].features}
            if "features" in asked.include
            else None,
            flags=[s.flags for s in scores] if "flags" in asked.include else None,
        )

    async def get_reward(self, asked: OpenRLHFRequest, request: Request) -> OpenRLHFReply:
        """OpenRLHF's remote reward model. Texts are encoded anew, which may change tokens: prefer AgentExecutor."""
        labels = asked.labels or [None] * len(asked.query)
        rows = list(zip(asked.query, asked.prompts, labels, strict=True))
        rollouts = [self.from_text(p, _response(q, p, self.tokenizer), label) for q, p, label in rows]
        scores = await self.ask(request, rollouts)
        rewards = [score.reward or 0.0 for score in scores]
        logs = {
            "flagged": [float(bool(score.flags)) for score in scores],
            "unscored": [float(score.reward is None) for score in scores],
        }
        return OpenRLHFReply(rewards=rewards, scores=rewards, extra_logs=logs)

    async def slime(self, asked: SlimeRequest, request: Request) -> float:
        """slime's remote reward model: one rollout, a bare number; 0 where no token can be read."""
        (score,) = await self.ask(request, [self.from_text(asked.prompt, asked.response, asked.label)])
        return score.reward or 0.0

    async def weights(
        self,
        request: Request,
        version: Annotated[str, Query(pattern=r"^[\w.-]{1,64}$", description="Echoed in replies.")],
    ) -> WeightsReply:
        """Take a policy's weights, as safetensors under the names of its ``state_dict()``."""
        if not self.settings.live:
            raise Refused(409, "This server reads frozen weights: start it with --live to push others.")
        if request.headers.get("content-type") != BYTES:  # which no other site's page can have a browser send
            raise Refused(415, f"The weights are not sent as bytes: give them Content-Type: {BYTES}.")
        file, size = self.worker.folder / f"{uuid.uuid4().hex}.safetensors", 0
        try:
            with file.open("wb") as opened:
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.worker.limits.weights:
                        raise Refused(413, "The file is larger than the weights of the server's model can be.")
                    await asyncio.to_thread(opened.write, piece)
            with refusing(422, "these weights"):
                taken = await self.worker.load_weights(file, version)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self.metrics.pushes.inc()
        return WeightsReply(version=version, tensors=taken)

    async def healthz(self) -> dict[str, str]:
        """The server is there."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, str]:
        """The model is loaded, and rollouts are taken."""
        if not self.worker.ready or self.batcher.draining:
            raise Refused(503, "The worker is starting, or the server is stopping.", RESTART)
        return {"status": "ready", "version": self.worker.version}

    async def metrics_(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def misunderstood(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"The body is no JSON: {first['ctx']['error']}.").response
    if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
        return Refused(415, "The body is not sent as JSON: give it Content-Type: application/json.").response
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
    says = first["msg"].removeprefix("Value error, ")
    return Refused(422, f"{where.removeprefix('.') or 'The request'}: {says}.").response


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(pocket.resolve(model))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"The tokenizer of {model} cannot be loaded ({said}): give a folder or a hub id.") from error


def _check(rollouts: Sequence[Rollout], worker: Worker, served: Served, settings: Settings) -> None:
    """Refuse what the model cannot read, before it shares a batch with others."""
    if len(rollouts) > settings.max_rollouts:
        raise Refused(413, f"{len(rollouts)} rollouts in one request: give at most {settings.max_rollouts}.")
    for row, rollout in enumerate(rollouts):
        if worker.limits.longest is not None and len(rollout) > worker.limits.longest:
            raise Refused(422, f"Rollout {row} has {len(rollout)} tokens, and the model takes {worker.limits.longest}.")
        if max(*rollout.prompt_ids, *rollout.response_ids) >= worker.limits.vocabulary:
            raise Refused(
                422,
                f"Rollout {row} holds a token id that the model's vocabulary of {worker.limits.vocabulary} does not "
                "have: serve the model that wrote the rollouts, or one with its tokenizer.",
            )
        if served.verifier is not None and rollout.label is None:
            raise Refused(422, f"Rollout {row} has no label, which the verifier {served.verifier} needs.")


def _response(query: str, prompt: str, tokenizer: Any) -> str:
    """What follows the prompt in OpenRLHF's query, which is decoded from ids and may spell the prompt another way."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    decoded = tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids, skip_special_tokens=False)
    if query.startswith(decoded):
        return query[len(decoded) :]
    raise Refused(
        422,
        "A query does not begin with its prompt (was the prompt cut?), so that the response cannot be found: send "
        "token ids with mechreward.integrations.openrlhf's AgentExecutor.",
    )


@contextmanager
def refusing(status: int, what: str) -> Iterator[None]:
    """Answer what the worker raises over ``what``: that it died, or with ``status`` why it refuses."""
    try:
        yield
    except WorkerDied:
        raise Refused(503, f"The worker died over {what}: try again.", RESTART) from None
    except MechRewardError as error:
        raise Refused(status, str(error)) from error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; cancelled where the client hangs up first.

    Raises:
        Refused: It did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    leaving.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if leaving.done():
            raise Refused(GONE, "The client left before the answer.") from None
        raise Refused(503, "The server had to stop before the answer: ask another one.", RESTART) from None
    finally:
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


class Gatekeeper:
    """ASGI middleware: the token, the body's size and pace, one log line and the metrics of each request.

    It runs before anything of a request's body is read.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        scope.setdefault("state", {})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is None:
                await self.app(scope, self._paced(scope, receive), tell)
            else:
                await refusal.response(scope, receive, tell)
        finally:
            self._tell(scope, status, time.perf_counter() - began)

    def _refusal(self, path: str, headers: dict[str, str]) -> Refused | None:
        if self.settings.token is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode("latin-1"), self.settings.token.encode())
            if not right or scheme.lower() != "bearer":
                return Refused(401, "The bearer token is missing or wrong.")
        length = headers.get("content-length", "0")
        if path != "/weights" and length.isdigit() and int(length) > self.settings.max_body:
            return self._too_large
        return None

    @property
    def _too_large(self) -> Refused:
        return Refused(413, f"The body is larger than {self.settings.max_body} bytes: send fewer rollouts at a time.")

    def _paced(self, scope: Scope, receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
        """``receive`` with the limits of a body; once it is whole, only a disconnect is to come, and may take long."""
        taken, whole = 0, False

        async def paced() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except TimeoutError:
                raise Refused(408, f"Nothing more of the body came within {PATIENCE:.0f} s.") from None
            if message["type"] == "http.disconnect":
                raise Refused(GONE, "The client left in the middle of the body.")
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if scope["path"] != "/weights" and taken > self.settings.max_body:
                raise self._too_large
            return message

        return paced

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")  # not the path: strangers choose that
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        record = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1)}
        record |= {name: scope["state"][name] for name in ("rollouts", "tokens") if name in scope["state"]}
        logger.info(record)
