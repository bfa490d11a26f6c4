"""From a configuration, Diffusers' own included, to the noise process of a scheduler."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from ..schedules import Flow
from .options import DEFAULTS

FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler")
OTHER_PROCESSES = (
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler",
    "CosineDPMSolverMultistepScheduler", "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler", "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler", "EntropyBoundScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchLCMScheduler",
    "HeliosDMDScheduler", "IPNDMScheduler", "KarrasVeScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RFD4ProteinaScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "VQDiffusionScheduler",
)  # fmt: skip
BETA_OPTIONS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale")
FLOW_OPTIONS = (
    "use_flow_sigmas", "shift", "flow_shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "shift_terminal", "invert_sigmas",
)  # fmt: skip
# defaults of a flow, whose networks and pipelines differ
FLOW_DEFAULTS = {
    "prediction_type": "flow_prediction",
    "timestep_spacing": "linspace",
    "set_alpha_to_one": True,
    "skip_prk_steps": True,
    "clip_sample": False,
}
ONLY_WITH_BETAS = (*BETA_OPTIONS, "rescale_betas_zero_snr", "variance_type", "interpolation_type", "timestep_type")


def is_flow(config: Mapping[str, object]) -> bool:
    """Whether a configuration is that of flow matching."""
    return bool(config.get("use_flow_sigmas")) or config.get("shift") is not None


@functools.cache
def _options_of(name: str) -> frozenset[str]:
    """The options of a scheduler of Diffusers; none where it lacks a package."""
    parameters = inspect.signature(getattr(diffusers, name)).parameters.values() if hasattr(diffusers, name) else ()
    return frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def class_of(config: Mapping[str, Any]) -> str | None:
    """
    The class that a configuration belongs to. One in memory does not name it, but has exactly its options, which are the same
    for Heun of flow matching and of flow maps: there it is the former.
    """
    if "_class_name" in config:
        return config["_class_name"]
    options = frozenset(name for name in config if not name.startswith("_"))
    names = (*FLOW_CLASSES, *OTHER_PROCESSES, "CogVideoXDDIMScheduler")
    return next((name for name in names if options and _options_of(name) == options), None)


def read_process(config: dict[str, Any], overrides: dict[str, Any], cls: type) -> dict[str, Any]:
    """
    A configuration of any scheduler, complete for ``cls``: what its class implies is said, what its process does not read is
    left out.

    Raises:
        ValueError: for a class of Diffusers whose process is none of ours.
    """
    name, config = class_of(config), dict(config)
    if name in OTHER_PROCESSES:
        raise ValueError(
            f"{name} has a noise process that {cls.__name__} does not have; supported are configurations with betas, and of "
            f"flow matching ({', '.join(FLOW_CLASSES[:2])}, or use_flow_sigmas=True)"
        )
    defaults = set(config.get("_use_default_values", ()))
    if str(name).startswith("CogVideoX"):
        config.setdefault("snr_shift_scale", 3.0)
        defaults.discard("snr_shift_scale")
    if name in FLOW_CLASSES:
        config.setdefault("shift", 1.0)
    if is_flow(config):
        defaults -= {"shift", "use_flow_sigmas"}
        if new := [overrides[option] for option in ("shift", "flow_shift") if option in overrides]:
            config |= {"shift": new[0], "flow_shift": new[0]}
    elif is_flow(overrides):
        unread = {"prediction_type", *(option for option in FLOW_DEFAULTS if option in defaults)}
        config = {option: value for option, value in config.items() if option not in unread}
    if is_flow({**config, **overrides}):
        config = {option: value for option, value in config.items() if option not in ONLY_WITH_BETAS}
    elif config.get("flow_shift") != DEFAULTS.get("flow_shift"):
        config.pop("flow_shift", None)
    return {**config, "_use_default_values": [option for option in defaults if option in config]}


def settle_flow(scheduler: Any) -> None:
    """
    Complete the configuration of a flow. ``use_flow_sigmas`` stays as it is: pipelines of Flux that find it true keep the
    sigmas to themselves that they give to other schedulers.

    Raises:
        ValueError: for options that only betas have, or, without a flow, that only a flow has.
    """
    c, signature = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    defaults = {name: p.default for name, p in signature.items() if name != "self"}
    given = [name for name in defaults if name != "trained_betas" and c[name] != defaults[name]]
    given += ["trained_betas"] if c.trained_betas is not None else []  # which may be an array
    if not is_flow(c):
        for name in FLOW_OPTIONS:
            if name in given:
                raise ValueError(f"{name}={c[name]!r} is an option of a flow; set use_flow_sigmas=True, or leave it out")
        return
    for name in ONLY_WITH_BETAS:
        if name in given:
            raise ValueError(
                f"{name}={c[name]!r} is an option of betas, which a flow (use_flow_sigmas={c.use_flow_sigmas}, "
                f"shift={c.shift}) does not have; leave it out"
            )
    if {"shift", "flow_shift"} <= set(given) and c.shift != c.flow_shift:
        raise ValueError(f"shift={c.shift} and flow_shift={c.flow_shift} are two names of one option; give one of them")
    left_out = set(c.get("_use_default_values", ()))
    completed = {name: value for name, value in FLOW_DEFAULTS.items() if name in signature and name in left_out}
    shift = c.flow_shift if c.shift is None else c.shift
    completed |= {"shift": shift, "flow_shift": shift}
    travel = {*completed, *FLOW_OPTIONS, "num_train_timesteps"}  # even where they were left at their defaults
    scheduler.register_to_config(**completed, _use_default_values=sorted(left_out - travel))


def flow_process(config: Any) -> Flow:
    """The flow of a configuration; with `epsilon`, which says nothing about x_0 at α = 0, it starts a little below."""
    return Flow(
        config.num_train_timesteps,
        config.shift,
        dynamic=config.use_dynamic_shifting,
        time_shift_type=config.time_shift_type,
        terminal=config.shift_terminal,
        inverted=config.invert_sigmas,
        zero_signal=config.prediction_type != "epsilon",
    )
