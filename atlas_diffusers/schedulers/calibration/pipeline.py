"""A pipeline's network as the function that a calibration calls."""

from collections.abc import Callable, Sequence

import torch


def pipeline_predictions(
    pipeline, prompts: Sequence[str] | None, guidance_scale: float, count: int, sample_shape: Sequence[int] | None
) -> tuple[Callable, tuple[int, ...], torch.device]:
    """
    Guided predictions of a pipeline's ``unet`` as ``f(sample, timestep, rows)``, the shape of its samples and its device.

    Args:
        pipeline: with ``unet`` and, where that takes text, ``encode_prompt``.
        prompts: taken in turn for ``count`` samples; by default the empty text.
        guidance_scale: w; 1 is none.
        count: samples in all.
        sample_shape: instead of the network's own.

    Raises:
        ValueError: for prompts and a pipeline that takes none.
    """
    unet, device = pipeline.unet, pipeline._execution_device
    size = unet.config.sample_size
    shape = tuple(sample_shape or (unet.config.in_channels, *((size, size) if isinstance(size, int) else size)))
    if not hasattr(pipeline, "encode_prompt") or getattr(pipeline, "text_encoder", None) is None:
        if prompts or guidance_scale > 1:
            raise ValueError(f"{type(pipeline).__name__} takes no text; got prompts={prompts}, guidance_scale={guidance_scale}")
        return (lambda sample, t, rows: unet(sample.to(unet.dtype), t, return_dict=False)[0].float()), shape, device
    texts = [prompts[row % len(prompts)] for row in range(count)] if prompts else [""] * count
    guided = guidance_scale > 1
    with torch.no_grad():
        states, negative = pipeline.encode_prompt(texts, device, 1, guided)[:2]

    def predict(sample: torch.Tensor, timestep: torch.Tensor, rows: slice) -> torch.Tensor:
        sample = sample.to(unet.dtype)
        if not guided:
            return unet(sample, timestep, encoder_hidden_states=states[rows], return_dict=False)[0].float()
        conditions = torch.cat([negative[rows], states[rows]])
        both = unet(torch.cat([sample] * 2), timestep, encoder_hidden_states=conditions, return_dict=False)[0].float()
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict, shape, device
