"""
Kernel operators: ``K_ij = k(x_i, y_j)`` as a linear map, exact or approximate. torch only.

One convention: ``epsilon`` is the bandwidth, a length in the unit of the points.

==============  ===================================================================================
``direct``      exact; the matrix is stored if it fits, otherwise computed in blocks
``fft``         between the points of a regular grid: axis by axis, or by FFT
``rff``         random features: positive (for Sinkhorn) or cosine (for regression)
``nystrom``     through landmarks: the choice for broad kernels between very many points
``auto``        the best of these for the points, with the reason
==============  ===================================================================================
"""

from .choice import make_kernel_operator
from .direct import DirectKernel
from .distances import median_bandwidth, squared_distances
from .functions import KERNELS, KernelFunction, ScaledKernel, register_kernel
from .grid import GridKernel
from .nystrom import KernelProbe, NystromKernel
from .operator import KERNEL_OPERATORS, KernelOperator, register_kernel_operator
from .random_features import RandomFeatureKernel

__all__ = [
    "DirectKernel",
    "GridKernel",
    "KERNELS",
    "KERNEL_OPERATORS",
    "KernelFunction",
    "KernelOperator",
    "KernelProbe",
    "NystromKernel",
    "RandomFeatureKernel",
    "ScaledKernel",
    "make_kernel_operator",
    "median_bandwidth",
    "register_kernel",
    "register_kernel_operator",
    "squared_distances",
]
