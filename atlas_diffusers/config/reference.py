"""The configuration reference, written from the models themselves."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .bridge import BridgeConfig
from .kernels import KernelConfig
from .models import ConditioningConfig, HighResModelConfig, InferenceConfig, SamplerConfig
from .noise_scheduler import NoiseSchedulerConfig
from .training import ClassImagesConfig, DatasetConfig, LoRAConfig, TextEncoderConfig, TrainingConfig

MODELS = (
    TrainingConfig, DatasetConfig, TextEncoderConfig, LoRAConfig, ClassImagesConfig, BridgeConfig, KernelConfig,
    SamplerConfig, HighResModelConfig, ConditioningConfig, InferenceConfig, NoiseSchedulerConfig,
)  # fmt: skip
HEAD = """# Configuration reference

Every field of the models in `atlas_diffusers.config`; written by `atlas-diffusers config reference`. Unknown keys are errors.
"""


def reference() -> str:
    """Markdown, one table a model."""
    return "\n".join([HEAD, *(_table(model) for model in MODELS)])


def _table(model: type[BaseModel]) -> str:
    rows, schemas = [], model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        text = (field.description or "").replace("|", "/")
        rows.append(f"| `{name}` | {_kind(schemas[name])} | {_default(field)} | {text} |")
    summary = (model.__doc__ or "").strip().splitlines()[0]
    head = "| field | type | default | what it does |\n|---|---|---|---|"
    return f"## {model.__name__}\n\n{summary}\n\n{head}\n" + "\n".join(rows) + "\n"


def _kind(schema: dict) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema)
    kind = schema.get("type", "any")
    return f"{kind} {bounds}".strip()


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{getattr(value, 'value', value)}`"
