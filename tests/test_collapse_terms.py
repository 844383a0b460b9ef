"""The terms against collapse: their formulas in plain numpy, one process against many ranks, and what they do."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import finish, start_function
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from brainscale import distributed
from brainscale.config import Regularizer
from brainscale.regularizers import directions, sigreg, vcr, vcr_tokens
from brainscale.settings import InputError

SETTINGS = Regularizer(slices=24, knots=17)
SEED, STEP = 11, 3
SHAPES = {"vcr": (12, 5), "vcr_tokens": (12, 4, 5), "sigreg": (12, 5)}


def embeddings(shape, seed=0):
    """Float64 values whose dims have means off 0, correlate, and deviate by 0.4 to 1.6."""
    draw = np.random.default_rng(seed)
    width = shape[-1]
    mixed = draw.standard_normal(shape) @ (np.eye(width) + 0.5 * draw.standard_normal((width, width)))
    flat = mixed.reshape(-1, width)
    return torch.from_numpy(mixed / flat.std(axis=0) * np.linspace(0.4, 1.6, width) + draw.standard_normal(width))


def term(name, x):
    """Every part of a term, as one vector."""
    if name == "sigreg":
        return sigreg(x, SETTINGS, SEED, STEP)[None]
    return torch.stack({"vcr": vcr, "vcr_tokens": vcr_tokens}[name](x, 1.0))


def plain_covariance(rows):
    mean = sum(rows) / len(rows)
    return sum(np.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)


def plain_off_diagonal(covariance):
    width = len(covariance)
    return sum(covariance[i, j] ** 2 for i in range(width) for j in range(width) if i != j) / width


def plain_vcr(x, target_std):
    hinges = [max(0.0, target_std - math.sqrt(column.var(ddof=1) + 1e-4)) for column in x.T]
    return sum(hinges) / len(hinges), plain_off_diagonal(plain_covariance(list(x)))


def plain_vcr_tokens(x, target_std):
    n, tokens, width = x.shape
    hinges = []
    for t in range(tokens):
        for c in range(width):
            variance = sum((x[b, t, c] - x[:, t, c].mean()) ** 2 for b in range(n)) / (n - 1)
            hinges.append(max(0.0, target_std - math.sqrt(variance + 1e-4)))
    rows = [x[b, t] for b in range(n) for t in range(tokens)]
    return sum(hinges) / (tokens * width), plain_off_diagonal(plain_covariance(rows))


def plain_sigreg(x, unit_vectors, knots):
    """With the integral over -3..3 by the trapezoid rule on both halves, and complex numbers."""
    n = len(x)
    t = np.array([3 * k / (knots - 1) for k in range(-knots + 1, knots)])
    gauss = np.exp(-(t**2) / 2)
    statistics = []
    for vector in unit_vectors:
        phi = sum(np.exp(1j * t * float(row @ vector)) for row in x) / n
        integrand = np.abs(phi - gauss) ** 2 * gauss
        statistics.append(n * sum((integrand[i] + integrand[i + 1]) / 2 * (t[i + 1] - t[i]) for i in range(len(t) - 1)))
    return sum(statistics) / len(statistics)


@pytest.mark.parametrize("target_std", [0.5, 1.0, 2.5])
def test_vcr_is_the_plain_formula(target_std):
    for shape in ((12, 5), (2, 3), (7, 1), (5, 9)):
        x = embeddings(shape)
        np.testing.assert_allclose(vcr(x, target_std), plain_vcr(x.numpy(), target_std), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("target_std", [0.5, 1.0, 2.5])
def test_vcr_of_tokens_is_the_plain_formula(target_std):
    for shape in ((12, 4, 5), (2, 3, 3), (6, 1, 4)):
        x = embeddings(shape)
        x += torch.from_numpy(np.random.default_rng(1).standard_normal(shape[1:]))
        expected = plain_vcr_tokens(x.numpy(), target_std)
        np.testing.assert_allclose(vcr_tokens(x, target_std), expected, rtol=1e-12)


@pytest.mark.parametrize(("slices", "knots"), [(24, 17), (3, 2), (1, 40)])
def test_sigreg_is_the_plain_formula(slices, knots):
    for shape in ((12, 5), (2, 3), (7, 1)):
        x = embeddings(shape)
        unit_vectors = directions(shape[1], slices, SEED, STEP, torch.float64).numpy()
        found = sigreg(x, Regularizer(slices=slices, knots=knots), SEED, STEP)
        assert float(found) == pytest.approx(plain_sigreg(x.numpy(), unit_vectors, knots), rel=1e-12)


def test_vcr_of_equal_volumes_is_the_whole_hinge():
    for target_std in (0.5, 1.0, 3.0):
        for found in (
            vcr(torch.full((6, 4), 2.5, dtype=torch.float64), target_std),
            vcr_tokens(torch.arange(12.0, dtype=torch.float64).view(3, 4).expand(6, 3, 4), target_std),
        ):
            assert float(found.variance) == pytest.approx(target_std - 0.01, abs=1e-12)
    assert float(vcr(torch.full((6, 4), 2.5), 1.0).covariance) == 0


def test_tokens_that_only_know_their_position_pay_the_hinge_and_not_covariance():
    """The reason for the native form: positions alone may look decorrelated."""
    positions = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    found = vcr_tokens(positions.expand(6, 4, 2), 1.0)
    assert float(found.variance) == pytest.approx(0.99) and float(found.covariance) == pytest.approx(0, abs=1e-15)


def test_vcr_of_uncorrelated_dims():
    """Columns of a Hadamard matrix: means 0, variances 4/3, no covariance."""
    x = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float64) + 5
    assert [float(part) for part in vcr(x, 1.0)] == [0, 0]
    assert float(vcr(x, 2.0).variance) == pytest.approx(2 - math.sqrt(4 / 3 + 1e-4), rel=1e-12)


def test_vcr_of_one_dim_repeated():
    """All C² covariances are the variance v, so the term is (C − 1) v²."""
    column = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)
    found = vcr(column[:, None].expand(4, 6), 1.0)
    assert float(found.variance) == 0
    assert float(found.covariance) == pytest.approx(5 * (5 / 3) ** 2, rel=1e-12)


def test_sigreg_of_collapse_is_the_integral():
    """n volumes at 0: n ∫ (1 − g)² g over -3..3, by hand from error functions (g = exp(−t²/2))."""

    def gauss_integral(power):
        return math.sqrt(2 * math.pi / power) * math.erf(3 * math.sqrt(power / 2))

    expected = gauss_integral(1) - 2 * gauss_integral(2) + gauss_integral(3)
    found = sigreg(torch.zeros(10, 4, dtype=torch.float64), Regularizer(slices=5, knots=400), 0, 0)
    assert float(found) == pytest.approx(10 * expected, rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name):
    shape = (6, 3, 4) if name == "vcr_tokens" else (6, 4)
    assert torch.autograd.gradcheck(partial(term, name), embeddings(shape).requires_grad_())


@pytest.mark.parametrize("name", SHAPES)
def test_the_order_of_volumes_changes_nothing(name):
    x = embeddings(SHAPES[name])
    order = np.random.default_rng(2).permutation(len(x))
    torch.testing.assert_close(term(name, x[order]), term(name, x), rtol=1e-12, atol=0)


def share(ranks, rank):
    """Volumes of a rank; ranks hold unequal numbers of them, down to one."""
    first = {2: (0, 8, 12), 4: (0, 5, 6, 9, 12)}[ranks]
    return slice(first[rank], first[rank + 1])


def through_a_model(name, dtype, world):
    """Value, parameter gradients (averaged over ranks by DDP) and input gradient of this rank's share."""
    x = embeddings(SHAPES[name]).to(dtype)
    model = nn.Linear(x.shape[-1], 7, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator)
    parallel = model if world.size == 1 else DistributedDataParallel(model)
    x = x if world.size == 1 else x[share(world.size, world.rank)]
    x.requires_grad_()
    value = term(name, parallel(x))
    (value @ torch.tensor([1.0, 0.3], dtype=dtype)[: len(value)]).backward()
    return {"value": value.detach(), "weight": model.weight.grad, "bias": model.bias.grad, "input": x.grad}


def in_ranks(folder: Path) -> None:
    """Measure every term in this rank, also with volumes dealt to the ranks in another order."""
    world = distributed.find()
    distributed.start(world, 60.0)
    found = {
        (name, dtype): through_a_model(name, dtype, world)
        for name in SHAPES
        for dtype in (torch.float64, torch.float32)
    }
    order = np.random.default_rng(world.size).permutation(12)[share(world.size, world.rank)]
    dealt = {name: term(name, embeddings(shape)[order]) for name, shape in SHAPES.items()}
    torch.save({"found": found, "dealt": dealt}, folder / f"{world.rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module", params=[2, 4])
def measured(request, tmp_path_factory):
    """What each of 2 or 4 ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    finish(start_function(partial(in_ranks, folder), ranks=request.param, logs=folder / "logs"))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_many_ranks_are_one_process(name, dtype, measured):
    """Value and averaged gradient on every rank, and a rank's input gradient / the number of ranks."""
    alone = through_a_model(name, dtype, distributed.World(0, 1, 0, torch.device("cpu"), "single"))
    assert alone["value"].all() and alone["weight"].all()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5

    def assert_near(found, expected, scale):
        assert found.dtype == dtype and float((found - expected).norm() / scale) < tolerance

    for rank, results in enumerate(measured):
        found = results["found"][name, dtype]
        for part, expected in zip(found["value"], alone["value"]):
            assert_near(part, expected, expected.norm())
        assert_near(found["weight"], alone["weight"], alone["weight"].norm())
        # a shift moves nothing in vcr: its bias gradient is rounding error, so it is held to the scale of the weight's
        assert_near(found["bias"], alone["bias"], alone["weight"].norm())
        own = alone["input"][share(len(measured), rank)]
        assert_near(found["input"] / len(measured), own, own.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_it_does_not_matter_which_rank_holds_which_volume(name, measured):
    expected = term(name, embeddings(SHAPES[name]))
    for results in measured:
        torch.testing.assert_close(results["dealt"][name], expected, rtol=1e-12, atol=0)
        assert torch.equal(results["dealt"][name], measured[0]["dealt"][name])


def test_directions_are_unit_vectors_all_around():
    drawn = directions(4, 20_000, 0, 0, torch.float64)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(20_000, dtype=torch.float64), rtol=0, atol=1e-14)
    assert drawn.mean(dim=0).abs().max() < 0.02
    assert (drawn.T @ drawn / 20_000 - torch.eye(4) / 4).abs().max() < 0.01


def test_directions_are_pure_in_seed_and_step():
    state = torch.random.get_rng_state()
    first = directions(6, 8, 5, 7, torch.float32)
    assert first.dtype == torch.float32 and first.shape == (8, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(directions(6, 8, 5, 7, torch.float32), first)
    pairs = [(5, 7), (5, 8), (6, 7), (7, 5), (4, 8), (5 + 2**31, 7), (5, 7 + 2**32)]
    drawn = {tuple(directions(6, 8, *pair, torch.float32).flatten().tolist()) for pair in pairs}
    assert len(drawn) == len(pairs)


def test_every_step_of_sigreg_looks_from_elsewhere():
    x = embeddings((12, 5))
    seen = {float(sigreg(x, SETTINGS, seed, step)) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))}
    assert len(seen) == 3


def test_sigreg_is_lowest_for_a_standard_normal():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((512, 16)))
    settings = Regularizer(slices=64)
    normal = float(sigreg(x, settings, 0, 0))
    worse = {
        "collapsed": 0.01 * x,
        "scaled up": 2 * x,
        "scaled down": x / 2,
        "shifted": x + 0.5,
        "one dim repeated": x[:, :1].expand(512, 16),
    }
    scores = {name: float(sigreg(y, settings, 0, 0)) for name, y in worse.items()}
    assert normal < 2 and min(scores.values()) > 5 * normal, (normal, scores)


@pytest.mark.parametrize("name", SHAPES)
def test_lower_precision_in_means_float32_inside(name):
    x = embeddings(SHAPES[name])
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype).requires_grad_()
        expected = term(name, low.detach().float())
        found = term(name, low)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        found.sum().backward()
        assert low.grad.dtype == dtype and low.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        found = term(name, x.float())
    assert torch.equal(found, term(name, x.float()))


@pytest.mark.parametrize("name", ["vcr", "vcr_tokens"])
def test_a_large_mean_costs_no_digits(name):
    """In float32 the mean of squares would be wrong by more than the variance itself."""
    x = (embeddings(SHAPES[name]) * 1024).round() / 1024
    torch.testing.assert_close(term(name, (x + 4096).float()).double(), term(name, x), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_one_volume_is_refused(name):
    with pytest.raises(InputError, match=r"got 1 volume .* at least 2 .* larger train.micro_batch_volumes or .* ranks"):
        term(name, embeddings(SHAPES[name])[:1])


def descend(loss, steps):
    """64 vectors of 8 dims that start as one, nearly: deviation 0.01, correlation above 0.9. Where they end."""
    draw = np.random.default_rng(0)
    start = 0.01 * (draw.standard_normal((64, 1)) + 0.2 * draw.standard_normal((64, 8)))
    assert np.corrcoef(start.T)[np.triu_indices(8, 1)].min() > 0.85 and start.std(axis=0).max() < 0.015
    x = torch.from_numpy(start).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    for step in range(steps):
        optimizer.zero_grad()
        loss(x, step).backward()
        optimizer.step()
    x = x.detach().numpy()
    return x.std(axis=0, ddof=1), np.abs(np.corrcoef(x.T)[np.triu_indices(8, 1)]).mean()


@pytest.mark.parametrize("form", ["native", "paper"])
def test_vcr_undoes_a_collapse(form):
    def loss(x, _step):
        found = vcr(x, 1.5) if form == "native" else vcr_tokens(x[:, None], 1.5)
        return found.variance + 0.04 * found.covariance

    deviation, correlation = descend(loss, 400)
    assert deviation.min() > 0.9 * 1.5 and correlation < 0.2, (deviation, correlation)


def test_sigreg_undoes_a_collapse():
    deviation, correlation = descend(lambda x, step: sigreg(x, Regularizer(slices=64), 0, step), 400)
    assert np.abs(deviation - 1).max() < 0.2 and correlation < 0.2, (deviation, correlation)
