"""Work on many items at once, results in the order of the items, and never more of them in memory than needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# What an iterator gives when it has no more.
_END: Any = object()


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`work` on every item, by so many threads; at most `ahead` items (1 or more) are begun and not yet taken.

    An error, of an item or of `items`, is raised when its turn comes, after the results of all items before it; what is
    not begun by then never is.
    """
    pending: deque[Future[Any]] = deque()
    source, drained = iter(items), False
    with ThreadPoolExecutor(workers) as executor, ThreadPoolExecutor(1) as puller:
        try:
            while True:
                while not drained and len(pending) < ahead:
                    # Pulled by another thread, so that an error of `items` too is a future, and waits for its turn.
                    item = puller.submit(next, source, _END)
                    drained = item.exception() is not None or item.result() is _END
                    if item.exception() is not None:
                        pending.append(item)
                    elif not drained:
                        pending.append(executor.submit(work, item.result()))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            puller.shutdown()
            if isinstance(source, Generator):
                source.close()
