"""What a pipeline's ``callback_on_step_end`` sees and changes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..denoising import ClassifierFreeGuidance, CoupledDenoiser, Denoiser, SamplingState
from .base import AtlasPipelineBase
from .inputs import check_tensor_inputs

STATES = "encoder_hidden_states"


class StepCallback:
    """
    Calls a callback of Diffusers after a step of sampling, and hands on what it changed: the tensors that it returns, and the
    pipeline's ``_guidance_scale`` and ``_interrupt``.

    Args:
        pipeline: whose call it is.
        callback: called as ``f(pipeline, index, timestep, tensors)``, returns the tensors to replace.
        tensor_inputs: names of the tensors that it gets.
    """

    def __init__(self, pipeline: AtlasPipelineBase, callback: Callable, tensor_inputs: list[str]):
        self.pipeline, self.callback, self.tensor_inputs = pipeline, callback, tensor_inputs

    @classmethod
    def of(
        cls,
        pipeline: AtlasPipelineBase,
        callback: Callable | PipelineCallback | MultiPipelineCallbacks | None,
        tensor_inputs: list[str] | None,
    ) -> "StepCallback | None":
        """That of a call, if there is one; ``ValueError`` for tensors that there are not."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        if tensor_inputs is not None:
            check_tensor_inputs(tensor_inputs, pipeline._callback_tensor_inputs, callback)
        return None if callback is None else cls(pipeline, callback, tensor_inputs or ["latents"])

    def __call__(self, state: SamplingState) -> None:
        """Call it, and change the state."""
        coupled: CoupledDenoiser | None = state.denoiser if isinstance(state.denoiser, CoupledDenoiser) else None
        denoiser: Any = state.denoiser if coupled is None else coupled.denoiser
        tensors: dict[str, torch.Tensor | None] = {"latents": state.sample}
        if "prompt_embeds" in self.tensor_inputs:
            tensors["prompt_embeds"] = _prompt_embeds(denoiser)
        given = {name: tensors[name] for name in self.tensor_inputs}
        changed = self.callback(self.pipeline, state.index, state.timestep, given) or {}
        state.sample, state.stopped = changed.get("latents", state.sample), self.pipeline.interrupt
        denoiser = self._changed(denoiser, changed, given, len(state.sample))
        state.denoiser = denoiser if coupled is None else replace(coupled, denoiser=denoiser)

    def _changed(self, denoiser: Denoiser, changed: Mapping[str, Any], given: Mapping[str, Any], batch: int) -> Denoiser:
        guidance, scale = denoiser.guidance, self.pipeline.guidance_scale
        if isinstance(guidance, ClassifierFreeGuidance) and guidance.scale != max(scale, 1.0):
            denoiser = replace(denoiser, guidance=replace(guidance, scale=max(scale, 1.0)))
        states = changed.get("prompt_embeds")
        if states is None or states is given.get("prompt_embeds"):
            return denoiser
        if denoiser.unconditional is None or len(states) != 2 * batch:
            if self.pipeline.do_classifier_free_guidance:
                raise ValueError(f"a callback gave {len(states)} rows of prompt_embeds; guidance needs {2 * batch}")
            return replace(denoiser, conditions={**denoiser.conditions, STATES: states}, unconditional=None)
        negative, states = states.split(batch)
        return replace(
            denoiser,
            conditions={**denoiser.conditions, STATES: states},
            unconditional={**denoiser.unconditional, STATES: negative},
        )


def _prompt_embeds(denoiser: Denoiser) -> torch.Tensor | None:
    """Text states of the batch; where guidance is on, the negative ones first."""
    states = denoiser.conditions[STATES]
    negative = None if denoiser.unconditional is None else denoiser.unconditional[STATES]
    return states if states is None or negative is None else torch.cat([negative, states])
