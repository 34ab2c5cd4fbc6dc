"""Features of all samples: which numbers they are, how much memory they may take, how a run goes on after a stop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from made_rows import chosen, feed, from_model, from_numbers, restarted
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.selection import table as tables
from steepest.selection.features import FeatureRun, TableRun, layer_inputs, rescale_
from steepest.selection.grad_match import GradMatch
from steepest.selection.herding import Herding
from steepest.selection.k_center import KCenter
from steepest.selection.method import Method
from steepest.selection.table import Table

METHODS = [Herding, KCenter, GradMatch]
any_method = pytest.mark.parametrize("kind", METHODS)


def made(count: int, width: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def all_rows(table: Table) -> torch.Tensor:
    return table.gather(torch.arange(table.num_rows))


@pytest.mark.parametrize("bias", [True, False])
def test_features_are_the_inputs_of_the_last_layer_without_the_one_of_the_bias(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    inputs = made(10, 4)
    found = torch.cat([layer_inputs(rows) for rows in from_model(model, inputs, torch.arange(10) % 3, "2.weight")])
    torch.testing.assert_close(found, model[1](model[0](inputs)))


def test_features_are_averaged_over_positions() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    inputs = torch.randn(6, 2, 5)
    targets = torch.randint(3, (6, 5))
    found = torch.cat([layer_inputs(rows) for rows in from_model(model, inputs, targets, "2.weight")])
    torch.testing.assert_close(found, model[1](model[0](inputs)).mean(2))


@pytest.mark.parametrize("block_numbers", [1, 12, 15, 1000])
def test_a_table_gives_back_its_rows_whatever_its_blocks_and_batches(
    monkeypatch: pytest.MonkeyPatch, block_numbers: int
) -> None:
    monkeypatch.setattr(tables, "BLOCK_NUMBERS", block_numbers)
    table, rows = Table("Herding", 1 << 20), made(23)
    for batch in rows.split([1, 6, 0, 9, 7]):
        table.append(batch)
    assert table.num_rows == 23
    assert torch.equal(all_rows(table), rows)
    some = torch.tensor([0, 3, 4, 11, 22])
    assert torch.equal(table.gather(some), rows[some])


def test_a_table_keeps_float32_of_any_float_and_changes_no_row_that_it_was_given() -> None:
    rows = made(4).double().requires_grad_()
    table = Table("Herding", 1 << 20)
    table.append(rows)
    table.append(rows.bfloat16())
    assert torch.equal(all_rows(table), torch.cat([rows.float(), rows.bfloat16().float()]).detach())
    all_rows(table).zero_()
    assert torch.equal(all_rows(table)[:4], rows.float())


def test_a_table_at_its_limit_is_fine_and_one_number_more_is_refused() -> None:
    table = Table("KCenter", 4 * 5 * 20)
    table.append(made(20))
    assert table.nbytes <= 4 * 5 * 20
    with pytest.raises(InvalidOptionError) as caught:
        table.append(made(1))
    message = str(caught.value)
    assert "KCenter keeps 5 float32 numbers per sample: 420 bytes for the first 21 samples" in message
    assert "max_memory allows 400 bytes" in message
    assert "SAGE" in message
    assert "KCenter(max_memory=...) 420 bytes or more" in message
    assert table.num_rows == 20


@any_method
def test_a_table_known_to_grow_too_large_is_refused_at_the_first_batch(kind: type[Method]) -> None:
    run = kind(max_memory=1 << 20).begin()
    assert isinstance(run, TableRun)
    run.expect(100_000)
    with pytest.raises(InvalidOptionError, match=r"(1.9|2.3) MiB for 100000 samples, and max_memory allows 1.0 MiB"):
        feed(run, from_numbers(made(7)))


def test_the_bytes_in_the_end_are_told_as_soon_as_the_width_is_known() -> None:
    run = Herding().begin()
    assert run.nbytes == 0
    run.expect(10_000_000)
    feed(run, from_numbers(made(7)))
    assert run.nbytes == 4 * 5 * 10_000_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_feature_that_is_no_float32_number_is_refused_with_the_position_of_its_sample(bad: float) -> None:
    features = made(20).double()
    features[16, 2] = bad
    with pytest.raises(NonFiniteError, match="sample 16 "):
        feed(Herding().begin(), from_numbers(features))


@any_method
def test_a_run_stopped_after_any_batch_goes_on_to_the_same_choice(kind: type[Method], tmp_path: Path) -> None:
    features, errors, labels = made(40), made(40, 3, seed=2), torch.arange(40) % 4
    method = kind()
    whole = feed(method.begin(), from_numbers(features, errors, labels)).pick(9, labels)
    for stop in range(7):
        first = feed(method.begin(), from_numbers(features, errors, labels), until=stop)
        again = restarted(method, first, str(tmp_path / "state"))
        feed(again, from_numbers(features, errors, labels), after=stop - 1)
        found = again.pick(9, labels)
        assert torch.equal(found.indices, whole.indices)
        assert torch.equal(found.weights, whole.weights)
        assert torch.equal(found.scores, whole.scores)
        assert found.numbers == whole.numbers


def test_a_state_does_not_change_when_its_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_NUMBERS", 50)
    rows = made(40)
    first, second = Table("Herding", 1 << 20), Table("Herding", 1 << 20)
    first.append(rows[:13])
    state = first.state_dict()
    second.load_state_dict(state)
    second.append(rows[20:])
    first.append(rows[13:])
    third = Table("Herding", 1 << 20)
    third.load_state_dict(state)
    third.append(rows[13:20])
    assert torch.equal(all_rows(first), rows)
    assert torch.equal(all_rows(second), torch.cat([rows[:13], rows[20:]]))
    assert torch.equal(all_rows(third), rows[:20])


@any_method
def test_a_policy_that_needs_labels_is_refused_at_the_first_batch_without_them(kind: type[Method]) -> None:
    run = kind(class_policy="balanced").begin()
    with pytest.raises(InvalidOptionError, match="needs the class of every sample"):
        feed(run, from_numbers(made(7)))


@any_method
def test_a_batch_out_of_order_is_an_error(kind: type[Method]) -> None:
    batches = list(from_numbers(made(21)))
    run = kind().begin()
    run.update(0, batches[0])
    with pytest.raises(RuntimeError, match="sample 14 came where 7 was due"):
        run.update(0, batches[2])


@any_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_policy": "fair"}, "class_policy='fair'"),
        ({"max_memory": 0}, "max_memory=0"),
        ({"max_memory": 1e9}, "max_memory=1000000000.0"),
    ],
)
def test_options_that_cannot_be_are_refused_when_the_method_is_made(
    kind: type[Method], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        kind(**options)


@any_method
@pytest.mark.parametrize("policy", ["auto", "global", "balanced", "proportional"])
@pytest.mark.parametrize("count", [1, 2, 13, 29, 30])
def test_as_many_as_asked_for_are_kept_with_weights_of_mean_one(kind: type[Method], policy: str, count: int) -> None:
    features, errors = made(30), made(30, 3, seed=2)
    labels = torch.tensor([0] * 20 + [1] * 7 + [7] * 3)
    found = chosen(kind(class_policy=policy), features, count, errors, labels)
    assert len(found.indices) == len(found.weights) == count
    assert found.indices.dtype == torch.int64
    assert torch.equal(found.indices, found.indices.unique())
    assert found.weights.dtype == torch.float32
    assert float(found.weights.min()) >= 0
    assert float(found.weights.mean()) == pytest.approx(1, abs=1e-6)
    assert found.scores is not None
    assert found.scores.shape == (30,)
    assert found.scores.dtype == torch.float32
    if policy == "proportional" and count == 13:
        assert labels[found.indices].bincount(minlength=8).tolist() == [9, 3, 0, 0, 0, 0, 0, 1]


@any_method
def test_every_class_is_chosen_from_by_itself(kind: type[Method]) -> None:
    features, errors, labels = made(40), made(40, 3, seed=2), torch.arange(40) % 2
    both = chosen(kind(), features, 12, errors, labels).indices
    for label in (0, 1):
        members = (labels == label).nonzero().squeeze(1)
        alone = members[chosen(kind(), features[members], 6, errors[members]).indices]
        assert torch.equal(both[labels[both] == label], alone)


@any_method
@pytest.mark.parametrize("count", [1, 4, 12])
def test_samples_that_are_all_equal_or_all_zero_are_chosen_without_repetition(kind: type[Method], count: int) -> None:
    for value in (0.0, 3.0):
        same = torch.full((12, 5), value)
        found = chosen(kind(), same, count, same[:, :2].clone())
        assert len(found.indices.unique()) == count
        assert bool(found.weights.isfinite().all())


@any_method
def test_a_choice_does_not_change_in_float64_nor_under_a_factor_nor_with_the_batches(kind: type[Method]) -> None:
    features, errors, labels = made(60), made(60, 3, seed=2), torch.arange(60) % 3
    expected = chosen(kind(), features, 20, errors, labels)
    for other in (features.double(), features * 1e-25, features * 1e25):
        assert torch.equal(chosen(kind(), other, 20, errors, labels).indices, expected.indices)
    batches = from_numbers(features, errors, labels, size=11)
    assert torch.equal(feed(kind().begin(), batches).pick(20, labels).indices, expected.indices)


@any_method
def test_the_callers_autocast_and_no_grad_do_not_change_the_choice(kind: type[Method]) -> None:
    features, errors, labels = made(60), made(60, 3, seed=2), torch.arange(60) % 3
    expected = chosen(kind(), features, 20, errors, labels)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = chosen(kind(), features, 20, errors, labels)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("kind", [Herding, KCenter])
def test_scores_tell_the_order_of_choice_within_a_class(kind: type[Method]) -> None:
    features, labels = made(40), torch.arange(40) % 2
    run = kind().begin()
    assert isinstance(run, FeatureRun)
    found = feed(run, from_numbers(features, None, labels)).pick(13, labels)
    assert found.scores is not None
    kept = torch.zeros(40, dtype=torch.bool)
    kept[found.indices] = True
    assert bool((found.scores[~kept] == 0).all())
    for label, quota in ((0, 7), (1, 6)):
        ranks = found.scores[kept & (labels == label)]
        assert sorted(ranks.tolist()) == [float(rank) for rank in range(1, quota + 1)]
        fewer = run.pick(2, labels).indices  # the first of each class
        assert found.scores[fewer[labels[fewer] == label]].item() == quota
    assert bool((found.weights == 1).all())


def test_rescaling_is_exact_and_undone_by_its_exponent() -> None:
    for factor in (1.0, 1e-40, 3e38):
        matrix = made(5).clamp_(-1, 1) * factor
        scaled = matrix.clone()
        exponent = rescale_(scaled)
        assert 0.5 <= float(scaled.abs().max()) < 1
        assert torch.equal(scaled.double() * 2.0**exponent, matrix.double())
    zeros = torch.zeros(3, 2)
    assert rescale_(zeros) == 0
    assert not zeros.any()
