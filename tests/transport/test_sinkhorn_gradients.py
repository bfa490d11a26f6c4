"""Implicit gradients of every output against central differences."""

import pytest
import torch
from conftest import seeded
from oracles import points

from atlas_diffusers.training.memory import LiveBytes
from atlas_diffusers.transport import entropic_transport, sinkhorn_divergence

STEP = 1e-5


def weights(n, seed):
    values = torch.rand(n, generator=seeded(seed), dtype=torch.float64) + 0.2
    return values / values.sum()


INPUTS = {
    "x": points(7, 2),
    "y": points(6, 2, seed=1) + 0.5,
    "epsilon": torch.tensor(0.4, dtype=torch.float64),
    "a": weights(7, 2),
    "b": weights(6, 3),
}
LOSSES = {
    "potentials": lambda o: (o.f - o.f.mean()).square().sum() + (o.f[0] + o.g).cos().sum(),
    "plan": lambda o: o.plan.square().sum() * 50,
    "map": lambda o: (o.barycentric_map() * torch.linspace(-1, 1, 2, dtype=torch.float64)).square().sum(),
    "new points": lambda o: o.barycentric_map(points(4, 2, seed=9)).square().sum(),
    "cost": lambda o: o.cost.sum(),
    "transport cost": lambda o: o.transport_cost.sum(),
    "effective size": lambda o: o.effective_size.sum(),
}


def solve(rho, **inputs):
    return entropic_transport(**inputs, rho=rho, tolerance=1e-12, max_iterations=500, differentiable=True)


@pytest.mark.parametrize("rho", [None, (0.7, None)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss, rho):
    inputs = {name: value.clone().requires_grad_() for name, value in INPUTS.items()}
    gradients = torch.autograd.grad(LOSSES[loss](solve(rho, **inputs)), list(inputs.values()))
    for seed, (name, gradient) in enumerate(zip(inputs, gradients)):
        direction = torch.randn(INPUTS[name].shape, generator=seeded(seed), dtype=torch.float64)
        if name in "ab":
            direction -= direction.mean()  # totals stay equal
        ends = [LOSSES[loss](solve(rho, **{**INPUTS, name: INPUTS[name] + h * direction})) for h in (STEP, -STEP)]
        difference = ((ends[0] - ends[1]) / (2 * STEP)).item()
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=2e-5, abs=1e-7), name


def test_gradients_of_a_batch_are_those_of_its_members():
    x, y = torch.stack([points(5, 2), points(5, 2, seed=4)]).requires_grad_(), points(6, 2, seed=1)
    epsilon = torch.tensor([0.3, 2.0], dtype=torch.float64)
    output = entropic_transport(x, y, epsilon, tolerance=1e-11, differentiable=True)
    (together,) = torch.autograd.grad(output.barycentric_map().square().sum(), x)
    for member in range(2):
        point = x[member].detach().requires_grad_()
        alone = entropic_transport(point, y, epsilon[member], tolerance=1e-11, differentiable=True)
        (gradient,) = torch.autograd.grad(alone.barycentric_map().square().sum(), point)
        torch.testing.assert_close(together[member], gradient, rtol=1e-6, atol=1e-8)


def test_the_cost_needs_no_linear_system():
    """∂OT/∂x_i = 2 Σ_j P_ij (x_i − y_j), and the potentials are not differentiated."""
    x, y = points(7, 2).requires_grad_(), points(6, 2, seed=1)
    output = entropic_transport(x, y, 0.3, tolerance=1e-12, differentiable=True)
    (gradient,) = torch.autograd.grad(output.cost, x)
    plan = output.plan.detach()
    torch.testing.assert_close(gradient, 2 * (plan.sum(1, keepdim=True) * x - plan @ y).detach(), rtol=0, atol=1e-8)


def test_a_divergence_can_be_descended():
    x, y = points(30, 2).requires_grad_(), 0.5 * points(30, 2, seed=1) + 2
    values = []
    for _ in range(25):
        value = sinkhorn_divergence(x, y, 0.2, tolerance=1e-6, differentiable=True)
        (gradient,) = torch.autograd.grad(value, x)
        values.append(value.item())
        x = (x - 30 / 4 * gradient).detach().requires_grad_()
    assert values[-1] < 1e-2 * values[0]


def test_without_asking_there_are_no_gradients():
    output = entropic_transport(points(5, 2).requires_grad_(), points(4, 2, seed=1), 0.5)
    assert not output.plan.requires_grad and not output.cost.requires_grad


@pytest.mark.parametrize("rho", [None, (0.7, None)])
def test_gradients_stay_within_their_memory(rho):
    """A matrix of 8 MB: blocks are computed again, and the gradients are those of the matrix."""
    x, y, gradients = points(1000, 5), points(1000, 5, seed=1), []
    for max_bytes in (2**31, 2**21):
        point = x.clone().requires_grad_()
        with LiveBytes() as live:
            output = entropic_transport(point, y, 4.0, rho=rho, tolerance=1e-6, differentiable=True, max_bytes=max_bytes)
            loss = output.barycentric_map().square().sum() + output.cost + output.transport_cost
            gradients.append(torch.autograd.grad(loss, point)[0])
    assert live.peak < 2**22, "half a matrix: the bound and some hundred vectors"
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9 * gradients[0].abs().max().item())
