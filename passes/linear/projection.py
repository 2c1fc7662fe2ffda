"""Projections of a weight onto a cheaper structure, optimal for the inputs it was seen to meet.

Everywhere: weight W [out, in], gram C = E[x xT] [in, in], and the error of an approximation
W + D is tr(D C DT) = E‖D x‖², computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-6


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """float64 gram with `damping` of its mean diagonal added, positive definite."""
    gram = gram.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + (damping * mean).clamp(min=1e-30) * eye


def error(change: Tensor, gram: Tensor) -> Tensor:
    """tr(D C DT) over the last two axes."""
    change = change.double()
    return (change @ gram.double() * change).sum((-2, -1))


def relative_error(change: Tensor, weight: Tensor, gram: Tensor) -> float:
    """E‖D x‖² / E‖W x‖²; 0 when the layer's output is zero anyway."""
    total = error(weight, gram)
    return float(error(change, gram) / total) if total > 0 else 0.0


def spectrum(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Energies in descending order and the output directions [out, min(out, in)] they lie in.

    The energies are the squared singular values of W C^1/2. Keeping the first r directions
    leaves the sum of the other energies as the error, and no matrix of rank r leaves less (the
    whitened SVD of Wang et al. 2024). Only the smaller of the two sides is decomposed, and C is
    never inverted. Leading axes are a batch.
    """
    weight, gram = weight.double(), damped(gram)
    out_features, in_features = weight.shape[-2:]
    if out_features <= in_features:
        energies, directions = torch.linalg.eigh(weight @ gram @ weight.mT)
        return energies.flip(-1).clamp(min=0.0), directions.flip(-1)
    # any root of C will do; this one exists where a Cholesky factor does not
    values, vectors = torch.linalg.eigh(gram)
    whitened = weight @ (vectors * values.clamp(min=0.0).sqrt()[..., None, :])
    energies, basis = torch.linalg.eigh(whitened.mT @ whitened)
    directions, _ = torch.linalg.qr(whitened @ basis.flip(-1))
    return energies.flip(-1).clamp(min=0.0), directions


def low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` [rank, in] and `up` [out, rank] in float64 with the least error of their rank."""
    _, directions = spectrum(weight, gram)
    return truncated(weight, directions, rank)


def truncated(weight: Tensor, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` [rank, in] and `up` [out, rank]: the first `rank` directions of a spectrum."""
    up = directions[..., :rank]
    return up.mT @ weight.double(), up


@dataclass(frozen=True)
class Shared:
    """Weights of one input, one below the other and each divided by the norm of its output, and
    the directions of the whole."""

    weight: Tensor
    norms: tuple[Tensor, ...]
    rows: tuple[int, ...]
    directions: Tensor

    @staticmethod
    def of(weights: Sequence[Tensor], gram: Tensor) -> Shared:
        gram = damped(gram)
        norms = tuple(error(w, gram).clamp_min(1e-300).sqrt() for w in weights)
        scaled = [w.double() / s for w, s in zip(weights, norms, strict=True)]
        stacked = torch.cat(scaled)
        rows = tuple(len(w) for w in weights)
        return Shared(stacked, norms, rows, spectrum(stacked, gram)[1])

    def low_rank(self, rank: int) -> tuple[Tensor, list[Tensor]]:
        """One `down` [rank, in] for all weights and an `up` [out, rank] for each, in float64: the
        least sum of relative errors."""
        down, up = truncated(self.weight, self.directions, rank)
        parts = up.split(self.rows)
        return down, [part * s for part, s in zip(parts, self.norms, strict=True)]


def columns(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """float64 [out, kept]: the weight that does best with these columns of the input alone,
    W C_:k C_kk^-1."""
    gram = damped(gram)
    seen = weight.double() @ gram[:, kept]
    return torch.linalg.solve(gram[kept][:, kept], seen, left=False)


def output_factor(weight: Tensor, gram: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The best `up` [out, rank] for a given `down` [rank, in], and the gram [rank, rank] of what
    it meets, in float64: W C DT (D C DT)^-1."""
    down = down.double()
    mixed = damped(gram) @ down.mT
    inner = down @ mixed
    return _solve(inner, (weight.double() @ mixed).mT).mT.contiguous(), inner


def pivoted(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product of two factors as `pivots` [rank, in], some of its rows, and `others`
    [out - rank, rank], the rest of them as combinations of those, in float64.

    `order` [out] gives where each row is in (pivots, others). Zhao et al. 2025, with the pivots of
    an LU decomposition: coefficients a little larger than those of a QR one, in a fiftieth of the
    time.
    """
    rank, rows = len(down), list(range(len(up)))
    for i, j in enumerate(torch.linalg.lu_factor(up).pivots.tolist()):
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    places = torch.tensor(rows, device=up.device)
    chosen, rest = up[places[:rank]], up[places[rank:]]
    return chosen @ down, torch.linalg.solve(chosen, rest, left=False), places.argsort()


def monarch(
    weight: Tensor, gram: Tensor, blocks: int, rank: int, sweeps: int = 3
) -> tuple[Tensor, Tensor]:
    """`right` [b, b * k, in / b] and `left` [b, out / b, b * k] in float64.

    Each block is first projected alone, which ignores how the input blocks correlate; then the
    left factors are fitted by least squares to the full gram, and each sweep fits the right
    factors of one block column after the other and the left factors again. No step raises the
    error.
    """
    weight, gram = weight.double(), damped(gram)
    out_width, in_width = weight.shape[0] // blocks, weight.shape[1] // blocks
    tiles = weight.reshape(blocks, out_width, blocks, in_width).transpose(1, 2)
    grams = gram.reshape(blocks, in_width, blocks, in_width)
    own = torch.stack([grams[j, :, j] for j in range(blocks)])
    right, left = low_rank(tiles, own, rank)  # [i, j, k, in/b] and [i, j, out/b, k]
    residual = tiles - left @ right  # [i, j, out/b, in/b]
    left, residual = _fit_left(residual, grams, left, right)
    for _ in range(sweeps):
        right, residual = _fit_right(residual, grams, left, right)
        left, residual = _fit_left(residual, grams, left, right)
    return right.transpose(0, 1).flatten(1, 2), left.transpose(1, 2).flatten(-2)


def _fit_left(
    residual: Tensor, grams: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """The best left factors for these right ones, one least-squares problem a block row i:
    L_i + E_i C R_iT (R_i C R_iT)^-1, where R_i is block-diagonal."""
    blocks, rank = right.shape[1:3]
    mixed = torch.einsum("apjq,ijkq->iapjk", grams, right).flatten(3)  # C R_iT
    inner = torch.einsum("ialp,iapk->ialk", right, mixed).flatten(1, 2)
    target = residual.transpose(1, 2).flatten(-2) @ mixed.flatten(1, 2)
    step = _solve(inner, target.mT).mT.unflatten(-1, (blocks, rank)).transpose(1, 2)
    return left + step, residual - step @ right


def _fit_right(
    residual: Tensor, grams: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """The best right factors, one block column j after the other, the others held:
    R_ij + (L_ijT L_ij)^-1 L_ijT E_i C_:j C_jj^-1."""
    right, residual = right.clone(), residual.clone()
    for j in range(right.shape[1]):
        factor = left[:, j]
        seen = torch.einsum("iaop,apq->ioq", factor.mT[:, None] @ residual, grams[:, :, j])
        target = torch.linalg.solve(grams[j, :, j], seen, left=False)
        step = _solve(factor.mT @ factor, target)
        right[:, j] += step
        residual[:, j] -= factor @ step
    return right, residual


def _solve(matrix: Tensor, target: Tensor) -> Tensor:
    """The smallest solution of matrix x = target for symmetric matrices that may be singular:
    directions that the data hardly shows stay as they are."""
    values, vectors = torch.linalg.eigh(matrix)
    shown = values > 1e-10 * values[..., -1:].clamp_min(1e-300)
    inverse = torch.where(shown, 1 / values.where(shown, torch.ones_like(values)), 0.0)
    return vectors @ (inverse[..., None] * (vectors.mT @ target))
