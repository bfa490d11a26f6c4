"""Where a sampler stands in its list of network calls, known without reading a device."""

import torch

from ..schedules import NoiseLevel


class StepPosition:
    """The part of a sampler that finds the index of a step; the list itself is ``self._grid.timesteps``."""

    @property
    def step_index(self) -> int | None:
        """Index of the next step in ``timesteps``; ``None`` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (image-to-image)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: torch.Tensor | float | int) -> int:
        """
        Position of ``timestep`` in ``self.timesteps``, without reading a device.

        An element of ``self.timesteps`` is a view of it, so its storage offset is the position. Other tensors and plain
        numbers are looked up by value; among equal timesteps the expected next one wins.

        Raises:
            ValueError: before ``set_timesteps``, or for a timestep that is not in the list.
        """
        if self._grid is None:
            raise ValueError("step() was called before set_timesteps(); choose the steps first")
        if isinstance(timestep, torch.Tensor):
            if timestep.dtype == self.timesteps.dtype and timestep.device == self.timesteps.device:
                offset = (timestep.data_ptr() - self.timesteps.data_ptr()) // timestep.element_size()
                if timestep.numel() and 0 <= offset < len(self._grid.timesteps):
                    return offset
            timestep = timestep.reshape(-1)[0].item()
        values = self._grid.timesteps
        for index in (self._step_index, self._begin_index):
            if index is not None and index < len(values) and values[index] == timestep:
                return index
        if timestep not in values:
            raise ValueError(f"timestep {timestep} is not among the {len(values)} timesteps of set_timesteps: {values}")
        return len(values) - 1 - values[::-1].index(timestep)

    def _advance(self, timestep: torch.Tensor | float | int) -> int:
        """Index of the step to take now."""
        index = self.index_for_timestep(timestep)
        if self._step_index is not None and self._step_index >= len(self._grid.timesteps):
            raise ValueError(f"step() was called more often than the {len(self._grid.timesteps)} steps of set_timesteps()")
        self._step_index = index + 1
        return index

    def _levels(self, timestep: torch.Tensor | float | int) -> tuple[NoiseLevel, NoiseLevel]:
        """Where the step to take now starts and where it ends."""
        index = self._advance(timestep)
        return self._grid.source[index], self._grid.target[index]
