"""What editors and type checkers see of the package, which imports its names when they are asked for."""

from typing import Any

from diffusers import DiffusionPipeline as DiffusionPipeline
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from .models import *
from .pipelines import AtlasBridgePipeline as AtlasBridgePipeline
from .pipelines import AtlasPipeline as AtlasPipeline
from .pretrained import load_emoji as load_emoji
from .pretrained import load_pictograms as load_pictograms
from .schedulers import *
from .schedules import register_beta_schedule as register_beta_schedule

SCHEDULERS: list[str]
__version__: str

def __getattr__(name: str) -> Any: ...
