"""Iterative Markovian fitting: displacements against Brownian bridges, its fixed point against the Gaussian closed form."""

import math

import pytest
import torch
from conftest import seeded
from test_objectives import batch_of, build_bridge
from test_trainer import assert_same_checkpoints, interrupt_at

from atlas_diffusers import AtlasBridgePipeline
from atlas_diffusers.bridges.brownian import bridge_displacement, follow, times_left
from atlas_diffusers.training import MarkovianFitting, MixtureCoupling, load_checkpoint

SIGMA = 0.8


def draw(generator):
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


# ---------------------------------------------------------------------- bridges and the diffusion


def test_displacement_is_that_of_the_brownian_bridge():
    g, count = seeded(), 40_000
    start, end = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5]).double()
    left, noise = torch.full((count,), 0.3).double(), torch.randn(count, 2, generator=g).double()
    x, d = bridge_displacement(start.expand(count, 2), end.expand(count, 2), left, SIGMA, noise)
    torch.testing.assert_close(x + math.sqrt(0.3) * d, end.expand(count, 2))
    # mean and standard deviation, within five standard errors of each
    spread = SIGMA * math.sqrt(0.3 * 0.7)
    assert ((x.mean(0) - (0.3 * start + 0.7 * end)).abs() < 5 * spread / math.sqrt(count)).all()
    assert ((x.std(0) - spread).abs() < 5 * spread / math.sqrt(2 * count)).all()


def test_a_diffusion_towards_a_known_end_arrives():
    """With the drift ``(e − x)/r`` of a bridge to e the last step goes there; half of the time is left at its mean."""
    end, start, seen = torch.tensor([4.0, -1.0]).double(), torch.zeros(1, 2).double(), []

    def predict(x, left):
        seen.append(left)
        return (end - x) / left**0.5

    found = follow(predict, start, SIGMA, 5, draw(seeded()))
    torch.testing.assert_close(found, end[None])
    assert seen == pytest.approx([1, 0.64, 0.64, 0.36, 0.36, 0.16, 0.16, 0.04, 0.04])
    assert times_left(5) == pytest.approx([1, 0.64, 0.36, 0.16, 0.04, 0])


def gaussian_bridge(a, b, sigma):
    """Cross-covariance of the Schrödinger bridge from N(0, a²) to N(0, b²), and the displacement of its diffusion."""
    cross = (math.sqrt(4 * a**2 * b**2 + sigma**4) - sigma**2) / 2

    def displacement(x, left):
        time = 1 - left
        variance = left**2 * a**2 + time**2 * b**2 + 2 * time * left * cross + sigma**2 * time * left
        to_end = (left * cross + time * b**2) / variance - 1  # E[end | x]/x − 1
        return to_end * x / left**0.5

    return cross, displacement


def moments_of_paths(a, b, steps):
    """Cross-covariance and variance at the end, from N(0, a²) along the exact displacement, without sampling error."""
    _, displacement = gaussian_bridge(a, b, SIGMA)
    x = torch.tensor([[a, 0.0]], dtype=torch.float64)  # coordinates of x_0/a and of one step's noise

    def ends(source, number):
        drawn = iter(range(steps))
        return follow(displacement, source, SIGMA, steps, lambda x: torch.full_like(x, float(next(drawn) == number)))

    slope = ends(x[:, :1], -1)[0, 0] / a  # the map is linear in the start and in each noise
    noises = [ends(torch.zeros(1, 1).double(), number)[0, 0] for number in range(steps - 1)]
    return (slope * a**2).item(), (slope * a).square().item() + sum(noise.square().item() for noise in noises)


@pytest.mark.parametrize("a, b", [(1.0, 0.3), (0.5, 1.5), (1.0, 1.0)])
def test_the_exact_displacement_leads_to_the_exact_plan(a, b):
    """To second order: errors fall fourfold, or faster, where steps double."""
    cross, _ = gaussian_bridge(a, b, SIGMA)
    errors = [(abs(c - cross), abs(v - b**2)) for c, v in (moments_of_paths(a, b, steps) for steps in (10, 20, 40))]
    for coarse, fine in zip(errors, errors[1:]):
        assert fine[0] < coarse[0] / 3 + 1e-9 and fine[1] < coarse[1] / 3
    assert errors[-1][0] < 1e-3 * a * b and errors[-1][1] < 0.01 * b**2


# ---------------------------------------------------------------------- fitting by turns


class Linear(torch.nn.Module):
    """A displacement that is linear in x, its slope piecewise linear in √r: what Gaussians need."""

    def __init__(self, knots=16):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.zeros(knots, dtype=torch.float64))

    def forward(self, x, left):
        place = left.sqrt() * (len(self.slopes) - 1)
        lower = place.floor().clamp(max=len(self.slopes) - 2).long()
        return torch.lerp(self.slopes[lower], self.slopes[lower + 1], place - lower) * x


def standardised(count, generator):
    """Two coordinates of exactly unit variance and no correlation, (count,) each."""
    z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(count)).unbind(1)


def fit(passes, count=20_000):
    """Networks after some passes from independent pairs of N(0, 1), each pass solved on one large batch."""
    networks, g = (Linear(), Linear()), seeded()
    x, y = standardised(count, g)
    left = (torch.randperm(count, generator=g).double() + 0.5) / count
    fitting = MarkovianFitting(*networks, SIGMA, passes)
    for number in range(passes):
        learning = [p for network in networks for p in network.parameters()]
        if number:
            learning = list(networks[0 if fitting.fits_forward(number) else 1].parameters())
        optimiser = torch.optim.LBFGS(learning, max_iter=30, line_search_fn="strong_wolfe")

        def closure(number=number, optimiser=optimiser):
            optimiser.zero_grad()
            loss = fitting.loss(number, x, y, left, draw(seeded(100 + number)))
            loss.backward()
            return loss

        optimiser.step(closure)
    return fitting


def test_passes_approach_the_schroedinger_bridge():
    """From independent pairs one pass stops short of the bridge's cross-covariance; further ones come near it."""
    cross, _ = gaussian_bridge(1.0, 1.0, SIGMA)
    x, _ = standardised(20_000, seeded(7))
    errors = {}
    for passes in (1, 6):
        fitting = fit(passes)
        y = fitting.follow(fitting.forward, x, draw(seeded(8)))
        errors[passes] = abs((x * y).mean().item() - cross)
        assert y.var().item() == pytest.approx(1.0, abs=0.05)
    assert errors[1] > 0.05 and errors[6] < 0.3 * errors[1]


def test_by_turns_one_network_learns():
    networks = Linear(), Linear()
    x, y = torch.randn(2, 50, generator=seeded(), dtype=torch.float64)
    left = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    learns = []
    for number in range(4):
        for network in networks:
            network.zero_grad(set_to_none=True)
        MarkovianFitting(*networks, SIGMA, 4).loss(number, x, y, left, draw(seeded())).backward()
        learns.append([network.slopes.grad is not None for network in networks])
    assert learns == [[True, True], [True, False], [False, True], [True, False]]


# ---------------------------------------------------------------------- in the trainer


def test_a_diffusion_is_trained_by_turns_and_saved(tmp_path):
    run = build_bridge(tmp_path, bridge_sigma=0.5, bridge_passes=4, bridge_steps=2, max_steps=8, checkpoint_interval=1,
                       checkpoints_total_limit=9, sample_interval=8, sample_steps=2)  # fmt: skip
    folder = run.train()
    assert (tmp_path / "sample-000008.png").exists()
    states = {step: load_checkpoint(tmp_path / f"checkpoint-{step}")[0] for step in range(2, 9)}
    moved = []
    for step in (3, 5, 7):  # a pass begins with the averages of the one before, and then moves one network
        other = "unet" if step == 5 else "backward_unet"
        still = [name for name in states[step] if name.startswith(f"weight.{other}.")]
        averages = [states[step - 1]["average" + name.removeprefix("weight")] for name in still]
        assert still and all(torch.equal(states[step][name], average) for name, average in zip(still, averages))
        before, after = states[step], states[step + 1]
        names = [name for name in before if name.startswith("weight.") and not torch.equal(before[name], after[name])]
        moved.append({name.split(".")[1] for name in names})
    assert moved == [{"unet"}, {"backward_unet"}, {"unet"}]
    with torch.random.fork_rng():
        pipeline = AtlasBridgePipeline.from_pretrained(folder)
    assert pipeline.config.bridge_sigma == 0.5
    weights = [next(network.parameters()) for network in (pipeline.unet, pipeline.backward_unet)]
    assert not torch.equal(*weights)


def test_the_first_loss_is_of_both_networks_at_displacements(tmp_path, monkeypatch):
    run = build_bridge(tmp_path, bridge_sigma=0.5, bridge_passes=2, max_steps=4)
    batch, calls = batch_of(run), {}
    for name in ("unet", "backward_unet"):
        network = run.objective.wrapped[name]

        def watched(sample, timesteps, context, class_labels=None, name=name, network=network):
            calls[name] = (sample.double(), timesteps.double() / 1000)
            return network(sample, timesteps, context, class_labels=class_labels)

        watched.train = lambda mode: None
        monkeypatch.setitem(run.objective.wrapped, name, watched)
    with torch.no_grad():
        loss = run.objective(batch, seeded())
    expected, ends = 0.0, {"unet": batch["pixels"], "backward_unet": batch["source"]}
    for name, end in ends.items():
        x, left = calls[name]
        d = (end - x) / left.sqrt().reshape(-1, 1, 1, 1)
        with torch.no_grad():
            output = run.networks[name](x.float(), 1000 * left.float()).sample
        expected += (output - d).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_resumed_diffusion_is_the_same(tmp_path, monkeypatch):
    options = {"bridge_sigma": 0.5, "bridge_passes": 2, "bridge_steps": 2, "max_steps": 6, "checkpoint_interval": 3,
               "log_interval": 1}  # fmt: skip
    build_bridge(tmp_path / "whole", **options).train()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            build_bridge(tmp_path / "parts", **options).train()
    build_bridge(tmp_path / "parts", **options).train()
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "parts")


def test_mixture_pairs_have_the_plan_and_keep_constants():
    g = seeded()
    x = torch.randn(3000, 1, 2, 2, generator=g)
    y = 2 + 0.5 * torch.randn(2000, 1, 2, 2, generator=g)
    y[:, 0, 1, 1] = -1.0
    coupling = MixtureCoupling(x, y, SIGMA)
    found = coupling(x, seeded(1))
    assert found.shape == x.shape and found.dtype == x.dtype and (found[:, 0, 1, 1] == -1).all()
    cross, _ = gaussian_bridge(1.0, 0.5, SIGMA)
    a, b = x[:, 0, 0, 0], found[:, 0, 0, 0]
    # five standard errors of 3,000 pairs, and those of the fit
    assert ((a - a.mean()) * (b - b.mean())).mean().item() == pytest.approx(cross, abs=10 * 0.5 / math.sqrt(2000))
    assert b.mean().item() == pytest.approx(2, abs=0.1) and b.std().item() == pytest.approx(0.5, abs=0.05)


def test_a_run_may_start_from_mixture_pairs(tmp_path, monkeypatch):
    options = {"bridge_sigma": 0.5, "bridge_passes": 1, "coupling": "mixture", "max_steps": 1}
    size = {"resolution": 8}
    run = build_bridge(tmp_path, dataset=size, source_dataset=size, **options)
    batch = batch_of(run)
    source, data = run.objective._coupled(batch["source"], batch["pixels"], seeded())
    assert torch.equal(source, batch["source"]) and not torch.equal(data, batch["pixels"])
    torch.testing.assert_close(data, run.objective.coupling(source, seeded()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bridge_passes": 2}, "bridge_passes=2 needs bridge_sigma"),
        ({"coupling": "mixture"}, "coupling='mixture' needs bridge_sigma"),
        ({"bridge_steps": 5}, "bridge_steps=5 needs bridge_passes of at least 2"),
        ({"bridge_sigma": 1.0, "bridge_passes": 9, "max_steps": 8}, "bridge_passes=9 need as many steps, got max_steps=8"),
        ({"bridge_sigma": 1.0, "coupling": "mixture", "num_resolutions": 2}, "not num_resolutions=2"),
    ],
)
def test_diffusions_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_bridge(tmp_path, **changes)
