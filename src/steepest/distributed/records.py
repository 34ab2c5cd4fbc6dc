"""Records of other processes: the same groups of parameters everywhere, and products with all rows, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.distributed.agreement import fail_together, tell
from steepest.distributed.ranks import Ranks
from steepest.engine import Jacobian
from steepest.engine.packing import RecordForm
from steepest.engine.records import MaterializedRecord, Record

__all__ = ["align", "gathered_gram", "layout", "spans"]

# Kind and parameters of every record.
Layout = tuple[tuple[str, tuple[str, ...]], ...]


def layout(jacobian: Jacobian) -> Layout:
    """What of a Jacobian must be the same on all ranks before their records have products."""
    return tuple((type(record).__name__, record.names) for record in jacobian.records)


def align(jacobian: Jacobian, layouts: Sequence[Layout]) -> Jacobian:
    """Bring a Jacobian to the records that all ranks have.

    Groups of parameters that the ranks hold in different ways, or that some do not use, become explicit gradients.

    Args:
        jacobian: This rank's.
        layouts: Those of all ranks.

    Returns:
        The Jacobian itself where all ranks are alike, as they are when they run the same code.
    """
    if len(set(layouts)) == 1:
        return jacobian
    groups: list[set[str]] = []
    for names in dict.fromkeys(frozenset(names) for found in layouts for _, names in found):
        touching = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names]
        groups.append(set(names).union(*touching))
    records: list[Record] = []
    for group in groups:
        held = {tuple(entry for entry in found if group.issuperset(entry[1])) for found in layouts}
        mine = [record for record in jacobian.records if group.issuperset(record.names)]
        alike = len(held) == 1 and len(next(iter(held))) == 1
        records.append(mine[0] if alike else _explicit(group, mine, jacobian))
    return Jacobian(
        records, jacobian.shapes, jacobian.num_rows, jacobian.max_memory, jacobian.device, jacobian.dtype
    )  # fmt: skip


def _explicit(group: set[str], records: Sequence[Record], jacobian: Jacobian) -> MaterializedRecord:
    found = {name: grad for record in records for name, grad in record.per_sample_grads().items()}
    return MaterializedRecord({
        name: found[name] if name in found
        else torch.zeros(jacobian.num_rows, *shape, dtype=jacobian.dtype, device=jacobian.device)
        for name, shape in jacobian.shapes.items()
        if name in group
    })  # fmt: skip


def spans(counts: Sequence[int]) -> list[slice]:
    """Where the rows of every rank lie among those of all: rank 0's first."""
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def gathered_gram(jacobian: Jacobian, ranks: Ranks, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``J J^T`` of the rows of all ranks, each of which forms a share of its blocks.

    Layer by layer the ranks send each other what another one needs of it: the record, or its explicit gradients where
    these are smaller for all ranks together. Every pair of ranks meets once, so a rank sends each record to
    ``(size - 1) / 2`` others on average, and no rank holds more than two records of others at a time, of the same
    layer. Then the blocks are gathered.

    Args:
        jacobian: This rank's, aligned with those of the others.
        ranks: The ranks.
        counts: Number of rows of every rank.
        dtype: dtype of the products.

    Returns:
        ``[R, R]``, the same on all ranks to the bit, the rows of rank 0 first. Per rank, R times ``R + 1`` numbers are
        gathered for the R of the rank that has most rows.
    """
    forms = list(zip(*tell(ranks, [RecordForm.of(record) for record in jacobian.records], None), strict=True))
    own, total = spans(counts), sum(counts)
    # The last column tells of a failure, so that it travels with the blocks.
    strip = torch.zeros(jacobian.num_rows, total + 1, dtype=dtype, device=jacobian.device)
    work = _Strip(strip, own, jacobian.max_memory)
    for number, (record, kinds) in enumerate(zip(jacobian.records, forms, strict=True)):
        _add_layer(work, record, _cheapest(kinds), ranks, number)
    if work.failure is not None:
        strip[:, -1] = 1
    gathered = torch.cat(ranks.gather(strip))
    if gathered[:, -1].any():
        fail_together(ranks, work.failure)
    gathered = gathered[:, :-1]
    gram = gathered + gathered.T  # of every pair of ranks one block is zero, or both are parts of a sum
    for span in own:
        gram[span, span] = gathered[span, span]
    return gram


def _cheapest(forms: Sequence[RecordForm]) -> list[RecordForm]:
    """What the ranks send of one layer: their records, or their explicit gradients if these are smaller."""
    explicit = [form.explicit() for form in forms]
    return explicit if sum(f.nbytes for f in explicit) < sum(f.nbytes for f in forms) else list(forms)


def _hops(rank: int, size: int, number: int) -> Iterator[tuple[int | None, int | None]]:
    """Whom a rank sends its record of a layer, and whose it receives meanwhile, so that every pair meets once."""
    for hop in range(1, size // 2 + 1):
        target, source = (rank + hop) % size, (rank - hop) % size
        if 2 * hop < size:
            yield target, source
        # Both ends of a pair see each other at this hop: by turns of the layers one of them forms the products.
        elif (rank < hop) == (number % 2 == 0):
            yield None, source
        else:
            yield target, None


@dataclass(eq=False)
class _Strip:
    """The rows of the Gram that this rank forms; after a failure it goes on only with what the others wait for."""

    products: Tensor
    spans: Sequence[slice]
    max_memory: int
    failure: Exception | None = field(default=None)

    def attempt(self, action: Callable[[], None]) -> None:
        if self.failure is None:
            try:
                action()
            except Exception as error:
                self.failure = error


def _add_layer(work: _Strip, record: Record, forms: Sequence[RecordForm], ranks: Ranks, number: int) -> None:
    strip, rank, device = work.products, ranks.rank, work.products.device
    kept: list[Record] = []
    sent: list[Tensor] = []

    def prepare() -> None:
        kept.append(record.materialize() if forms[rank].kind is not type(record) else record)
        sent.extend(tensor.contiguous() for tensor in kept[0].parts()[1])

    def meet(other: Record | None, span: slice) -> None:
        products = (
            kept[0].gram(strip.dtype, work.max_memory)
            if other is None
            else kept[0].cross_gram(other, strip.dtype, work.max_memory)
        )
        strip[:, span] += products

    work.attempt(prepare)
    if work.failure is not None:
        sent = forms[rank].empty(device)
    hops = list(_hops(rank, ranks.size, number))

    def start(target: int | None, source: int | None) -> tuple[Callable[[], None], list[Tensor]]:
        room = [] if source is None else forms[source].empty(device)
        return ranks.exchange(sent, target, room, source), room

    pending = start(*hops[0])
    work.attempt(lambda: meet(None, work.spans[rank]))
    for place, (_, source) in enumerate(hops):
        wait, room = pending
        wait()
        if place + 1 < len(hops):  # travels while the products are formed
            pending = start(*hops[place + 1])
        if source is not None:
            form, span = forms[source], work.spans[source]
            work.attempt(lambda room=room, form=form, span=span: meet(form.build(room), span))  # type: ignore[misc]
        del room
