"""Frequent Directions: its bounds, and what must not change them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs
from torch import Tensor

import steepest as st
from steepest.training.memory import peak_memory

EPS = torch.finfo(torch.float32).eps


def rows_of(rows: int, columns: int, seed: int = 0, *, decay: float = 0.5) -> Tensor:
    """Random rows whose spectrum falls like ``k ** -decay``."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, columns + 1).float() ** -decay
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return torch.randn(rows, columns, generator=generator) * scale @ turn


def fed(rows: Tensor | dict[str, Tensor], size: int, step: int = 7, *, robust: bool = False) -> st.FrequentDirections:
    sketch = st.FrequentDirections(size, robust=robust)
    if isinstance(rows, Tensor):
        for part in rows.split(step):
            sketch.insert(part)
    else:
        for start in range(0, len(next(iter(rows.values()))), step):
            sketch.insert({name: block[start : start + step] for name, block in rows.items()})
    return sketch


def flat(sketch: st.FrequentDirections) -> Tensor:
    made = sketch.sketch()
    return (made if isinstance(made, Tensor) else torch.cat(list(made.values()), 1)).double()


def left_out(rows: Tensor, sketch: st.FrequentDirections) -> Tensor:
    """Eigenvalues of ``A^T A - B^T B``, ascending."""
    a, b = rows.float().double(), flat(sketch)
    return torch.linalg.eigvalsh(a.T @ a - b.T @ b)


def rounding(rows: Tensor) -> float:
    """What float32 rows may cost either bound: each shrink rounds the sketch once."""
    return 20 * EPS * float(torch.linalg.matrix_norm(rows.double(), 2)) ** 2 + 1e-300


def theorem(rows: Tensor, size: int) -> float:
    """The least of ``|A - A_k|_F^2 / (l + 1 - k)`` over k."""
    values = torch.linalg.svdvals(rows.float().double()).square()
    return min(float(values[k:].sum()) / (size + 1 - k) for k in range(size + 1))


SHAPES: dict[str, Any] = {
    "count": hs.integers(1, 60),
    "columns": hs.integers(1, 24),
    "size": hs.integers(1, 9),
    "seed": hs.integers(0, 99),
    "decay": hs.sampled_from([0.0, 0.5, 2.0]),
}


@given(**SHAPES)
def test_what_is_left_out_is_positive_and_within_both_bounds(
    count: int, columns: int, size: int, seed: int, decay: float
) -> None:
    rows = rows_of(count, columns, seed, decay=decay)
    sketch = fed(rows, size)
    error = left_out(rows, sketch)
    assert len(flat(sketch)) <= size
    assert error[0] >= -rounding(rows)
    assert error[-1] <= sketch.certificate + rounding(rows)
    assert sketch.certificate <= theorem(rows, size) * (1 + 1e-5) + rounding(rows)
    assert sketch.num_rows == count
    assert sketch.squared_norm == pytest.approx(float(rows.double().square().sum()))


@given(**SHAPES)
def test_a_robust_sketch_halves_the_bound(count: int, columns: int, size: int, seed: int, decay: float) -> None:
    rows = rows_of(count, columns, seed, decay=decay)
    sketch, plain = fed(rows, size, robust=True), fed(rows, size)
    error = (left_out(rows, sketch) - sketch.ridge).abs().max()
    assert sketch.ridge == sketch.certificate == plain.certificate / 2
    assert error <= sketch.certificate + rounding(rows)
    assert plain.ridge == 0.0


@given(count=hs.integers(1, 60), rank=hs.integers(1, 4), size=hs.integers(4, 9), seed=hs.integers(0, 99))
def test_rows_of_rank_at_most_l_are_kept_exactly(count: int, rank: int, size: int, seed: int) -> None:
    rows = torch.randn(count, rank, generator=torch.Generator().manual_seed(seed)) @ rows_of(rank, 20, seed)
    sketch = fed(rows, size)
    assert sketch.certificate <= rounding(rows)
    assert left_out(rows, sketch).abs().max() <= rounding(rows)


@given(count=hs.integers(1, 50), cut=hs.integers(1, 15), size=hs.integers(1, 6), seed=hs.integers(0, 99))
def test_blocks_of_columns_give_the_sketch_of_the_whole(count: int, cut: int, size: int, seed: int) -> None:
    rows = rows_of(count, 16, seed)
    whole, blocks = fed(rows, size), fed({"a": rows[:, :cut], "b": rows[:, cut:]}, size)
    made = blocks.sketch()
    assert {name: block.shape[1] for name, block in made.items()} == {"a": cut, "b": 16 - cut}
    assert blocks.certificate == pytest.approx(whole.certificate, rel=1e-5, abs=rounding(rows))
    b, c = flat(whole), flat(blocks)
    torch.testing.assert_close(c.T @ c, b.T @ b, rtol=0, atol=rounding(rows))


@given(
    count=hs.integers(1, 50), shards=hs.integers(2, 5), size=hs.integers(1, 7), seed=hs.integers(0, 99),
    robust=hs.booleans(),
)  # fmt: skip
def test_merged_shards_keep_the_bound_of_one_stream(
    count: int, shards: int, size: int, seed: int, robust: bool
) -> None:
    rows = rows_of(count, 18, seed)
    merged = st.FrequentDirections(size, robust=robust)
    for shard in range(shards):  # some of them may be empty
        part = fed(rows[shard::shards], size, robust=robust)
        before = part.state_dict()
        merged.merge(part)
        assert _same(before, part.state_dict())
    error = left_out(rows, merged)
    assert merged.num_rows == count
    assert merged.squared_norm == pytest.approx(float(rows.double().square().sum()))
    assert (error - merged.ridge).abs().max() <= merged.certificate + rounding(rows)
    assert error[0] >= -rounding(rows)
    assert merged.certificate * (1 + robust) <= theorem(rows, size) * (1 + 1e-5) + rounding(rows)


def test_a_sketch_merges_with_itself_and_into_an_empty_one() -> None:
    rows = rows_of(40, 12)
    sketch, empty = fed(rows, 4), st.FrequentDirections(4)
    empty.merge(sketch)
    assert empty.certificate == sketch.certificate
    empty.merge(st.FrequentDirections(4))
    assert empty.num_rows == 40
    sketch.merge(sketch)
    error = left_out(torch.cat([rows, rows]), sketch)
    assert -rounding(rows) <= error[0]
    assert error[-1] <= sketch.certificate + rounding(rows)


@given(seed=hs.integers(0, 99), factor=hs.sampled_from([1e-18, 0.37, 2.0**20, 1e18]))
def test_scaled_rows_scale_the_sketch(seed: int, factor: float) -> None:
    """Squares of 1e18 and 1e-18 do not exist in float32."""
    rows = rows_of(30, 10, seed)
    plain, scaled = fed(rows, 4), fed(rows * factor, 4)
    assert scaled.certificate == pytest.approx(plain.certificate * factor**2, rel=1e-4)
    assert scaled.squared_norm == pytest.approx(plain.squared_norm * factor**2, rel=1e-5)
    b, c = flat(plain), flat(scaled) / factor
    torch.testing.assert_close(c.T @ c, b.T @ b, rtol=0, atol=rounding(rows))


@given(seed=hs.integers(0, 99))
def test_rotated_rows_rotate_the_sketch(seed: int) -> None:
    rows = rows_of(30, 10, seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=generator)).Q
    plain, rotated = fed(rows, 4), fed(rows.double() @ turn, 4)
    assert rotated.certificate == pytest.approx(plain.certificate, rel=1e-4)
    b, c = flat(plain) @ turn, flat(rotated)
    torch.testing.assert_close(c.T @ c, b.T @ b, rtol=0, atol=rounding(rows))


@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
@given(before=hs.integers(0, 25), compressed=hs.booleans(), robust=hs.booleans())
def test_a_stream_goes_on_bit_by_bit(way: str, before: int, compressed: bool, robust: bool) -> None:
    rows = rows_of(40, 12)
    sketch = st.FrequentDirections(4, robust=robust)
    sketch.insert({"w": rows[:before]})
    if compressed:
        sketch.compress()
    copied = _copied(sketch, way)
    assert torch.equal(sketch.sketch()["w"], copied.sketch()["w"])
    for part in (rows[before : before + 3], rows[before + 3 :]):
        sketch.insert({"w": part})
        copied.insert({"w": part})
    assert _same(sketch.state_dict(), copied.state_dict())
    assert torch.equal(sketch.sketch()["w"], copied.sketch()["w"])
    assert (sketch.certificate, sketch.ridge) == (copied.certificate, copied.ridge)


def _copied(sketch: st.FrequentDirections, way: str) -> st.FrequentDirections:
    if way == "deepcopy":
        return copy.deepcopy(sketch)
    if way == "pickle":
        return pickle.loads(pickle.dumps(sketch))
    file = io.BytesIO()
    torch.save(sketch.state_dict(), file)
    file.seek(0)
    made = st.FrequentDirections(sketch.sketch_size, robust=sketch.robust)
    made.insert({"other": torch.ones(1, 3)})  # a state replaces what was there
    made.load_state_dict(torch.load(file, weights_only=True))
    return made


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    blocks, others = left.pop("blocks"), right.pop("blocks")
    return left == right and blocks.keys() == others.keys() and all(
        torch.equal(block, others[name]) for name, block in blocks.items()
    )  # fmt: skip


def test_looking_changes_nothing() -> None:
    rows = rows_of(50, 12)
    watched, plain = st.FrequentDirections(4), st.FrequentDirections(4)
    for row in rows.split(1):
        watched.insert(row)
        plain.insert(row)
        watched.sketch()
        assert watched.certificate >= 0
        repr(watched)
    assert _same(watched.state_dict(), plain.state_dict())


def test_the_certificate_never_falls_and_is_that_of_the_sketch_at_every_moment() -> None:
    rows = rows_of(50, 12)
    sketch, last = st.FrequentDirections(3), 0.0
    for count in range(1, 51):
        sketch.insert(rows[count - 1 : count])
        assert sketch.certificate >= last * (1 - 1e-6)
        assert left_out(rows[:count], sketch)[-1] <= sketch.certificate + rounding(rows)
        last = sketch.certificate
        if count % 9 == 0:
            sketch.compress()
            assert sketch.certificate == pytest.approx(last)
    assert last > 0


def test_what_is_returned_is_the_callers_own() -> None:
    sketch = fed(rows_of(21, 12), 4)
    sketch.compress()
    before = sketch.state_dict()
    sketch.sketch().zero_()
    sketch.state_dict()["blocks"][""].zero_()
    assert _same(before, sketch.state_dict())


def test_rows_inserted_at_once_and_one_by_one_give_the_same_bits() -> None:
    rows = rows_of(50, 12)
    assert _same(fed(rows, 4, step=1).state_dict(), fed(rows, 4, step=50).state_dict())


def test_compressed_rows_are_orthogonal_and_the_largest_first() -> None:
    sketch = fed(rows_of(21, 12), 4)
    shown = sketch.sketch()
    sketch.compress()
    assert torch.equal(sketch.sketch(), shown)
    gram = shown.double() @ shown.double().T
    assert (gram.diagonal().diff() <= 0).all()
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5 * float(gram.max()))


def test_fewer_rows_than_l_lose_nothing() -> None:
    rows = rows_of(3, 12)
    sketch = fed(rows, 8)
    sketch.compress()
    assert sketch.certificate == 0.0
    assert left_out(rows, sketch).abs().max() <= rounding(rows)


def test_identical_rows_become_one_direction() -> None:
    row = torch.tensor([[3.0, -4.0, 0.0]])
    sketch = fed(row.repeat(100, 1), 2)
    first = sketch.sketch()[0]
    torch.testing.assert_close(first.abs(), 10 * row[0].abs())
    assert sketch.certificate <= 1e-3


def test_zero_rows_count_and_leave_nothing() -> None:
    sketch = fed(torch.zeros(20, 3), 2)
    assert sketch.sketch().shape == (0, 3)
    assert (sketch.num_rows, sketch.certificate, sketch.squared_norm) == (20, 0.0, 0.0)
    sketch.insert(torch.tensor([[0.0, 2.0, 0.0]]))
    torch.testing.assert_close(sketch.sketch().abs()[:1], torch.tensor([[0.0, 2.0, 0.0]]))


def test_no_rows_are_rows_of_a_known_width() -> None:
    sketch = st.FrequentDirections(2)
    sketch.insert(torch.zeros(0, 3))
    assert sketch.sketch().shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_floating_point_dtype_is_taken_up_in_float32(dtype: torch.dtype) -> None:
    rows = rows_of(30, 8).to(dtype)
    assert _same(fed(rows, 4).state_dict(), fed(rows.float(), 4).state_dict())


def test_rows_with_a_graph_and_another_default_dtype_do_no_harm() -> None:
    rows = rows_of(30, 8)
    torch.set_default_dtype(torch.float64)
    try:
        made = fed(rows.requires_grad_(), 4).sketch()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32
    assert not made.requires_grad


def test_autocast_does_not_round_the_sketch() -> None:
    rows = rows_of(30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fed(rows, 4)
    assert _same(rounded.state_dict(), fed(rows, 4).state_dict())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300], ids=str)
def test_rows_that_are_not_finite_change_nothing(bad: float) -> None:
    sketch = fed({"a": rows_of(11, 4), "b": rows_of(11, 3)}, 4)
    before = sketch.state_dict()
    rows = {"a": torch.ones(2, 4), "b": torch.ones(2, 3, dtype=torch.float64)}
    rows["b"][1, 2] = bad
    with pytest.raises(st.NonFiniteError, match=r"NaN or infinity.*left as it was"):
        sketch.insert(rows)
    assert _same(before, sketch.state_dict())


def test_rows_that_are_too_large_together_are_refused() -> None:
    sketch = st.FrequentDirections(2)
    sketch.insert(torch.full((1, 2), 2e38))
    other = copy.deepcopy(sketch)
    for again in (lambda: sketch.insert(torch.full((1, 2), 2e38)), lambda: sketch.merge(other)):
        with pytest.raises(st.NonFiniteError, match="scale all rows"):
            again()
    assert sketch.num_rows == 1


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "integers": (lambda: torch.ones(2, 4, dtype=torch.int64), r"\(2, 4\), torch.int64"),
    "complex": (lambda: torch.ones(2, 4, dtype=torch.complex64), "complex64"),
    "sparse": (lambda: torch.ones(2, 4).to_sparse(), "sparse"),
    "one row": (lambda: torch.ones(4), r"shape \(4,\)"),
    "width": (lambda: torch.ones(2, 5), r"\(2, 5\)"),
    "a mapping": (lambda: {"a": torch.ones(2, 4)}, r"a: \(2, 4\)"),
    "nothing": (dict, "of no block"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_refused_with_their_shape(name: str) -> None:
    make, found = REFUSED[name]
    sketch = fed(torch.ones(3, 4), 2)
    before = sketch.state_dict()
    with pytest.raises(st.InvalidOptionError, match=found):
        sketch.insert(make())
    assert _same(before, sketch.state_dict())


@pytest.mark.parametrize(
    "blocks",
    [{"a": (2, 4)}, {"a": (2, 4), "c": (2, 3)}, {"a": (2, 4), "b": (1, 3)}, {"a": (2, 4), "b": (2, 3), "c": (2, 1)}],
    ids=["missing", "renamed", "fewer rows", "more"],
)
def test_blocks_stay_what_they_were(blocks: dict[str, tuple[int, int]]) -> None:
    sketch = fed({"a": torch.ones(3, 4), "b": torch.ones(3, 3)}, 2)
    with pytest.raises(st.InvalidOptionError, match=r"has columns \{'a': 4, 'b': 3\}"):
        sketch.insert({name: torch.ones(shape) for name, shape in blocks.items()})
    sketch.insert({"b": torch.ones(1, 3), "a": torch.ones(1, 4)})  # their order does not matter


@pytest.mark.parametrize("size", [0, -1, 2.0, True], ids=str)
def test_impossible_sizes_are_refused(size: Any) -> None:
    with pytest.raises(st.InvalidOptionError, match="sketch_size"):
        st.FrequentDirections(size)


def test_sketches_of_other_kinds_are_not_mixed() -> None:
    sketch = st.FrequentDirections(4)
    for other in (st.FrequentDirections(5), st.FrequentDirections(4, robust=True)):
        with pytest.raises(st.InvalidOptionError, match="cannot be merged"):
            sketch.merge(other)
        with pytest.raises(st.InvalidOptionError, match="saved sketch has sketch_size"):
            sketch.load_state_dict(other.state_dict())
    with pytest.raises(st.InvalidOptionError, match="seen no rows"):
        sketch.sketch()


def test_memory_is_the_buffer_and_a_few_pieces() -> None:
    size, columns = 8, 400_000
    rows = torch.randn(4, columns)
    sketch = st.FrequentDirections(size)
    sketch.insert(rows)
    assert sketch.nbytes == 2 * size * columns * 4
    assert "columns=400000" in repr(sketch)

    def more() -> None:
        for _ in range(5):
            sketch.insert(rows)
        sketch.compress()

    peak = peak_memory("cpu", more)
    assert peak < sketch.nbytes / 2, f"{peak} bytes beside a buffer of {sketch.nbytes}"


@pytest.mark.parametrize("rows", [[[1.0, 2.0]], None, {"a": [1.0]}], ids=["list", "nothing", "list by name"])
def test_what_is_no_tensor_is_refused_in_words(rows: Any) -> None:
    with pytest.raises(st.errors.InvalidOptionError, match="give a tensor of shape"):
        st.FrequentDirections(4).insert(rows)


def test_only_a_sketch_is_merged() -> None:
    other: Any = {"sketch_size": 4}
    with pytest.raises(st.errors.InvalidOptionError, match="a dict: give another FrequentDirections"):
        st.FrequentDirections(4).merge(other)


@pytest.mark.parametrize("name", ["sketch_size", "num_rows", "taken", "blocks"])
def test_a_state_that_is_not_whole_is_refused_and_changes_nothing(name: str) -> None:
    sketch = fed(rows_of(30, 8), 4)
    before = sketch.state_dict()
    with pytest.raises(st.errors.InvalidOptionError, match=f"lacks {name}"):
        sketch.load_state_dict({key: value for key, value in before.items() if key != name})
    assert _same(sketch.state_dict(), before)
