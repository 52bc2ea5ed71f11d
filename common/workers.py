"""Work for several processes or threads, results in order; worker processes end with their parent."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from common.cli import UserError


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blocks(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` items, the last one shorter."""
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def read_ahead(function: Callable, items: Iterable, batch: int, n_thread: int) -> Iterator[list]:
    """Lists of function(item), in order; threads compute the next list while one is in use."""
    with ThreadPoolExecutor(max(1, n_thread)) as pool:
        ahead = ()
        for block in [*blocks(items, batch), ()]:
            ready, ahead = ahead, pool.map(function, block)
            if ready:
                yield list(ready)


def map_ordered(function: Callable, items: Iterable, n_worker: int, ahead: int = 64) -> Iterator:
    """`function` of each item, in their order, in `n_worker` processes (1: in this one), which work at most `ahead`
    items ahead. function and items are pickled. Raises UserError when a worker dies."""
    if n_worker <= 1:
        yield from map(function, items)
        return
    # not fork: this process may have threads
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    executor = ProcessPoolExecutor(n_worker, context, initializer=_start_worker)
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker was killed, most likely for lack of memory: use a smaller --n_worker") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent; end when the parent was killed, instead of waiting for it without end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
