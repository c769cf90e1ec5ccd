"""The same service as Attolytics, written with FastAPI and asyncpg by their documentation's advice.

Same requests, same checks, same table, same promise: 200 after COMMIT. Run by bench/ingest.py as

    DATABASE_URL=postgres://... uvicorn peer_fastapi:app
"""

import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

import asyncpg
from fastapi import FastAPI, Header, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

APPS = {"com.example.myapp": "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"}
INSERT = (
    "INSERT INTO events (time, referer, platform, version, user_id, event_type, score)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7)"
)


class Event(BaseModel):
    """One event; unknown keys are refused no more than by Attolytics."""

    model_config = ConfigDict(strict=True)

    table: str = Field(alias="_t", pattern="^events$")
    time: float | None = Field(default=None, ge=-62_135_596_800, le=253_402_300_799)
    platform: str
    version: str
    user_id: str | None = None
    event_type: str
    score: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)


class Batch(BaseModel):
    """A request's body."""

    model_config = ConfigDict(strict=True)

    secret_key: str
    events: list[Event] = Field(max_length=10_000)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool of connections for as long as the service runs."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/apps/{app_id}/events")
async def receive(
    app_id: str, batch: Batch, request: Request, referer: Annotated[str | None, Header()] = None
) -> dict[str, object]:
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
    async with request.app.state.pool.acquire() as connection, connection.transaction():
        await connection.executemany(INSERT, rows)
    return {"accepted": len(rows), "stored": "database"}
