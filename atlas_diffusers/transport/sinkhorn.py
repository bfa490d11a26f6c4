"""Entropic optimal transport by accelerated Sinkhorn iterations: between points, of a cost matrix, through an operator."""

import math
import warnings
from dataclasses import replace

import torch

from ..kernels import DirectKernel, KernelOperator
from .arrays import in_kind
from .costs import DEFAULT_MAX_BYTES, Cost
from .fixed_point import FixedPoint, SinkhornMap
from .geometry import Clouds, Geometry, Matrix
from .implicit import attach
from .inputs import Init, Marginals, Options, check_epsilon, check_init, check_rho
from .operator_cost import OperatorCost
from .penalties import penalties
from .potentials import Potentials
from .sinkhorn_output import SinkhornOutput
from .small import one_thread
from .solver import Solver
from .stabilised import OperatorKernel

VISIBLE_ROUNDING = 1 / 16  # of the tolerance, from which on the error of the plan itself is measured


@in_kind
def entropic_transport(
    x: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    epsilon: float | torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    cost: torch.Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    init: Init | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    differentiable: bool = False,
    check_every: int | None = 1,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> SinkhornOutput:
    r"""
    Entropic optimal transport between point clouds with the cost ``C_ij = |x_i − y_j|²``, or with a matrix C of costs:

        P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε),    Σ_j P_ij = a_i,    Σ_i P_ij = b_j

    Cuturi 2013 (arXiv 1306.0895), in log-domain semantics at the speed of matrix products (Schmitzer 2019, arXiv 1610.06519),
    with Anderson acceleration, a start between Gaussians and annealing of small ε. NumPy arrays in place of tensors are
    answered with NumPy arrays.

    Args:
        x: (..., n, d), float32 or float64.
        y: (..., m, d); leading dimensions broadcast and are solved together.
        epsilon: ε, in the unit of the cost; a number, or a tensor over the leading dimensions.
        cost: C, (..., n, m), in place of x and y.
        a: row weights (..., n), uniform by default; zeros are allowed.
        b: column weights (..., m), of the same total.
        tolerance: L1 error of the row marginal over the total mass; columns are exact. From 1e-5 on the kernel is float32
            where ε allows, below it is float64.
        max_iterations: limit. One iteration is a product with the kernel and one with its transpose, or up to eight such
            pairs where they are tiny; problems that fit the cache are solved on one thread.
        init: potentials ``(f, g)`` to start from, such as an output's; ``(None, g)`` takes f from g, for new points x.
        rho: ρ of penalties ``ρ KL(P1 | a)`` and ``ρ KL(Pᵀ1 | b)`` in place of the marginals, in the unit of the cost; of a
            pair, ``None`` keeps that marginal. Chizat et al. 2016 (arXiv 1607.05816).
        differentiable: all outputs carry gradients to x, y, cost, a, b and ε, by implicit differentiation.
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
    options, rho = Options(tolerance, max_iterations, check_every, max_bytes), check_rho(rho)
    geometry = _geometry(x, y, cost)
    shape, sizes, device = tuple(geometry.shape), geometry.sizes, geometry.device
    epsilons = check_epsilon(epsilon, shape)
    marginals = Marginals.of(a, b, shape, sizes, device, rho == (math.inf, math.inf), options.reads)
    start = check_init(init, shape, sizes, device, options.reads)
    with torch.no_grad(), one_thread(math.prod(shape) * math.prod(sizes)):
        solver = Solver(geometry.detach(), epsilons, marginals.detach(), rho, options)
        solution, found = solver.solve(start), solver.cost
        weights = (marginals.a, marginals.b) if marginals.has_zeros else (None, None)
        if marginals.has_zeros:
            found = geometry.detach().cost(found.epsilon, max_bytes, True, weights)
            solution = _extended(solution, found, marginals, rho)
    if differentiable:
        attached = torch.as_tensor(epsilon, dtype=torch.float64, device=device).expand(shape).reshape(-1)
        found = geometry.cost(attached, max_bytes, True, weights)
        solution = attach(found, solution, marginals.a, marginals.b, rho)
    else:
        marginals = marginals.detach()
    output = _output(solution, found, marginals, shape, rho, options, solver.applications, geometry.targets, geometry.dtype)
    return _with_known_error(output, solver.rounding) if options.reads else output


def _geometry(x: torch.Tensor | None, y: torch.Tensor | None, cost: torch.Tensor | None) -> Geometry:
    if cost is None and x is not None and y is not None:
        return Clouds(x, y)
    if cost is not None and x is None and y is None:
        return Matrix(cost)
    given = [name for name, value in (("x", x), ("y", y), ("cost", cost)) if value is not None]
    raise ValueError(f"expected points x and y, or a matrix `cost`; got {given or 'neither'}")


def sinkhorn(
    operator: KernelOperator,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    init: Init | None = None,
    rho: float | tuple[float | None, float | None] | None = None,
    differentiable: bool = False,
    check_every: int | None = 1,
) -> SinkhornOutput:
    r"""
    Entropic optimal transport through a kernel operator K of shape (n, m), whose cost is ``C = −ε log K``:

        P_ij = a_i b_j e^{f_i/ε} K_ij e^{g_j/ε}

    ε is the operator's ``cost_unit``: ``2 h²`` for a gaussian kernel of bandwidth h, so that C is the squared distance; h for
    a laplacian one, C then being the distance; and 1 for a cauchy one. An operator that has none is taken to have 1, with a
    warning. A gaussian :class:`DirectKernel` is solved by :func:`entropic_transport`.
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
    if isinstance(operator, DirectKernel) and operator.has_squared_distances:
        limits |= {"init": init, "rho": rho, "differentiable": differentiable, "max_bytes": operator.max_bytes}
        return entropic_transport(operator.x, operator.y, operator.cost_unit, a, b, **limits)
    if differentiable:
        raise ValueError(f"differentiable=True needs a gaussian DirectKernel, not {type(operator).__name__}")
    if not operator.is_positive:
        raise ValueError(f"{type(operator).__name__} has negative entries, which Sinkhorn's algorithm cannot scale")
    options, rho = Options(**limits, max_bytes=DEFAULT_MAX_BYTES), check_rho(rho)
    balanced = rho == (math.inf, math.inf)
    with torch.no_grad():
        marginals = Marginals.of(a, b, (), operator.shape, operator.device, balanced, options.reads).detach()
        cost = OperatorCost(operator, torch.tensor([_cost_unit(operator)], dtype=torch.float64, device=operator.device))
        start = check_init(init, (), operator.shape, operator.device, options.reads)
        kernel, solution = _solve_operator(cost, marginals, start, rho, options)
        if marginals.has_zeros:
            solution = _extended(solution, cost, marginals, rho)
    targets = None if operator.points is None else operator.points[1]
    output = _output(solution, cost, marginals, (), rho, options, kernel.applications, targets, operator.dtype)
    return _with_known_error(output) if options.reads else output


def _cost_unit(operator: KernelOperator) -> float:
    if operator.cost_unit is not None:
        return operator.cost_unit
    name = type(operator).__name__
    warnings.warn(f"{name} says no cost_unit: the cost of transport is −log K, and ε is 1", stacklevel=3)
    return 1.0


def _solve_operator(
    cost: OperatorCost,
    marginals: Marginals,
    start: Init | None,
    rho: tuple[float, float],
    options: Options,
) -> tuple[OperatorKernel, Potentials]:
    kernel = OperatorKernel(cost, marginals)
    phi, psi, epsilon = torch.zeros_like(marginals.a), torch.zeros_like(marginals.b), cost.epsilon[:, None]
    none = torch.zeros_like(phi), torch.zeros_like(psi)
    step = SinkhornMap(kernel, marginals.a / marginals.a.sum(-1, keepdim=True), *penalties(rho, epsilon, none))
    if start is not None:
        f, psi = start[0], start[1] / epsilon
        if options.reads and rho == (math.inf, math.inf) and float(psi.amax() - psi.amin()) > 2 * kernel.bound:
            f, psi = None, _tamed(kernel, psi)
        phi = step.image(psi) if f is None else f / epsilon
    solution = FixedPoint(step, options.tolerance, options.max_iterations, options.check_every).solve(phi, psi)
    return kernel, solution.times(epsilon)


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


def _extended(solution: Potentials, cost: Cost, marginals: Marginals, rho: tuple[float, float]) -> Potentials:
    """With the potentials of points without weight taken from those of the other side."""
    epsilon, (log_a, log_b), (no_a, no_b) = cost.epsilon[:, None], marginals.log(), marginals.negligible()
    row, column = (epsilon / (1 + epsilon / penalty) for penalty in rho)
    f = -row * cost.log_rows(solution.g / epsilon + log_b)
    g = -column * cost.log_columns(solution.f / epsilon + log_a)
    return replace(solution, f=torch.where(no_a, f, solution.f), g=torch.where(no_b, g, solution.g))


def _output(
    solution: Potentials,
    cost: Cost,
    marginals: Marginals,
    shape: tuple[int, ...],
    rho: tuple[float, float],
    options: Options,
    applications: int,
    targets: torch.Tensor | None,
    dtype: torch.dtype,
) -> SinkhornOutput:
    return SinkhornOutput(
        f=solution.f.reshape(*shape, -1),
        g=solution.g.reshape(*shape, -1),
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


def _with_known_error(output: SinkhornOutput, rounding: float = math.inf) -> SinkhornOutput:
    """
    The output with an error that its plan has, and a warning if that is above the tolerance.

    Args:
        output: of a solver that reads its errors.
        rounding: a bound of what the rounding of potentials does to the plan, where one is known.
    """
    if rounding > VISIBLE_ROUNDING * output.tolerance:
        rounding = float(output.rounding.detach().max())
    exhausted = rounding > VISIBLE_ROUNDING * output.tolerance
    if exhausted:
        output = replace(output, row_error=output.measured_error.detach())
    error = float(output.row_error.detach().max())
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
