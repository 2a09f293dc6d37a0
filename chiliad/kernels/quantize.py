"""Rounding weights to few bits; the same for every implementation of the kernels.

int8: the largest magnitude of a group becomes level 127. int4: a grid of scales around
(max - min) / 15; each rounds the group to levels, fits scale and minimum to them by least squares,
and the one with the smallest squared error stays. Gaussian weights keep a relative error of .0713,
where the plain range of each group (GGUF's Q4_1) leaves .0782. Weights that were int8 or int4 before come
back as they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chiliad.errors import KernelError
from chiliad.kernels.base import GROUP, QuantizedWeight, Tensor

_CHUNK = 1000  # groups at a time: temporaries stay in cache, and torch does not wake threads for them
_ROUND = 1.5 * 2**23  # added, it leaves no bits for fractions; `round` would wake threads too
_STEPS = (0.0, -1.4, -0.7, 0.7, 1.4, 2.1)  # steps between the extremes of a group, beyond 15


def quantize(weight: Tensor, dtype: str) -> QuantizedWeight:
    """weight: [out, in] of any float type, dtype "int8" or "int4" -> levels, scales and minima."""
    if dtype not in ("int8", "int4"):
        raise KernelError(f"cannot quantise to {dtype}")
    out, width = weight.shape
    groups = F.pad(weight, (0, -width % GROUP)).view(-1, GROUP)
    levels = torch.empty(groups.shape, dtype=torch.int8 if dtype == "int8" else torch.uint8)
    scale = torch.empty(len(groups), dtype=torch.float16)
    minimum = torch.empty_like(scale) if dtype == "int4" else None
    for start in range(0, len(groups), _CHUNK):
        part = slice(start, start + _CHUNK)
        x = groups[part].float().T.contiguous()  # groups side by side: sums over them are of whole vectors
        if minimum is None:
            q, scale[part] = _int8(x)
        else:
            q, scale[part], minimum[part] = _int4(x)
        levels[part] = q.T
    per_row = (out, -1)
    return QuantizedWeight(
        levels.view(per_row)[:, :width].contiguous(),
        scale.view(per_row),
        None if minimum is None else minimum.view(per_row),
    )


def _half(x: Tensor) -> Tensor:
    """Rounded to what float16 holds, and finite."""
    return x.clamp(-65504, 65504).half().float()


def _levels(x: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """x / scale in whole numbers; 0 where the scale is."""
    q = (x * torch.where(scale == 0, 0, 1 / scale)).clamp_(lowest, highest)
    return q.add_(_ROUND).sub_(_ROUND)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [32, groups]."""
    scale = _half(x.abs().amax(0) / 127)
    return _levels(x, scale, -127, 127), scale


def _int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [32, groups]."""
    low, high = x.amin(0), x.amax(0)
    best_scale, best_minimum = _half((high - low) / 15), _half(low)
    best = torch.full_like(low, float("inf"))
    centred = x - low
    total, squares = centred.sum(0), (centred * centred).sum(0)
    for step in _STEPS:
        q = _levels(centred, (high - low) / (15 + step), 0, 15)
        # the line through (q, x - low) with the least squared error
        sum_q, sum_qq, sum_qx = q.sum(0), (q * q).sum(0), (q * centred).sum(0)
        spread = GROUP * sum_qq - sum_q * sum_q
        scale = _half(torch.where(spread == 0, 0, (GROUP * sum_qx - sum_q * total) / spread))
        minimum = _half(low + (total - scale * sum_q) / GROUP)
        b = minimum - low
        error = squares + scale * (scale * sum_qq + 2 * (b * sum_q - sum_qx)) + b * (GROUP * b - 2 * total)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return _levels(x - best_minimum, best_scale, 0, 15), best_scale, best_minimum
