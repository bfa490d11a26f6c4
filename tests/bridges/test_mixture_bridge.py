"""The mixture-potential bridge against closed forms: Gaussian ends, a known potential, its process and its identities."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.bridges import MixtureBridge
from atlas_diffusers.bridges.mixture_components import merge
from atlas_diffusers.bridges.mixture_fit import Cloud, gaussian_bridge, residual
from atlas_diffusers.bridges.mixture_potential import MixturePotential


def cloud(points):
    return Cloud(points, torch.full((len(points),), 1 / len(points), dtype=points.dtype))


def covariance_of(points):
    centred = points - points.mean(0)
    return centred.T @ centred / len(points)


def spread_out(seed, n, d, full=True):
    """Points of a random covariance and mean."""
    g = seeded(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / 2 + torch.eye(d) if full else torch.rand(d, generator=g) + 0.5
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    return (z @ mix if full else z * mix) + 3 * torch.randn(d, generator=g, dtype=torch.float64)


def random_potential(seed, count=3, d=2, epsilon=0.5, full=False):
    g = seeded(seed)
    S = 0.1 + 0.4 * torch.rand(count, d, generator=g, dtype=torch.float64)
    if full:
        rotations, _ = torch.linalg.qr(torch.randn(count, d, d, generator=g, dtype=torch.float64))
        S = rotations * S[:, None] @ rotations.mT
    mean = 2 * torch.randn(count, d, generator=g, dtype=torch.float64)
    mass = torch.randn(count, generator=g, dtype=torch.float64) / 2
    return MixturePotential(mass, mean, S, torch.randn(count, d, generator=g, dtype=torch.float64), epsilon)


def bridge_of(potential, source_mean=None, target_mean=None, scale=1.0):
    """A fitted bridge with a given potential."""
    d = potential.mean.shape[1]
    bridge = MixtureBridge(len(potential), "full" if potential.is_full else "diag")
    bridge._potential, bridge._scale = potential, scale
    bridge._source_mean = torch.zeros(d, dtype=torch.float64) if source_mean is None else source_mean
    bridge._target_mean = torch.zeros(d, dtype=torch.float64) if target_mean is None else target_mean
    return bridge


def grid(limit=6.0, count=241):
    """A fine grid of the plane, (count², 2), and the area of a cell."""
    side = torch.linspace(-limit, limit, count, dtype=torch.float64)
    return torch.cartesian_prod(side, side), (side[1] - side[0]).item() ** 2


# ---------------------------------------------------------------------- Gaussian to Gaussian


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_one_component_is_the_gaussian_bridge_of_the_moments(epsilon, covariance):
    full = covariance == "full"
    x, y = spread_out(0, 500, 4, full), spread_out(1, 700, 4, full)
    bridge = MixtureBridge(1, covariance).fit(x, y, epsilon)
    V0, V1 = covariance_of(x), covariance_of(y)
    if not full:
        V0, V1 = (torch.diag(V.diagonal()) for V in (V0, V1))
    values, vectors = torch.linalg.eigh(V0)
    root, inverse = vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
    inner, axes = torch.linalg.eigh(4 * root @ V1 @ root + epsilon**2 * torch.eye(4, dtype=torch.float64))
    cross = 0.5 * (root @ (axes * inner.sqrt() @ axes.T) @ inverse - epsilon * torch.eye(4, dtype=torch.float64))
    slope = torch.linalg.solve(V0, cross)
    query = spread_out(2, 20, 4)
    expected = y.mean(0) + (query - x.mean(0)) @ slope
    torch.testing.assert_close(bridge.mean(query), expected, rtol=1e-8, atol=1e-8)
    within = V1 - cross.T @ slope
    torch.testing.assert_close(bridge.covariance(query), within.expand(20, 4, 4), rtol=1e-7, atol=1e-8)
    assert bridge.residual < 1e-8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_gaussian_bridge_solves_its_equation(seed, epsilon):
    V0, V1 = covariance_of(spread_out(seed, 50, 3)), covariance_of(spread_out(seed + 1, 50, 3))
    S = gaussian_bridge(V0[None], V1[None], epsilon)[0]
    torch.testing.assert_close(S @ V0 @ S / epsilon**2 + S, V1, rtol=1e-7, atol=1e-8)
    v0, v1 = V0.diagonal()[None], V1.diagonal()[None]
    s = gaussian_bridge(v0, v1, epsilon)
    torch.testing.assert_close(s.square() * v0 / epsilon**2 + s, v1)


# ---------------------------------------------------------------------- the potential's closed forms


@pytest.mark.parametrize("full", [False, True])
def test_partition_is_the_integral_of_the_tilted_potential(full):
    potential, (points, area) = random_potential(3, full=full), grid(9.0, 401)
    x = torch.tensor([[0.3, -0.8], [1.0, 0.5]], dtype=torch.float64)
    integrand = (x @ points.T)[:, :, None] / potential.epsilon + potential.log_components(points)
    torch.testing.assert_close(potential.log_partition(x), (integrand.exp() * area).sum(1).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_another_origin_is_the_same_potential(full):
    potential = random_potential(4, full=full)
    moved = potential.about(torch.randn(3, 2, generator=seeded(0), dtype=torch.float64))
    x = torch.randn(7, 2, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(moved.log_partition(x), potential.log_partition(x))
    torch.testing.assert_close(moved.log_components(x), potential.log_components(x))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
def test_posterior_is_the_law_of_the_end(full, t):
    """Given X_t = z the end has density v(y) exp(|y|²/2ε − |y − z|²/2ε(1 − t)) up to a constant."""
    potential, (y, _) = random_potential(5, full=full), grid(9.0, 401)
    z, eps = torch.tensor([[0.4, -0.2]], dtype=torch.float64), potential.epsilon
    logits = potential.log_components(y).logsumexp(1) + y.square().sum(1) / (2 * eps)
    density = (logits - (y - z).square().sum(1) / (2 * eps * (1 - t))).softmax(0)
    log_weights, means, S = potential.posterior(z, t)
    weights = log_weights.exp()[0]
    mean = weights @ means[0]
    torch.testing.assert_close(mean, density @ y, rtol=1e-6, atol=1e-6)
    centred = means[0] - mean
    inner = torch.einsum("k,kij->ij", weights, S) if full else torch.diag(weights @ S)
    expected = (y - mean).T @ ((y - mean) * density[:, None])
    torch.testing.assert_close(inner + centred.T @ (centred * weights[:, None]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_plan_integrates_to_one_with_the_moments_that_it_reports(full):
    bridge, (y, area) = bridge_of(random_potential(6, full=full), scale=1.3), grid(12.0, 501)
    x = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    density = bridge.log_prob(y, x.expand(len(y), 2)).exp()
    assert (density.sum() * area).item() == pytest.approx(1, abs=1e-6)
    mean = density @ y * area
    torch.testing.assert_close(bridge.mean(x)[0], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        bridge.covariance(x)[0], (y - mean).T @ ((y - mean) * density[:, None]) * area, rtol=1e-4, atol=1e-5
    )


def test_log_potential_gives_the_plan():
    """``log π(y|x) − xᵀy/ε − log v(y)`` depends on x alone, in the coordinates of the data."""
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([-3.0, 5.0], dtype=torch.float64)
    bridge = bridge_of(random_potential(7), *shift, scale=1.7)
    g = seeded(3)
    y = shift[1] + torch.randn(9, 2, generator=g, dtype=torch.float64)
    for x in shift[0] + torch.randn(3, 2, generator=g, dtype=torch.float64):
        rest = bridge.log_prob(y, x.expand(9, 2)) - y @ x / bridge.epsilon - bridge.log_potential(y)
        torch.testing.assert_close(rest, rest[:1].expand(9), rtol=0, atol=1e-9)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.5, 0.95])
def test_drift_is_the_gradient_of_the_log_partition(full, t):
    """``u = ε ∇ log ∫ v(y) e^{|y|²/2ε} N(y; x, ε(1 − t)) dy``, by autograd of the closed form."""
    potential = random_potential(8, full=full)
    bridge, eps = bridge_of(potential), potential.epsilon
    x = torch.randn(6, 2, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    S = potential.covariance if full else torch.diag_embed(potential.covariance)
    P = torch.linalg.inv(S)
    A = P + t / (eps * (1 - t)) * torch.eye(2)
    h = (P @ potential.mean[:, :, None])[:, :, 0] - potential.origin / eps
    c = h + x[:, None] / (eps * (1 - t))
    constant = potential.log_mass - (torch.logdet(S) + torch.einsum("ki,kij,kj->k", potential.mean, P, potential.mean)) / 2
    quadratic = torch.einsum("nki,kij,nkj->nk", c, torch.linalg.inv(A), c)
    log_phi = (constant - torch.logdet(A) / 2 + quadratic / 2).logsumexp(1) - x.square().sum(1) / (2 * eps * (1 - t))
    (gradient,) = torch.autograd.grad(log_phi.sum(), x)
    torch.testing.assert_close(bridge.drift(x.detach(), t), eps * gradient, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------- samples and paths


def assert_same_moments(first, second, errors=5.0):
    """Means and variances agree within standard errors of two samples."""
    for f in (lambda v: v, torch.square):
        a, b = f(first), f(second)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= errors * error).all()


@pytest.mark.parametrize("full", [False, True])
def test_samples_and_path_ends_have_the_moments_of_the_plan(full):
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([-3.0, 5.0], dtype=torch.float64)
    bridge = bridge_of(random_potential(9, full=full), *shift, scale=1.5)
    x = torch.tensor([[2.5, -1.4]], dtype=torch.float64).expand(20_000, 2)
    y = bridge.sample(x, seeded(0))
    standard_error = bridge.covariance(x[:1])[0].diagonal().sqrt() / math.sqrt(len(x))
    assert ((y.mean(0) - bridge.mean(x[:1])[0]).abs() < 5 * standard_error).all()
    torch.testing.assert_close(covariance_of(y), bridge.covariance(x[:1])[0], rtol=0.06, atol=0.02)
    path = bridge.sample_path(x, 3, seeded(1))
    assert torch.equal(path[0], x)
    assert_same_moments(path[-1], y)
    # the middle of a path has the law of X_t given X_0
    assert_same_moments(path[1], bridge.interpolate(x, 1 / 3, seeded(2)))


def test_interpolation_ends_where_the_bridge_does():
    bridge, x = bridge_of(random_potential(10)), torch.randn(8, 2, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(bridge.interpolate(x, 0.0, seeded(1)), x)
    assert torch.equal(bridge.interpolate(x, 1.0, seeded(1)), bridge.sample(x, seeded(1)))


def test_pairs_keep_the_source():
    bridge, x = bridge_of(random_potential(11)), torch.randn(8, 2, generator=seeded(0), dtype=torch.float64)
    source, target = bridge.pairs(x, seeded(1))
    assert source is x and torch.equal(target, bridge.sample(x, seeded(1)))


# ---------------------------------------------------------------------- fitting


def mixture_problem(seed, n, d=2, epsilon=1.0, count=4):
    """Samples of a bridge whose potential is a known mixture, and that bridge."""
    truth = random_potential(seed, count, d, epsilon)
    g = seeded(seed + 1)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    other = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, bridge_of(truth).sample(other, g), bridge_of(truth)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_fit_finds_the_bridge_and_its_number_of_components(covariance):
    x, y, truth = mixture_problem(12, 3000)
    bridge = MixtureBridge("auto", covariance, restarts=1).fit(x, y, 1.0)
    query = torch.randn(200, 2, generator=seeded(5), dtype=torch.float64)
    error = (bridge.mean(query) - truth.mean(query)).square().sum(1).mean()
    assert error < 0.01 * covariance_of(y).trace()
    assert len(bridge.potential) <= 5 and bridge.residual < 0.02


def test_objective_exceeds_the_best_by_the_divergence():
    """``L(θ) − L(θ*) = KL(π* | π_θ)`` over the same law of x, here by quadrature over y at samples of x."""
    best, other = random_potential(13), random_potential(14)
    g = seeded(6)
    x = 0.6 * torch.randn(4000, 2, generator=g, dtype=torch.float64)
    y = bridge_of(best).sample(x, g)
    losses = [bridge_of(p).objective(x, y) for p in (best, other)]
    samples = [bridge_of(p).log_prob(y, x) for p in (best, other)]
    divergence = samples[0] - samples[1]
    # both sides are means over the same pairs of terms that differ by the constant <x, y> alone: equal to rounding
    assert losses[1] - losses[0] == pytest.approx(divergence.mean().item(), rel=1e-9)
    assert divergence.mean() > 5 * divergence.std() / math.sqrt(len(x))


def test_a_fit_is_stationary_and_better_than_where_it_started():
    x, y, _ = mixture_problem(15, 2000)
    bridge = MixtureBridge(4).fit(x, y, 1.0)
    from_x, from_y = bridge._source(x)[0], bridge._target(y)[0]
    assert residual(bridge.potential, cloud(from_x), cloud(from_y)) == pytest.approx(bridge.residual)
    assert bridge.residual < 0.02
    # moments of y given by the plan are those of the samples of y: two of the identities, mixed over components
    mean = bridge.mean(x).mean(0)
    torch.testing.assert_close(mean, y.mean(0), rtol=0, atol=0.03)


def test_merging_ends_at_what_held_out_points_support():
    x, y, truth = mixture_problem(16, 4000, epsilon=0.5, count=2)
    split = redundant_split(truth.potential)
    train, held = (cloud(part) for part in (x[:2000], x[2000:])), (cloud(part) for part in (y[:2000], y[2000:]))
    (x_train, x_held), (y_train, y_held) = train, held
    assert len(split) == 4 and len(merge(split, x_train, y_train, x_held, y_held)) == 2


def redundant_split(p):
    """Every component twice, with half the mass."""
    return MixturePotential(
        torch.cat([p.log_mass, p.log_mass]) - math.log(2), torch.cat([p.mean, p.mean]), torch.cat([p.covariance] * 2),
        torch.cat([p.origin] * 2), p.epsilon,
    )  # fmt: skip


def test_the_bridge_does_not_depend_on_place_and_unit():
    x, y, _ = mixture_problem(17, 1500)
    query = torch.randn(20, 2, generator=seeded(8), dtype=torch.float64)
    plain = MixtureBridge(4, restarts=1).fit(x, y, 1.0)
    c0, c1, unit = torch.tensor([1e3, -7.0]).double(), torch.tensor([-5.0, 2e3]).double(), 1e-3
    moved = MixtureBridge(4, restarts=1).fit(unit * (x + c0), unit * (y + c1), unit**2)
    expected = unit * (plain.mean(query) + c1)
    torch.testing.assert_close(moved.mean(unit * (query + c0)), expected, rtol=0, atol=1e-5 * unit)
    log_unit = 2 * math.log(unit)
    torch.testing.assert_close(
        moved.log_prob(unit * (query + c1), unit * (query + c0)) + log_unit, plain.log_prob(query, query), rtol=0, atol=1e-4
    )


def test_a_full_fit_turns_with_the_data():
    x, y, _ = mixture_problem(18, 1500)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    fits = [MixtureBridge(1, "full").fit(a, b, 1.0) for a, b in ((x, y), (x @ turn, y @ turn))]
    query = torch.randn(20, 2, generator=seeded(8), dtype=torch.float64)
    torch.testing.assert_close(fits[1].mean(query @ turn), fits[0].mean(query) @ turn, rtol=0, atol=1e-8)


def test_weights_are_repetitions():
    x, y, _ = mixture_problem(19, 300)
    counts = torch.arange(300) % 3
    once = MixtureBridge(1).fit(x, y, 1.0, y_weights=counts)
    often = MixtureBridge(1).fit(x, y.repeat_interleave(counts, 0), 1.0)
    torch.testing.assert_close(once.mean(x[:9]), often.mean(x[:9]), rtol=0, atol=1e-8)


def test_batches_and_arrays_are_taken():
    x, y, _ = mixture_problem(20, 400)
    whole = MixtureBridge(2, restarts=1).fit(x, y, 1.0)
    batched = MixtureBridge(2, restarts=1).fit(iter(x.split(64)), y.split(100), 1.0)
    assert torch.equal(batched.mean(x[:5]), whole.mean(x[:5]))
    arrays = MixtureBridge(2, restarts=1).fit(x.numpy(), y.numpy(), 1.0)
    found = arrays.mean(x[:5].numpy().astype(np.float32))
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, whole.mean(x[:5]).numpy(), atol=1e-5)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_save_and_load(tmp_path, covariance):
    x, y, _ = mixture_problem(21, 500)
    bridge = MixtureBridge(2, covariance).fit(x, y, 0.7)
    bridge.save_pretrained(tmp_path / "bridge")
    loaded = MixtureBridge.from_pretrained(tmp_path / "bridge")
    assert torch.equal(loaded.mean(x), bridge.mean(x)) and loaded.epsilon == bridge.epsilon == pytest.approx(0.7)
    assert repr(loaded) == repr(bridge) and "2 " + covariance in repr(bridge)


# ---------------------------------------------------------------------- bad and hard input


@pytest.mark.parametrize(
    "x, y, epsilon, found",
    [
        (torch.randn(9, 2), torch.randn(9, 2), 0.0, "epsilon=0.0"),
        (torch.randn(9, 2), torch.randn(9, 2), -1.0, "epsilon=-1.0"),
        (torch.randn(9, 2), torch.randn(9, 2), math.nan, "epsilon=nan"),
        (torch.randn(9, 2), torch.randn(9, 2), math.inf, "epsilon=inf"),
        (torch.randn(9, 2), torch.randn(9, 3), 1.0, "x has 2 coordinates, y has 3"),
        (torch.full((9, 2), math.nan), torch.randn(9, 2), 1.0, "x has 18 values that are NaN"),
        (torch.randn(9, 2), torch.full((9, 2), math.inf), 1.0, "y has 18 values that are NaN or infinite"),
        (torch.zeros(0, 2), torch.randn(9, 2), 1.0, "0 and 9 samples"),
        (torch.randn(9), torch.randn(9, 2), 1.0, r"x has shape \(9,\)"),
        (torch.randn(9, 2), torch.randn(1, 2), 1.0, "9 and 1 samples"),
        (torch.randn(9, 2), torch.ones(9, 2), 1.0, r"coordinates \[0, 1\] of y are constant"),
    ],
)
def test_wrong_samples_are_named(x, y, epsilon, found):
    with pytest.raises(ValueError, match=found):
        MixtureBridge().fit(x, y, epsilon)


@pytest.mark.parametrize(
    "options, found",
    [
        ({"components": 0}, "components=0"),
        ({"components": "many"}, "components='many'"),
        ({"covariance": "iso"}, "covariance='iso'"),
        ({"restarts": 0}, "restarts=0"),
    ],
)
def test_wrong_options_are_named(options, found):
    with pytest.raises(ValueError, match=found):
        MixtureBridge(**options)


def test_other_mistakes_are_named(tmp_path):
    x, y, _ = mixture_problem(22, 100)
    with pytest.raises(ValueError, match="not fitted"):
        MixtureBridge().mean(x)
    with pytest.raises(ValueError, match="100 and 100 samples; expected at least 2 and 101"):
        MixtureBridge(101).fit(x, y, 1.0)
    with pytest.raises(ValueError, match="y_weights must be 100 non-negative"):
        MixtureBridge().fit(x, y, 1.0, y_weights=-torch.ones(100))
    bridge = MixtureBridge(1).fit(x, y, 1.0)
    for call, found in (
        (lambda: bridge.mean(torch.zeros(3, 4)), r"\(3, 4\); expected \(n, 2\)"),
        (lambda: bridge.drift(x, 1.0), "t=1.0"),
        (lambda: bridge.interpolate(x, 1.5), "t=1.5"),
        (lambda: bridge.sample_path(x, 0), "steps=0"),
    ):
        with pytest.raises(ValueError, match=found):
            call()
    with pytest.raises(OSError, match="has no bridge"):
        MixtureBridge.from_pretrained(tmp_path)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 1e6])
@pytest.mark.parametrize("kind", ["far", "duplicates", "line", "few", "heavy"])
def test_hard_samples_give_numbers(kind, epsilon):
    g = seeded(4)
    x, y = torch.randn(60, 2, generator=g).double(), torch.randn(40, 2, generator=g).double()
    if kind == "far":
        y += 1e6
    elif kind == "duplicates":
        y = y[:5].repeat(8, 1)
    elif kind == "line":
        x, y = x[:, :1], y[:, :1]
    elif kind == "few":
        x, y = x[:4], y[:3]
    elif kind == "heavy":
        y = y / torch.rand(40, 1, generator=g).double() ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a fit of such samples may say that it is not stationary
        bridge = MixtureBridge(restarts=1).fit(x, y, epsilon)
    for result in (bridge.mean(x), bridge.covariance(x), bridge.sample(x, seeded(1)), bridge.drift(x, 0.5)):
        assert result.isfinite().all()
    torch.testing.assert_close(bridge.mean(x).mean(0), y.mean(0), rtol=0.05, atol=0.6 * y.std(0).max().item())


def test_a_constant_x_is_sent_to_the_law_of_y():
    x, y = torch.full((50, 2), 3.0).double(), spread_out(24, 200, 2)
    bridge = MixtureBridge(1).fit(x, y, 1.0)
    torch.testing.assert_close(bridge.mean(x[:1])[0], y.mean(0))
    # a variance of x below the floor of 1e-9, in units of y's, is taken for that
    torch.testing.assert_close(bridge.covariance(x[:1])[0].diagonal(), covariance_of(y).diagonal(), rtol=1e-7, atol=0)


def test_a_fit_that_is_not_stationary_says_so():
    x, y, _ = mixture_problem(23, 400, epsilon=0.05)
    with pytest.warns(UserWarning, match="not stationary.*standard deviations"):
        MixtureBridge(8, restarts=1, max_iterations=1).fit(x[:12], 100 * y[:12] ** 3, 1e-4)
