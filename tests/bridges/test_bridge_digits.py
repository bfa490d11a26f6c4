"""
Bridge steps on the 8x8 digits of scikit-learn: the noisy part of sampling costs no network calls, and class proportions come
out right even where the network's are wrong.

Half of the digits make the network (an exact denoiser of a Gaussian a class) and the references; the other half is the truth.
"""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import seeded
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from atlas_diffusers.bridges import SchrodingerBridgeSolver

COUNT, STEPS, BRIDGED = 450, 20, 12
BIASED = torch.tensor([5, 1, 0.3, 1, 3, 1, 1, 0.3, 1, 2], dtype=torch.float64)


@functools.cache
def data():
    """Training half with labels, held-out half, all labels, and a classifier of them."""
    pictures, labels = load_digits(return_X_y=True)
    pictures, order = pictures / 8 - 1, np.random.default_rng(0).permutation(len(pictures))
    pictures, labels = pictures[order], labels[order]
    classifier = LogisticRegression(max_iter=2000, C=0.1).fit(pictures, labels)
    return torch.tensor(pictures[:900]), torch.tensor(labels[:900]), torch.tensor(pictures[900:]), labels, classifier


class ClassMixture:
    """E[x_0 | x_t] of one Gaussian a class, with class weights of one's choice."""

    def __init__(self, weights=None):
        pictures, labels, *_ = data()
        parts = [pictures[labels == c] for c in range(10)]
        self.means = torch.stack([part.mean(0) for part in parts])
        covariances = torch.stack([torch.cov(part.T) * 0.9 + 0.02 * torch.eye(64, dtype=torch.float64) for part in parts])
        self.values, self.vectors = torch.linalg.eigh(covariances)
        weights = torch.tensor([len(part) for part in parts], dtype=torch.float64) if weights is None else weights
        self.log_weights = (weights / weights.sum()).log()

    def __call__(self, x, alpha, sigma):
        variance = alpha**2 * self.values + sigma**2
        z = torch.einsum("kde,nkd->nke", self.vectors, x[:, None] - alpha * self.means)
        log_density = self.log_weights - 0.5 * (z.square() / variance + variance.log()).sum(-1)
        within = self.means + torch.einsum("kde,nke->nkd", self.vectors, alpha * self.values / variance * z)
        return (log_density.softmax(1)[..., None] * within).sum(1)


def log_snr_grid():
    """21 log-SNRs from all noise to clean data, evenly spaced over the process with linear betas."""
    alpha_bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    return torch.linspace(alpha_bar[-1].logit() / 2, alpha_bar[0].logit() / 2, STEPS + 1, dtype=torch.float64).tolist()


def level(log_snr):
    return math.sqrt(1 / (1 + math.exp(-2 * log_snr))), math.sqrt(1 / (1 + math.exp(2 * log_snr)))


def sample(network, bridged):
    """20 steps of DPM-Solver++(2M) (arXiv 2211.01095), the first ``bridged`` of them by the bridge."""
    solver, state, calls, before = SchrodingerBridgeSolver(data()[0][:COUNT]), None, 0, None
    x = torch.randn(COUNT, 64, generator=seeded(0)).double()
    grid = log_snr_grid()
    for index, (now, after) in enumerate(zip(grid, grid[1:])):
        if index < bridged:
            coupling = solver.couple(x, *level(now), state)
            prediction, state = coupling.data, coupling.state
        else:
            prediction, calls = network(x, *level(now)), calls + 1
        slope = prediction if before is None else 1.5 * prediction - 0.5 * before
        (_, sigma), (alpha_after, sigma_after) = level(now), level(after)
        x = sigma_after / sigma * x - alpha_after * math.expm1(now - after) * slope
        before = prediction
    return x, calls


def sliced_wasserstein(x, y, directions=500):
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(64, directions, generator=generator, dtype=torch.float64)
    theta, at = theta / theta.norm(dim=0), torch.linspace(0, 1, 400, dtype=torch.float64)
    difference = torch.quantile(x @ theta, at, 0) - torch.quantile(y @ theta, at, 0)
    return difference.square().mean().sqrt().item()


def class_error(x):
    """Total variation between the class proportions of the samples and of all digits."""
    *_, labels, classifier = data()
    found = np.bincount(classifier.predict(x.numpy()), minlength=10) / len(x)
    return 0.5 * np.abs(found - np.bincount(labels, minlength=10) / len(labels)).sum()


@pytest.mark.parametrize("weights", [None, BIASED], ids=["exact", "biased"])
def test_bridge_steps_on_digits(weights):
    network = ClassMixture(weights)
    x, calls = sample(network, BRIDGED)
    alone, _ = sample(network, 0)
    pictures, _, truth, *_ = data()
    assert calls == STEPS - BRIDGED
    distance = sliced_wasserstein(x, truth)
    assert distance <= 0.060 and distance < sliced_wasserstein(alone, truth)
    assert class_error(x) <= 0.06 and class_error(x) < class_error(alone)
    nearest = torch.cdist(x, pictures[:COUNT]).amin(1).mean().item()
    assert nearest >= 2.3, "samples are copies of references"


def test_past_the_gate_the_bridge_copies():
    """What the gate is for: with 18 of 20 steps bridged, samples collapse onto references."""
    pictures = data()[0]
    x, _ = sample(ClassMixture(), 18)
    assert torch.cdist(x, pictures[:COUNT]).amin(1).mean() < 1.6


def test_the_gate_shuts_before_copies():
    """The median of the effective references falls from all of them to about one along the way."""
    solver = SchrodingerBridgeSolver(data()[0][:COUNT])
    x0, z = data()[2][:COUNT], torch.randn(COUNT, 64, generator=seeded(0)).double()
    spreads = []
    for log_snr in log_snr_grid():
        alpha, sigma = level(log_snr)
        spreads.append(solver.couple(alpha * x0 + sigma * z, alpha, sigma).median_effective_references)
    assert all(a >= b - 1e-6 for a, b in zip(spreads, spreads[1:]))
    assert spreads[0] > 0.8 * COUNT and spreads[-1] < 1.5
    assert 2 < spreads[BRIDGED - 1] < 60
