"""A kernel of your own in entropic transport: python -m atlas_diffusers.examples.custom_kernels"""

import torch

from ..kernels import KernelFunction, make_kernel_operator, register_kernel
from ..transport import sinkhorn

SQUARED_CAUCHY = KernelFunction(
    "squared_cauchy", lambda squared, epsilon: -2 * torch.log1p(squared / epsilon**2), cost_unit=lambda epsilon: 1.0
)


def main() -> None:
    """Couple two clouds with the kernel 1/(1 + |x − y|²/ε²)² and print the marginal error."""
    register_kernel(SQUARED_CAUCHY)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2, generator=generator) for n in (200, 300))
    operator = make_kernel_operator(x, y, kernel_type=SQUARED_CAUCHY.name, epsilon=0.5, solver_type="direct")
    output = sinkhorn(operator)
    print(f"{output.iterations} iterations, marginal error {float(output.row_error):.1e}")


if __name__ == "__main__":
    main()
