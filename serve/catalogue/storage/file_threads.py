"""Threads for work on the files of adapters: downloads, digests, and waits for another process that does the same.

Such work may take minutes. In the threads of `asyncio.to_thread` it would keep everything else of a replica waiting:
the catalogue, publishes, usage.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, ParamSpec, TypeVar

# What the work is for. Each has threads of its own, so that none waits for the work of another.
Purpose = Literal["request", "prefetch", "admin"]

_THREADS: dict[Purpose, int] = {"request": 8, "prefetch": 2, "admin": 4}
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def to_file_thread(
    purpose: Purpose,
    function: Callable[_Arguments, _Result],
    *args: _Arguments.args,
    **kwargs: _Arguments.kwargs,
) -> _Result:
    """`asyncio.to_thread` in one of the threads for this purpose; waits until one is free."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(
        _threads(purpose), lambda: context.run(function, *args, **kwargs)
    )


@cache
def _threads(purpose: Purpose) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS[purpose], thread_name_prefix=f"adapter files for {purpose}")
