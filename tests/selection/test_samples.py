"""Data in its own order: every kind, every label, and the fingerprint of a pass."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from steepest.errors import InvalidOptionError, SelectionError, SteepestError
from steepest.selection.samples import Batch, Samples, fold, sample_keys, to_device

X = torch.arange(22.0).view(11, 2)
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 1, 0])


class Pairs(Dataset[Any]):
    """A map-style dataset of pairs with plain integers as labels."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(X):
            raise IndexError(index)
        return X[index], int(Y[index])


class Rows(Dataset[Any]):
    """Dicts of plain numbers and strings, as a dataset of Hugging Face gives them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": X[index].tolist(), "text": f"row {index}", "label": int(Y[index])}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Any]):
    def __init__(self, lengths: tuple[int, ...] = (11,)) -> None:
        self.lengths, self.passes = lengths, 0

    def __iter__(self) -> Iterator[Any]:
        length = self.lengths[min(self.passes, len(self.lengths) - 1)]
        self.passes += 1
        return ((X[i], int(Y[i])) for i in range(length))


class Again:
    """Batches that can be gone through more than once, and nothing else."""

    def __iter__(self) -> Iterator[Any]:
        return iter(cut(X, Y))


def cut(x: Tensor, y: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def pairs_of(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "a list of tensors": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "map style": Pairs,
    "stream": Stream,
    "list of batches": lambda: cut(X, Y),
    "tuple of batches": lambda: tuple(cut(X, Y)),
    "batches": Again,
    "loader": lambda: DataLoader(Pairs(), batch_size=4),
    "shuffling loader": lambda: DataLoader(Pairs(), batch_size=4, shuffle=True),
    "loader that drops": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True),
    "loader with a batch sampler": lambda: DataLoader(
        Pairs(), batch_sampler=BatchSampler(range(10, 0, -1), 4, drop_last=True)
    ),
    "loader that collates": lambda: DataLoader(Pairs(), batch_size=4, collate_fn=pairs_of),
    "loader over a stream": lambda: DataLoader(Stream(), batch_size=4),
    "loader over whole batches": lambda: DataLoader(WholeBatches(), batch_size=None),
    "loader over a list": lambda: DataLoader([(x, int(y)) for x, y in zip(X, Y, strict=True)], batch_size=4),
}


class WholeBatches(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(cut(X, Y))


@pytest.fixture
def digest() -> Callable[[Samples], bytes]:
    def of(samples: Samples) -> bytes:
        state = b""
        for batch in samples.batches():
            state = fold(state, batch)
        return state

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_all_samples_in_their_own_order(kind: str) -> None:
    samples = Samples(KINDS[kind]())
    for _ in range(2):
        batches = list(samples.batches())
        assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(11))
        assert torch.equal(torch.cat([torch.as_tensor(batch.content[0]) for batch in batches]), X)
        labels = [batch.labels for batch in batches if batch.labels is not None]
        assert torch.equal(torch.cat(labels), Y)
        assert {label.dtype for label in labels} == {torch.int64}
        assert samples.num_samples == 11
    if "loader" in kind or "batches" in kind:
        assert [len(batch) for batch in batches] == [4, 4, 3]
    assert samples.num_batches in {len(batches), None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_can_begin_at_any_batch(kind: str) -> None:
    data = KINDS[kind]()
    own_batches = "batches" in kind
    samples = Samples(data, batch_size=None if own_batches else 4)
    whole = list(samples.batches())
    for start in range(5):
        rest = list(samples.batches(start))
        assert [b.indices.tolist() for b in rest] == [b.indices.tolist() for b in whole[start:]]
        for found, wanted in zip(rest, whole[start:], strict=True):
            assert torch.equal(found.content[0], wanted.content[0])
            assert found.labels is not None
            assert torch.equal(found.labels, wanted.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_have_the_same_fingerprint_in_every_form_and_batch_size(
    kind: str, digest: Callable[[Samples], bytes]
) -> None:
    reference = digest(Samples((X, Y), batch_size=11))
    assert digest(Samples(KINDS[kind]())) == reference
    if "batches" not in kind:
        assert digest(Samples(KINDS[kind](), batch_size=2)) == reference  # a batch of two, made of two parts
        assert digest(Samples(KINDS[kind](), batch_size=1)) == reference


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_neither_order_nor_random_state(workers: int, digest: Callable[[Samples], bytes]) -> None:
    loader = DataLoader(Pairs(), batch_size=3, shuffle=True, num_workers=workers)
    state = torch.get_rng_state()
    samples = Samples(loader)
    assert digest(samples) == digest(Samples((X, Y)))
    assert [batch.indices.tolist() for batch in samples.batches(3)] == [[9, 10]]
    assert torch.equal(state, torch.get_rng_state())


def test_a_loader_is_left_as_it_was() -> None:
    loader = DataLoader(Pairs(), batch_size=4, shuffle=True, drop_last=True)
    list(Samples(loader).batches())
    assert [len(batch[0]) for batch in loader] == [4, 4]


def test_a_subset_is_counted_from_its_own_beginning() -> None:
    samples = Samples(DataLoader(Subset(Pairs(), [7, 3, 5]), batch_size=2))
    first, last = samples.batches()
    assert first.indices.tolist() == [0, 1]
    assert torch.equal(first.content[0], X[[7, 3]])
    assert last.labels is not None
    assert last.labels.tolist() == [int(Y[5])]
    assert isinstance(samples.dataset, Subset)


def test_dicts_keep_their_strings_and_find_their_labels() -> None:
    batch = next(Samples(Rows(), batch_size=3).batches())
    assert batch.content["text"] == ["row 0", "row 1", "row 2"]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets"])
def test_labels_of_a_dict_are_found_under_their_usual_names(key: str) -> None:
    batch = next(Samples([{"x": X[:4], key: Y[:4].to(torch.uint8)}]).batches())
    assert batch.labels is not None
    assert batch.labels.tolist() == Y[:4].tolist()


@pytest.mark.parametrize("targets", [X, Y.float(), Y.view(11, 1), torch.zeros(11, dtype=torch.complex64)])
def test_what_is_no_row_of_whole_numbers_is_no_label(targets: Tensor) -> None:
    assert next(Samples((X, targets)).batches()).labels is None
    assert next(Samples((X,)).batches()).labels is None


def test_labels_of_the_user_come_before_those_of_the_data() -> None:
    for given in (1 - Y, (1 - Y).numpy(), (1 - Y).tolist(), (1 - Y).int()):
        for data in ((X, Y), Stream()):
            labels = [batch.labels for batch in Samples(data, labels=given, batch_size=4).batches()]
            assert torch.equal(torch.cat([label for label in labels if label is not None]), 1 - Y)


@pytest.mark.parametrize("given", [Y[:5], torch.cat([Y, Y])])
def test_labels_of_another_length_are_refused(given: Tensor, teaches: Callable[[Exception], None]) -> None:
    with pytest.raises(InvalidOptionError, match=rf"labels has {len(given)} entries and the data 11 samples") as caught:
        Samples((X, Y), labels=given)
    teaches(caught.value)
    with pytest.raises(InvalidOptionError, match=rf"labels has {len(given)} entries"):
        list(Samples(Stream(), labels=given).batches())


@pytest.mark.parametrize("given", [Y.float(), Y.view(11, 1), ["cat"] * 11, object()])
def test_labels_that_are_no_whole_numbers_are_refused(given: Any) -> None:
    with pytest.raises(InvalidOptionError, match="labels"):
        Samples((X, Y), labels=given)


def test_labels_that_stop_are_refused(teaches: Callable[[Exception], None]) -> None:
    with pytest.raises(InvalidOptionError, match="samples 4 to 7 lacks") as caught:
        list(Samples([(X[:4], Y[:4]), (X[4:8], X[4:8])]).batches())
    teaches(caught.value)
    with pytest.raises(InvalidOptionError, match="samples 4 to 7 has"):
        list(Samples([(X[:4], X[:4]), (X[4:8], Y[4:8])]).batches())


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Tensor:
        return X[0]


BAD: list[tuple[Any, str]] = [
    ((X, Y[:5]), r"shapes \(11, 2\), \(5,\)"),
    ((X, torch.tensor(1)), "not equally many samples"),
    ((), "empty tuple"),
    ([], "empty list"),
    ((X[:0], Y[:0]), "is empty"),
    (TensorDataset(X[:0]), "is empty"),
    (X, "single Tensor"),
    (X.numpy(), "single ndarray"),
    ({"train": X, "test": X}, "keys 'train', 'test'"),
    (UserDict(x=X), "keys 'x'"),
    ("data.csv", "'data.csv'"),
    (None, "None"),
    (7, "is a int"),
    (iter(cut(X, Y)), "gone after one pass"),
    ((batch for batch in cut(X, Y)), "generator, which is gone"),
    (iter(DataLoader(Pairs())), "gone after one pass"),
    (DataLoader(Pairs(), batch_size=None), "makes no batches"),
    (DataLoader(Endless(), sampler=range(3)), "has no length"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[message for _, message in BAD])
def test_data_that_cannot_be_used_is_refused(data: Any, message: str, teaches: Callable[[Exception], None]) -> None:
    with pytest.raises(SteepestError, match=message) as caught:
        Samples(data)
    teaches(caught.value)
    assert "\n" not in str(caught.value)


BAD_BATCHES: list[tuple[Any, str]] = [
    ([(X[:4], Y[:3])], "lengths 4, 3"),
    ([(X[:4], Y[:4]), ({"a": X[:2], "b": X[:3]}, Y[:2])], "batch 1 of the data have lengths 2, 3"),
    ([(X[:0], Y[:0])], "Batch 0 of the data is empty"),
    ([(3, 4)], "Item 0 of the data is a tuple of int, int"),
    (["cat", "dog"], "Item 0 of the data is a str"),
]


@pytest.mark.parametrize(("data", "message"), BAD_BATCHES)
def test_batches_that_cannot_be_used_are_refused(data: Any, message: str, teaches: Callable[[Exception], None]) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        list(Samples(data).batches())
    teaches(caught.value)


def test_a_list_of_samples_is_refused(teaches: Callable[[Exception], None]) -> None:
    for label in (3, torch.tensor(3)):
        for samples in ([(x, label) for x in X], [{"x": x, "label": label} for x in X]):
            with pytest.raises(InvalidOptionError, match="single samples") as caught:
                list(Samples(samples).batches())
            teaches(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_different_shapes_are_refused_by_one_line(
    workers: int, teaches: Callable[[Exception], None]
) -> None:
    ragged = [(torch.zeros(2 + i), i) for i in range(3)]
    with pytest.raises(InvalidOptionError, match="3 samples could not be made into a batch") as caught:
        list(Samples(DataLoader(ragged, batch_size=3, num_workers=workers)).batches())
    teaches(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_that_ends_elsewhere_is_refused(teaches: Callable[[Exception], None]) -> None:
    for lengths in ((11, 9), (11, 0), (9, 11)):
        samples = Samples(Stream(lengths))
        list(samples.batches())
        with pytest.raises(SelectionError, match=f"{lengths[0]} samples in one pass and {lengths[1]}") as caught:
            list(samples.batches())
        teaches(caught.value)
    with pytest.raises(InvalidOptionError, match="is empty"):
        list(Samples(Stream((0,))).batches())


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_impossible_batch_sizes_are_refused(size: Any) -> None:
    with pytest.raises(InvalidOptionError, match="batch_size"):
        Samples((X, Y), batch_size=size)


def test_batches_of_their_own_take_no_batch_size() -> None:
    with pytest.raises(InvalidOptionError, match="in batches of its own"):
        Samples(cut(X, Y), batch_size=4)


@pytest.mark.parametrize("start", [-1, 1.5])
def test_an_impossible_start_is_refused(start: Any) -> None:
    with pytest.raises(InvalidOptionError, match="start"):
        list(Samples((X, Y)).batches(start))


def test_random_augmentation_shows_in_the_fingerprint_with_and_without_workers(
    digest: Callable[[Samples], bytes],
) -> None:
    for workers in (0, 1):
        samples = Samples(DataLoader(Noisy(), batch_size=4, num_workers=workers))
        assert digest(samples) != digest(samples)


class Noisy(Pairs):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x + torch.rand(2), y


def test_every_change_of_the_data_changes_the_fingerprint(digest: Callable[[Samples], bytes]) -> None:
    more, other = X.clone(), Y.clone()
    more[10, 1] += 1e-5
    other[0] = 1
    versions = {
        "itself": (X, Y),
        "an entry": (more, Y),
        "a target": (X, other),
        "the order": (X.flip(0), Y.flip(0)),
        "the length": (X[:10], Y[:10]),
        "the shape": (X.view(11, 1, 2), Y),
        "the dtype": (X.double(), Y),
        "the dtype, not the bytes": (X.view(torch.int32), Y),
        "the structure": (X, Y, Y),
    }
    found = {name: digest(Samples(data)) for name, data in versions.items()}
    found["the labels"] = digest(Samples((X, Y), labels=other))
    assert len(set(found.values())) == len(found)
    assert {len(value) for value in found.values()} == {32}


Named = namedtuple("Named", ["x", "y"])


CONTENTS: dict[str, Callable[[slice], Any]] = {
    "bfloat16": lambda s: X[s].to(torch.bfloat16),
    "half": lambda s: X[s].half(),
    "bool": lambda s: X[s] > 5,
    "complex": lambda s: torch.complex(X, X)[s].conj(),
    "no numbers": lambda s: X[s][:, :0],
    "strings": lambda s: [f"text {i}" for i in range(11)][s],
    "nested": lambda s: {"a": (X[s], {"b": Y[s]}), "c": 3.5, "d": None, "e": "shared"},
    "named tuple": lambda s: Named(X[s], Y[s]),
    "user dict": lambda s: UserDict(x=X[s]),
    "array": lambda s: X.numpy()[s],
    "strings in an array": lambda s: np.array([f"text {i}" for i in range(11)])[s],
    "ragged": lambda s: [torch.arange(4 + i) for i in range(11)][s],
    "shared tensor": lambda s: (X[s], torch.eye(20), torch.tensor(3)),
    "boxes": lambda s: (X[s], [{"box": torch.ones(i % 3, 4), "name": str(i)} for i in range(11)][s]),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_content_of_any_form_has_a_fingerprint_that_batches_and_strides_do_not_change(kind: str) -> None:
    make = CONTENTS[kind]

    def chain(sizes: tuple[int, ...]) -> bytes:
        state, at = b"", 0
        for size in sizes:
            state = fold(state, Batch(torch.arange(at, at + size), make(slice(at, at + size)), None))
            at += size
        return state

    assert chain((11,)) == chain((4, 4, 3)) == chain((1,) * 11)
    assert chain((5,)) != chain((6,))
    keys = sample_keys(Batch(torch.arange(11), make(slice(0, 11)), None))
    assert len(keys) == 11
    if kind not in {"bool", "no numbers"}:
        assert len(set(keys)) == 11
    split = [k for s in (slice(0, 6), slice(6, 11)) for k in sample_keys(Batch(torch.arange(11)[s], make(s), None))]
    assert split == keys


def test_strides_do_not_matter() -> None:
    index = torch.arange(2)
    strided = X.T[:, :11]
    assert not strided.is_contiguous()
    assert fold(b"", Batch(index, strided, None)) == fold(b"", Batch(index, strided.contiguous(), None))


def test_keys_of_mappings_are_taken_in_any_order() -> None:
    index = torch.arange(11)
    one = Batch(index, OrderedDict(a=X, b=Y), None)
    two = Batch(index, {"b": Y, "a": X}, None)
    assert fold(b"", one) == fold(b"", two)


def test_what_has_no_content_of_its_own_is_refused(teaches: Callable[[Exception], None]) -> None:
    with pytest.raises(InvalidOptionError, match="whose content cannot be compared") as caught:
        fold(b"", Batch(torch.arange(11), (X, object()), None))
    teaches(caught.value)


def test_duplicates_are_told_by_their_inputs_and_not_by_their_labels() -> None:
    x = torch.stack([X[0], X[1], X[0], X[2]])
    y = torch.tensor([0, 1, 2, 1])
    index = torch.arange(4)
    for content in ((x, y), [x, y], {"x": x, "label": y}, x):
        keys = sample_keys(Batch(index, content, y))
        assert keys[0] == keys[2]
        assert len(set(keys)) == 3
    # Inputs that nothing tells apart by sample are no duplicates.
    assert len(set(sample_keys(Batch(index, (torch.tensor(1.0), y), y)))) == 4


def test_content_moves_to_a_device_with_its_structure() -> None:
    content = {"a": (X, [Y, "text"]), "b": None, "c": np.ones(2), "d": Named(X, 3), "e": Movable()}
    moved = to_device(content, "meta")
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == moved["d"].x.device.type == "meta"
    assert isinstance(moved["a"], tuple)
    assert (moved["a"][1][1], moved["b"], moved["d"].y, moved["e"]) == ("text", None, 3, "moved to meta")
    assert isinstance(moved["c"], np.ndarray)
    assert to_device(X, "cpu").data_ptr() == X.data_ptr()
    assert not to_device(X.clone().requires_grad_(), "cpu").requires_grad


class Movable:
    def to(self, device: str) -> str:
        return f"moved to {device}"


def test_a_dataset_of_hugging_face_without_positions_is_a_stream_of_samples() -> None:
    class Foreign:
        __module__ = "datasets.iterable_dataset"

        def __iter__(self) -> Iterator[Any]:
            return ({"x": X[i].tolist(), "label": int(Y[i])} for i in range(11))

    batches = list(Samples(Foreign(), batch_size=4).batches())
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([b.labels for b in batches if b.labels is not None]), Y)


def test_what_is_known_of_the_data_is_told() -> None:
    samples = Samples(Stream(), batch_size=3)
    assert (samples.num_samples, samples.num_batches, samples.batch_size) == (None, None, 3)
    assert repr(samples) == "Samples(Stream, samples=unknown, batch_size=3)"
    list(samples.batches())
    assert (samples.num_samples, samples.num_batches) == (11, 4)
    own = Samples(cut(X, Y))
    assert (own.num_samples, own.num_batches, own.batch_size) == (None, 3, None)
    assert Samples(Pairs()).batch_size == 256


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_does_not_matter(kind: str) -> None:
    data = KINDS[kind]()
    with torch.device("meta"):
        batches = list(Samples(data).batches())
    assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(11))
