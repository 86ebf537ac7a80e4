"""Work on many items at once, results in the order of the items, and never more of them in memory than needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`work` on every item, by so many threads; at most `ahead` items (1 or more) are begun and not yet taken.

    An error, of an item or of `items`, is raised when its turn comes, after the results of all items before it; what is
    not begun by then never is.
    """
    pending: deque[Future[Result]] = deque()
    source = iter(items)
    broken: BaseException | None = None
    with ThreadPoolExecutor(workers) as executor:
        try:
            while True:
                while broken is None and len(pending) < ahead:
                    try:
                        pending.append(executor.submit(work, next(source)))
                    except StopIteration:
                        break
                    except Exception as error:  # noqa: BLE001 - raised again when its turn has come
                        broken = error
                if not pending:
                    break
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            if isinstance(source, Iterator) and hasattr(source, "close"):
                source.close()
    if broken is not None:
        raise broken
