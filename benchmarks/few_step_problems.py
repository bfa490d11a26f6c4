"""
Problems of ``few_step.py``: mixtures of Gaussians, whose denoisers are known exactly, seen by schedulers as a network that
predicts noise, and their probability flow solved to high accuracy.

In ``y = x/α`` and ``s = σ/α`` a component N(m, U diag(l) U^T) stays Gaussian under noise, and with responsibilities r_k(y, s)

    D(y, s) = E[x_0 | y] = Σ_k r_k (m_k + U_k diag(l_k / (l_k + s²)) U_k^T (y − m_k)),    ε(y, s) = (y − D) / s.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
TEST_SEED, LABEL_SEED, CALIBRATION_LABEL_SEED = 1234, 4321, 77
LARGEST_BATCH = 65536
BEND = 0.02


@dataclass
class Mixture:
    """Components in ``len(variances[0])`` leading coordinates of ``(x − centre) @ frame``, one Gaussian in the rest of them."""

    weights: torch.Tensor
    means: torch.Tensor
    bases: torch.Tensor
    variances: torch.Tensor
    classes: torch.Tensor
    centre: torch.Tensor
    frame: torch.Tensor
    tail: torch.Tensor

    def __post_init__(self):
        self.flat_bases = self.bases.transpose(0, 1).flatten(1)
        self.shifts = torch.einsum("kd,kde->ke", self.means, self.bases)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def denoise(self, y: torch.Tensor, s: float, labels: torch.Tensor | None = None, guidance: float = 1.0) -> torch.Tensor:
        """
        Args:
            y: points of variance s² around the data, (n, d), float64.
            labels: a class for each point, towards which ``guidance`` extrapolates from the unconditional denoiser.
        """
        count, rank = self.shifts.shape
        rotated = (y - self.centre) @ self.frame
        offsets = (rotated[:, :rank] @ self.flat_bases).view(-1, count, rank) - self.shifts
        precision = 1 / (self.variances + s * s)
        distances = torch.einsum("nkr,kr->nk", offsets.square(), precision)
        logits = self.weights.log() + 0.5 * (precision.log().sum(1) - distances)
        shares = logits.softmax(1)
        if labels is not None:
            of_class = logits.masked_fill(self.classes != labels[:, None], -torch.inf).softmax(1)
            shares = shares + guidance * (of_class - shares)
        pulled = (offsets * (self.variances * precision) * shares[..., None]).flatten(1) @ self.flat_bases.T
        leading = pulled + shares @ self.means
        rest = rotated[:, rank:] * (self.tail / (self.tail + s * s))
        return torch.cat([leading, rest], 1) @ self.frame.T + self.centre


def in_place(weights, means, covariances, classes=None, centre=None, frame=None, tail=()) -> Mixture:
    """A mixture from moments; without a frame in the coordinates of the data."""
    variances, bases = np.linalg.eigh(covariances)
    size = means.shape[1] + len(tail)
    classes = np.zeros(len(weights)) if classes is None else classes
    centre, frame = (np.zeros(size), np.eye(size)) if frame is None else (centre, frame)
    arrays = (weights, means, bases, variances.clip(1e-8), classes, centre, frame, np.array(tail))
    return Mixture(*(torch.from_numpy(np.array(array, dtype=np.float64, order="C")) for array in arrays))


def gauss8() -> Mixture:
    angles = np.arange(8) * np.pi / 4
    means = 2**0.5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    return in_place(np.full(8, 1 / 8), means, np.tile(0.01 * np.eye(2), (8, 1, 1)))


def checkerboard() -> Mixture:
    """The eight dark squares of a 4x4 board, sixteen Gaussians each, at unit variance."""
    ticks = (np.arange(16) + 0.5) / 4
    x, y = (grid.ravel() for grid in np.meshgrid(ticks, ticks))
    dark = (np.floor(x) + np.floor(y)) % 2 == 0
    scale = (4 / 3) ** -0.5
    means = scale * (np.stack([x[dark], y[dark]], 1) - 2)
    return in_place(np.full(len(means), 1 / len(means)), means, np.tile((scale / 8) ** 2 * np.eye(2), (len(means), 1, 1)))


def digits() -> Mixture:
    """Three Gaussians of full covariance to each class."""
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    data = load_digits()
    points = data.data / 8 - 1
    fits = [GaussianMixture(3, reg_covar=2e-3, n_init=2, random_state=c).fit(points[data.target == c]) for c in range(10)]
    weights = np.concatenate([fit.weights_ * (data.target == c).mean() for c, fit in enumerate(fits)])
    moments = (np.concatenate([getattr(fit, name) for fit in fits]) for name in ("means_", "covariances_"))
    return in_place(weights, *moments, classes=np.repeat(np.arange(10), 3))


def patches(size: int, count: int = 10000, components: int = 16, rank: int = 64, floor: float = 3e-4) -> Mixture:
    """Square patches of two photographs, shrunk one to four times; components in the leading principal coordinates."""
    from sklearn.datasets import load_sample_images
    from sklearn.mixture import GaussianMixture

    pictures, random, points = load_sample_images().images, np.random.default_rng(0), []
    for index in range(count):
        picture, factor = pictures[index % len(pictures)], random.integers(1, 5)
        top, left = (random.integers(0, side - size * factor) for side in picture.shape[:2])
        cut = picture[top : top + size * factor, left : left + size * factor] / 127.5 - 1
        points.append(cut.reshape(size, factor, size, factor, 3).mean((1, 3)).ravel())
    points = np.array(points)
    centre = points.mean(0)
    spectrum, frame = (array[..., ::-1] for array in np.linalg.eigh(np.cov(points.T)))
    leading = (points - centre) @ frame[:, :rank]
    fit = GaussianMixture(components, reg_covar=floor, random_state=0, max_iter=40).fit(leading)
    tail = spectrum[rank:].clip(floor)
    return in_place(fit.weights_, fit.means_, fit.covariances_, centre=centre, frame=frame, tail=tail)


PROBLEMS = {
    "gauss8": (gauss8, None),
    "checkerboard": (checkerboard, None),
    "digits": (digits, None),
    "digits guided": (digits, 3.0),
    "patches 192": (lambda: patches(8), None),
    "patches 768": (lambda: patches(16), None),
}


def kept(folder: Path | None, name: str, make) -> dict[str, torch.Tensor]:
    """What ``make`` returns, from or to a file in ``folder`` if there is one."""
    path = None if folder is None else folder / f"{name.replace(' ', '-')}.safetensors"
    if path is not None and path.exists():
        return load_file(path)
    tensors = {key: tensor.contiguous() for key, tensor in make().items()}
    if path is not None:
        save_file(tensors, path)
    return tensors


class Problem:
    """
    A mixture, a table of noise levels, and a denoiser with labels by row; the labels are those of the test noise.

    ``process`` are options of a scheduler of ours, ``steps`` those of its ``set_timesteps`` besides their number, and
    ``calibrated`` the options that it is calibrated with.
    """

    steps: dict = {}

    def __init__(self, name: str, variant: str, folder: Path | None = None):
        make, self.guidance = PROBLEMS[name]
        self.name, self.variant = name, variant
        self.mixture = Mixture(**kept(folder, name.removesuffix(" guided"), lambda: make().tensors()))
        self.size = len(self.mixture.centre)
        self.labels = self.draw_labels(LABEL_SEED)
        self.set_process()

    def set_process(self) -> None:
        self.process = self.calibrated = BETAS[self.variant] | {"prediction_type": "epsilon"}
        self.reference_name = self.variant
        cumulative = DDPMScheduler(**self.process).alphas_cumprod.double().numpy()
        self.log_levels = 0.5 * np.log((1 - cumulative) / cumulative)

    @property
    def largest(self) -> float:
        return float(np.exp(self.log_levels[-1]))

    @property
    def smallest(self) -> float:
        return float(np.exp(self.log_levels[0]))

    def draw_labels(self, seed: int) -> torch.Tensor | None:
        if self.guidance is None:
            return None
        return torch.randint(0, 10, (LARGEST_BATCH,), generator=torch.Generator().manual_seed(seed))

    def denoise(self, y: torch.Tensor, s: float) -> torch.Tensor:
        if self.guidance is None:
            return self.mixture.denoise(y, s)
        return self.mixture.denoise(y, s, self.labels[: len(y)], self.guidance)

    def network(self) -> "Network":
        return Network(self)

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """y at the noisiest level."""
        return noise * (1 + self.largest**2) ** 0.5

    def noise(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(TEST_SEED)
        return torch.randn(count, self.size, dtype=torch.float64, generator=generator)


class Network:
    """``ε(x, t)`` of variance-preserving x at any t in [0, 999], log(σ/α) linear between timesteps; counts its calls."""

    def __init__(self, problem: Problem):
        self.problem, self.calls = problem, 0

    def __call__(self, x: torch.Tensor, t) -> torch.Tensor:
        levels = self.problem.log_levels
        time = float(torch.as_tensor(t).flatten()[0])
        return self.at(x, float(np.exp(np.interp(time, np.arange(len(levels)), levels))))

    def at(self, x: torch.Tensor, s: float) -> torch.Tensor:
        self.calls += 1
        y = x.double() * (1 + s * s) ** 0.5
        return ((y - self.problem.denoise(y, s)) / s).to(x.dtype)


def solve(problem: Problem, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """The end at σ = 0 of the probability flow from x_T = ``noise``: Runge-Kutta of order four in asinh(s / 0.02)."""

    def slope(y: torch.Tensor, u: float) -> torch.Tensor:
        s = BEND * np.sinh(u)
        return (y - problem.denoise(y, s)) * (BEND * np.cosh(u) / s) if s > 1e-9 else torch.zeros_like(y)

    y = problem.start(noise)
    grid = np.linspace(np.arcsinh(problem.largest / BEND), 0, steps + 1)
    for start, end in zip(grid[:-1], grid[1:]):
        step, middle = end - start, (start + end) / 2
        first = slope(y, start)
        second = slope(y + step / 2 * first, middle)
        third = slope(y + step / 2 * second, middle)
        y = y + step / 6 * (first + 2 * second + 2 * third + slope(y + step * third, end))
    return y


def reference(problem: Problem, noise: torch.Tensor, steps: int, folder: Path | None = None) -> torch.Tensor:
    name = f"{problem.name}-{problem.reference_name}-{len(noise)}-{steps}"
    return kept(folder, name, lambda: {"end": solve(problem, noise, steps)})["end"]
