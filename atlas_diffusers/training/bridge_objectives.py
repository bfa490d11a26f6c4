"""The losses of bridges between two data sets: of the flow, and of the diffusion in both directions."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from ..config import TrainingConfig
from .bridge_matching import brownian_bridge
from .couplings import MixtureCoupling
from .markovian_fitting import MarkovianFitting
from .objectives import Objective

READ_AT_ONCE = 256


class BridgeMatching(Objective):
    r"""
    ``E ‖v_θ(x_s, s) − dx_s/ds‖²`` on Brownian bridges from the data (s = 0) to the source (s = 1), the direction and the time
    ``s T`` of Diffusers' flow-matching schedulers.
    """

    pipeline = "AtlasBridgePipeline"
    coupling: MixtureCoupling | None = None

    @staticmethod
    def build_scheduler(config: TrainingConfig, start: dict):
        """Diffusers' Euler."""
        return FlowMatchEulerDiscreteScheduler()

    def prepare(self, dataset: Any) -> None:
        """Fit the pairs of ``coupling: mixture``."""
        if self.config.coupling == "mixture":
            source, data = self._every(dataset.source), self._every(dataset.pictures)
            self.coupling = MixtureCoupling(source, data, self.config.bridge_sigma, self.config.seed)

    def loss(
        self, data: torch.Tensor, batch: dict, own: list[torch.Generator], generator: torch.Generator, halvings: int
    ) -> torch.Tensor:
        source, data = self._coupled(self._source(batch, own, halvings), data, generator)
        s = self._times(len(data), generator)
        noise = randn_tensor(data.shape, own, data.device, data.dtype)
        x, velocity = brownian_bridge(source, data, 1 - s.to(data), self.config.bridge_sigma, noise)
        return (self._predict(x, s * self._horizon, batch, own) + velocity).square().mean()

    @property
    def _horizon(self) -> int:
        return self.scheduler.config["num_train_timesteps"]

    def _times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """s, half a step from either end, where the velocity of a Brownian bridge is infinite."""
        return (self._timesteps(count, generator) + 0.5) / self._horizon

    def _source(self, batch: dict, own: Any, halvings: int) -> torch.Tensor:
        return self._halved(self._encoded(batch, "source", own), halvings)

    def _coupled(self, source: torch.Tensor, data: torch.Tensor, generator: torch.Generator):
        """Source and data by the coupling of the recipe."""
        if self.config.coupling == "sinkhorn":
            source = self._paired(source, data, generator)
        elif self.coupling is not None:
            data = self.coupling(source, generator)
        return source, data

    def _every(self, pictures: Any) -> torch.Tensor:
        """All pictures, or their latents, (n, channels, height, width), on the CPU."""
        found = []
        for start in range(0, len(pictures), READ_AT_ONCE):
            places = range(start, min(start + READ_AT_ONCE, len(pictures)))
            batch = {"pixels": torch.stack([pictures[place, place]["pixels"] for place in places])}
            found.append(self._encoded(batch, "pixels", [torch.Generator().manual_seed(place) for place in places]).cpu())
        return torch.cat(found)


class BridgeFitting(BridgeMatching):
    """
    :class:`~.markovian_fitting.MarkovianFitting` of the networks ``unet`` and ``backward_unet`` in equal shares of the run.
    They predict displacements at ``r T`` with the share r of the time left.
    """

    @property
    def begins_pass(self) -> bool:
        """What was learned in a pass goes on as the average of its weights."""
        return self.step > 0 and self._pass(self.step) != self._pass(self.step - 1)

    def _pass(self, step: int) -> int:
        return step * self.config.bridge_passes // (self.config.max_steps or 1)

    def loss(
        self, data: torch.Tensor, batch: dict, own: list[torch.Generator], generator: torch.Generator, halvings: int
    ) -> torch.Tensor:
        c, number, conditions = self.config, self._pass(self.step), self._conditions(batch, own)
        source = self._source(batch, own, halvings)
        if number == 0:
            source, data = self._coupled(source, data, generator)
        forward, backward = (self._displacement(name, conditions) for name in ("unet", "backward_unet"))
        fitting = MarkovianFitting(forward, backward, c.bridge_sigma, c.bridge_passes, c.bridge_steps)
        left = self._times(len(data), generator).to(data)
        return fitting.loss(number, source, data, left, lambda x: randn_tensor(x.shape, own, x.device, x.dtype))

    def _displacement(self, name: str, conditions: dict) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def predict(x: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
            self.family.components.networks[name].train(torch.is_grad_enabled())  # without dropout where it is only followed
            return self._output(name, x, left * self._horizon, conditions)

        return predict
