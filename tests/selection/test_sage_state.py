"""SAGE interrupted and resumed, and the data, labels and options that it refuses."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import Tensor

from selection.sage_runs import (
    CONSENSUS,
    LAST,
    LOSS,
    dense_gradients,
    dense_sketch,
    feed,
    made,
    mlp,
    oracle,
    sage,
)
from steepest.errors import InvalidOptionError, NonFiniteError, SelectionError
from steepest.selection.rules import Strata
from steepest.selection.sage import SAGE


def same(first, second):
    """Equal to the last bit, NaN to NaN."""
    if isinstance(first, Tensor):
        return torch.equal(first.nan_to_num(nan=77.0), second.nan_to_num(nan=77.0)) and first.dtype == second.dtype
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return first == second or (isinstance(first, float) and math.isnan(first) and math.isnan(second))


@pytest.mark.parametrize("options", CONSENSUS, ids=str)
def test_a_run_resumed_from_a_file_after_any_batch_is_bitwise_the_same(options):
    model, data, reference = mlp(torch.float32), made(dtype=torch.float32), made(20, dtype=torch.float32, seed=5)
    method = SAGE(sketch_size=3, class_policy="balanced", weights="class", robust=True, **options)
    whole = sage(method, model, data, reference=reference)
    passes = method.begin().passes
    for stop_pass, stop_batch in itertools.product(range(passes), (0, 1, 3)):
        run = method.begin()
        for number in range(passes):
            source = data if run.reads(number) == "data" else reference
            if number == stop_pass:
                feed(run, number, model, source, method, 7, stop=stop_batch)
                file = io.BytesIO()
                torch.save(run.state_dict(), file)
                file.seek(0)
                run = method.begin()
                run.load_state_dict(torch.load(file, weights_only=True))
                feed(run, number, model, source, method, 7, start=stop_batch)
            else:
                feed(run, number, model, source, method, 7)
            run.end_pass(number)
        again = run.pick(12, data[1])
        for name in ("indices", "scores", "weights"):
            assert same(getattr(whole, name), getattr(again, name))
        assert same(dict(whole.numbers), dict(again.numbers))
        assert whole.notes == again.notes


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
def test_a_state_is_a_copy_and_loading_it_leaves_it_alone(options):
    model, data = mlp(), made()
    method = SAGE(sketch_size=3, **options)
    run = method.begin()
    feed(run, 0, model, data, method, 7, stop=4)
    state = run.state_dict()
    kept = copy.deepcopy(state)
    feed(run, 0, model, data, method, 7, start=4)
    run.end_pass(0)
    feed(run, 1, model, data, method, 7, stop=3)
    other = method.begin()
    other.load_state_dict(state)
    feed(other, 0, model, data, method, 7, start=4)
    assert same(state, kept)


def test_a_reference_set_without_one_of_the_classes_is_refused(teaches):
    model, data = mlp(), made()
    with pytest.raises(SelectionError, match="no sample of class 1, 2, which the data has") as error:
        sage(SAGE(consensus="reference"), model, data, reference=(data[0][:5], torch.zeros(5, dtype=torch.long)))
    teaches(error.value)


def test_a_reference_set_may_hold_other_classes_and_few_samples(monkeypatch):
    monkeypatch.setattr("steepest.selection.consensus.ROUNDING", 0.06)  # times 20 samples of a class: more than 1
    model, (x, y), reference = mlp(out=5), made(), made(5, classes=5, seed=5)
    reference = (reference[0], torch.arange(5))
    picked = sage(SAGE(sketch_size=6, consensus="reference"), model, (x, y), reference=reference)
    G, R = (dense_gradients(model, data, LAST) for data in ((x, y), reference))
    expected = oracle(G, dense_sketch(G, 6), y, "reference", (R, reference[1]))
    torch.testing.assert_close(picked.scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_reference_set_without_labels_is_refused_where_classes_are_compared(teaches):
    model, data = mlp(), made()

    def loss(out, y):
        return LOSS(out, y.long())

    with pytest.raises(
        SelectionError, match="the data and the reference set have labels and others have none"
    ) as error:
        sage(
            SAGE(consensus="reference", class_policy="auto"),
            model, data, reference=(data[0], data[1].double()), loss=loss,
        )  # fmt: skip
    teaches(error.value)


def test_new_samples_or_classes_in_a_later_pass_are_refused():
    model, (x, y) = mlp(out=5), made()
    method = SAGE(sketch_size=4)
    run = method.begin()
    feed(run, 0, model, (x, y), method, 7)
    run.end_pass(0)
    state = run.state_dict()
    with pytest.raises(SelectionError, match="changed between passes: class 4 was not there"):
        feed(run, 1, model, (x, torch.where(y == 1, 4, y)), method, 7)
    run.load_state_dict(state)
    with pytest.raises(SelectionError, match=r"changed between passes: sample 6[0-9] was not there"):
        feed(run, 1, model, (torch.cat([x, x]), torch.cat([y, y])), method, 7)


def test_a_pass_that_stopped_early_is_no_selection(teaches):
    model, data = mlp(), made()
    method = SAGE(sketch_size=4)
    run = method.begin()
    feed(run, 0, model, data, method, 7)
    run.end_pass(0)
    feed(run, 1, model, data, method, 7, stop=3)
    with pytest.raises(SelectionError, match="39 of 60 samples have no score") as error:
        run.pick(12, data[1])
    teaches(error.value)


def test_labels_that_are_needed_and_missing_are_refused_in_the_first_batch(teaches):
    model, data = mlp(out=1), (made()[0], torch.rand(60, dtype=torch.float64))
    for options in ({"class_policy": "balanced"}, {"weights": "class"}):
        with pytest.raises(InvalidOptionError, match="no whole-number labels") as error:
            sage(SAGE(**options), model, data, labels=None, loss=lambda out, y: (out.squeeze(1) - y) ** 2)
        teaches(error.value)


def test_a_gradient_that_is_not_finite_is_refused():
    model, (x, y) = mlp(torch.float32), made(dtype=torch.float32)
    method = SAGE(sketch_size=4)

    def loss(out, y):
        return LOSS(out, y) + torch.sqrt(0 * out[:, 0])  # finite, with an infinite slope

    with pytest.raises(NonFiniteError):
        feed(method.begin(), 0, model, (x, y), method, 7, loss=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch_size": 0}, "sketch_size=0"),
        ({"class_policy": "fair"}, "class_policy='fair'"),
        ({"consensus": "mean"}, "consensus='mean'"),
        ({"weights": "inverse"}, "weights='inverse'"),
        ({"rule": "top"}, r"rule='top': give Top\(\)"),
        ({"keep_projections": True}, "keep_projections=True saves a pass only with consensus='sketch'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        SAGE(**options)


def test_options_are_frozen_and_equal_by_value():
    assert SAGE() == SAGE(rule=Strata(spread=3.0))
    assert SAGE() != SAGE(sketch_size=32)
    with pytest.raises(AttributeError):
        SAGE().sketch_size = 3
    assert hash(SAGE()) == hash(SAGE())
