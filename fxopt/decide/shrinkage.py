"""Second moments from few rows: what was seen, shrunk towards what is alike in all directions.

Rows span no more directions than there are of them. A projection fitted to them alone leaves out
every other one, and on the same rows that costs nothing: it would be chosen for an error of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def intensity(gram: Tensor, rows: int) -> float:
    """The share of tr(C) / n I in the estimate of least squared error, between 0 and 1, for the
    mean C [n, n] of x xT over `rows` rows: oracle approximating shrinkage (Chen et al. 2010,
    https://arxiv.org/abs/0907.4698). About the number of directions that carry the energy, over
    that of rows."""
    size = len(gram)
    squared, trace = gram.square().sum().item(), gram.diagonal().sum().item() ** 2
    above = (rows + 1 - 2 / size) * (squared - trace / size)
    return min(1.0, ((1 - 2 / size) * squared + trace) / above) if above > 0 else 1.0


def shrunk(gram: Tensor, share: float) -> Tensor:
    """`gram` [n, n] with that `share` of its trace spread over all directions."""
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (1 - share) * gram + share * mean * eye


def spread(x: Tensor, gram: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Rows [T, n] of what `gram` is the mean of, with noise that gives them its shrunk moments:
    what errs in directions that they do not show errs on these."""
    share = intensity(gram, rows)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    deviation = (share * gram.diagonal().mean()).sqrt().item()
    return ((1 - share) ** 0.5 * x.float() + deviation * noise).to(x.dtype)
