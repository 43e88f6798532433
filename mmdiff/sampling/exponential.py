"""The integrals behind the multistep solvers: exact weights for a polynomial through past estimates.

In lambda = -ln(sigma) the sampling ODE is dx/dlambda = D - x. Over a step from lambda to lambda + h it gives
x_next = e^(-h) x + int_0^h e^(s - h) D(lambda + s) ds, and what a solver does is to put a polynomial in the place of D.
Sources: arXiv 2211.01095, eq. 8 and 9; arXiv 2302.04867, section 3. Everything here is plain numbers, made on the host.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def moments(h: float, count: int) -> list[float]:
    """Means of s^k, k = 0 .. count - 1, for s in [0, 1] with density proportional to e^(h s). h > 0."""
    if h > 1:  # by parts: int h e^(h (s - 1)) s^k ds = 1 - k / h times that of s^(k - 1)
        integrals = [-math.expm1(-h)]
        for k in range(1, count):
            integrals.append(1 - k / h * integrals[-1])
    else:  # the same subtracts equal numbers there; the power series of e^(h s) has only positive terms
        terms = [h * math.exp(-h) * h**j / math.factorial(j) for j in range(20)]
        integrals = [sum(term / (j + k + 1) for j, term in enumerate(terms)) for k in range(count)]
    return [integral / integrals[0] for integral in integrals]


def falling_moments(h: float, count: int) -> list[float]:
    """The same for a density proportional to e^(-h s)."""
    if h > 1:
        integrals = [-math.expm1(-h)]
        for k in range(1, count):
            integrals.append(k / h * integrals[-1] - math.exp(-h))
    else:
        terms = [h * (-h) ** j / math.factorial(j) for j in range(20)]
        integrals = [sum(term / (j + k + 1) for j, term in enumerate(terms)) for k in range(count)]
    return [integral / integrals[0] for integral in integrals]


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with sum_i w_i p(nodes_i) = sum_k p_k moments_k for every polynomial p of degree < len(nodes)."""
    weights = []
    for i, node in enumerate(nodes):
        polynomial = [1.0]  # its coefficients, lowest first: 1 at this node, 0 at the others
        for other in (other for j, other in enumerate(nodes) if j != i):
            shifted = [0.0, *polynomial]
            polynomial = [
                (up - other * low) / (node - other) for up, low in zip(shifted, [*polynomial, 0.0], strict=True)
            ]
        weights.append(sum(c * m for c, m in zip(polynomial, moments, strict=True)))
    return weights


def combine(estimates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i estimates_i, for weights that sum to 1, so that equal estimates come back unchanged."""
    first, *others = estimates
    total = first
    for other, weight in zip(others, weights[1:], strict=True):
        total = torch.add(total, other - first, alpha=weight)
    return total
