"""Optimisers that a recipe names."""

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.99)


def named_weights(networks: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Weights that train, by the name of their network and their own."""
    named = {f"{part}.{name}": p for part, module in networks.items() for name, p in module.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon for the matrices of linear layers, AdamW for everything else (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

    Muon's steps are orthogonalised momentum, of the size that AdamW's have, so both take one learning rate.

    Args:
        matrices: weights of linear layers, (outputs, inputs).
        others: embeddings, biases, convolutions.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float):
        self.parts: list[Any] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of both parts."""
        for part, group in zip(self.parts, self.param_groups):
            # loading a state replaces groups and state
            part.param_groups, part.state = [group], self.state
            part.step()


def build_optimizer(name: str, networks: dict[str, nn.Module], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """
    `adamw`, or `muon` (:class:`MuonAdamW`), over the weights that train.

    Raises:
        ValueError: for `muon` and networks without a linear layer that trains.
    """
    named = named_weights(networks)
    if name == "adamw":
        return torch.optim.AdamW(list(named.values()), lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
    layers = [module for network in networks.values() for module in network.modules() if isinstance(module, nn.Linear)]
    inner = {id(layer.weight) for layer in layers if layer.weight.requires_grad}
    if not inner:
        raise ValueError("optimizer: muon needs linear layers that train; there are none")
    matrices = [p for p in named.values() if id(p) in inner]
    return MuonAdamW(matrices, [p for p in named.values() if id(p) not in inner], lr, weight_decay)
