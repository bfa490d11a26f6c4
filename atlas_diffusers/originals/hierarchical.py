"""The sampler of the original toolkit: continuous time, optional references, coarse resolutions first."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..bridges import GatedBridge, SchrodingerBridgeSolver
from ..config import KernelConfig, SamplerConfig
from ..denoising import (
    ClassifierFreeGuidance,
    CoupledDenoiser,
    Denoiser,
    ReferenceCoupling,
    SamplingState,
    SchedulerProcess,
    lift,
    sample,
    split_steps,
)
from ..denoising.guidance import Conditions
from ..denoising.resolution import LARGEST_SIGMA

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
        kernel_config: kernel operator of the bridge to references. The kernel is the gaussian of the noise, and ``epsilon`` its
            bandwidth in units of the noise: 1 is the exact posterior.
        sampler_config: see :class:`~atlas_diffusers.config.SamplerConfig`.

    Raises:
        ValueError: for a kernel that is no gaussian, several bandwidths, and a bandwidth in units of the points' distances.
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
        _check_kernel(self.kernel_config)
        self.is_network = "sample_size" in getattr(score_model, "config", {})
        self.dtype = torch.promote_types(getattr(score_model, "dtype", torch.float32), torch.float32)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        timesteps: int | list[float] = 50,
        conditioning: object = None,
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
        bridges = None if references is None else _Bridges(references.to(self.device), self.kernel_config, self.config)
        bar, seen = tqdm(total=len(times), disable=not verbose), []
        x: Any = None

        def watch(state: SamplingState) -> None:
            found = state.sample / math.sqrt(1 + scheduler.after**2)
            if return_intermediates:
                seen.append(found)
            if callback is not None:
                callback(found, times[state.index], [*times, 0.0][state.index + 1])
            bar.update()

        for halvings, begin, end in plan:
            sigmas = [self._sigma_hat(t) / 2**halvings for t in times[begin : end + 1]]
            scheduler = _ExponentialIntegrator(sigmas if end < len(times) else [*sigmas, 0.0])
            if x is None:
                size = [side >> halvings for side in shape[2:]]
                x = sigmas[0] * randn_tensor((*shape[:2], *size), generator, self.device, self.dtype)
            else:
                x = lift(x, sigmas[0], generator)
            denoiser = self._denoiser(scheduler, len(x), conditioning, {} if halvings else dict(zip(sigmas, times[begin:end])))
            if bridges is not None:
                denoiser = CoupledDenoiser(denoiser, bridges.coupling(len(x), halvings))
            x = sample(denoiser, scheduler, x, first=begin, callback=watch)
        bar.close()
        return (x, seen) if return_intermediates else x

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

    def _denoiser(
        self, scheduler: "_ExponentialIntegrator", batch: int, conditioning: Any, times: dict[float, float]
    ) -> Denoiser:
        """The model's noise predictions at levels σ̂; ``times`` has those that are known."""

        def time_of(sigma: torch.Tensor) -> float:
            # at zero signal the noise says nothing about the data: the model is asked where it still does
            at = sigma.item()
            return times[at] if at in times and at < LARGEST_SIGMA else self._time_of(at)

        process = SchedulerProcess(scheduler)
        if not self.is_network:
            given = () if conditioning is None else (conditioning,)
            return Denoiser(lambda x, s: self.score_model(x, x.new_full((len(x),), time_of(s)), *given), process)
        payload: dict[str, Any] = {"encoder_hidden_states": conditioning}
        if not torch.is_tensor(conditioning):
            payload = dict(conditioning or {})
        scale, negative = payload.pop("guidance_scale", 1.0), payload.pop("negative_encoder_hidden_states", None)
        states = payload.pop("encoder_hidden_states", None)
        if scale != 1 and negative is None:
            raise ValueError(f"conditioning has guidance_scale={scale}, which needs negative_encoder_hidden_states")

        def network(x: torch.Tensor, s: torch.Tensor, **conditions: Any) -> Any:
            return self.score_model(x, (TRAINED_TIMESTEPS - 1) * x.new_full((len(x),), time_of(s)), **conditions)

        def of_batch(value: torch.Tensor | None) -> Conditions:
            value = value if value is None else value.to(self.device, self.dtype).expand(batch, -1, -1)
            return {"encoder_hidden_states": value}

        return Denoiser(
            network, process, of_batch(states), None if negative is None else of_batch(negative), payload,
            ClassifierFreeGuidance(float(scale)),
        )  # fmt: skip


def _check_kernel(kernel: KernelConfig) -> None:
    """The kernel of the bridge is that of the forward process."""
    default = KernelConfig()
    if kernel.kernel_type != default.kernel_type:
        raise ValueError(f"kernel_type={kernel.kernel_type!r}; the bridge's kernel is gaussian")
    for name in ("adaptive_epsilon", "multi_scale", "scale_factors"):
        if (value := getattr(kernel, name)) != getattr(default, name):
            raise ValueError(f"{name}={value}; the bridge has one bandwidth, the noise, of which epsilon is the multiple")


class _ExponentialIntegrator:
    """
    The update rule as a scheduler, which samples ``x̂ = x_0 + σ̂ ε``; its timesteps are the levels σ̂ themselves.

    Args:
        sigmas: decreasing levels, the last one where the last step ends.
    """

    order, config = 1, {"prediction_type": "epsilon"}

    def __init__(self, sigmas: list[float]):
        self.timesteps = torch.tensor(sigmas[:-1], dtype=torch.float64)
        self.sigmas, self.index, self.last = sigmas, -1, None

    @property
    def after(self) -> float:
        """σ̂ at the end of the step that was taken."""
        return self.sigmas[self.index + 1]

    def add_noise(self, data: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """``x_0 + σ̂ ε``."""
        return data + sigmas.to(data) * noise

    def scale_model_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """``x̂/√(1 + σ̂²)``, of unit variance."""
        return x / math.sqrt(1 + sigma.item() ** 2)

    def step(self, output: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        """One step, from a noise prediction."""
        self.index += 1
        sigma, after = self.sigmas[self.index], self.after
        data = x - sigma * output
        direction = data
        if self.last is not None and after > 0:
            before, former = self.last
            ratio = math.log(former / sigma) / math.log(sigma / after)
            direction = data + (data - before) / (2 * ratio)
        self.last = (data, sigma)
        return (torch.lerp(direction, x, after / sigma),)


class _Bridges:
    """The bridge to references at every resolution; once it is shut it stays so."""

    def __init__(self, references: torch.Tensor, kernel: KernelConfig, config: SamplerConfig):
        self.references, self.kernel, self.config = references, kernel, config
        self.last: GatedBridge | None = None

    def coupling(self, batch: int, halvings: int) -> ReferenceCoupling:
        """The coupling of the whole batch with the references, halved as often as the samples are."""
        small = torch.nn.functional.avg_pool2d(self.references, 2**halvings) if halvings else self.references
        known = ("num_features", "num_landmarks", "orthogonal", "max_bytes")
        options = {name: value for name, value in self.kernel.arguments().items() if name in known}
        solver = SchrodingerBridgeSolver(
            small, epsilon=self.kernel.epsilon**2, max_iterations=self.config.sb_iterations,
            solver_type=self.kernel.solver_type, kernel_options=options,
        )  # fmt: skip
        bridge = GatedBridge(solver, self.config.gate)
        bridge.is_open = self.last is None or self.last.is_open
        self.last = bridge
        return ReferenceCoupling([torch.arange(batch, device=small.device)], [bridge])
