"""Objectives by the names that recipes have for them."""

from ..config import TrainingConfig
from .bridge_objectives import BridgeFitting, BridgeMatching
from .objectives import Denoising, FlowMatching, Objective

OBJECTIVES = {"denoising": Denoising, "flow_matching": FlowMatching, "bridge_matching": BridgeMatching}


def objective_class(config: TrainingConfig) -> type[Objective]:
    """The objective of a recipe; a bridge in passes has its own."""
    return BridgeFitting if config.bridge_passes else OBJECTIVES[config.objective]
