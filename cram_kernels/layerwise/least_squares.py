"""Least squares under a mask, from sums of products that are streamed."""

from collections.abc import Iterator

import torch
from torch import Tensor

RIDGE = 1e-3  # times the mean square of the inputs: how strongly the old weights hold
CHUNK = 2**23  # elements of the systems that are factored at once: 64 MiB in float64, for each of four intermediate results


class Moments:
    """Sums over rows x [groups, n, in], y [groups, n, out], in float64: 8 * groups * in * (in + out) bytes.

    They are taken about the mean of the first rows, so that a mean that is large beside the spread costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0

    @property
    def bytes(self) -> int:
        return self.xx.nbytes + self.xy.nbytes if self.n else 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.shape[1] == 0:
            return
        if self.n == 0:
            self.origin_x, self.origin_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
            self.sum_x, self.sum_y = torch.zeros_like(x[:, 0]), torch.zeros_like(y[:, 0])
            self.xx = x.new_zeros(len(x), x.shape[2], x.shape[2])
            self.xy = x.new_zeros(len(x), x.shape[2], y.shape[2])
            self.yy = torch.zeros_like(self.sum_y)
        x, y = x - self.origin_x, y - self.origin_y
        self.n += x.shape[1]
        self.sum_x += x.sum(1)
        self.sum_y += y.sum(1)
        self.xx.baddbmm_(x.mT, x)
        self.xy.baddbmm_(x.mT, y)
        self.yy += y.square().sum(1)

    def finish(self, intercept: bool) -> None:
        """Set the means; refer xx, xy, yy to them with an intercept, else to zero."""
        self.intercept = intercept
        mean_x, mean_y = self.sum_x / self.n, self.sum_y / self.n
        self.mean_x, self.mean_y = mean_x + self.origin_x[:, 0], mean_y + self.origin_y[:, 0]
        self.spread = self.yy - self.n * mean_y.square()  # of y about its mean
        shift = [(mean_x, mean_y, -self.n)] + ([] if intercept else [(self.mean_x, self.mean_y, self.n)])
        for a, b, n in shift:
            self.xx += n * a[:, :, None] * a[:, None, :]
            self.xy += n * a[:, :, None] * b[:, None, :]
            self.yy += n * b.square()

    def error(self, w: Tensor, bias: Tensor, part: slice) -> float:
        """Of finished moments: |y - x w' - bias|^2 of the columns `part` of y, relative to that of the mean of y.

        w [groups, part, in], bias [groups, part].
        """
        squares = self.yy[:, part] - 2 * (w * self.xy[:, :, part].mT).sum(2) + (w @ self.xx * w).sum(2)
        if self.intercept:
            squares += self.n * (bias + (w @ self.mean_x[:, :, None])[:, :, 0] - self.mean_y[:, part]).square()
        missed, spread = float(squares.sum().clamp(min=0)), float(self.spread[:, part].sum())
        return missed / spread if spread > 0 else float(missed > 0)


def solve(xx: Tensor, xy: Tensor, w: Tensor) -> Tensor:
    """`w_S = (xx_SS + e I)^-1 (xy_S + e w_S)` for every row of w [groups, out, in], S where it is not zero, e = RIDGE * mean(diag xx).

    Rows of about equal counts are factored in one batch; where no weight is zero, one factor serves all. Weights of constant inputs stay.
    """
    ridge = RIDGE * xx.diagonal(dim1=1, dim2=2).mean(1)  # [groups]
    right = xy.mT + ridge[:, None, None] * w  # [groups, out, in]
    live = ridge > 0
    new = w.clone()
    identity = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
    kept = w != 0
    if kept.all():
        factor = torch.linalg.cholesky(xx[live] + ridge[live, None, None] * identity)
        new[live] = torch.cholesky_solve(right[live].mT, factor).mT
        return new
    for group, row, places, valid in _batches(kept & live[:, None, None]):
        pairs = valid[:, :, None] & valid[:, None, :]
        unit = torch.eye(places.shape[1], dtype=w.dtype, device=w.device)
        system = xx[group[:, None, None], places[:, :, None], places[:, None, :]]
        system = torch.where(pairs, system, 0) + unit * torch.where(valid, ridge[group, None], 1)[:, None, :]
        rhs = torch.where(valid, right[group[:, None], row[:, None], places], 0)
        solution = torch.cholesky_solve(rhs[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        old = w[group[:, None], row[:, None], places]  # zero where a place is not valid
        new[group[:, None], row[:, None], places] = torch.where(valid, solution, old)
    return new


def _batches(kept: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows of kept [groups, out, in] of about equal count: group [r], row [r], places [r, most], of which `valid` [r, most] are kept."""
    counts = kept.sum(2).flatten()
    order = counts.argsort(descending=True)
    order = order[counts[order] > 0]
    while len(order):
        most = int(counts[order[0]])
        size = max(1, CHUNK // most**2)
        batch, order = order[:size], order[size:]
        group, row = batch // kept.shape[1], batch % kept.shape[1]
        mask = kept[group, row]
        places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        yield group, row, places, mask.gather(1, places)
