"""The same service as Attolytics, written with FastAPI and asyncpg by their documentation's advice.

Same requests, same checks, same tables, same promise: 200 after COMMIT. Run by bench/ingest.py as

    DATABASE_URL=postgres://... uvicorn peer_fastapi:app
"""

import hmac
import json
import os
import re
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

APPS = {"com.example.myapp": "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"}
ORIGIN = "http://example.com"
POOL_SIZE = 10  # asyncpg's default.
EVENTS_MAX = 10_000
BODY_BYTES_MAX = 1 << 20
GZIP = 16 + zlib.MAX_WBITS  # zlib: a gzip header and trailer, and no other.
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
INSERTS = {
    "events": "INSERT INTO events (time, referer, platform, version, user_id, event_type, score)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7)",
    "purchases": "INSERT INTO purchases (time, user_id, product, price, details) VALUES ($1, $2, $3, $4, $5)",
    "sessions": "INSERT INTO sessions (id, started, user_id, seconds) VALUES ($1, $2, $3, $4)"
    " ON CONFLICT (id) DO NOTHING",
}

Row = tuple[object, ...]


def json_text(value: JsonValue) -> str | None:
    """Return the text that asyncpg takes for jsonb; refuse what that cannot hold, such as NUL or NaN."""
    if value is None:
        return None
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    text.encode()  # Raises for a lone surrogate.
    if NUL.search(text):
        raise ValueError("contains NUL")
    return text


def moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


# PostgreSQL cannot store NUL; pydantic itself refuses lone surrogates.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Integer = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=-62_135_596_800, le=253_402_300_799, allow_inf_nan=False)]


class Event(BaseModel):
    """One event. Unknown keys are ignored, as by Attolytics."""

    model_config = ConfigDict(strict=True)

    table: Literal["events"] = Field(alias="_t")
    time: Seconds | None = None
    platform: Text
    version: Text
    user_id: Text | None = None
    event_type: Text
    score: Integer | None = None

    def row(self, referer: str | None) -> Row:
        """Return the values in the order of INSERTS."""
        return (
            moment(self.time),
            referer,
            self.platform,
            self.version,
            self.user_id,
            self.event_type,
            self.score,
        )


class Purchase(BaseModel):
    """One event with a json column."""

    model_config = ConfigDict(strict=True)

    table: Literal["purchases"] = Field(alias="_t")
    time: Seconds | None = None
    user_id: Text
    product: Text
    price: Real | None = None
    details: Annotated[JsonValue, AfterValidator(json_text)] = None

    def row(self, _referer: str | None) -> Row:
        """Return the values in the order of INSERTS."""
        return (moment(self.time), self.user_id, self.product, self.price, self.details)


class Session(BaseModel):
    """One event with a unique column; an id that was there before is skipped."""

    model_config = ConfigDict(strict=True)

    table: Literal["sessions"] = Field(alias="_t")
    id: Annotated[UUID, Field(strict=False)]  # From a string, the only way JSON has.
    started: Seconds | None = None
    user_id: Text
    seconds: Integer | None = None

    def row(self, _referer: str | None) -> Row:
        """Return the values in the order of INSERTS."""
        return (self.id, moment(self.started), self.user_id, self.seconds)


class Batch(BaseModel):
    """A request's body. The discriminator lets pydantic check each event against one model only."""

    model_config = ConfigDict(strict=True)

    secret_key: str
    events: list[Annotated[Event | Purchase | Session, Field(discriminator="table")]] = Field(
        max_length=EVENTS_MAX
    )


class Stored(BaseModel):
    """The answer to a batch. A declared model is written by pydantic's compiled code."""

    accepted: int
    stored: str = "database"


class GzipRequest(Request):
    """A request whose body may be compressed, as FastAPI's documentation has it; inflated only so far."""

    async def body(self) -> bytes:
        """Return the body as it was before it was compressed."""
        if not hasattr(self, "_body"):
            body = await super().body()
            if self.headers.get("Content-Encoding") == "gzip":
                body = inflate(body)
            self._body = body
        return self._body


def inflate(body: bytes) -> bytes:
    """Return what a gzip body holds, up to BODY_BYTES_MAX."""
    inflater = zlib.decompressobj(GZIP)
    try:
        inflated = inflater.decompress(body, BODY_BYTES_MAX + 1)
    except zlib.error:
        raise HTTPException(400, "the body is not gzip") from None
    if len(inflated) > BODY_BYTES_MAX:
        raise HTTPException(413, "the body is too large")
    if not inflater.eof or inflater.unused_data:
        raise HTTPException(400, "the body is not gzip")
    return inflated


class GzipRoute(APIRoute):
    """A route whose requests may be compressed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's own handler, which is given our request."""
        handle = super().get_route_handler()

        async def handle_gzip(request: Request) -> Response:
            return await handle(GzipRequest(request.scope, request.receive))

        return handle_gzip


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool of connections for as long as the service runs."""
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=POOL_SIZE, max_size=POOL_SIZE) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    CORSMiddleware, allow_origins=[ORIGIN], allow_methods=["POST"], allow_headers=["Content-Type"]
)
app.router.route_class = GzipRoute


@app.exception_handler(RequestValidationError)
async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer a batch that does not fit, without quoting it.

    FastAPI's own handler quotes a lone surrogate, which its answer cannot hold, and so ends in a 500.
    """
    reasons = [{"place": problem["loc"], "reason": problem["msg"]} for problem in error.errors()]
    return JSONResponse({"error": "the batch does not fit", "events": reasons}, 400)


@app.post("/apps/{app_id}/events")
async def receive(
    app_id: str, batch: Batch, request: Request, referer: Annotated[str | None, Header()] = None
) -> Stored:
    """Store the events of one request."""
    key = APPS.get(app_id)
    if key is None:
        raise HTTPException(404, "no such app")
    if not hmac.compare_digest(batch.secret_key.encode(), key.encode()):
        raise HTTPException(403, "wrong key")
    rows: dict[str, list[Row]] = {}
    for event in batch.events:
        rows.setdefault(event.table, []).append(event.row(referer))
    pool = request.app.state.pool
    if len(rows) == 1:
        # executemany() is atomic (asyncpg's documentation, since 0.22): BEGIN and COMMIT around it would
        # only add two round trips.
        [(table, only)] = rows.items()
        await pool.executemany(INSERTS[table], only)
    else:
        async with pool.acquire() as connection, connection.transaction():
            for table, several in rows.items():
                await connection.executemany(INSERTS[table], several)
    return Stored(accepted=len(batch.events))
