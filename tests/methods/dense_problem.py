"""Block-sparse least-squares problems with a dense A, in the form the solvers read."""

import functools
from collections.abc import Iterator, Sequence

import torch
from direct_refit import NormalEquations
from torch import Tensor

from moetools.methods.conjugate import FeatureProblem, FeatureRows


class DenseProblem(FeatureProblem):
    """A [T, N] whose columns belong to experts of the given widths; every fifth row is held out."""

    def __init__(self, a: Tensor, y: Tensor, widths: Sequence[int], weight: Tensor | None = None) -> None:
        self.a, self.y, self.widths, self.weight = a, y, list(widths), weight
        self.held = torch.arange(len(a)) % 5 == 4

    def rows(self, held_out: bool) -> Iterator[FeatureRows]:
        for where in (self.held == held_out).nonzero().flatten().chunk(3):
            columns = self.a[where].split(self.widths, 1)
            tokens = [(part != 0).any(1).nonzero().flatten() for part in columns]
            yield FeatureRows(
                tokens=tokens,
                features=[part[here] for part, here in zip(columns, tokens, strict=True)],
                target=functools.partial(self.y.__getitem__, where),
                num_tokens=len(where),
                weight_T=None if self.weight is None else self.weight[where],
            )

    def equations(self, held_out: bool) -> NormalEquations:
        rows = self.held == held_out
        root = torch.ones(len(rows), 1, dtype=torch.float64) if self.weight is None else self.weight.sqrt()[:, None]
        a, y = (root * self.a)[rows], (root * self.y)[rows]
        return NormalEquations(gram_NN=a.T @ a, cross_ND=a.T @ y, energy=y.square().sum().item())


class RandomProblem(DenseProblem):
    """Each token goes to about two fifths of the experts; Y = A `true` + noise."""

    def __init__(
        self,
        *,
        tokens: int,
        widths: Sequence[int],
        outputs: int = 6,
        noise: float = 0.3,
        weighted: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        chosen = torch.rand(tokens, len(widths), generator=generator) < 0.4
        mixing = [normal(width, width) / width**0.5 + torch.eye(width) for width in widths]
        parts = [chosen[:, [e]] * (normal(tokens, width) @ mixing[e]) for e, width in enumerate(widths)]
        a = torch.cat(parts, 1)
        self.true = normal(sum(widths), outputs)
        y = a @ self.true + noise * normal(tokens, outputs) * a.norm() / tokens**0.5
        weight = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
        super().__init__(a, y, widths, weight)
