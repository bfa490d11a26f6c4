"""When a bridge to references may stand for a network."""

import torch

from .schrodinger_bridge import BridgeCoupling, BridgeState, SchrodingerBridgeSolver


class GatedBridge:
    """
    The bridge over the steps of one call, open while the noise is high: where few references explain a sample, its projection
    would copy them, so from there on the bridge stays shut.

    Args:
        solver: couples samples with references.
        gate: least median of the effective references.
        until: σ̂ at which the bridge shuts in any case.

    Attributes:
        effective_references: their medians at every level that was coupled, the one that shut it included.
        kernel_applications: products with the kernel, over all levels.
    """

    def __init__(self, solver: SchrodingerBridgeSolver, gate: float, until: float = 0.0):
        self.solver, self.gate, self.until = solver, gate, until
        self.is_open, self.effective_references, self.kernel_applications = True, [], 0
        self._state = BridgeState()

    def couple(self, particles: torch.Tensor, alpha: float, sigma: float) -> BridgeCoupling | None:
        """The coupling of samples ``x = alpha · x_0 + sigma · ε``; ``None`` once the bridge is shut."""
        if not self.is_open:
            return None
        coupling = self.solver.couple(particles, alpha, sigma, self._state)
        self._state = coupling.state
        self.kernel_applications += coupling.kernel_applications
        self.effective_references.append(coupling.median_effective_references)
        self.is_open = self.effective_references[-1] >= self.gate and sigma > self.until * alpha
        return coupling if self.is_open else None
