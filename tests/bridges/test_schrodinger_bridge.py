import logging
import math

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cloud, dense_plan

from atlas_diffusers.bridges import BridgeState, SchrodingerBridgeSolver


def dense(x, y, alpha, sigma, weights=None, iterations=20_000):
    """The coupling by plain log-domain Sinkhorn: plan, projection and posterior mean."""
    a, b = torch.full((len(x),), 1 / len(x), dtype=x.dtype), torch.full((len(y),), 1 / len(y), dtype=x.dtype)
    b = b if weights is None else weights
    cost = torch.cdist(x, alpha * y).square() / (2 * sigma**2)
    plan, log_k = dense_plan(cost, 1.0, a, b, iterations), b.log() - cost
    return plan, (plan / plan.sum(1, keepdim=True)) @ y, log_k.softmax(1) @ y


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sigma", [0.5, 0.9])
def test_coupling_is_the_dense_one(sigma, weighted):
    x, y, alpha = cloud(30), cloud(20, seed=1), 0.7
    weights = torch.rand(20, generator=seeded(2), dtype=torch.float64) if weighted else None
    weights = weights / weights.sum() if weighted else None
    coupling = SchrodingerBridgeSolver(y, weights, tolerance=1e-9).couple(x, alpha, sigma)
    plan, projection, posterior = dense(x, y, alpha, sigma, weights)
    torch.testing.assert_close(coupling.posterior, posterior, rtol=0, atol=1e-10)
    torch.testing.assert_close(coupling.data, projection, rtol=0, atol=1e-6)
    rows = plan / plan.sum(1, keepdim=True)
    torch.testing.assert_close(coupling.effective_references, (-(rows * rows.log()).sum(1)).exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(coupling.correct(x), x + projection - posterior, rtol=0, atol=1e-6)
    assert coupling.marginal_error < 1e-9


def test_particles_distributed_as_the_noised_references_are_left_alone():
    """Both clouds are orbits of one rotation, so no reference is favoured: v is constant and T is the posterior mean."""
    turn = torch.arange(8, dtype=torch.float64) * math.pi / 4
    rotations = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(8, 2, 2)
    y = rotations @ torch.tensor([2.0, 0.0], dtype=torch.float64)
    x = (rotations[:, None] @ cloud(5, 2)[None, :, :, None]).flatten(0, 1)[..., 0]
    coupling = SchrodingerBridgeSolver(y, tolerance=1e-10).couple(x, 0.6, 0.8)
    v = coupling.state.potentials[-1]
    assert (v - v.mean()).abs().max() < 1e-6
    torch.testing.assert_close(coupling.data, coupling.posterior, rtol=0, atol=1e-6)


def test_coordinates_do_not_matter():
    x, y = cloud(30), cloud(20, seed=1)
    solver = SchrodingerBridgeSolver(y, tolerance=1e-9)
    preserving, exploding = solver.couple(x, 0.6, 0.8), solver.couple(x / 0.6, 1.0, 0.8 / 0.6)
    torch.testing.assert_close(preserving.data, exploding.data, rtol=0, atol=1e-8)
    torch.testing.assert_close(preserving.effective_references, exploding.effective_references)


def test_epsilon_widens_the_kernel():
    x, y = cloud(30), cloud(20, seed=1)
    wide = SchrodingerBridgeSolver(y, epsilon=4.0, tolerance=1e-9).couple(x, 1.0, 0.5)
    expected = SchrodingerBridgeSolver(y, tolerance=1e-9).couple(x, 1.0, 1.0)
    torch.testing.assert_close(wide.data, expected.data, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_a_relaxed_marginal_scales_the_potential(rho):
    x, y = cloud(30), cloud(20, seed=1)
    v = SchrodingerBridgeSolver(y, rho=rho, tolerance=1e-10).couple(x, 1.0, 0.7).state.potentials[-1]
    bandwidth = 2 * 0.7**2
    log_k = -torch.cdist(x, y).square() / bandwidth
    log_rows = torch.logsumexp(log_k + v / bandwidth - math.log(20), 1)
    full = -torch.logsumexp(log_k - log_rows[:, None] - math.log(30), 0) * bandwidth
    torch.testing.assert_close(v, rho / (1 + rho) * full, rtol=0, atol=1e-6)


def test_few_particles_relax_the_marginal():
    """n particles scale the potential by n/M, where M = exp(entropy of the weights) references are more than that."""
    x, y = cloud(5), cloud(20, seed=1)
    weights = torch.tensor([1.0] * 15 + [0.0] * 5)
    relaxed = SchrodingerBridgeSolver(y, weights, tolerance=1e-9).couple(x, 1.0, 0.7)
    explicit = SchrodingerBridgeSolver(y, weights, rho=5 / (15 - 5), tolerance=1e-9).couple(x, 1.0, 0.7)
    torch.testing.assert_close(relaxed.data, explicit.data, rtol=0, atol=1e-5)
    exact = SchrodingerBridgeSolver(y[:5], tolerance=1e-9).couple(x, 1.0, 0.7)
    infinite = SchrodingerBridgeSolver(y[:5], rho=math.inf, tolerance=1e-9).couple(x, 1.0, 0.7)
    assert torch.equal(exact.data, infinite.data)


def test_images_keep_their_shape_and_dtype():
    y = torch.randn(12, 3, 4, 4, generator=seeded(1))
    x = torch.randn(7, 3, 4, 4, generator=seeded(2), dtype=torch.float32)
    coupling = SchrodingerBridgeSolver(y).couple(x.half(), 0.5, 0.9)
    assert coupling.data.shape == x.shape and coupling.data.dtype == torch.float16
    flat = SchrodingerBridgeSolver(y.flatten(1)).couple(x.half().flatten(1), 0.5, 0.9)
    assert torch.equal(coupling.data.flatten(1), flat.data)


def test_one_particle_has_the_posterior_mean():
    y, x = cloud(9), cloud(1, seed=3)
    coupling = SchrodingerBridgeSolver(y).couple(x, 0.8, 0.6)
    assert torch.equal(coupling.data, coupling.posterior)
    torch.testing.assert_close(coupling.data, dense(x, y, 0.8, 0.6, iterations=1)[2])


def test_without_signal_the_projection_is_the_weighted_mean():
    y, weights = cloud(9), torch.arange(9.0, dtype=torch.float64)
    coupling = SchrodingerBridgeSolver(y, weights).couple(cloud(5, seed=3), 0.0, 1.0)
    torch.testing.assert_close(coupling.data, (weights / weights.sum() @ y).expand(5, 3))


def test_permutations_of_either_side():
    x, y = cloud(15), cloud(12, seed=1)
    shuffle, mix = torch.randperm(15, generator=seeded(4)), torch.randperm(12, generator=seeded(5))
    expected = SchrodingerBridgeSolver(y, tolerance=1e-9).couple(x, 0.7, 0.7).data
    torch.testing.assert_close(
        SchrodingerBridgeSolver(y[mix], tolerance=1e-9).couple(x[shuffle], 0.7, 0.7).data, expected[shuffle], rtol=0, atol=1e-7
    )


def test_warm_starts_save_kernel_applications():
    """Along a diffusion the potentials change slowly: the state spares most of the work and changes nothing."""
    y, x0, z = cloud(512, 64), cloud(512, 64, seed=1), cloud(512, 64, seed=2)
    solver, state, warm, cold = SchrodingerBridgeSolver(y), None, 0, 0
    for angle in np.linspace(1.4, 0.8, 30):
        alpha, sigma = math.cos(angle), math.sin(angle)
        x = alpha * x0 + sigma * z
        follow, fresh = solver.couple(x, alpha, sigma, state), solver.couple(x, alpha, sigma)
        state, warm, cold = follow.state, warm + follow.kernel_applications, cold + fresh.kernel_applications
        # both plans are within 1e-3 of the marginals in L1, so the masses moved between them carry at most 2e-3 max|y|
        assert (follow.data - fresh.data).abs().mean() < 2e-3 * y.abs().max()
    assert warm < 0.6 * cold, (warm, cold)
    assert len(state.potentials) == len(state.log_snrs) == 2


def test_a_second_solution_at_one_level_replaces_the_first():
    state = BridgeState().followed_by(0.0, torch.zeros(2)).followed_by(1.0, torch.ones(2)).followed_by(1.0, 2 * torch.ones(2))
    assert state.log_snrs == (0.0, 1.0) and state.potentials[-1][0] == 2


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(2, 12), log_sigma=st.floats(-6, 6), seed=st.integers(0, 99), duplicates=st.booleans()
)
def test_projections_are_finite_and_inside_the_references(n, m, log_sigma, seed, duplicates):
    y, x = cloud(m, 2, seed), cloud(n, 2, seed + 1)
    if duplicates:
        y[1:] = y[0]
    coupling = SchrodingerBridgeSolver(y, rho=1.0).couple(x, 1.0, math.exp(log_sigma))
    assert coupling.data.isfinite().all()
    slack = 1e-9 * (1 + y.abs().max())
    assert (coupling.data >= y.amin(0) - slack).all() and (coupling.data <= y.amax(0) + slack).all()


def test_nearest_reference():
    y, x = cloud(9), cloud(4, seed=2)
    expected = [min(np.linalg.norm(a - b) for b in y.numpy()) for a in x.numpy()]
    np.testing.assert_allclose(SchrodingerBridgeSolver(y).nearest_reference(x).numpy(), expected)


@pytest.mark.parametrize("references, weights, options, message", [
    (torch.zeros(1, 3), None, {}, r"at least two points, \(m, ...\), got shape \(1, 3\)"),
    (torch.tensor([[1.0, math.nan], [0, 0]]), None, {}, "contain 1 values that are NaN"),
    (torch.zeros(3, 2), torch.ones(4), {}, r"weights have shape \(4,\), references are 3"),
    (torch.zeros(3, 2), torch.tensor([1.0, -1.0, 1.0]), {}, "non-negative and not all zero, found values from -1 to 1"),
    (torch.zeros(3, 2), torch.zeros(3), {}, "not all zero"),
    (torch.zeros(3, 2), None, {"epsilon": 0.0}, "epsilon=0.0"),
    (torch.zeros(3, 2), None, {"rho": -1.0}, "rho=-1.0"),
    (torch.zeros(3, 2), None, {"solver_type": "exact"}, "solver_type='exact' is unknown"),
], ids=str)  # fmt: skip
def test_bad_references_are_named(references, weights, options, message):
    with pytest.raises(ValueError, match=message):
        SchrodingerBridgeSolver(references, weights, **options)


@pytest.mark.parametrize("sigma, falls_back", [(4.0, False), (0.2, True)])
def test_landmarks_serve_wide_kernels_and_give_way_for_narrow_ones(sigma, falls_back, caplog):
    x, y = cloud(400), cloud(300, seed=1)
    exact = SchrodingerBridgeSolver(y, tolerance=1e-6).couple(x, 0.8, sigma)
    with caplog.at_level(logging.INFO, "atlas_diffusers.bridges"):
        landmarks = SchrodingerBridgeSolver(y, tolerance=1e-6, solver_type="nystrom").couple(x, 0.8, sigma)
    assert ("the direct kernel is used" in caplog.text) == falls_back
    torch.testing.assert_close(landmarks.data, exact.data, rtol=0, atol=1e-4)


def test_random_features_are_there_on_request():
    x, y = cloud(40), cloud(30, seed=1)
    exact = SchrodingerBridgeSolver(y).couple(x, 0.8, 4.0)
    features = SchrodingerBridgeSolver(y, solver_type="rff").couple(x, 0.8, 4.0)
    assert (features.data - exact.data).abs().max() < 0.2 * exact.data.std()


def test_the_size_of_a_posterior_is_that_of_noised_references():
    """Far apart references in groups of five equal ones: a sample of one has the other four to explain it."""
    y = (100 * torch.eye(6, dtype=torch.float64)).repeat_interleave(5, 0)
    assert SchrodingerBridgeSolver(y).posterior_size(1.0, 0.5) == pytest.approx(4)
    assert SchrodingerBridgeSolver(y).posterior_size(1e-4, 1.0) == pytest.approx(29, rel=1e-3)
    weights = torch.zeros(30).index_fill(0, torch.tensor([7, 8, 20]), 1.0)
    assert SchrodingerBridgeSolver(y, weights).posterior_size(1e-4, 1.0) == pytest.approx(2, rel=1e-3)


def test_a_few_broad_posteriors_do_not_open_the_gate():
    """One group of three equal references and one of ninety, drawn equally often: a median of 2 or 89, never between."""
    y = torch.cat([torch.zeros(3, 2), 100 + torch.zeros(90, 2)])
    weights = torch.cat([torch.full((3,), 0.65 / 3), torch.full((90,), 0.35 / 90)])
    assert SchrodingerBridgeSolver(y, weights).posterior_size(1.0, 0.5) == pytest.approx(2, rel=1e-5)


def test_bad_particles_are_named():
    with pytest.raises(ValueError, match=r"particles have shape \(4,\), references \(3,\)"):
        SchrodingerBridgeSolver(cloud(5)).couple(cloud(5, 4), 0.5, 0.5)
