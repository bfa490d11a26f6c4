"""The options that samplers share, and how a constructor takes them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, get_args

from diffusers.configuration_utils import register_to_config
from typing_extensions import Unpack

__all__ = ["DEFAULTS", "SchedulerOptions", "SigmaOptions", "Unpack", "extend_config", "takes_options"]

Init = TypeVar("Init", bound=Callable[..., None])


class SchedulerOptions(TypedDict, total=False):
    """
    Options of every sampler, besides T, the betas, and those whose defaults differ between samplers.

    Args:
        prediction_type: `epsilon`, `sample`, `v_prediction` (α ε − σ x_0) or `flow_prediction` (ε − x_0).
        steps_offset: added to `leading` timesteps.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas: grid of σ̂ instead of a spacing of
            the training timesteps; at most one.
        sigma_min, sigma_max: ends of that grid; by default those of the training process.
        final_sigmas_type: where the last step ends: `zero` (clean data) or `sigma_min` (training timestep 0).
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv 2305.08891, algorithm 1).
        clip_sample_range: of ``clip_sample``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: clamp it to a quantile of its own absolute values and
            rescale (Imagen, arXiv 2205.11487). Takes precedence over ``clip_sample``, as in Diffusers.
        snr_shift_scale: k of ᾱ ← ᾱ/(k + (1 − k)ᾱ) (CogVideoX); becomes ``trained_betas``.
        use_flow_sigmas: flow matching.
        shift, flow_shift: k of the flow's ``s ← ks/(1 + (k − 1)s)``, under two names.
        use_dynamic_shifting, time_shift_type: shift by ``set_timesteps(mu=...)`` instead, `exponential` or `linear`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: μ of the shortest and the longest sequence of tokens.
        shift_terminal: stretch the flow's sigmas so that this is the last one.
        invert_sigmas: count the flow's sigmas and timesteps from noise to data (Mochi).
        stochastic_sampling: end every step at ``α' x_0 + σ' z`` with fresh noise; samplers with a memory refuse it.
    """

    prediction_type: str
    steps_offset: int
    use_karras_sigmas: bool
    use_exponential_sigmas: bool
    use_beta_sigmas: bool
    use_lu_lambdas: bool
    sigma_min: float | None
    sigma_max: float | None
    final_sigmas_type: str
    rescale_betas_zero_snr: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    snr_shift_scale: float
    use_flow_sigmas: bool
    shift: float | None
    flow_shift: float
    use_dynamic_shifting: bool
    time_shift_type: str
    base_shift: float | None
    max_shift: float | None
    base_image_seq_len: int
    max_image_seq_len: int
    shift_terminal: float | None
    invert_sigmas: bool
    stochastic_sampling: bool


class SigmaOptions(SchedulerOptions, total=False):
    """
    Options of every sampler in VE coordinates.

    Args:
        interpolation_type: σ̂ at a fractional timestep: `linear`, or `log_linear` for σ̂ evenly spaced in log σ̂ whatever
            the timesteps, as Diffusers has it.
        timestep_type: `discrete`, or `continuous` for networks with ``v_prediction`` that are given ¼ log σ̂.
        Others: see :class:`SchedulerOptions`.
    """

    interpolation_type: str
    timestep_type: str


DEFAULTS: SigmaOptions = {
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "sigma_min": None,
    "sigma_max": None,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "snr_shift_scale": 1.0,
    "use_flow_sigmas": False,
    "shift": None,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}


def takes_options(init: Init) -> Init:
    """
    Decorate an ``__init__`` that ends in ``**options: Unpack[SchedulerOptions]``: its arguments and the options make the
    configuration.
    """
    *own, options = inspect.signature(init).parameters.values()
    types = get_args(options.annotation)[0].__annotations__
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
        if name in types
    ]
    return _registered(init, inspect.Signature([*own, *shared]))


def _registered(init: Any, signature: inspect.Signature) -> Any:
    """``init`` with another signature, whose arguments are the configuration; it is given all of them."""

    @functools.wraps(init)
    def registered(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(scheduler, *args, **kwargs)
        bound.apply_defaults()
        init(**bound.arguments)

    wrapper: Any = registered
    wrapper.__signature__ = signature
    return register_to_config(wrapper)


class extend_config:
    """
    Decorate the ``__init__`` of a sampler of one's own that adds options to its base class, or changes defaults of it::

        class Mine(AtlasDDIMScheduler):
            @extend_config
            def __init__(self, strength: float = 1.0):
                pass

    takes the arguments of :class:`AtlasDDIMScheduler` and ``strength``, and has all of them in its configuration. The body
    runs before the base is set up, with its own arguments only.
    """

    def __init__(self, init: Callable[..., None]):
        self.init = init

    def __set_name__(self, owner: type, name: str) -> None:
        init = self.init
        own = list(inspect.signature(init).parameters.values())[1:]
        merged = {**inspect.signature(super(owner, owner).__init__).parameters, **{p.name: p for p in own}}
        signature = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in merged.values()])

        @functools.wraps(self.init)
        def extended(self: Any, **options: Any) -> None:
            init(self, **{p.name: options[p.name] for p in own})
            self._setup()

        setattr(owner, name, _registered(extended, signature))
