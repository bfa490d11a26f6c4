"""The sampling loop and the network call inside it."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from .bridging import BridgeRun, noise_level
from .correcting import LangevinCorrector
from .tiling import Tiles


@dataclass
class DenoisingRun:
    """
    What stays the same over the steps of one call.

    Args:
        scheduler: this call's own.
        prompt_embeds, labels: conditions of the batch; where guidance is on, the unconditional half comes first.
        attention_kwargs: of the network.
        step_arguments: further arguments of ``scheduler.step``.
        callback, tensor_inputs: as of ``AtlasPipeline.__call__``.
        bridge: a bridge to references.
        guidance_interval: lowest and highest σ̂ with guidance.
        guider: a guider of Diffusers instead of our own guidance.
        corrector: Langevin steps after every step.
        tiles: the network sees these parts of a sample, one after the other.
    """

    scheduler: Any
    prompt_embeds: torch.Tensor | None
    labels: torch.Tensor | None
    attention_kwargs: dict | None = None
    step_arguments: dict = field(default_factory=dict)
    callback: Callable | None = None
    tensor_inputs: list[str] = field(default_factory=list)
    bridge: BridgeRun | None = None
    guidance_interval: tuple[float, float] | None = None
    guider: Any = None
    corrector: LangevinCorrector | None = None
    tiles: Tiles | None = None


def step_arguments(scheduler, **given) -> dict[str, Any]:
    """Those of some arguments that the scheduler's ``step`` knows."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in given.items() if name in known}


class DenoisingMixin:
    """The loop of a pipeline with ``unet`` and the guidance state of ``AtlasPipeline``."""

    def _denoise(self, run: DenoisingRun, latents: torch.Tensor, begin: int = 0, first: int = 0) -> torch.Tensor:
        """From ``timesteps[begin]`` to the last; callbacks count steps from ``first``."""
        scheduler, steps = run.scheduler, run.scheduler.timesteps[begin:]
        self._num_timesteps = first + len(steps)
        healthy, guided = [], self._guided_steps(run, steps)
        with self.progress_bar(total=-(-len(steps) // scheduler.order)) as progress:
            for index, t in enumerate(steps):
                if self.interrupt:
                    break
                if run.guider is not None:
                    run.guider.set_state(step=index, num_inference_steps=len(steps), timestep=t)
                prediction = self._prediction(run, latents, t, guided[index])
                healthy.append(prediction.isfinite().all())
                latents = scheduler.step(prediction, t, latents, **run.step_arguments, return_dict=False)[0]
                if run.corrector is not None and index + 1 < len(steps):
                    latents = run.corrector(
                        latents, t, steps[index + 1], lambda x, s, on=guided[index + 1]: self._prediction(run, x, s, on)
                    )
                if run.callback is not None:
                    tensors = {"latents": latents, "prompt_embeds": run.prompt_embeds}
                    changed = run.callback(self, first + index, t, {name: tensors[name] for name in run.tensor_inputs}) or {}
                    latents = changed.get("latents", latents)
                    run.prompt_embeds = changed.get("prompt_embeds", run.prompt_embeds)
                if index % scheduler.order == 0:
                    progress.update()
                if latents.device.type == "cpu" or index == len(steps) - 1:
                    _stop_where_unhealthy(healthy)
        return latents

    @staticmethod
    def _guided_steps(run: DenoisingRun, steps: torch.Tensor) -> list[bool]:
        """Whether each step lies in the guidance interval."""
        if run.guidance_interval is None:
            return [True] * len(steps)
        low, high = run.guidance_interval
        return [low <= noise_level(run.scheduler, t).sigma_hat <= high for t in steps]

    def _prediction(self, run: DenoisingRun, latents: torch.Tensor, t: torch.Tensor, guided: bool = True) -> torch.Tensor:
        """The network's prediction at ``t``, replaced or corrected by the bridge where there is one."""
        # Diffusers' flow-matching schedulers have no scaling
        scale = getattr(run.scheduler, "scale_model_input", None)
        model_input = latents if scale is None else scale(latents, t)
        rows = torch.arange(len(latents), device=latents.device)
        couplings = {} if run.bridge is None else run.bridge.couplings(latents, t)
        if run.bridge is not None:
            rows = run.bridge.network_rows(len(latents), couplings, latents.device)
        parts = [
            self._tiled(run, model_input[part], t, part, len(latents), guided)
            for part in rows.split(self._network_batch_size)
            if len(part)
        ]
        if not couplings:
            return torch.cat(parts)
        prediction = torch.zeros_like(latents)
        if parts:
            prediction[rows] = torch.cat(parts)
        return run.bridge.apply(prediction, latents, couplings)

    def _tiled(self, run: DenoisingRun, model_input, t, rows: torch.Tensor, batch: int, guided: bool) -> torch.Tensor:
        """The prediction of some samples of the batch, blended from tiles where there are any."""
        conditions = _of_rows(run.prompt_embeds, rows, batch), _of_rows(run.labels, rows, batch)

        def predict(x: torch.Tensor) -> torch.Tensor:
            if run.guider is not None:
                return self._guider_prediction(run, x, t, *conditions)
            return self._guided_prediction(x, t, *conditions, run.attention_kwargs, guided)

        return predict(model_input) if run.tiles is None else run.tiles.blend(predict, model_input)

    def _guided_prediction(
        self, model_input: torch.Tensor, t: torch.Tensor, prompt_embeds, labels, attention_kwargs, guided: bool = True
    ) -> torch.Tensor:
        """The network's prediction at ``t``, guided where guidance is on; one network call."""
        guided = guided and self.do_classifier_free_guidance
        model_input = torch.cat([model_input] * 2) if guided else model_input
        arguments = {"encoder_hidden_states": prompt_embeds, "class_labels": labels}
        # without guidance, here or from here on, only the conditional half
        arguments = {name: value if value is None else value[-len(model_input) :] for name, value in arguments.items()}
        if attention_kwargs is not None:
            arguments["cross_attention_kwargs"] = attention_kwargs
        prediction = self.unet(model_input, t, **arguments, return_dict=False)[0]
        if not guided:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + self._guidance_scale * (conditional - unconditional)
        if self._guidance_rescale > 0:
            prediction = rescale_noise_cfg(prediction, conditional, self._guidance_rescale)
        return prediction

    @staticmethod
    def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] <= interval[1]:
            raise ValueError(f"guidance_interval={interval}; expected (lowest, highest) noise level, 0 or above")
        return interval

    def _own_guider(self, guider, parted: bool):
        """A copy for this call, because it may keep state; ``guider.new()`` would lose arguments given by position."""
        if guider is None:
            return None
        if not self._guided:
            raise ValueError("a guider needs a prompt, class labels or prompt_embeds")
        if parted:
            raise ValueError("a guider may keep state from step to step: give no tiles, correctors or network_batch_size")
        return copy.deepcopy(guider)

    def _tiles(self, size: int | None, overlap: int | None) -> Tiles | None:
        if size is None:
            if overlap is not None:
                raise ValueError(f"tile_overlap={overlap} needs tile_size")
            return None
        factor, multiple = self.vae_scale_factor, self.vae_scale_factor * getattr(self.unet, "size_multiple", 1)
        if size < 1 or size % multiple:
            raise ValueError(f"tile_size={size} must be a positive multiple of {multiple}")
        return Tiles(size // factor, (size // 4 if overlap is None else overlap) // factor)

    def _guider_prediction(self, run: DenoisingRun, model_input, t, prompt_embeds, labels) -> torch.Tensor:
        """As a guider of Diffusers combines the network's predictions for its conditions."""
        arguments = {"encoder_hidden_states": prompt_embeds, "class_labels": labels}
        pairs = {name: value.chunk(2)[::-1] for name, value in arguments.items() if value is not None}
        batches = run.guider.prepare_inputs(pairs)
        for batch in batches:
            run.guider.prepare_models(self.unet)
            conditions = {name: getattr(batch, name) for name in pairs}
            if run.attention_kwargs is not None:
                conditions["cross_attention_kwargs"] = run.attention_kwargs
            batch.noise_pred = self.unet(model_input, t, **conditions, return_dict=False)[0]
            run.guider.cleanup_models(self.unet)
        return run.guider(batches).pred


def _of_rows(conditions: torch.Tensor | None, rows: torch.Tensor, batch: int) -> torch.Tensor | None:
    """The conditions of some samples of the batch; where guidance is on, the unconditional half comes first."""
    if conditions is None or len(rows) == batch:
        return conditions
    return torch.cat([half[rows] for half in conditions.split(batch)])


def _stop_where_unhealthy(healthy: list[torch.Tensor]) -> None:
    flags = torch.stack(healthy).tolist()
    if not all(flags):
        raise ValueError(f"the network returned NaN or infinity at step {flags.index(False) + 1} of sampling")
