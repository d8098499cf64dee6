"""Look at many files in threads, and keep what was found: the same command goes on after it."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from distillation.data.audio import AudioError
from distillation.journal import Journal

# Findings are kept once a second. Those that come faster than so many per second are as fast to find as to keep.
KEEP_SECONDS, KEEP_RATE = 1.0, 10_000
# Items that wait for a thread: a Future of each of a million would take gigabytes.
WAITING = 4
MEANWHILE_SECONDS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")


def remembered(
    function: Callable[[int], Any],
    paths: Sequence[str],
    keys: Sequence[str],
    known: Journal | None,
    label: str | None,
    num_threads: int | None,
    chunk: int,
    slow: bool = True,
    holds: Callable[[int, Any], bool] = lambda index, found: True,
    ended: threading.Event | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Generator[tuple[int, Any], None, None]:
    """What a function finds in each file, as it comes, in plain JSON types; it is kept, and looked for only once.

    Failures are not kept: they may pass, as those of a network mount do, and are few.

    Args:
        function: is given the index of a file, and raises AudioError where it fails.
        paths: of the files; one that has another size or time than when it was looked at is looked at again.
        keys: under which the findings are kept.
        known: keeps them; None keeps nothing.
        label: of the progress bar; None for no bar.
        num_threads: files looked at once.
        chunk: files that a thread takes at once.
        slow: whether what is found in the first second is kept; then that is measured.
        holds: whether what was found for the file of that index can still be used.
        ended: is set when nobody waits any more, for a function that takes long.
        meanwhile: is called by the thread that waits, a few times per second.

    Yields:
        Index of a file, and what was found, or the AudioError.
    """
    pieces: dict[str, Any] = {} if known is None else known.pieces
    new: deque[tuple[str, list[Any]]] = deque()
    slow = slow and known is not None

    def look(index: int) -> Any:
        try:
            return find_or_recall(index)
        except AudioError as error:
            return error

    def find_or_recall(index: int) -> Any:
        before = pieces.get(keys[index])
        if before is None and not slow:
            return function(index)
        try:
            status = os.stat(paths[index])  # noqa: PTH116 (a Path of each of a million files would take longer)
        except OSError:
            return function(index)
        stamp = [status.st_size, status.st_mtime_ns]
        if before is not None and before[:2] == stamp and holds(index, before[2]):
            return before[2]
        found = function(index)
        new.append((keys[index], [*stamp, found]))
        return found

    def keep() -> None:
        if known is not None:
            known.update(dict(new.popleft() for _ in range(len(new))))

    since, count = time.monotonic(), 0
    try:
        with closing(in_threads(look, range(len(paths)), label, num_threads, chunk, ended, meanwhile)) as results:
            for result in results:
                count += 1
                if (elapsed := time.monotonic() - since) > KEEP_SECONDS:
                    slow = known is not None and count < KEEP_RATE * elapsed
                    keep()
                    since, count = time.monotonic(), 0
                yield result
    finally:
        keep()


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    label: str | None,
    num_threads: int | None,
    chunk: int,
    ended: threading.Event | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Index of an item and result, as they come from several threads; a progress bar when it takes over a second.

    Whoever stops waiting for them, as on a signal, waits for no more than one item of each thread, and sets ``ended``.
    ``meanwhile`` is called a few times per second by the thread that waits.
    """
    ended = ended or threading.Event()

    def work(start: int) -> list[tuple[int, Result]]:
        indices = range(start, min(start + chunk, len(items)))
        return [(index, function(items[index])) for index in indices if not ended.is_set()]

    num_threads = num_threads or 2 * (os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads)
    starts = iter(range(0, len(items), chunk))
    try:
        with tqdm(total=len(items), desc=label, unit="file", delay=1, disable=label is None) as bar:
            running = {pool.submit(work, start) for start in islice(starts, WAITING * num_threads)}
            while running:
                done, running = wait(running, None if meanwhile is None else MEANWHILE_SECONDS, FIRST_COMPLETED)
                if meanwhile is not None:
                    meanwhile()
                running |= {pool.submit(work, start) for start in islice(starts, len(done))}
                for future in done:
                    bar.update(len(future.result()))
                    yield from future.result()
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)
