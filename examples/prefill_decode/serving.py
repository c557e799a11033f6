"""An aiohttp application that runs beside a program that knows nothing of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from aiohttp import web

HOST = "127.0.0.1"


@contextmanager
def served(app: web.Application) -> Iterator[str]:
    """Serve it on a thread and a free port for as long as the block lasts. Returns: the URL."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    try:
        yield asyncio.run_coroutine_threadsafe(_start(runner), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(runner: web.AppRunner) -> str:
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    _, port = runner.addresses[0]
    return f"http://{HOST}:{port}"
