"""SAGE equals the formulas as they are written, whatever the batches, the scope and the kind of layer."""

import copy

import pytest
import torch
from torch import nn

from selection.sage_runs import (
    ALL,
    CONSENSUS,
    LAST,
    LOSS,
    dense_gradients,
    dense_sketch,
    feed,
    finished,
    made,
    mlp,
    oracle,
    sage,
    unit,
)
from steepest.linalg import FrequentDirections
from steepest.selection.consensus import ClassMeans
from steepest.selection.sage import SAGE
from steepest.selection.samples import Samples
from steepest.selection.scan import FixedModel


@pytest.mark.parametrize("options", CONSENSUS, ids=str)
@pytest.mark.parametrize(("scope", "names"), [("last", LAST), ("all", ALL), (("0",), ALL[:2])])
@pytest.mark.parametrize("policy", ["balanced", "global"])
def test_scores_equal_the_dense_formula(options, scope, names, policy):
    model, data, reference = mlp(), made(), made(31, seed=5)
    G, R = dense_gradients(model, data, names), dense_gradients(model, reference, names)
    method = SAGE(sketch_size=6, scope=scope, class_policy=policy, **options)
    found = sage(method, model, data, reference=reference)
    labels = data[1] if policy == "balanced" else None
    their_labels = reference[1] if policy == "balanced" else torch.zeros(31, dtype=torch.long)
    expected = oracle(G, dense_sketch(G, 6), labels, method.consensus, (R, their_labels))
    tolerance = 5e-4 if method.keep_projections else 1e-5
    torch.testing.assert_close(found.scores.double(), expected, rtol=tolerance, atol=tolerance)
    assert (expected.max() - expected.min()) > 0.5  # the scores say something


def test_a_float32_model_scores_as_its_float64_copy():
    model, data = mlp(), made()
    single = copy.deepcopy(model).float()
    found = sage(SAGE(sketch_size=6), single, (data[0].float(), data[1])).scores
    torch.testing.assert_close(found, sage(SAGE(sketch_size=6), model, data).scores, rtol=1e-4, atol=1e-4)


def test_with_as_many_sketch_rows_as_the_rank_no_direction_is_lost():
    model, data = mlp(), made()
    G = dense_gradients(model, data, LAST)
    found = sage(SAGE(sketch_size=40), model, data)
    assert found.numbers["certificate"] < 1e-9 * found.numbers["squared_norm"]
    metric = G.T @ G  # S^T S is all of it: alpha is the cosine in this metric
    for label in range(3):
        mine = data[1] == label
        mean = unit(G[mine]).mean(0)
        exact = (G[mine] @ metric @ mean) / ((G[mine] @ metric * G[mine]).sum(1).sqrt() * (mean @ metric @ mean).sqrt())
        torch.testing.assert_close(found.scores[mine].double(), exact, rtol=1e-5, atol=1e-5)


def test_the_mean_before_the_sketch_is_not_the_mean_after_it():
    model, data = mlp(), made()
    strict, paper = (sage(SAGE(sketch_size=6, consensus=c), model, data).scores for c in ("gradients", "sketch"))
    assert (strict - paper).abs().max() > 1e-3


def test_kept_projections_give_the_scores_of_the_third_pass_up_to_float16():
    model, data = mlp(), made()
    exact = sage(SAGE(sketch_size=6, consensus="sketch"), model, data)
    kept = sage(SAGE(sketch_size=6, consensus="sketch", keep_projections=True), model, data)
    torch.testing.assert_close(kept.scores, exact.scores, rtol=0, atol=5e-4)
    assert not torch.equal(kept.scores, exact.scores)


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_the_loss_changes_no_score(options, factor):
    model, data = mlp(torch.float32), made(dtype=torch.float32)
    plain = sage(SAGE(sketch_size=6, **options), model, data)
    scaled = sage(SAGE(sketch_size=6, **options), model, data, loss=lambda out, y: factor * LOSS(out, y))
    torch.testing.assert_close(plain.scores, scaled.scores, rtol=0, atol=1e-4)


def test_scaling_single_losses_leaves_the_mean_of_unit_gradients_as_it_is():
    model, data = mlp(), made(12, classes=2)
    means = [ClassMeans(), ClassMeans()]
    factors = torch.rand(12, dtype=torch.float64) + 0.1
    for sums, loss in zip(means, (LOSS, lambda out, y: factors * LOSS(out, y)), strict=True):
        with FixedModel(model, "last", loss) as fixed:
            rows = fixed.rows(next(iter(Samples(data, batch_size=12).batches())))
            sums.sketch_and_add(rows, rows.labels, FrequentDirections(4))
    basis = {"2.weight": torch.eye(27, 24), "2.bias": torch.eye(27)[:, 24:]}
    first, second = (sums.projected(basis) for sums in means)
    for label in (0, 1):
        torch.testing.assert_close(first[label], second[label], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
def test_batch_sizes_change_scores_by_rounding_only(options):
    model, data = mlp(torch.float32), made(dtype=torch.float32)
    runs = [sage(SAGE(sketch_size=6, **options), model, data, batch_size=b) for b in (1, 7, 60)]
    for other in runs[1:]:
        tolerance = 1e-3 if "keep_projections" in options else 2e-5
        torch.testing.assert_close(runs[0].scores, other.scores, rtol=0, atol=tolerance)
    assert runs[0].indices.tolist() == runs[1].indices.tolist() == runs[2].indices.tolist()


@pytest.mark.parametrize("single", [True, False], ids=["the layer's products", "explicit gradients"])
def test_class_sums_are_the_sums_of_unit_gradients(single, monkeypatch):
    if not single:
        monkeypatch.setattr("steepest.selection.consensus._single_layer", lambda rows: None)
    model, data = mlp(), made()
    G = unit(dense_gradients(model, data, LAST))
    sums = ClassMeans()
    with FixedModel(model, "last", LOSS) as fixed:
        for batch in Samples(data, batch_size=9).batches():
            rows = fixed.rows(batch)
            sums.sketch_and_add(rows, rows.labels, FrequentDirections(4))
    found = sums.projected({"2.weight": torch.eye(27, 24), "2.bias": torch.eye(27)[:, 24:]})
    for label in range(3):
        torch.testing.assert_close(found[label], G[data[1] == label].mean(0), rtol=1e-10, atol=1e-12)
    assert sums.nbytes == 3 * 27 * 8


@pytest.mark.parametrize("build", ["tied", "frozen bias", "bias alone", "positions", "conv"])
def test_last_layers_of_every_kind_score_as_the_dense_formula(build):
    torch.manual_seed(3)
    data, scope, loss = made(), "last", LOSS
    if build == "tied":
        half = nn.Linear(5, 5)
        model = nn.Sequential(half, nn.Tanh(), nn.Linear(5, 5))
        model[2].weight = half.weight
        names = ("0.weight", "0.bias", "2.bias")
        scope = "all"
    elif build == "positions":
        model = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten())
        names = ("3.weight", "3.bias")
    elif build == "conv":
        model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Flatten())
        names = ("1.weight", "1.bias")
    else:
        model = mlp()
        names = ("2.weight",) if build == "frozen bias" else ("2.bias",)
        (model[2].bias if build == "frozen bias" else model[2].weight).requires_grad_(False)
        scope = "last" if build == "frozen bias" else ("2",)
    model = model.double()
    G = dense_gradients(model, data, names, loss)
    expected = oracle(G, dense_sketch(G, 5), data[1], "gradients")
    found = sage(SAGE(sketch_size=5, scope=scope), model, data).scores
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_numbers_report_the_sketch_and_robust_halves_the_certificate():
    model, data = mlp(), made()
    G = dense_gradients(model, data, ALL)
    plain, robust = (sage(SAGE(sketch_size=4, scope="all", robust=r), model, data) for r in (False, True))
    numbers = plain.numbers
    assert numbers["squared_norm"] == pytest.approx(float(G.square().sum()), rel=1e-6)
    S = dense_sketch(G, 4)
    error = torch.linalg.matrix_norm(G.T @ G - S.T @ S, 2)
    assert 0 < error <= numbers["certificate"] * (1 + 1e-6)
    assert numbers["certificate_relative"] == pytest.approx(numbers["certificate"] / numbers["squared_norm"])
    assert numbers["sketch_rank"] == 4
    assert numbers["mean_agreement"] == pytest.approx(float(plain.scores.mean()), abs=1e-6)
    assert robust.numbers["certificate"] == pytest.approx(numbers["certificate"] / 2)
    assert robust.numbers["ridge"] == robust.numbers["certificate"]
    assert torch.equal(robust.scores, plain.scores)


def test_memory_is_that_of_the_table():
    model, data = mlp(torch.float32), made(dtype=torch.float32)
    D = 27
    run = finished(method := SAGE(sketch_size=6), model, data)
    assert run.nbytes == 4 * 6 * D + 4 * 60
    run = method.begin()
    feed(run, 0, model, data, method, 7)
    assert run.nbytes == 8 * 6 * D + 8 * 3 * D
    kept = finished(SAGE(sketch_size=6, consensus="sketch", keep_projections=True), model, data)
    assert kept.nbytes == 4 * 6 * D + 4 * 60 + 2 * 60 * 6


def test_autocast_of_the_caller_rounds_no_score():
    model, data = mlp(torch.float32), made(dtype=torch.float32)
    plain = sage(SAGE(sketch_size=6), model, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sage(SAGE(sketch_size=6), model, data)
    assert torch.equal(plain.scores, under.scores)


def test_passes_and_what_they_read():
    passes = {str(o): [SAGE(**o).begin().reads(n) for n in range(SAGE(**o).begin().passes)] for o in CONSENSUS}
    assert list(passes.values()) == [["data"] * 2, ["data"] * 3, ["data"] * 2, ["data", "reference", "data"]]
