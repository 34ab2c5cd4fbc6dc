"""What is left of a pass is shared out anew without loss and without repetition, however often and by however many."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset

from steepest.distributed.alone import OneRank
from steepest.selection.samples import Samples
from steepest.selection.share import Share
from steepest.selection.spans import first, joined, left, read_by, within
from steepest.selection.together import Together
from steepest.selection.unchanged import Unchanged, digest_of


class Flowing(IterableDataset[Tensor]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(self.number)


def numbers(spans: list[list[int]]) -> list[int]:
    return [number for start, stop in spans for number in range(start, stop)]


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 40),
    stages=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), max_size=4),
    last=st.integers(1, 5),
    streamed=st.booleans(),
)
def test_every_batch_is_read_once_by_one_process(
    total: int, stages: list[tuple[int, int]], last: int, streamed: bool
) -> None:
    before: list[list[int]] = []
    read: list[int] = []

    def shares(size: int) -> list[Share]:
        made = []
        for rank in range(size):
            data = Flowing(2 * total) if streamed else (torch.arange(2 * total),)
            made.append(Share(Samples(data, batch_size=2), rank, size))
            made[-1].leave_out(before)
        return made

    for size, done in stages:
        now: list[list[int]] = []
        for rank, share in enumerate(shares(size)):
            found = [number for number, _ in zip(share_numbers(share), range(done), strict=False)]
            spans = read_by(rank, size, len(found), share.total, before)
            assert numbers(spans) == found
            now += spans
            read += found
        before = joined([*before, *now])
        assert numbers(before) == sorted(read)
    for share in shares(last):
        read += share_numbers(share)
    assert sorted(read) == list(range(total))


def share_numbers(share: Share) -> list[int]:
    found = list(share.numbered())
    for number, batch in found:
        assert batch.indices.tolist() == [2 * number, 2 * number + 1]
    half = len(found) // 2  # as after an interruption
    assert [number for number, _ in share.numbered(half)] == [number for number, _ in found[half:]]
    return [number for number, _ in found]


@given(spans=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6), total=st.integers(0, 40))
def test_spans_are_sets_of_numbers(spans: list[tuple[int, int]], total: int) -> None:
    read = joined([start, start + length] for start, length in spans)
    wanted = {number for start, length in spans for number in range(start, start + length)}
    assert numbers(read) == sorted(wanted)
    rest = [number for number in range(total) if number not in wanted]
    assert numbers(left(total, read)) == rest
    assert numbers(within(left(total, read), 2, 5)) == rest[2:5]
    assert numbers(first(7, read)) == [number for number in range(60) if number not in wanted][:7]


def test_digests_of_several_processes_are_put_together_by_number() -> None:
    parts = []
    for rank in range(2):
        known = Unchanged()
        for number in range(rank, 6, 2):
            assert known.agrees(number, digest_of(bytes([number])))
        known.seal()
        parts.append({"data": known.state()})
    whole = Unchanged.of(parts, "data")
    assert all(whole.agrees(number, digest_of(bytes([number]))) for number in range(6))
    assert not any(whole.agrees(number, digest_of(b"another")) for number in range(6))
    assert whole.state().shape == (6, 40)
    whole.join(Together(OneRank()))
    assert whole.state().shape == (6, 40)
    assert Unchanged.of([], "data").state().shape == (0, 40)


def test_one_process_can_be_spoken_to_as_several() -> None:
    together = Together(OneRank())
    rows = torch.tensor([3.0, 1.0, 2.0])
    together.meet(torch.tensor([2, 0, 1]))
    assert together.in_order(rows).tolist() == [1.0, 2.0, 3.0]
    assert together.told("a word") == ["a word"]
    together.sum_([rows])
    together.from_first_([rows])
    assert rows.tolist() == [3.0, 1.0, 2.0]
    assert together.traffic == 0
