"""Clients that are made for an event loop, used by code that waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def in_own_loop(work: Callable[[], Awaitable[Answer]], name: str) -> Answer:
    """Run something in an event loop of its own, and wait for it.

    The loop has a thread of its own: `on_kill` is a signal's handler, and comes in the middle of a wait whose loop
    runs already in this thread.

    :param work: starts it; it must come to an end by itself
    :param name: of the thread
    """
    outcome: list[Answer] = []
    failure: list[BaseException] = []

    async def run() -> Answer:
        return await work()

    def in_thread() -> None:
        try:
            outcome.append(asyncio.run(run()))
        except BaseException as error:  # raised below, in the thread that asked
            failure.append(error)

    thread = threading.Thread(target=in_thread, name=name, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
