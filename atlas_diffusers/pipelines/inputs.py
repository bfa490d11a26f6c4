"""What a pipeline call may be given; every mistake is a ``ValueError`` that names both sides."""

import torch

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def batch_size_of(prompt, class_labels, prompt_embeds) -> int:
    """Number of prompts or labels, 1 without either."""
    if isinstance(prompt, list):
        return len(prompt)
    if prompt_embeds is not None:
        return len(prompt_embeds)
    if class_labels is not None and prompt is None:
        return torch.as_tensor(class_labels).numel()
    return 1


def check_call_inputs(
    pipeline, prompt, negative_prompt, class_labels, prompt_embeds, negative_prompt_embeds,
    num_images_per_prompt, height, width, strength, generator, output_type, tensor_inputs,
) -> None:  # fmt: skip
    """Raise ``ValueError`` for the first input of ``AtlasPipeline.__call__`` that cannot be used."""
    _check_text(pipeline, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
    batch = batch_size_of(prompt, class_labels, prompt_embeds)
    _check_labels(pipeline, class_labels, batch)
    _check_size(pipeline, height, width)
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt={num_images_per_prompt}; expected at least 1")
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected a number in (0, 1]")
    if isinstance(generator, list) and len(generator) != batch * num_images_per_prompt:
        raise ValueError(f"{len(generator)} generators for {batch * num_images_per_prompt} pictures; expected one each")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; allowed are {OUTPUT_TYPES}")
    if unknown := [name for name in tensor_inputs if name not in pipeline._callback_tensor_inputs]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown}; allowed are {pipeline._callback_tensor_inputs}"
        )


def _check_text(pipeline, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds) -> None:
    given = {"prompt": prompt, "prompt_embeds": prompt_embeds, "negative_prompt": negative_prompt}
    if not pipeline.has_text and (unused := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"this pipeline's network takes no text, but {unused} were given")
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        is_list = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        if not (value is None or isinstance(value, str) or is_list):
            raise ValueError(f"{name} must be a text or a non-empty list of texts, got {value!r}")
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("give prompt or prompt_embeds, not both")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
    if pipeline.has_text and prompt_embeds is None and pipeline.text_encoder is None:
        raise ValueError("this pipeline has no text_encoder; give prompt_embeds")
    count = batch_size_of(prompt, None, prompt_embeds)
    if isinstance(negative_prompt, list) and len(negative_prompt) not in (1, count):
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts; expected 1 or {count}")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            shapes = tuple(prompt_embeds.shape), tuple(negative_prompt_embeds.shape)
            raise ValueError(f"prompt_embeds and negative_prompt_embeds differ in shape: {shapes[0]} and {shapes[1]}")


def _check_labels(pipeline, class_labels, batch: int) -> None:
    if class_labels is None:
        return
    count = getattr(pipeline.unet.config, "num_class_embeds", None)
    if count is None:
        raise ValueError("class_labels were given, but this pipeline's network has no classes")
    labels = torch.as_tensor(class_labels)
    if labels.numel() != batch:
        raise ValueError(f"{labels.numel()} class_labels for {batch} prompts; expected one each")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"class_labels must be integers from 0 to {count - 1}, got {labels.flatten().tolist()}")


def _check_size(pipeline, height: int, width: int) -> None:
    multiple = pipeline.vae_scale_factor * getattr(pipeline.unet, "size_multiple", 1)
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(f"height={height} and width={width} must be positive multiples of {multiple}")
