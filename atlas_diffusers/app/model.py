"""The pipeline that a page plays with."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .._registration import SAMPLERS
from ..conditioning import token_lists
from ..pipelines import AtlasBridgePipeline
from ..pipelines.base import AtlasPipelineBase
from ..pipelines.named_schedulers import scheduler_class, swapped
from ..pretrained.pictogram_data import STYLES
from ..schedulers.calibration.paused_call import PausedCall

OWN = "pipeline's own"
ANY = "any"
LONGEST_PROMPT, MOST_PICTURES, MOST_STEPS, MOST_SEED = 1000, 64, 200, 2**31 - 1


class Model:
    """
    A pipeline and what a page may ask of it; it is never changed, so that pages may share it.

    Args:
        pipeline: that makes pictures from noise.
        name: to show.

    Attributes:
        styles: that a prompt may ask for, `any` first.

    Raises:
        ValueError: for a pipeline that starts from pictures.
    """

    def __init__(self, pipeline: Any, name: str):
        if isinstance(pipeline, AtlasBridgePipeline):
            raise ValueError(f"{name} translates pictures; the page needs a pipeline that starts from noise")
        self.pipeline, self.name = pipeline, name
        self.is_ours = isinstance(pipeline, AtlasPipelineBase)
        self.styles = _known_styles(getattr(pipeline, "tokenizer", None))
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def samplers(self) -> list[str]:
        """Names that :meth:`scheduler` knows."""
        return [OWN, *(name.removeprefix("Atlas").removesuffix("Scheduler") for name in SAMPLERS.values())]

    def scheduler(self, sampler: str) -> Any:
        """The pipeline's own scheduler, or another with its noise process; ``OSError`` where there is none such."""
        if sampler == OWN:
            return self.pipeline.scheduler
        if sampler not in self.samplers:
            raise ValueError(f"sampler {sampler!r} is unknown; allowed are {self.samplers}")
        return swapped(self.pipeline, scheduler_class(sampler))

    @property
    def example(self) -> str:
        """A prompt to begin with."""
        return "red heart" if self.takes_prompts else ""

    @property
    def labels(self) -> int | None:
        """Number of classes of a network that takes labels in place of prompts."""
        return None if self.takes_prompts else getattr(self.pipeline.unet.config, "num_class_embeds", None)

    @property
    def takes_prompts(self) -> bool:
        """Whether a call may have a prompt."""
        return self.pipeline.has_text if self.is_ours else True

    @property
    def defaults(self) -> tuple[int, float]:
        """Steps and guidance scale of a call that says nothing; of a stock pipeline Stable Diffusion's."""
        if not self.is_ours:
            return 50, 7.5
        return self.pipeline.defaults.default_num_inference_steps, self.pipeline.defaults.default_guidance_scale

    def call(self, prompt: str, style: str, count: int, negative: str = "") -> dict[str, Any]:
        """
        What the pipeline is called with for some pictures of a prompt, or of the number of a class.

        Raises:
            ValueError: for a text that is too long, or that the network does not read, and too many pictures.
        """
        if not 1 <= count <= MOST_PICTURES:
            raise ValueError(f"{count} pictures; allowed are 1 to {MOST_PICTURES}")
        for name, text in (("prompt", prompt), ("negative prompt", negative)):
            if len(text) > LONGEST_PROMPT:
                raise ValueError(f"the {name} has {len(text):,} characters; allowed are {LONGEST_PROMPT:,}")
        if style not in self.styles:
            raise ValueError(f"style {style!r} is unknown; allowed are {self.styles}")
        prompt = prompt.strip() if style == ANY else f"{prompt.strip()}, {STYLES[style][0]} style"
        if self.takes_prompts:
            call = {"prompt": [prompt] * count}
            return call | {"negative_prompt": [negative] * count} if negative.strip() else call
        if negative.strip() or (prompt and self.labels is None):
            raise ValueError("this pipeline's network takes no text; leave prompt and negative prompt empty")
        if self.labels is None or not prompt:
            return {"num_images_per_prompt": count}
        if not prompt.isdecimal() or int(prompt) >= self.labels:
            raise ValueError(f"this pipeline draws classes: expected a number below {self.labels}, got {prompt!r}")
        return {"class_labels": [int(prompt)] * count}


def _known_styles(tokenizer: Any) -> list[str]:
    """Drawing styles that the text encoder has a word for, after `any`."""
    if tokenizer is None:
        return [ANY]
    words = {style: wordings[0] for style, wordings in STYLES.items()}
    tokens = token_lists(tokenizer, list(words.values()), marks=False)
    return [ANY, *(style for (style, text), ids in zip(words.items(), tokens) if len(ids) == len(text.split()))]


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One a picture, so that a picture does not depend on the others."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed {seed}; allowed are 0 to {MOST_SEED}")
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def as_they_come(call: Callable[[Callable[[Any], Any]], Any]) -> Iterator[Any]:
    """
    What a call shows, one by one, and its result; whoever stops asking ends the call.

    Args:
        call: gets the function by which it shows something other than ``None``.
    """
    found: list[Any] = []
    paused = PausedCall(lambda running: found.append(call(running.pause)))
    try:
        while (shown := paused.resume()) is not None:
            yield shown
    finally:
        paused.abandon()
    yield found[0]
