"""Runs of SAGE for its tests, and a dense oracle: every gradient in one matrix, float64, one sample after the other."""

import itertools

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from steepest.linalg import FrequentDirections
from steepest.selection.samples import Samples
from steepest.selection.scan import FixedModel

LOSS = nn.CrossEntropyLoss(reduction="none")
CONSENSUS = [
    {"consensus": "gradients"},
    {"consensus": "sketch"},
    {"consensus": "sketch", "keep_projections": True},
    {"consensus": "reference"},
]


def made(samples=60, classes=3, dtype=torch.float64, seed=0):
    """Clusters, a quarter of them with labels drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(samples) % classes
    centres = 2 * torch.randn(classes, 5, generator=torch.Generator().manual_seed(8), dtype=dtype)
    x = centres[truth] + 0.7 * torch.randn(samples, 5, generator=generator, dtype=dtype)
    drawn = torch.randint(classes, (samples,), generator=generator)
    return x, torch.where(torch.rand(samples, generator=generator) < 0.25, drawn, truth)


def mlp(dtype=torch.float64, out=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, out)).to(dtype)


def feed(run, number, model, data, method, batch_size, labels=None, loss=LOSS, start=0, stop=None):
    with FixedModel(model, method.scope, loss) as fixed:
        batches = Samples(data, labels=labels, batch_size=batch_size).batches(start)
        for batch in itertools.islice(batches, None if stop is None else stop - start):
            run.update(number, fixed.rows(batch))


def finished(method, model, data, *, batch_size=7, reference=None, **kwargs):
    run = method.begin()
    for number in range(run.passes):
        source = data if run.reads(number) == "data" else reference
        feed(run, number, model, source, method, batch_size, **kwargs)
        run.end_pass(number)
    return run


def sage(method, model, data, count=12, *, labels="own", **kwargs):
    return finished(method, model, data, **kwargs).pick(count, data[1] if isinstance(labels, str) else labels)


def dense_gradients(model, data, names, loss=LOSS):
    """``[N, D]``, by torch.func, in the order of the parameters' names."""
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(params, x, y):
        return loss(functional_call(model, params, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

    grads = vmap(grad(one), (None, 0, 0))(params, *data)
    return torch.cat([grads[n].flatten(1) for n in names], 1)


def dense_sketch(G, size):
    fd = FrequentDirections(size)
    fd.insert(G)
    fd.compress()
    return fd.sketch().double()


def unit(rows):
    return nn.functional.normalize(rows, dim=-1, eps=1e-300)


def oracle(G, S, labels, consensus, reference=None):
    """alpha as the formulas say, one sample after the other; labels None for one consensus."""
    labels = torch.zeros(len(G), dtype=torch.long) if labels is None else labels
    Z = unit(G @ S.T)
    alpha = torch.zeros(len(G), dtype=torch.float64)
    for i in range(len(G)):
        if consensus == "gradients":
            u = S @ unit(G[labels == labels[i]]).mean(0)
        elif consensus == "sketch":
            u = Z[labels == labels[i]].mean(0)
        else:
            others, their_labels = reference
            u = unit(others @ S.T)[their_labels == labels[i]].mean(0)
        alpha[i] = Z[i] @ unit(u)
    return alpha


LAST, ALL = ("2.weight", "2.bias"), ("0.weight", "0.bias", "2.weight", "2.bias")
