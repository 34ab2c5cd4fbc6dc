"""SAGE where gradients vanish or cancel, classes are few or small, and what it keeps then."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selection.sage_runs import CONSENSUS, LOSS, finished, made, mlp, sage
from steepest.selection.rules import RandomAboveCut, Strata, Top
from steepest.selection.sage import SAGE


def test_wrong_labels_score_low_and_the_default_leaves_them_out():
    torch.manual_seed(0)
    centres = 3 * torch.randn(3, 5)
    truth = torch.arange(600) % 3
    x = centres[truth] + torch.randn(600, 5)
    wrong = torch.rand(600) < 0.15
    labels = torch.where(wrong, (truth + 1) % 3, truth)
    model = mlp(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        LOSS(model(x), labels).mean().backward()
        optimizer.step()
    picked = sage(SAGE(sketch_size=16), model, (x, labels), 120)
    assert picked.scores[wrong].mean() < picked.scores[~wrong].mean() - 0.3
    assert wrong[picked.indices].float().mean() < 0.05  # 0.15 at random
    assert labels[picked.indices].bincount().tolist() == [40, 40, 40]
    assert picked.numbers["mean_agreement_kept"] > picked.numbers["mean_agreement"]


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
def test_samples_without_a_gradient_score_zero_and_are_counted(options):
    model, data = mlp(), made()

    def loss(out, y):
        return LOSS(out, y) * torch.where(y == 1, 0.0, 1.0)

    picked = sage(SAGE(sketch_size=6, **options), model, data, loss=loss)
    without = int((data[1] == 1).sum())
    assert picked.scores[data[1] == 1].tolist() == [0.0] * without
    assert (picked.scores[data[1] != 1] != 0).all()
    assert len(picked.indices) == 12
    assert any(f"gradients of {without} samples are zero" in note for note in picked.notes)
    assert any("class 1 cancel" in note for note in picked.notes)


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
def test_no_gradient_at_all_is_defined(options):
    model, data = mlp(), made()
    picked = sage(SAGE(sketch_size=6, **options), model, data, loss=lambda out, y: 0 * LOSS(out, y))
    assert picked.scores.tolist() == [0.0] * 60
    assert picked.numbers["sketch_rank"] == 0
    assert picked.numbers["certificate_relative"] == 0
    assert len(picked.indices) == 12


@pytest.mark.parametrize("options", CONSENSUS[:3], ids=str)
def test_gradients_that_cancel_leave_no_consensus_and_a_note(options):
    torch.manual_seed(0)
    x = torch.randn(20, 5).repeat(2, 1)
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(20)
    model = nn.Linear(5, 1)
    picked = sage(
        SAGE(sketch_size=4, **options), model, (x, sign), labels=None,
        loss=lambda out, y: out.squeeze(1) * y,
    )  # fmt: skip
    assert picked.scores.abs().max() == 0
    assert picked.notes == ("The unit gradients cancel: there is no consensus, and every sample scores 0.",)


def test_a_class_of_one_sample_agrees_with_itself():
    model, (x, y) = mlp(), made()
    y = y.clone()
    y[y == 2] = 1
    y[5] = 2
    picked = sage(SAGE(sketch_size=6), model, (x, y))
    assert picked.scores[5] == pytest.approx(1, abs=1e-6)
    assert 5 in picked.indices


@pytest.mark.parametrize("rule", [Top(), Strata(), RandomAboveCut()])
@pytest.mark.parametrize("policy", ["global", "balanced", "proportional"])
def test_one_sample_all_samples_and_one_class(rule, policy):
    model, (x, y) = mlp(), made()
    for labels in (y, torch.zeros_like(y)):
        run = finished(SAGE(sketch_size=6, class_policy=policy, rule=rule), model, (x, labels))
        assert run.pick(60, labels).indices.tolist() == list(range(60))
        assert len(run.pick(1, labels).indices) == 1
        picked = run.pick(13, labels)
        assert len(picked.indices) == len(picked.weights) == 13
        assert picked.indices.tolist() == sorted(picked.indices.tolist())


def test_the_order_of_a_shuffling_loader_plays_no_part():
    model, (x, y) = mlp(), made()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    plain = sage(SAGE(sketch_size=6), model, (x, y))
    assert torch.equal(sage(SAGE(sketch_size=6), model, loader, labels=y).scores, plain.scores)


def test_without_labels_auto_takes_one_consensus():
    model, (x, _) = mlp(out=1), made()
    targets = x[:, 0].sin()
    picked = sage(SAGE(sketch_size=6), model, (x, targets), labels=None, loss=lambda out, y: (out.squeeze(1) - y) ** 2)
    assert picked.notes == ()
    assert picked.scores.abs().max() <= 1 + 1e-6
    assert picked.weights.tolist() == [1.0] * 12


def test_class_weights_undo_balanced_quotas():
    model, (x, y) = mlp(), made(90)
    y = torch.where(torch.arange(90) < 60, 0, y)
    picked = sage(SAGE(sketch_size=6, weights="class"), model, (x, y), 12)
    assert picked.weights.mean() == pytest.approx(1)
    shares = torch.zeros(3).index_add_(0, y[picked.indices], picked.weights) / 12
    torch.testing.assert_close(shares, y.bincount() / 90)


@pytest.mark.parametrize("scope", ["last", "all"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**90])
def test_scaling_all_losses_changes_nothing_where_float32_holds_the_gradients(scale, scope):
    # S g is of second order in the gradients: it would vanish, or overflow, long before they do.
    data, model, method = made(dtype=torch.float32), mlp(torch.float32), SAGE(sketch_size=4, scope=scope)
    plain = sage(method, model, data)
    scaled = sage(method, model, data, loss=lambda outputs, targets: scale * LOSS(outputs, targets))
    torch.testing.assert_close(scaled.scores, plain.scores, rtol=0, atol=1e-5)
    assert torch.equal(scaled.indices, plain.indices)
