"""The sampler of the original toolkit: continuous time, optional references, coarse resolutions first."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..bridges.schrodinger_bridge import BridgeState, SchrodingerBridgeSolver
from ..config import KernelConfig, SamplerConfig
from ..denoising.resolution import LARGEST_SIGMA, lift, split_steps

TRAINED_TIMESTEPS = 1000


class AdvancedHierarchicalDiffusionSampler:
    r"""
    Samples along the probability flow of ``x_t = √ᾱ(t) x_0 + √(1 − ᾱ(t)) ε``, from t = 1 (noise) to t = 0 (clean), by the
    multistep exponential integrator of order 2, in coordinates ``x̂ = x/√ᾱ`` with σ̂ = √((1 − ᾱ)/ᾱ):

        x̂' = (σ̂'/σ̂) x̂ + (1 − σ̂'/σ̂) (D + (D − D_last)/(2 r)),    r = log(σ̂_last/σ̂) / log(σ̂/σ̂')

    with D the data prediction (Lu et al. 2022, arXiv 2211.01095). The last step ends at D.

    Args:
        score_model: predicts the noise. A network of Diffusers, or of this package, is called with timesteps of [0, 999];
            anything else as ``score_model(x, t)`` or ``score_model(x, t, conditioning)``, t of shape (batch,) in [0, 1].
        noise_schedule: ᾱ(t), decreasing in t.
        device: where to sample.
        kernel_config: its ``solver_type`` is the kernel operator of the bridge to references, whose kernel is gaussian and
            whose bandwidth is the noise.
        sampler_config: see :class:`~atlas_diffusers.config.SamplerConfig`.
    """

    def __init__(
        self,
        score_model: Callable,
        noise_schedule: Callable,
        device: str | torch.device = "cpu",
        kernel_config: KernelConfig | None = None,
        sampler_config: SamplerConfig | None = None,
    ):
        self.score_model, self.noise_schedule, self.device = score_model, noise_schedule, torch.device(device)
        self.kernel_config, self.config = kernel_config or KernelConfig(), sampler_config or SamplerConfig()
        if self.kernel_config.kernel_type != "gaussian":
            raise ValueError(f"kernel_type={self.kernel_config.kernel_type!r}; the bridge's kernel is gaussian")
        self.is_network = "sample_size" in getattr(score_model, "config", {})
        self.dtype = torch.promote_types(getattr(score_model, "dtype", torch.float32), torch.float32)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        timesteps: int | list[float] = 50,
        conditioning: Any = None,
        callback: Callable[[torch.Tensor, float, float], None] | None = None,
        return_intermediates: bool = False,
        verbose: bool = False,
        *,
        references: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Draw samples; one network call a timestep.

        Args:
            shape: (batch, channels, height, width), or any with batch first.
            timesteps: decreasing times in [0, 1], or how many, evenly from 1 to 0.
            conditioning: for a network of Diffusers, text states, or a payload of
                ``CLIPConditioningInterface.build_conditioning_payload``; for other models, whatever they take.
            callback: called after each step with the sample, its old and its new time (0 after the last).
            return_intermediates: return the samples after each step too.
            verbose: show a bar.
            references: clean data, (m, ...), that the batch is coupled with while noise is high, see
                :class:`SchrodingerBridgeSolver`; these steps need no network call.
            generator: draws the noise; a list has one a sample.

        Raises:
            ValueError: for times that do not decrease within [0, 1], and a hierarchy that the network was not trained for.
        """
        times, levels = self._times(timesteps), self._levels(shape)
        plan = split_steps(len(times), levels)
        bridge = None if references is None else _Bridge(references.to(self.device), self.kernel_config, self.config)
        bar, steps = tqdm(total=len(times), disable=not verbose), []
        x, size = None, [side >> plan[0][0] for side in shape[2:]]
        for halvings, begin, end in plan:
            sigmas = [self._sigma_hat(t) / 2**halvings for t in times[begin : end + 1]]
            ends = [*times[begin + 1 : end + 1], 0.0][: end - begin]
            if x is None:
                x = sigmas[0] * randn_tensor((*shape[:2], *size), generator, self.device, self.dtype)
            else:
                x = lift(x, sigmas[0], generator)
            flow, last = _Multistep(), end == len(times)
            for index, sigma in enumerate(sigmas if last else sigmas[:-1]):
                after = 0.0 if last and index == len(sigmas) - 1 else sigmas[index + 1]
                data = self._data(x, sigma, halvings, times[begin + index], conditioning, bridge)
                x = flow.step(x, data, sigma, after)
                bar.update()
                seen = x / math.sqrt(1 + after**2)
                if return_intermediates:
                    steps.append(seen)
                if callback is not None:
                    callback(seen, times[begin + index], ends[index])
        bar.close()
        return (x, steps) if return_intermediates else x

    def _times(self, timesteps: int | list[float]) -> list[float]:
        if isinstance(timesteps, int):
            timesteps = torch.linspace(1, 0, timesteps + 1)[:-1].tolist() if timesteps > 0 else []
        times = [float(t) for t in timesteps]
        if not times or any(a <= b for a, b in zip(times, times[1:])) or not 0 <= times[-1] <= times[0] <= 1:
            raise ValueError(f"timesteps must decrease within [0, 1], from 1 (noise) to 0 (clean), got {timesteps}")
        # times of equal noise are one, and the last step ends at clean data, wherever it begins
        by_noise = {self._sigma_hat(t): t for t in times}
        by_noise.pop(0.0, None)
        if not by_noise:
            raise ValueError(f"timesteps={timesteps} have no noise under this schedule")
        return list(by_noise.values())

    def _levels(self, shape: tuple[int, ...]) -> int:
        """Number of resolutions."""
        if not self.config.hierarchical_sampling:
            return 1
        levels = self.config.num_resolutions
        if self.is_network:
            levels = self.score_model.config.get("num_resolutions", 1)
            if levels < 2:
                raise ValueError(f"hierarchical_sampling needs a network of several resolutions, not num_resolutions={levels}")
        if len(shape) != 4 or any(side % 2 ** (levels - 1) for side in shape[2:]):
            raise ValueError(f"hierarchical_sampling over {levels} resolutions cannot halve the sides of shape={tuple(shape)}")
        return levels

    def _sigma_hat(self, t: float) -> float:
        alpha_bar = float(self.noise_schedule(t))
        return min(math.sqrt((1 - alpha_bar) / alpha_bar), LARGEST_SIGMA) if alpha_bar > 0 else LARGEST_SIGMA

    def _time_of(self, sigma: float) -> float:
        """The time whose noise is σ̂, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._sigma_hat(middle) < sigma else (low, middle)
        return (low + high) / 2

    def _data(self, x, sigma: float, halvings: int, t: float, conditioning, bridge: "_Bridge | None") -> torch.Tensor:
        """The data prediction for ``x̂ = x_0 + σ̂ ε``: of the bridge while it is open, else of the model."""
        alpha = 1 / math.sqrt(1 + sigma**2)
        if bridge is not None and (found := bridge.data(alpha * x, alpha, alpha * sigma, halvings)) is not None:
            return found
        # at zero signal the noise says nothing about the data: the model is asked where it still does
        moved = halvings or sigma == LARGEST_SIGMA
        return x - sigma * self._noise(alpha * x, self._time_of(sigma) if moved else t, conditioning)

    def _noise(self, x: torch.Tensor, t: float, conditioning) -> torch.Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if not self.is_network:
            return self.score_model(x, times) if conditioning is None else self.score_model(x, times, conditioning)
        payload = {"encoder_hidden_states": conditioning} if torch.is_tensor(conditioning) else dict(conditioning or {})
        scale, negative = payload.pop("guidance_scale", 1.0), payload.pop("negative_encoder_hidden_states", None)
        states = payload.pop("encoder_hidden_states", None)
        states = None if states is None else states.to(x).expand(len(x), -1, -1)
        guided = scale != 1 and negative is not None
        if guided:
            states, x, times = torch.cat([negative.to(x).expand_as(states), states]), torch.cat([x] * 2), times.repeat(2)
        found = self.score_model(x, (TRAINED_TIMESTEPS - 1) * times, encoder_hidden_states=states, **payload).sample
        if not guided:
            return found
        unconditional, conditional = found.chunk(2)
        return unconditional + scale * (conditional - unconditional)


class _Multistep:
    """The update rule, with the data prediction of the step before."""

    def __init__(self):
        self.last = None

    def step(self, x: torch.Tensor, data: torch.Tensor, sigma: float, after: float) -> torch.Tensor:
        direction = data
        if self.last is not None and after > 0:
            before, former = self.last
            ratio = math.log(former / sigma) / math.log(sigma / after)
            direction = data + (data - before) / (2 * ratio)
        self.last = (data, sigma)
        return torch.lerp(direction, x, after / sigma)


class _Bridge:
    """References that stand for the network until one of them explains a sample."""

    def __init__(self, references: torch.Tensor, kernel: KernelConfig, config: SamplerConfig):
        self.references, self.kernel, self.config = references, kernel, config
        self.solver, self.state, self.open, self.halvings = None, BridgeState(), True, None

    def data(self, x: torch.Tensor, alpha: float, sigma: float, halvings: int) -> torch.Tensor | None:
        if not self.open:
            return None
        if halvings != self.halvings:
            small = torch.nn.functional.avg_pool2d(self.references, 2**halvings) if halvings else self.references
            limit = self.config.sb_iterations
            self.solver = SchrodingerBridgeSolver(small, solver_type=self.kernel.solver_type, max_iterations=limit)
            self.state, self.halvings = BridgeState(), halvings
        coupling = self.solver.couple(x, alpha, sigma, self.state)
        self.state, self.open = coupling.state, coupling.median_effective_references >= self.config.gate
        return coupling.data if self.open else None
