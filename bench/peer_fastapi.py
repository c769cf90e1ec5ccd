"""The same service as Attolytics, written with FastAPI and asyncpg by their documentation's advice.

Same requests, same checks, same table, same promise: 200 after COMMIT. Run by bench/ingest.py as

    DATABASE_URL=postgres://... uvicorn peer_fastapi:app
"""

import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Literal

import asyncpg
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

APPS = {"com.example.myapp": "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"}
ORIGIN = "http://example.com"
POOL_SIZE = 10  # asyncpg's default.
EVENTS_MAX = 10_000
INSERT = (
    "INSERT INTO events (time, referer, platform, version, user_id, event_type, score)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7)"
)

# PostgreSQL cannot store NUL; pydantic itself refuses lone surrogates.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class Event(BaseModel):
    """One event. Unknown keys are ignored, as by Attolytics."""

    model_config = ConfigDict(strict=True)

    table: Literal["events"] = Field(alias="_t")
    time: float | None = Field(default=None, ge=-62_135_596_800, le=253_402_300_799, allow_inf_nan=False)
    platform: Text
    version: Text
    user_id: Text | None = None
    event_type: Text
    score: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)


class Batch(BaseModel):
    """A request's body."""

    model_config = ConfigDict(strict=True)

    secret_key: str
    events: list[Event] = Field(max_length=EVENTS_MAX)


class Stored(BaseModel):
    """The answer to a batch. A declared model is written by pydantic's compiled code."""

    accepted: int
    stored: str = "database"


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
    rows = [
        (
            None if event.time is None else datetime.fromtimestamp(event.time, UTC),
            referer,
            event.platform,
            event.version,
            event.user_id,
            event.event_type,
            event.score,
        )
        for event in batch.events
    ]
    # executemany() is atomic (asyncpg's documentation, since 0.22): BEGIN and COMMIT around it would
    # only add two round trips.
    await request.app.state.pool.executemany(INSERT, rows)
    return Stored(accepted=len(rows))
