"""What a pipeline call says of guidance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.utils import logging

from ..denoising import ClassifierFreeGuidance
from .prompts import Prompts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class GuidanceInputs:
    """
    Guidance of a call; what it leaves open is ``None``.

    Args:
        default_scale: the pipeline's.
        scale, rescale, interval, guider: as of ``AtlasPipeline.__call__``.
    """

    default_scale: float
    scale: float | None = None
    rescale: float | None = None
    interval: tuple[float, float] | None = None
    guider: Any = None

    @property
    def effective_scale(self) -> float:
        """w, as given or by default."""
        return self.default_scale if self.scale is None else self.scale

    @property
    def _given(self) -> Mapping[str, object]:
        """What takes the place of a guider, by the name of the call's argument."""
        named = {"guidance_scale": self.scale, "guidance_rescale": self.rescale, "guidance_interval": self.interval}
        return {name: value for name, value in named.items() if value is not None}

    def classifier_free(self) -> ClassifierFreeGuidance:
        """The formula, which a scale below 1 leaves at the conditional prediction; ``ValueError`` for options out of range."""
        return ClassifierFreeGuidance(max(self.effective_scale, 1.0), self.rescale or 0.0, self.interval)

    def check_guider(self, prompts: Prompts, is_parted: bool) -> None:
        """Of Diffusers: it needs a condition, and is called once a step, on the whole batch, because it may keep state."""
        if self.guider is None:
            return
        if self._given:
            raise ValueError(f"a guider takes the place of {', '.join(self._given)}: give one of them")
        if not prompts.are_given:
            raise ValueError("a guider needs a prompt, class labels or prompt_embeds")
        if is_parted:
            raise ValueError("a guider may keep state from step to step: give no tiles, correctors or network_batch_size")

    def warn_unused(self, prompts: Prompts) -> None:
        """Say what a call without guidance does not read; a scale that switches guidance off is read."""
        scale = self.effective_scale
        given = [name for name in self._given if name != "guidance_scale" or scale > 1]
        if unused := [*prompts.given_negatives, *given]:
            reason = f"guidance_scale={scale} is off" if prompts.are_given else "there is no prompt or label to guide by"
            logger.warning(f"{', '.join(unused)}: not used, because {reason}")
