"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest.

The update of a matrix is its Nesterov momentum made nearly orthogonal: by five quintic polynomials,
each the best for what the one before leaves (Polar Express, Amsel et al. 2025, arXiv:2505.16932),
over all matrices of one shape at once. NorMuon (Li et al. 2025, arXiv:2510.05491) then normalises
the rows of the update, which belong to one neuron each.

`torch.optim.Muon` orthogonalises one matrix after the other by one fixed quintic
polynomial. Here matrices of one shape are one batched matmul, ranks share them, FSDP parts are
gathered, and a step with NaN is skipped on the device.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp import as_part_of, cut, local, whole

ROW_DECAY = 0.95  # of NorMuon's mean of squares, as in its paper
SLACK = 1.02  # for singular values that rounding takes above 1, where the polynomials run away
POLYNOMIALS = (  # a x + b x³ + c x⁵ of singular values: from 0.001 on they end in 0.85 … 1.15
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Tensor) -> Tensor:
    """(n, rows, columns), rows ≤ columns -> nearly U Vᵀ of each, in the same precision."""
    x = matrices / (SLACK * matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        if not x.is_cuda:
            x = a * x + (b * square + c * (square @ square)) @ x
            continue
        # (a I + b S + c S²) x in fewer passes over memory; `baddbmm` would copy x to add it
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = polynomial @ x
    return x


def nesterov(  # noqa: PLR0917 - one kernel
    mean: Tensor, grad: Tensor, momentum: Tensor, skip: Tensor, scale: Tensor, to: torch.dtype
) -> Tensor:
    """Nesterov momentum of gradient / scale; updates the running mean unless skip > 0.

    `momentum`, `skip` and `scale` are () tensors: a number would compile anew for each value.
    """
    grad = torch.where(skip > 0, 0.0, grad / scale)
    new = torch.where(skip > 0, mean, mean.lerp(grad, 1 - momentum))
    mean.copy_(new)
    ahead = grad.lerp(new, momentum)
    return ahead.to(to)


def normalise_rows(update: Tensor, squares: Tensor, skip: Tensor) -> Tensor:
    """NorMuon: divides each row by the root of its running mean of squares.

    Each matrix keeps its norm. The paper scales to 0.2 √(rows · columns) instead, which would give
    `muon_lr` another meaning than in Muon.

    Args:
        update: (matrices, rows, columns).
        squares: (matrices, rows, 1) running mean of squares, updated unless skip > 0.
        skip: ().
    """
    exact = update.to(squares.dtype)
    new = squares.lerp(exact.square().mean(-1, keepdim=True), 1 - ROW_DECAY)
    new = torch.where(skip > 0, squares, new)
    squares.copy_(new)
    normalised = exact / (new.sqrt() + 1e-8)
    before, after = (m.norm(dim=(-2, -1), keepdim=True) for m in (exact, normalised))
    return normalised * (before / (after + 1e-8))


def row_factors(update: Tensor, squares: Tensor, skip: Tensor) -> Tensor:
    """`normalise_rows` as a factor of each row: reads the update once, and writes no copy of it.

    The norm of a matrix follows from the sums of its rows.

    Args:
        update: (matrices, rows, columns).
        squares: (matrices, rows, 1) running mean of squares, updated unless skip > 0.
        skip: ().

    Returns:
        (matrices, rows, 1).
    """
    own = update.to(squares.dtype).square().mean(-1, keepdim=True)
    new = squares.lerp(own, 1 - ROW_DECAY)
    new = torch.where(skip > 0, squares, new)
    squares.copy_(new)
    factors = 1 / (new.sqrt() + 1e-8)
    before, after = (m.sum(dim=1, keepdim=True).sqrt() for m in (own, own * factors.square()))
    return factors * (before / (after + 1e-8))


def apply(  # noqa: PLR0917 - one kernel
    p: Tensor, update: Tensor, factors: Tensor, keep: Tensor, rate: Tensor, skip: Tensor
) -> None:
    """p ← keep · p - rate · factors · update unless skip > 0.

    Args:
        p: (rows, columns).
        update: (rows, columns).
        factors: of the rows, (rows, 1) or ().
        keep: ().
        rate: ().
        skip: ().
    """
    step = rate * factors * update.to(p.dtype)
    p.copy_(torch.where(skip > 0, p, keep * p - step))


@functools.cache
def _compiled(function: Callable) -> Callable:
    """One kernel on a GPU, or few, for each shape: sums of unknown length would be slow."""
    return torch.compile(function, dynamic=False)


class MuonAndAdamW(torch.optim.AdamW):
    """Muon for the groups with `parts`, AdamW for the others.

    Args:
        groups: `parts`: how many matrices stand one above the other in each parameter (queries,
            keys and values: 3); `momentum`; `normuon`: whether rows are normalised.
        all_sum: sums a tensor over ranks in place; each rank orthogonalises its share.
        rank: of this process.
        world_size: ranks.
        compiled: whether its parts are compiled.
        precision: of `orthogonalise`: float32, or bf16, which is enough; the range of float16 is
            not.
        **settings: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        all_sum: Callable[[Tensor], Tensor],
        rank: int,
        world_size: int,
        compiled: bool,
        precision: torch.dtype,
        **settings: Any,
    ) -> None:
        super().__init__(groups, **settings)
        self.all_sum, self.rank, self.world_size = all_sum, rank, world_size
        self.precision = precision
        prepare = _compiled if compiled else lambda function: function
        self.nesterov: Callable[..., Tensor] = prepare(nesterov)
        self.row_factors = _compiled(row_factors) if compiled else None
        self.apply: Callable[..., None] = prepare(apply)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, with gradients divided by `grad_scale`; none where `found_inf` is 1.

        `train/step.py` sets both attributes, as `GradScaler` does for fused optimizers.
        """
        assert closure is None
        groups = self.param_groups
        self._step_muon([group for group in groups if "parts" in group])
        try:
            self.param_groups = [group for group in groups if "parts" not in group]
            super().step()
        finally:
            self.param_groups = groups

    def _step_muon(self, groups: list[dict]) -> None:
        number = functools.cache(lambda value, device: torch.full((), value, device=device))
        by_shape: dict[tuple[int, int], list[tuple[Tensor, dict]]] = defaultdict(list)
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    rows, columns = p.shape[0] // group["parts"], p.shape[1]
                    by_shape[min(rows, columns), max(rows, columns)].append((p, group))
        for members in by_shape.values():  # no more than one shape at a time is held whole
            matrices = [
                matrix
                for p, group in members
                for matrix in self._momentum(p, group, number).chunk(group["parts"])
            ]
            wide = torch.stack([m if m.shape[0] <= m.shape[1] else m.mT for m in matrices])
            updates, at = self._share(wide), 0
            for p, group in members:
                update = updates[at : at + group["parts"]]
                update = update if matrices[at].shape[0] <= matrices[at].shape[1] else update.mT
                update, factors = self._normalise_rows(p, update, group, number)
                self._apply(p, update.flatten(0, 1), factors, group, number)
                at += group["parts"]

    def _momentum(self, p: Tensor, group: dict, number: Callable) -> Tensor:
        """Nesterov momentum of a parameter, whole on every rank; updates the running mean."""
        state = self.state[p]
        if not state:  # "step" is what AdamW's loading of states looks for
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(p)
        mean, grad = local(state["momentum"]), local(p.grad)
        momentum, skip = number(group["momentum"], p.device), self._skip(number, p)
        scale = self._from_loop("grad_scale", 1.0, number, p)
        ahead = self.nesterov(mean, grad, momentum, skip, scale, self.precision)
        return whole(as_part_of(ahead, p))

    def _normalise_rows(
        self, p: Tensor, update: Tensor, group: dict, number: Callable
    ) -> tuple[Tensor, Tensor]:
        """(update, factors of its rows); every rank holds the mean of squares of all rows."""
        if not group["normuon"]:
            return update, number(1.0, p.device)
        state, skip = self.state[p], self._skip(number, p)
        if "squares" not in state:
            state["squares"] = update.new_zeros(*update.shape[:2], 1, dtype=p.dtype)
        if self.row_factors is None:
            update = normalise_rows(update.contiguous(), state["squares"], skip)
            return update, number(1.0, p.device)
        return update, self.row_factors(update, state["squares"], skip).flatten(0, 1)

    def _skip(self, number: Callable, p: Tensor) -> Tensor:
        return self._from_loop("found_inf", 0.0, number, p)

    def _from_loop(self, name: str, otherwise: float, number: Callable, p: Tensor) -> Tensor:
        """A () tensor that `train/step.py` may have set, else a constant."""
        found = getattr(self, name, None)
        return number(otherwise, p.device) if found is None else found

    def _share(self, stack: Tensor) -> Tensor:
        """Orthogonalises this rank's share of a stack; an all-reduce gives every rank all."""
        if self.world_size == 1:
            return orthogonalise(stack)
        each = -(-len(stack) // self.world_size)
        mine = slice(self.rank * each, min(len(stack), (self.rank + 1) * each))
        update = torch.zeros_like(stack)
        if len(stack[mine]):
            update[mine] = orthogonalise(stack[mine])
        return self.all_sum(update)

    def _apply(
        self, p: Tensor, update: Tensor, factors: Tensor, group: dict, number: Callable
    ) -> None:
        """p ← (1 - lr·decay) p - lr √max(1, rows/columns) factors · update; of p maybe a part."""
        rows, columns = p.shape[0] // group["parts"], p.shape[1]
        keep = number(1 - group["lr"] * group["weight_decay"], p.device)
        rate = number(group["lr"] * max(1.0, rows / columns) ** 0.5, p.device)
        own = cut(factors, p) if factors.ndim else factors
        self.apply(local(p), cut(update, p), own, keep, rate, self._skip(number, p))
