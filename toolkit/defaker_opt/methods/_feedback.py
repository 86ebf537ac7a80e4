"""Column by column, each rounding error made up for by the columns that are still to come.

Frantar et al. 2022 (GPTQ), algorithm 1: with U the upper factor of H⁻¹ = Uᵀ U, rounding column q by e changes the later
columns by -e U[q, q:] / U[q, q], which is the least-squares answer given all columns up to q.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from defaker_opt.methods import Doubles, QuantizedWeight, Scheme
from defaker_opt.methods._grids import Grid, as_weight, codes_on, grouped, searched_grid, unit_of

# Columns whose errors are handed on at once to all later blocks; a matter of speed only.
_BLOCK = 128


def damped(hessian: Doubles, damping: float) -> Doubles:
    """The Hessian [in, in] with a share of its mean diagonal added; inputs that are always zero are tied to nothing."""
    diagonal = np.diagonal(hessian)
    mean = float(diagonal.mean()) or 1.0
    whole = hessian + damping * mean * np.eye(len(hessian))
    dead = np.flatnonzero(diagonal == 0)
    whole[dead, dead] = mean
    return whole


def quantize_columns(weight: Doubles, hessian: Doubles, scheme: Scheme, largest_first: str) -> QuantizedWeight:
    """Quantize weight [out, in] so that its products with inputs of this (damped) Hessian change least.

    largest_first: "activation" takes columns by the size of their inputs, with grids of the weights as they came;
    "natural" takes them in order, and a group's grid is chosen for its weights as they are when it begins.
    """
    columns = weight.shape[1]
    importance = np.diagonal(hessian)
    size = scheme.group_size or columns
    by_group = importance.reshape(-1, size)
    if largest_first == "natural":
        factor = inverse_factor(hessian)
        return _sweep(weight.copy(), factor, np.arange(columns), None, by_group, scheme)
    order = np.argsort(-importance, kind="stable")
    grid = searched_grid(grouped(weight.astype(np.float32), scheme), scheme, by_group)
    factor = inverse_factor(hessian[np.ix_(order, order)])
    return _sweep(weight[:, order], factor, order, grid, by_group, scheme)


def inverse_factor(hessian: Doubles) -> Doubles:
    """U [in, in], upper, with H⁻¹ = Uᵀ U; without ever inverting H, which would square its condition."""
    # With rows and columns reversed, H = L Lᵀ; turned back, L becomes an upper V with H = V Vᵀ, and U = V⁻¹.
    lower = cholesky(hessian[::-1, ::-1], lower=True)
    upper: Doubles = solve_triangular(lower[::-1, ::-1], np.eye(len(hessian)), lower=False)
    return upper


def _sweep(
    weight: Doubles, factor: Doubles, order: np.ndarray, grid: Grid | None, importance: Doubles, scheme: Scheme
) -> QuantizedWeight:
    """Columns of `weight` are in the order of `factor`, `order` says which each is; it is changed. grid: None to choose
    each group's when it begins.
    """
    rows, columns = weight.shape
    size = scheme.group_size or columns
    groups = columns // size
    scale, zero = np.ones((rows, groups), np.float32), np.zeros((rows, groups), np.float32)
    chosen = grid or Grid(scale, zero, unit_of(weight.astype(np.float32), scheme))
    codes = np.zeros((rows, columns), np.float32)
    # A block ends where a group does, or a group's grid would be chosen before all errors have reached it.
    block = _BLOCK if size >= _BLOCK and size % _BLOCK == 0 else size * max(1, _BLOCK // size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.zeros((rows, stop - start))
        for column in range(start, stop):
            group = int(order[column]) // size
            if grid is None and column % size == 0:
                # A group as long as several blocks begins when earlier blocks are done; later ones change it no more.
                values = weight[:, column : column + size].astype(np.float32)
                fitted = searched_grid(values, scheme, importance[group], chosen.unit)
                chosen.scale[:, group], chosen.zero[:, group] = fitted.scale, fitted.zero
            here = chosen.column(group)
            value = weight[:, column]
            code = codes_on(value.astype(np.float32)[:, None], here, scheme)[:, 0]
            codes[:, order[column]] = code
            kept = (code - here.zero).astype(np.float64) * here.scale
            errors[:, column - start] = (value - kept) / factor[column, column]
            weight[:, column:stop] -= np.outer(errors[:, column - start], factor[column, column:stop])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return as_weight(codes.reshape(rows, groups, size), chosen, scheme)
