"""Numbers of batches as spans: which were read, and which are left."""

from collections.abc import Iterable

__all__ = ["Spans", "first", "joined", "left", "read_by", "within"]

Spans = list[list[int]]  # ascending, apart, each from its start to before its stop


def joined(spans: Iterable[Iterable[int]]) -> Spans:
    """Put spans in order, and together where they touch.

    Args:
        spans: In any order.

    Returns:
        The same numbers.

    Example:
        >>> joined([[4, 6], [0, 1], [1, 2]])
        [[0, 2], [4, 6]]
    """
    found: Spans = []
    for start, stop in sorted(map(tuple, spans)):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        elif start < stop:
            found.append([start, stop])
    return found


def left(total: int, read: Spans) -> Spans:
    """What spans leave of the numbers below a total.

    Args:
        total: The total.
        read: The spans.

    Returns:
        All other numbers.

    Example:
        >>> left(7, [[0, 2], [4, 6]])
        [[2, 4], [6, 7]]
    """
    edges = [0, *(edge for span in read for edge in span), total]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [[start, min(stop, total)] for start, stop in pairs if start < min(stop, total)]


def within(spans: Spans, start: int, stop: int) -> Spans:
    """Some of the numbers, counted in their order.

    Args:
        spans: The numbers.
        start: How many to leave out.
        stop: How many to end before.

    Returns:
        The numbers.

    Example:
        >>> within([[2, 4], [6, 9]], 1, 4)
        [[3, 4], [6, 8]]
    """
    found: Spans = []
    before = 0
    for low, high in spans:
        first_, last = max(low, low + start - before), min(high, low + stop - before)
        if first_ < last:
            found.append([first_, last])
        before += high - low
    return found


def first(count: int, read: Spans) -> Spans:
    """The first numbers that spans leave, where there is no total."""
    beyond = read[-1][1] if read else 0
    return within(left(beyond + count, read), 0, count)


def read_by(rank: int, size: int, done: int, total: int | None, before: Spans) -> Spans:
    """What a process has read of its share.

    Args:
        rank: Its number.
        size: How many processes shared what was left.
        done: How many batches it has read.
        total: Number of all batches; None for a stream, of which every process reads each W-th.
        before: What had been read when it was shared out.

    Returns:
        The numbers of these batches.

    Example:
        >>> read_by(1, 2, 2, 10, []), read_by(1, 2, 2, None, [[0, 1]])
        ([[5, 7]], [[2, 3], [4, 5]])
    """
    if total is not None:
        rest = left(total, before)
        number = sum(stop - start for start, stop in rest)
        start = -(-number * rank // size)
        return within(rest, start, start + done)
    turns = range(rank, rank + done * size, size)
    open_ = first(rank + done * size, before)
    return joined(span for turn in turns for span in within(open_, turn, turn + 1))
