"""Entropic optimal transport by Sinkhorn's algorithm, accelerated: between point clouds, and through a kernel operator."""

import math
import warnings
from dataclasses import replace

import torch

from ..kernels import DirectKernel, KernelOperator
from .costs import DEFAULT_MAX_BYTES, Cost, OperatorCost, PointCost
from .fixed_point import FixedPoint, SinkhornMap, Solution
from .implicit import attach
from .inputs import Marginals, Options, check_epsilon, check_init, check_points, check_rho
from .penalties import penalties
from .points import PointSolver
from .sinkhorn_output import SinkhornOutput
from .stabilised import OperatorKernel

VISIBLE_ROUNDING = 1 / 16  # of the tolerance, from which on the error of the plan itself is measured


def entropic_transport(
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float | torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    init: tuple[torch.Tensor | None, torch.Tensor] | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    differentiable: bool = False,
    check_every: int | None = 1,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> SinkhornOutput:
    r"""
    Entropic optimal transport between point clouds with the cost ``C_ij = |x_i − y_j|²``:

        P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε),    Σ_j P_ij = a_i,    Σ_i P_ij = b_j

    Cuturi 2013 (arXiv 1306.0895), in log-domain semantics at the speed of matrix products (Schmitzer 2019, arXiv 1610.06519),
    with Anderson acceleration, a start between Gaussians and annealing of small ε.

    Args:
        x: (..., n, d), float32 or float64.
        y: (..., m, d); leading dimensions broadcast and are solved together.
        epsilon: ε, in the unit of the cost; a number, or a tensor over the leading dimensions.
        a: row weights (..., n), uniform by default; zeros are allowed.
        b: column weights (..., m), of the same total.
        tolerance: L1 error of the row marginal over the total mass; columns are exact. From 1e-5 on the kernel is float32
            where ε allows, below it is float64.
        max_iterations: limit. One iteration is a product with the kernel and one with its transpose, or three such pairs
            where they are tiny.
        init: potentials ``(f, g)`` to start from, such as an output's; ``(None, g)`` takes f from g, for new points x.
        rho: ρ of penalties ``ρ KL(P1 | a)`` and ``ρ KL(Pᵀ1 | b)`` in place of the marginals, in the unit of the cost; of a
            pair, ``None`` keeps that marginal. Chizat et al. 2016 (arXiv 1607.05816).
        differentiable: all outputs carry gradients to x, y, a, b and ε, by implicit differentiation.
        check_every: iterations between reads of the error by the host. ``None`` runs exactly ``max_iterations`` without any
            read, and so without annealing, checks of values or a warning: for a GPU, and ε of at least 0.01 mean cost.
        max_bytes: largest kernel that is stored; blocks of a larger one are computed again for every product, and for
            gradients those that would hold more than this.

    Raises:
        ValueError: for points, weights, ε, ρ, potentials or options out of range.

    Warns:
        UserWarning: naming the error reached, if that is above the tolerance: too few iterations, or an ε so small that
            potentials in float64 do not resolve it, when the error is measured on the plan itself.
    """
    options = Options(tolerance, max_iterations, check_every, max_bytes)
    shape, rho = check_points(x, y), check_rho(rho)
    epsilons, sizes = check_epsilon(epsilon, shape), (x.shape[-2], y.shape[-2])
    flat = [z.expand(*shape, *z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, y)]
    marginals = Marginals.of(a, b, shape, sizes, x.device, rho == (math.inf, math.inf), options.reads)
    start = check_init(init, shape, sizes, x.device, options.reads)
    with torch.no_grad():
        solver = PointSolver(*(z.detach() for z in flat), epsilons, marginals.detach(), rho, options)
        solution, cost = solver.solve(start), solver.cost
        if marginals.has_zeros:
            cost = PointCost(*(z.detach().double() for z in flat), cost.epsilon, marginals.a, marginals.b, max_bytes)
            _extend(solution, cost, marginals, rho)
    if differentiable:
        attached = torch.as_tensor(epsilon, dtype=torch.float64, device=x.device).expand(shape).reshape(-1)
        weights = (marginals.a, marginals.b) if marginals.has_zeros else (None, None)
        cost = PointCost(*(z.double() for z in flat), attached, *weights, max_bytes)
        solution.phi, solution.psi = attach(cost, solution.phi, solution.psi, marginals.a, marginals.b, rho)
    else:
        marginals = marginals.detach()
    return _output(solution, cost, marginals, shape, rho, options, solver.applications, y, y.dtype)


def sinkhorn(
    operator: KernelOperator,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    init: tuple[torch.Tensor | None, torch.Tensor] | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    differentiable: bool = False,
    check_every: int | None = 1,
) -> SinkhornOutput:
    r"""
    Entropic optimal transport through a kernel operator K of shape (n, m), whose cost is ``C = −ε log K``:

        P_ij = a_i b_j e^{f_i/ε} K_ij e^{g_j/ε}

    ε is ``2 h²`` for a gaussian kernel of bandwidth h, so that C is the squared distance; h for a laplacian one, C then being
    the distance; and 1 for any other operator. A gaussian :class:`DirectKernel` is solved by :func:`entropic_transport`.
    Other operators are applied as they are, in float64 if they are grids, and by their logarithmic products, if they have
    them, once potentials leave the range of the dtype.

    Args:
        operator: with entries that are not negative.
        a, b, tolerance, max_iterations, init, rho, check_every: as in :func:`entropic_transport`.
        differentiable: as there; for a gaussian DirectKernel only.

    Raises:
        ValueError: also for an operator with negative entries.
    """
    limits = {"tolerance": tolerance, "max_iterations": max_iterations, "check_every": check_every}
    epsilon = _cost_unit(operator)
    if isinstance(operator, DirectKernel) and operator.kernel == "gaussian" and operator.scale_factors is None:
        limits |= {"init": init, "rho": rho, "differentiable": differentiable, "max_bytes": operator.max_bytes}
        return entropic_transport(operator.x, operator.y, epsilon, a, b, **limits)
    if differentiable:
        raise ValueError(f"differentiable=True needs a gaussian DirectKernel, not {type(operator).__name__}")
    if not operator.is_positive:
        raise ValueError(f"{type(operator).__name__} has negative entries, which Sinkhorn's algorithm cannot scale")
    options, rho = Options(**limits, max_bytes=DEFAULT_MAX_BYTES), check_rho(rho)
    grid = getattr(operator, "points", None)
    points = (grid, grid) if grid is not None and epsilon == 2 * operator.epsilon**2 else None
    balanced = rho == (math.inf, math.inf)
    with torch.no_grad():
        marginals = Marginals.of(a, b, (), operator.shape, operator.device, balanced, options.reads).detach()
        cost = OperatorCost(operator, torch.tensor([epsilon], dtype=torch.float64, device=operator.device), points)
        start = check_init(init, (), operator.shape, operator.device, options.reads)
        kernel, solution = _solve_operator(cost, marginals, start, rho, options)
        if marginals.has_zeros:
            _extend(solution, cost, marginals, rho)
    targets = getattr(operator, "y", grid)
    return _output(solution, cost, marginals, (), rho, options, kernel.applications, targets, operator.dtype)


def _cost_unit(operator: KernelOperator) -> float:
    """ε of ``C = −ε log K``."""
    if getattr(operator, "scale_factors", None) is not None:
        return 1.0
    units = {"gaussian": lambda bandwidth: 2 * bandwidth**2, "laplacian": lambda bandwidth: bandwidth}
    unit = units.get(getattr(operator, "kernel", None))
    return float(unit(operator.epsilon)) if unit else 1.0


def _solve_operator(
    cost: OperatorCost,
    marginals: Marginals,
    start: tuple[torch.Tensor | None, torch.Tensor] | None,
    rho: tuple[float, float],
    options: Options,
) -> tuple[OperatorKernel, Solution]:
    kernel = OperatorKernel(cost, marginals)
    phi, psi = torch.zeros_like(marginals.a), torch.zeros_like(marginals.b)
    none = torch.zeros_like(phi), torch.zeros_like(psi)
    step = SinkhornMap(kernel, marginals.a / marginals.a.sum(-1, keepdim=True), *penalties(rho, cost.epsilon[:, None], none))
    if start is not None:
        f, psi = (None if z is None else z / cost.epsilon[:, None] for z in start)
        if options.reads and rho == (math.inf, math.inf) and float(psi.amax() - psi.amin()) > 2 * kernel.bound:
            f, psi = None, _tamed(kernel, psi)
        phi = step.image(psi) if f is None else f
    solution = FixedPoint(step, options.tolerance, options.max_iterations, options.check_every).solve(phi, psi)
    solution.phi, solution.psi = solution.phi * cost.epsilon[:, None], solution.psi * cost.epsilon[:, None]
    return kernel, solution


def _tamed(kernel: OperatorKernel, psi: torch.Tensor) -> torch.Tensor:
    """
    Column potentials that leave the range of a dtype, after an iteration in logarithms: then they differ by no more than the
    cost does, and lie around 0. As they are where the operator has no logarithmic products.
    """
    try:
        psi = kernel.log_soft_columns(kernel.log_soft_rows(psi))
    except NotImplementedError:
        return psi
    return psi - (psi.amax() + psi.amin()) / 2


def _extend(solution: Solution, cost: Cost, marginals: Marginals, rho: tuple[float, float]) -> None:
    """Potentials of points without weight, from those of the other side."""
    epsilon, (log_a, log_b), (no_a, no_b) = cost.epsilon[:, None], marginals.log(), marginals.negligible()
    row, column = (epsilon / (1 + epsilon / penalty) for penalty in rho)
    f = -row * cost.log_rows(solution.psi / epsilon + log_b)
    g = -column * cost.log_columns(solution.phi / epsilon + log_a)
    solution.phi, solution.psi = torch.where(no_a, f, solution.phi), torch.where(no_b, g, solution.psi)


def _output(
    solution: Solution,
    cost: Cost,
    marginals: Marginals,
    shape: tuple[int, ...],
    rho: tuple[float, float],
    options: Options,
    applications: int,
    targets: torch.Tensor | None,
    dtype: torch.dtype,
) -> SinkhornOutput:
    output = SinkhornOutput(
        f=solution.phi.reshape(*shape, -1),
        g=solution.psi.reshape(*shape, -1),
        a=marginals.a.reshape(*shape, -1),
        b=marginals.b.reshape(*shape, -1),
        epsilon=cost.epsilon.reshape(shape),
        row_error=solution.error.reshape(shape),
        tolerance=options.tolerance,
        iterations=solution.iterations,
        kernel_applications=applications,
        rho=rho,
        geometry=cost,
        targets=targets,
        dtype=dtype,
    )
    return _with_known_error(output) if options.reads else output


def _with_known_error(output: SinkhornOutput) -> SinkhornOutput:
    """The output with an error that its plan has, and a warning if that is above the tolerance."""
    rounding, error = torch.stack((output.rounding.max(), output.row_error.max())).tolist()
    exhausted = rounding > VISIBLE_ROUNDING * output.tolerance
    if exhausted:
        output = replace(output, row_error=output.measured_error.detach())
        error = float(output.row_error.max())
    if not error <= output.tolerance:
        cause = f"has not converged in {output.iterations} iterations"
        remedy = "allow more iterations or a larger epsilon"
        if exhausted:
            cause, remedy = "has used up the precision of float64 potentials", "take a larger epsilon"
        warnings.warn(
            f"Sinkhorn's algorithm {cause}: the marginal error is {error:.2e}, tolerance {output.tolerance:.0e}; {remedy}",
            stacklevel=4,
        )
    return output
