"""Several pipelines side by side."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..config import NoiseSchedulerConfig, SamplingMethod, read_mapping, validate
from ..pictures.sheets import labelled_grid, to_pictures
from .pipeline import DiffusionPipeline, GaussianModel, device_of


class SchedulerComparison(dict):
    """
    Samples by the name of their pipeline, all from the same noise.

    Attributes:
        seconds, network_calls: of each pipeline, by name.
        distances: RMS distance of each sample to that of the first pipeline, by name.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.network_calls, self.distances = {}, {}, {}

    def plot(self, path: str | Path) -> None:
        """Write a sheet with the first sample of every pipeline, of values in [-1, 1], and what it took."""
        images = [to_pictures(sample[:1].float().cpu())[0] for sample in self.values()]
        took = {name: f"{self.network_calls[name]} calls, {self.seconds[name]:.2f} s" for name in self}
        labels = [f"{name}: {took[name]}, off by {self.distances[name]:.3f}" for name in self]
        labelled_grid(images, labels, tile=280).save(path)


class AdvancedDiffusionSystem:
    """
    Pipelines by name.

    Args:
        config_path: a file to load, see :meth:`load_config`.
    """

    def __init__(self, config_path: str | Path | None = None):
        self.pipelines: dict[str, DiffusionPipeline] = {}
        if config_path is not None:
            self.load_config(config_path)

    @property
    def configs(self) -> dict[str, NoiseSchedulerConfig]:
        """Configurations by name."""
        return {name: pipeline.config for name, pipeline in self.pipelines.items()}

    def create_pipeline(
        self, name: str, config: NoiseSchedulerConfig, sampling_method: SamplingMethod | str = "ddpm"
    ) -> DiffusionPipeline:
        """Make a pipeline, in place of one of the same name."""
        self.pipelines[name] = DiffusionPipeline(config, sampling_method)
        return self.pipelines[name]

    def get_pipeline(self, name: str) -> DiffusionPipeline:
        """The pipeline called ``name``, or ``ValueError`` with the names that there are."""
        if name not in self.pipelines:
            raise ValueError(f"pipeline {name!r} is unknown; there are {self.list_pipelines()}")
        return self.pipelines[name]

    def list_pipelines(self) -> list[str]:
        """Names, in the order in which they were made."""
        return list(self.pipelines)

    def update_config(self, name: str, **changes: Any) -> DiffusionPipeline:
        """Change fields of a pipeline's configuration, or its ``sampling_method``; what is wrong leaves it as it was."""
        pipeline = self.get_pipeline(name)
        method = changes.pop("sampling_method", pipeline.sampling_method)
        config = validate(NoiseSchedulerConfig, {**pipeline.config.model_dump(), **changes})
        return self.create_pipeline(name, config, _method(name, method))

    def compare_schedulers(
        self,
        shape: tuple[int, ...],
        num_inference_steps: int = 50,
        model: nn.Module | Callable | None = None,
        seed: int = 0,
        **options: Any,
    ) -> SchedulerComparison:
        """
        Sample with every pipeline from the same noise.

        Args:
            shape, num_inference_steps, model: as of :meth:`DiffusionPipeline.sample`; without a model, the exact one for data
                N(0, 0.5²) under each pipeline's own noise process.
            seed: of the noise.
            options: further arguments of ``sample``.

        Raises:
            ValueError: without pipelines.
        """
        if not self.pipelines:
            raise ValueError("there is no pipeline to compare; make some with create_pipeline or load_config")
        result, first = SchedulerComparison(), None
        for name, pipeline in self.pipelines.items():
            calls, network = [], model or GaussianModel(pipeline)
            generator, start = torch.Generator().manual_seed(seed), time.perf_counter()

            def counted(*args: Any, network: Any = network, calls: Any = calls, **kwargs: Any):
                calls.append(1)
                return network(*args, **kwargs)

            options.setdefault("device", device_of(network))
            result[name] = pipeline.sample(counted, shape, num_inference_steps, generator=generator, **options)
            result.seconds[name], result.network_calls[name] = time.perf_counter() - start, len(calls)
            first = result[name] if first is None else first
            result.distances[name] = (result[name] - first).square().mean().sqrt().item()
        return result

    def load_config(self, config_path: str | Path) -> None:
        """
        Make the pipelines of a YAML or JSON file: a mapping of names to fields of :class:`NoiseSchedulerConfig` and, if it is
        not `ddpm`, ``sampling_method``.

        Raises:
            ValueError: naming every mistake of the file; the system stays as it was.
        """
        read, mistakes = [], []
        for name, fields in read_mapping(config_path).items():
            try:
                if not isinstance(fields, dict):
                    raise ValueError(f"expected a mapping of fields, found {fields!r}")
                method = _method(name, fields.pop("sampling_method", SamplingMethod("ddpm")))
                read.append((name, validate(NoiseSchedulerConfig, fields), method))
            except ValueError as error:
                mistakes.append(f"{name}: {error}")
        if mistakes:
            raise ValueError(f"{config_path}: " + "; ".join(mistakes))
        for name, config, method in read:
            self.create_pipeline(name, config, method)

    def save_config(self, config_path: str | Path) -> None:
        """Write the pipelines as :meth:`load_config` reads them, JSON where the name ends so, else YAML."""
        data = {
            name: {**pipeline.config.model_dump(mode="json"), "sampling_method": pipeline.sampling_method.value}
            for name, pipeline in self.pipelines.items()
        }
        text = json.dumps(data, indent=1) if str(config_path).endswith(".json") else yaml.safe_dump(data, sort_keys=False)
        Path(config_path).write_text(text, encoding="utf-8")


def _method(name: str, value: Any) -> SamplingMethod:
    try:
        return SamplingMethod(value)
    except ValueError:
        allowed = [method.value for method in SamplingMethod]
        raise ValueError(f"sampling_method={value!r} of {name!r}; allowed are {allowed}") from None
