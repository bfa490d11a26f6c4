"""Which weights which optimiser moves."""

import copy

import pytest
import torch
from conftest import seeded
from torch import nn

from atlas_diffusers.training.optimizers import build_optimizer


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), nn.Conv1d(3, 2, 1), nn.Linear(4, 5)).double()


def gradients(net: nn.Module, step: int) -> None:
    for number, p in enumerate(net.parameters()):
        p.grad = torch.randn(p.shape, generator=seeded(100 * step + number), dtype=p.dtype)


def test_muon_moves_linear_layers_and_adamw_the_rest():
    net = network()
    alone, options = copy.deepcopy(net), {"lr": 0.1, "weight_decay": 0.01}
    others = [alone[0].weight, alone[1].bias, *alone[2].parameters(), alone[3].bias]
    optimizer = build_optimizer("muon", {"unet": net}, **options)
    parts = [
        torch.optim.Muon([alone[1].weight, alone[3].weight], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, betas=(0.9, 0.99), **options),
    ]
    for step in range(3):
        for each in (net, alone):
            gradients(each, step)
        optimizer.step()
        for part in parts:
            part.step()
    for (name, p), q, start in zip(net.named_parameters(), alone.parameters(), network().parameters()):
        torch.testing.assert_close(p, q, msg=name)
        assert not torch.allclose(p, start)


def test_a_loaded_state_goes_on():
    first, second = network(), network()
    one, two = (build_optimizer("muon", {"unet": net}, 0.1, 0.0) for net in (first, second))
    gradients(first, 0)
    one.step()
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for net, optimizer in ((first, one), (second, two)):
        gradients(net, 1)
        optimizer.step()
    for p, q in zip(first.parameters(), second.parameters()):
        assert torch.equal(p, q)


def test_frozen_weights_are_left_alone_and_muon_needs_matrices():
    net = network()
    net[1].requires_grad_(False)
    optimizer = build_optimizer("muon", {"unet": net}, 0.1, 0.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 4]
    net[3].requires_grad_(False)
    with pytest.raises(ValueError, match="needs linear layers that train"):
        build_optimizer("muon", {"unet": net}, 0.1, 0.0)
