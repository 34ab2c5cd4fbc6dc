"""A model on paper of what a step costs on W ranks, from 1 to 1,024: compute, memory and traffic; see docs/scaling.md.

    python benchmarks/scaling_model.py

Bytes are those of the library's own formulas, and `check` compares them with counted traffic on two processes. Rates
of this CPU are measured; those of a GPU are assumed (`ASSUMED_GPU`), not measured: put your own in their place.
The tables of docs/scaling.md are printed in Markdown.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import steepest as st
from records import write
from steepest.distributed import assign_by_cost
from steepest.optim.triangles import packed_size

RANKS = (1, 8, 64, 256, 1024)
UPDATE, REFRESH = 10, 100  # steps between two updates of the factors, and between two decompositions: the defaults
WORD = 4  # bytes of a float32
BUCKET = 1 << 25  # bytes of a message, see steepest.distributed.Ranks
SKETCH = 64  # rows l of SAGE's sketch
METRIC = 512  # the largest side of a layer that KroneckerMetric measures
LEARNT = 56  # numbers of the memory of LeaveOneOut: two for each of 27 dampings, and two
KEPT = 0.1  # share of the samples that a selection keeps
MODES = ("replicated", "sharded", "hybrid")


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution: n outputs, m inputs (the bias counts as one), and positions for each sample."""

    n: int
    m: int
    positions: int = 1
    recorded: int = 0  # numbers of a sample's input, as the engine keeps it; not unfolded
    kronecker: bool = True  # else AdamW trains it, within KFAC

    @property
    def matrix(self) -> int:
        return self.n * self.m

    @property
    def cubes(self) -> float:
        return float(self.n**3 + self.m**3)

    @property
    def squares(self) -> int:
        return self.n**2 + self.m**2

    @property
    def wire(self) -> int:
        """Numbers that stand for a sample's gradient: inputs and output gradients, or the gradient if it is smaller."""
        return min(self.recorded + self.n * self.positions, self.matrix)


@dataclass(frozen=True)
class Model:
    name: str
    layers: tuple[Layer, ...]
    rest: int  # parameters that are in no layer: norms, tables
    tensors: int  # trained parameters, counted as tensors
    more_flops: float  # of a sample's forward, beside the layers
    batch: int  # samples of a rank
    samples: int  # of the data, for a selection
    classes: int

    @property
    def factored(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kronecker)

    @property
    def parameters(self) -> int:
        return self.rest + sum(layer.matrix for layer in self.layers)

    @property
    def forward_flops(self) -> float:
        return self.more_flops + sum(2.0 * layer.matrix * layer.positions for layer in self.layers)


@dataclass(frozen=True)
class Constants:
    name: str
    train: float  # operations a second in forward and backward
    float32: float  # and in float32 and float64 products
    float64: float
    eigh32: float  # seconds of an eigendecomposition over m^3
    eigh64: float
    cholesky: float  # and of a Cholesky factor and the inverse
    bandwidth: float  # bytes a second of a link
    latency: float  # seconds of a hop


# Assumed, not measured: half of the peaks of a typical data-centre GPU, taken as 312 TFLOP/s in bfloat16 for training,
# 19.5 in float32 and 9.7 in float64; half of a 400 Gbit/s link; 10 microseconds a hop; eigendecompositions of 9 m^3
# operations at 5 % of peak, inverses of m^3 at 20 %.
ASSUMED_GPU = Constants(
    "assumed GPU", 156e12, 9.75e12, 4.85e12, 9 / (0.05 * 19.5e12), 9 / (0.05 * 9.7e12), 1 / (0.2 * 19.5e12), 25e9, 1e-5
)


def resnet50() -> Model:
    def conv(n: int, channels: int, kernel: int, side: int, side_in: int) -> Layer:
        return Layer(n, channels * kernel**2, side**2, channels * side_in**2)

    layers = [conv(64, 3, 7, 112, 224)]
    before, before_side = 64, 56
    for side, width, blocks in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        for block in range(blocks):
            layers += [
                conv(width, before, 1, before_side, before_side),
                conv(width, width, 3, side, before_side),  # has the stride
                conv(4 * width, width, 1, side, side),
            ]
            if not block:
                layers.append(conv(4 * width, before, 1, side, before_side))
            before, before_side = 4 * width, side
    norms = len(layers)
    rest = 2 * sum(layer.n for layer in layers)
    layers.append(Layer(1000, 2049, 1, 2048))
    model = Model("ResNet-50", tuple(layers), rest, norms * 3 + 2, 0.0, 32, 1_281_167, 1000)
    assert model.parameters == 25_557_032
    return model


def gpt2_small() -> Model:
    length, width, words, depth = 1024, 768, 50257, 12
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layers = [Layer(n, m + 1, length, length * m) for _ in range(depth) for n, m in block]
    head = Layer(words, width, length, length * width, kronecker=False)  # one matrix with the table of tokens
    rest = length * width + (2 * depth + 1) * 2 * width
    attention = depth * 4.0 * length**2 * width
    model = Model("GPT-2 small", (*layers, head), rest, 12 * depth + 4, attention, 8, 1_000_000, 1)
    assert model.parameters == 124_439_808
    return model


# ---- bytes: the formulas of the docstrings of KFAC, FOP, Sven and select_subset


def kfac_bytes(model: Model, world: int, mode: str, fop: bool = False) -> dict[str, float]:
    """What a rank gives to collectives: in every step, with an update of the factors, and with a decomposition."""
    if world == 1:
        return dict.fromkeys(("reduced", "broadcast", "update", "refresh"), 0)
    layers = model.factored
    matrices, count = sum(layer.matrix for layer in layers), len(layers)
    reduced = 8 * (5 + 4 * world + model.tensors + 4 * count + 1) + WORD * model.parameters
    broadcast = WORD * matrices if mode == "sharded" else 0
    if fop:
        reduced += 8 * (2 + count) + WORD * matrices
        broadcast += 4 * WORD * count if mode == "sharded" else 0
    update = WORD * sum(packed_size(layer.m) + packed_size(layer.n) for layer in layers)
    basis = WORD * sum(layer.squares + layer.m + layer.n for layer in layers)
    return {
        "reduced": reduced,
        "broadcast": broadcast,
        "update": update,
        "refresh": basis if mode == "hybrid" else 0,
    }


def sven_bytes(model: Model, world: int, tries: int | None = None) -> dict[str, float]:
    """Of a step in dual form that reports all singular values; with ``tries`` of one without options, tried so often.

    That has a metric, a damping that learns and a decay, and here a bias in every layer.
    """
    if world == 1:
        return dict.fromkeys(("sent", "gathered", "reduced", "broadcast"), 0)
    rows, layers = world * model.batch, model.layers
    measured_by = [a for a in layers if tries is not None and max(a.n, a.m) <= METRIC]
    # The metric joins a 1 to the inputs of a layer with a bias.
    wires = [min(a.wire + a.positions, a.matrix) if a in measured_by else a.wire for a in layers]
    found = {
        "sent": (world - 1) / 2 * WORD * model.batch * (model.rest + sum(wires)),
        "gathered": model.batch * (rows + 1) * 8 + model.batch * WORD,
        "reduced": model.parameters * WORD + 8,
        "broadcast": 96 + 8 * rows + 8 * rows,
    }
    if tries is not None:
        found["gathered"] += model.batch * WORD  # for the decay
        found["reduced"] += sum(WORD * a.squares + 16 for a in measured_by) + 16 * tries
        found["broadcast"] += 8 * LEARNT
    return found


def sage_bytes(model: Model, world: int) -> dict[str, float]:
    """Of one selection, for a rank that is not the first; consensus "gradients", two passes, with a review."""
    if world == 1:
        return dict.fromkeys(("sent", "gathered", "reduced", "broadcast"), 0)
    n, size = math.ceil(model.samples / world), model.layers[-1].matrix
    kept = round(KEPT * model.samples)
    return {
        "sent": 4 * SKETCH * size,
        "gathered": 2 * 8 * n + 40 * n + 4 * n + 32 * math.ceil(kept / world),
        "reduced": 8 * size + 8 * model.classes * size,
        "broadcast": 12 * kept + 4 * model.samples + 4 * SKETCH * size + 8 * model.classes * SKETCH,
    }


# ---- seconds and memory


def ring(c: Constants, world: int, size: float, messages: float = 1.0) -> float:
    """A sum over all ranks: a ring's bytes, a tree's latency."""
    return 2 * (world - 1) / world * size / c.bandwidth + spread(c, world, 0, messages)


def spread(c: Constants, world: int, size: float, messages: float = 1.0) -> float:
    """A broadcast, in a pipeline."""
    return size / c.bandwidth + messages * c.latency * math.ceil(math.log2(world)) if world > 1 else 0.0


def buckets(size: float) -> int:
    return math.ceil(size / BUCKET)


def sgd(model: Model, c: Constants, world: int) -> Any:
    """With momentum: what the others are compared with."""
    given = WORD * model.parameters * (world > 1)
    return {
        "forward_backward_s": 3 * model.batch * model.forward_flops / c.train,
        "factors_s": 0.0,
        "decomposition_s": 0.0,
        "direction_s": 0.0,
        "communication_s": ring(c, world, given, buckets(given)),
        "memory_bytes": 3 * WORD * model.parameters,
        "given_bytes": given,
    }


def kfac(model: Model, c: Constants, world: int, mode: str, fop: bool = False, solver: str = "eigenbasis") -> Any:
    layers, batch = model.factored, model.batch
    owners = assign_by_cost([layer.cubes for layer in layers], world)

    def load(cost: Callable[[Layer], float], divided: bool) -> float:
        """All of it, or what the busiest owner has of it."""
        loads = [0.0] * world
        for layer, owner in zip(layers, owners, strict=True):
            loads[owner if divided else 0] += cost(layer)
        return max(loads)

    # Products in pairs, from the left and from the right: six for FOP, see steepest.optim.projection.
    products = 3 if fop else 2 if solver == "eigenbasis" else 1
    direction = load(lambda a: 2.0 * products * a.matrix * (a.n + a.m), mode == "sharded") / c.float32
    if fop:  # the gradient of the first half of all samples: some ranks form it of their whole batch
        share = 0.5 if world == 1 else 1.0
        direction += share * sum(2.0 * a.matrix * a.positions for a in layers) * batch / c.float32
    per_cube = c.eigh32 if solver == "eigenbasis" else c.cholesky
    given = kfac_bytes(model, world, mode, fop)
    reduced = ring(c, world, given["reduced"], 2 + buckets(given["reduced"]))
    update = ring(c, world, given["update"], buckets(given["update"])) / UPDATE
    sent = spread(c, world, given["broadcast"], len(set(owners)) if given["broadcast"] else 0)
    refresh = spread(c, world, given["refresh"], len(set(owners)) if given["refresh"] else 0) / REFRESH
    matrices = sum(a.matrix for a in layers)
    numbers = 2 * model.parameters + 2 * (model.parameters - matrices) + matrices * (2 if fop else 1)
    numbers += sum(a.squares for a in layers)
    kept = (lambda a: float(a.squares + a.n + a.m)) if solver == "eigenbasis" else (lambda a: 2.0 * a.squares + 2)
    numbers += load(kept, mode == "sharded")
    return {
        "forward_backward_s": 3 * batch * model.forward_flops / c.train,
        "factors_s": sum(2.0 * batch * a.positions * a.squares for a in layers) / c.float32 / UPDATE,
        "decomposition_s": load(lambda a: per_cube * a.cubes, mode != "replicated") / REFRESH,
        "direction_s": direction,
        "communication_s": reduced + update + sent + refresh,
        "memory_bytes": WORD * numbers,
        "given_bytes": given["reduced"] + given["broadcast"] + given["update"] / UPDATE + given["refresh"] / REFRESH,
    }


def sven(model: Model, c: Constants, world: int) -> Any:
    rows, batch, layers = world * model.batch, model.batch, model.layers
    pairs = batch * (rows + batch) / 2  # every pair of ranks meets once; the own block is formed whole
    products = model.rest + sum(min(a.positions**2 * (a.n + a.m), a.matrix) for a in layers)
    explicit = sum(2.0 * batch * a.positions * a.matrix for a in layers if a.wire == a.matrix)
    given = sven_bytes(model, world)
    communication = given["sent"] / c.bandwidth + world // 2 * len(layers) * c.latency
    communication += (world - 1) * given["gathered"] / c.bandwidth + ring(c, world, given["reduced"], 4)
    communication += spread(c, world, given["broadcast"], 3)
    # All inputs and output gradients of the own rows; of one layer at a time those of two others, and what is sent.
    records = batch * (model.rest + sum(a.recorded + a.n * a.positions for a in layers))
    records += 3 * batch * max(a.wire for a in layers) if world > 1 else 0
    return {
        # Backward without gradients of parameters, and J^T w at the end: as much as one training backward.
        "forward_backward_s": 3 * batch * model.forward_flops / c.train,
        "factors_s": 2.0 * pairs * products / c.float64 + explicit / c.float32,
        "decomposition_s": c.eigh64 * rows**3,
        "direction_s": 0.0,
        "communication_s": communication if world > 1 else 0.0,
        "memory_bytes": WORD * (2 * model.parameters + records) + 3 * 8.0 * rows**2,
        "given_bytes": sum(given.values()),
    }


def sage(model: Model, c: Constants, world: int) -> Any:
    """One selection."""
    n, last = math.ceil(model.samples / world), model.layers[-1]
    size, given = last.matrix, sage_bytes(model, world)
    communication = ring(c, world, given["reduced"], buckets(given["reduced"])) + spread(
        c, world, given["broadcast"], buckets(given["broadcast"])
    )
    communication += (world - 1) * given["gathered"] / c.bandwidth
    # The sketches of all others arrive at the first process one after the other, and each is one shrink more.
    shrink = 8.0 * SKETCH**2 * size / c.float64 + 4.0 * SKETCH**2 * size / c.float32
    gradients = 2.0 * last.matrix * last.positions / c.float32
    held = 8 * model.classes * size + 12 * SKETCH * size + 4 * SKETCH * size * (world > 1)
    return {
        "forward_backward_s": 2 * n * (model.forward_flops / c.train + gradients),
        "factors_s": n * (shrink / SKETCH + 2.0 * SKETCH * size / c.float32),
        "decomposition_s": (world - 1) * (shrink + given["sent"] / c.bandwidth),
        "direction_s": 0.0,
        "communication_s": communication,
        "memory_bytes": WORD * model.parameters + held + 4.0 * model.samples,
        "given_bytes": sum(given.values()),
    }


METHODS: dict[str, Callable[[Model, Constants, int], Any]] = {
    "SGD": sgd,
    **{f"KFAC {mode}": lambda m, c, w, mode=mode: kfac(m, c, w, mode) for mode in MODES},  # type: ignore[misc]
    **{f"FOP {mode}": lambda m, c, w, mode=mode: kfac(m, c, w, mode, fop=True) for mode in MODES},  # type: ignore[misc]
    "KFAC replicated, Cholesky": lambda m, c, w: kfac(m, c, w, "replicated", solver="cholesky"),
    "KFAC sharded, Cholesky": lambda m, c, w: kfac(m, c, w, "sharded", solver="cholesky"),
    "Sven": sven,
    "SAGE": sage,
}


def total(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.endswith("_s"))


# ---- what is measured


def fastest(work: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def per_cube(work: Callable[[torch.Tensor], object], dtype: torch.dtype) -> float:
    """The c of c m^3, by least squares over some sizes."""
    over = under = 0.0
    for m in (256, 512, 1024):
        rows = torch.randn(2 * m, m, dtype=dtype)
        matrix = rows.T @ rows / (2 * m) + torch.eye(m, dtype=dtype)
        seconds = fastest(lambda matrix=matrix: work(matrix))  # type: ignore[misc]
        print(f"  {m}: {seconds:.4f} s, {seconds / m**3:.3g} s / m^3")
        over, under = over + seconds * m**3, under + float(m) ** 6
    return over / under


def gemm(dtype: torch.dtype, m: int = 1024) -> float:
    a, b = torch.randn(m, m, dtype=dtype), torch.randn(m, m, dtype=dtype)
    return 2 * m**3 / fastest(lambda: a @ b, 5)


def measured(bandwidth: float, latency: float) -> Constants:
    single, double = gemm(torch.float32), gemm(torch.float64)
    print("eigh float32")
    eigh32 = per_cube(torch.linalg.eigh, torch.float32)
    print("eigh float64")
    eigh64 = per_cube(torch.linalg.eigh, torch.float64)
    print("Cholesky and inverse")
    cholesky = per_cube(lambda a: torch.cholesky_inverse(torch.linalg.cholesky(a)), torch.float32)
    return Constants("one CPU core", single, single, double, eigh32, eigh64, cholesky, bandwidth, latency)


SIDES = ((5, 12), (12, 9), (9, 3))  # of the small model whose traffic is counted
STEPS, UPDATES, REFRESHES, ROWS = 3, 3, 2, 4  # with a period of 1 the factors are decomposed at updates 1, 2, 4, ...


def small() -> Model:
    layers = tuple(Layer(n, m + 1, 1, m) for m, n in SIDES)
    return Model("small", layers, 0, 2 * len(layers), 0.0, ROWS, 0, 3)


def traffic_of(kind: str, rank: int) -> tuple[float, ...]:
    """What a rank gave to collectives in some steps: reduced, broadcast, gathered, sent."""
    torch.manual_seed(0)
    (a, b), (_, d), (_, e) = SIDES
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, d), nn.Tanh(), nn.Linear(d, e))
    x = torch.randn(ROWS, a, generator=torch.Generator().manual_seed(rank))
    y, name, mode = torch.arange(ROWS) % e, *kind.split()
    if name == "Sven":
        sven_opt = st.Sven(model, solver=st.TruncatedEigh() if mode == "dual" else None)
        loss = nn.CrossEntropyLoss(reduction="none")
        for _ in range(STEPS):
            sven_opt.step(lambda: loss(model(x), y))
        traffic = sven_opt.traffic
    else:
        opt = (st.FOP if name == "FOP" else st.KFAC)(
            model, distribution=mode, factor_update_steps=1, inverse_update_steps=100
        )
        for _ in range(STEPS):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        assert opt._crew.ranks is not None
        traffic = opt._crew.ranks.traffic
    return traffic.reduced, traffic.broadcast, traffic.gathered, traffic.sent


KINDS = (*(f"{name} {mode}" for name in ("KFAC", "FOP") for mode in MODES), "Sven dual", "Sven default")


def expected(kind: str) -> tuple[float, ...]:
    """What the model says of the same; of Sven the mean of both ranks."""
    name, mode = kind.split()
    if name == "Sven":
        per_step = sven_bytes(small(), 2, None if mode == "dual" else 1)
        return tuple(STEPS * per_step[key] for key in ("reduced", "broadcast", "gathered", "sent"))
    given = kfac_bytes(small(), 2, mode, fop=name == "FOP")
    reduced = STEPS * given["reduced"] + UPDATES * given["update"]
    return reduced, STEPS * given["broadcast"] + REFRESHES * given["refresh"], 0, 0


def on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    large, tiny = torch.ones(1 << 23), torch.ones(1)
    for tensor in (large, tiny):
        dist.all_reduce(tensor)
    seconds = fastest(lambda: dist.all_reduce(large), 5)
    latency = fastest(lambda: [dist.all_reduce(tiny) for _ in range(50)]) / 50
    found = {"bandwidth": large.numel() * WORD / seconds, "latency": latency}
    torch.save(found | {kind: traffic_of(kind, rank) for kind in KINDS}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def two_processes() -> tuple[float, float, list[str]]:
    """Bandwidth and latency of a sum over two processes, after a check of the formulas against counted traffic."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, args=(2, folder), nprocs=2, join=True)
        ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
    lines = []
    for kind in KINDS:
        counted = tuple(sum(numbers) / 2 for numbers in zip(*(rank[kind] for rank in ranks), strict=True))
        assert check(kind, counted), (kind, counted, expected(kind))
        lines.append(f"| {kind} | " + " | ".join(f"{number:,.0f}" for number in counted) + " |")
    return ranks[0]["bandwidth"], ranks[0]["latency"], lines


def check(kind: str, counted: Sequence[float]) -> bool:
    return tuple(counted) == expected(kind)


# ---- what the model says


def busiest(costs: Sequence[float], world: int) -> float:
    loads = [0.0] * world
    for cost, owner in zip(costs, assign_by_cost(costs, world), strict=True):
        loads[owner] += cost
    return max(loads)


def crossings(model: Model, c: Constants) -> dict[str, float | None]:
    """Where one way begins to beat another; None where it never does up to the most ranks."""
    layers = model.factored
    cost = [layer.cubes for layer in layers]
    worlds = range(2, RANKS[-1] + 1)
    step = {w: [total(kfac(model, c, w, mode)) for mode in MODES] for w in worlds}
    whole, train = c.eigh32 * sum(cost), 3 * model.batch * model.forward_flops / c.train
    floor = next(w for w in worlds if busiest(cost, w) == max(cost))
    one, many = kfac(model, c, 1, "replicated"), kfac(model, c, RANKS[-1], "sharded")
    powers = [2**k for k in range(11)]
    busy = [w for w in powers if total(sven(model, c, w)) > 2 * train]
    merged = [total(sage(model, c, w)) for w in powers]
    saved = sum(one[name] - many[name] for name in ("decomposition_s", "direction_s"))
    sharded_wins = [w for w in worlds if step[w][1] < step[w][0]]
    hybrid_wins = [w for w in worlds if step[w][2] < step[w][0]]
    return {
        "decomposition_in_train_steps": whole / train,
        "cholesky_in_train_steps": c.cholesky * sum(cost) / train,
        "owners_that_help": floor,
        "speedup_of_owners": sum(cost) / max(cost),
        "sharded_wins_from": sharded_wins[0] if sharded_wins else None,
        "hybrid_wins_from": hybrid_wins[0] if hybrid_wins else None,
        "period_for_a_tenth_replicated": whole / (0.1 * train),
        "period_for_a_tenth_sharded": c.eigh32 * max(cost) / (0.1 * train),
        "kfac_over_sgd": step[RANKS[-1]][0] / total(sgd(model, c, RANKS[-1])),
        "sharded_over_sgd": step[RANKS[-1]][1] / total(sgd(model, c, RANKS[-1])),
        "sven_over_twice_training_from": busy[0] if busy else None,
        "sage_fastest_power_of_two": powers[merged.index(min(merged))],
        "sharded_wins_above_GBps": WORD * sum(layer.matrix for layer in layers) / saved / 1e9,
    }


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.3g} ms" if value else "0"
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def volume(value: float) -> str:
    if value < 1e12:
        return f"{value / 1e9:.3g} GB" if value else "0"
    return f"{value / 1e12:.3g} TB"


def markdown(rows: Sequence[dict[str, Any]]) -> None:
    """Everything, a row for each number of ranks."""
    keys = ["forward_backward_s", "factors_s", "decomposition_s", "direction_s", "communication_s", "total_s"]
    names = ["", "ranks", "training", "factors", "decompose", "direction", "traffic", "total", "memory", "given"]
    print("| " + " | ".join(names) + " |\n|---" + "|---:" * (len(names) - 1) + "|")
    for row in rows:
        cells = [row["method"], f"{row['ranks']:,}", *(seconds(row[key]) for key in keys)]
        print("| " + " | ".join([*cells, volume(row["memory_bytes"]), volume(row["given_bytes"])]) + " |")


def markdown_totals(rows: Sequence[dict[str, Any]]) -> None:
    """Seconds alone, a column for each number of ranks."""
    print("| | " + " | ".join(f"{world:,}" for world in RANKS) + " |\n|---" + "|---:" * len(RANKS) + "|")
    for name in METHODS:
        print(f"| {name} | " + " | ".join(seconds(row["total_s"]) for row in rows if row["method"] == name) + " |")


def main() -> None:
    torch.set_num_threads(1)
    bandwidth, latency, lines = two_processes()
    sets = [measured(bandwidth, latency), ASSUMED_GPU]
    rows: list[dict[str, Any]] = []
    for c in sets:
        for model in (resnet50(), gpt2_small()):
            for name, method in METHODS.items():
                for world in RANKS:
                    found = method(model, c, world)
                    head = {"constants": c.name, "model": model.name, "method": name, "ranks": world}
                    rows.append({**head, **found, "total_s": total(found)})
    record = [{**row} for row in rows]
    blank = dict.fromkeys(rows[0])
    for c in sets:
        record.append({**blank, "constants": c.name, "method": "constants", "values": asdict(c)})
        for model in (resnet50(), gpt2_small()):
            found = crossings(model, c)
            record.append({**blank, "constants": c.name, "model": model.name, "method": "crossings", "values": found})
            print(c.name, model.name, found)
    print(asdict(sets[0]), *lines, sep="\n")
    for c in sets:
        for model in (resnet50(), gpt2_small()):
            print(f"\n{c.name}, {model.name}\n")
            show = markdown if c is ASSUMED_GPU else markdown_totals
            show([row for row in rows if (row["constants"], row["model"]) == (c.name, model.name)])
    write("scaling_model", record)


if __name__ == "__main__":
    main()
