"""Where a sampler stands in its list of network calls: one position a thread, known without reading a device."""

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..schedules import NoiseLevel
from ..schedules.time_grid import TimeGrid


@dataclass
class Run:
    """
    What one ``set_timesteps`` chose, and how far its trajectory has come.

    ``grid`` is ``None`` where no step can be taken; ``levels`` are the α and σ of its calls, ``(2, calls)``. ``timesteps`` are
    those of the grid from call ``first`` on, ``step_index`` is the next call in the grid, ``history`` what the sampler
    remembers of earlier steps, and ``network_input`` the last sample that it scaled for the network.
    """

    grid: TimeGrid | None
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    levels: torch.Tensor | None = None
    num_inference_steps: int | None = None
    first: int = 0
    step_index: int | None = None
    begin_index: int | None = None
    history: Any = None
    network_input: torch.Tensor | None = None

    def __post_init__(self):
        t = self.timesteps
        self.place = t.data_ptr(), t.element_size(), 0 if self.grid is None else len(t)
        self.kind = t.dtype, t.device

    def planned(self) -> TimeGrid:
        """The grid, or ``ValueError`` before ``set_timesteps``."""
        if self.grid is None:
            raise ValueError("step() was called before set_timesteps(); choose the steps first")
        return self.grid

    def index_of(self, timestep: torch.Tensor | float | int) -> int:
        """Position of ``timestep`` in the grid, see :meth:`StepPosition.index_for_timestep`."""
        if isinstance(timestep, torch.Tensor):
            if (timestep.dtype, timestep.device) == self.kind:
                start, size, count = self.place
                offset = (timestep.data_ptr() - start) // size
                if 0 <= offset < count and timestep.numel():
                    return self.first + offset
            timestep = timestep.reshape(-1)[0].item()
        values = self.planned().timesteps
        begin = None if self.begin_index is None else self.first + self.begin_index
        for index in (self.step_index, begin):
            if index is not None and index < len(values) and values[index] == timestep:
                return index
        if timestep not in values:
            raise ValueError(f"timestep {timestep} is not among the {len(values)} timesteps of set_timesteps: {values}")
        return len(values) - 1 - values[::-1].index(timestep)

    def replace_timesteps(self, timesteps: torch.Tensor) -> None:
        """Go on with a part of the timesteps that follow each other, or on another device."""
        given, planned = timesteps.tolist(), self.planned().timesteps
        starts = (i for i in range(len(planned) - len(given) + 1) if planned[i : i + len(given)] == given)
        first = next(starts, None)
        if not given or first is None:
            raise ValueError(
                f"timesteps={given} are not a part of those that set_timesteps chose, {planned}; "
                "choose other steps by set_timesteps(timesteps=...)"
            )
        self.timesteps, self.first = timesteps, first
        self.__post_init__()


class Runs(threading.local):
    """The run of each thread, and in ``started`` the last one of any thread."""

    run: Run | None = None

    def __init__(self, started: list[Run]):
        self.started = started

    def start(self, run: Run) -> None:
        """Give this thread a run."""
        self.run = run
        self.started[:] = [run]


class StepPosition:
    """
    The part of a sampler that finds the index of a step.

    Several threads may share a sampler: plan, position and history belong to the thread that called ``set_timesteps``.
    """

    _runs: Runs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": self._run}  # a copy goes on where this thread stands

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _runs=Runs([replace(state["_runs"])]))

    @property
    def _run(self) -> Run:
        """This thread's run: where it has chosen no steps, the last one of any thread."""
        runs = self._runs
        if runs.run is None:
            if runs.started:
                runs.run = runs.started[0]
            else:
                runs.run = self._first_run()
                self._reset()
        return runs.run

    def _first_run(self) -> Run:
        """The run before ``set_timesteps``."""
        raise NotImplementedError

    def _check_zero_signal(self, timestep: float, level: NoiseLevel, target: NoiseLevel) -> None:
        """Raise ``ValueError`` unless a step can start at a level without signal."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forget what earlier steps left: a sampler with a memory overrides this, and keeps it in ``self._history``."""

    @property
    def _grid(self) -> TimeGrid:
        return self._run.planned()

    @property
    def _history(self) -> Any:
        return self._run.history

    @_history.setter
    def _history(self, history: Any) -> None:
        self._run.history = history

    @property
    def timesteps(self) -> torch.Tensor:
        """Timesteps of the network calls; a part of them, ``timesteps[5:]``, may take their place."""
        return self._run.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor) -> None:
        self._run.replace_timesteps(timesteps)

    @property
    def sigmas(self) -> torch.Tensor:
        """Sigmas of the network calls (σ̂ of betas, s of a flow), and where the last step ends, ``(calls + 1,)``."""
        return self._run.sigmas

    @property
    def num_inference_steps(self) -> int | None:
        """Number of steps; ``None`` before ``set_timesteps``."""
        return self._run.num_inference_steps

    @property
    def step_index(self) -> int | None:
        """Index of the next step in ``timesteps``; ``None`` before the first step."""
        run = self._run
        return None if run.step_index is None else run.step_index - run.first

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline set it."""
        return self._run.begin_index

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, index: int | None) -> None:  # pipelines of Diffusers turn it back to repeat a step
        run = self._run
        run.step_index = None if index is None else index + run.first

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (image-to-image)."""
        self._run.begin_index = begin_index

    def index_for_timestep(self, timestep: torch.Tensor | float | int) -> int:
        """
        Position of ``timestep`` in ``self.timesteps``, without reading a device.

        An element of ``self.timesteps`` is a view of it, so its storage offset is the position. Other tensors and plain
        numbers are looked up by value; among equal timesteps the expected next one wins.

        Raises:
            ValueError: before ``set_timesteps``, or for a timestep that is not in the list.
        """
        run = self._run
        return run.index_of(timestep) - run.first

    def _advance(self, timestep: torch.Tensor | float | int) -> tuple[Run, int]:
        """This thread's run, and the index in its grid of the step to take now."""
        run = self._run
        index = run.index_of(timestep)
        grid = run.planned()
        if run.step_index is not None and run.step_index >= len(grid.timesteps):
            raise ValueError(f"step() was called more often than the {len(grid.timesteps)} steps of set_timesteps()")
        run.step_index = index + 1
        alpha, sigma = grid.source[index]
        if not (alpha > 0 and sigma < math.inf):
            self._check_zero_signal(grid.timesteps[index], grid.source[index], grid.target[index])
        return run, index

    def _levels(self, timestep: torch.Tensor | float | int) -> tuple[NoiseLevel, NoiseLevel]:
        """Where the step to take now starts and where it ends."""
        run, index = self._advance(timestep)
        grid = run.planned()
        return grid.source[index], grid.target[index]
