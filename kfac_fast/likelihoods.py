"""Likelihoods: what a network's outputs mean, so that the Fisher information is defined.

A *loss term* is one log-likelihood term: an example of a classifier, a token of a language model, a pixel of a
per-pixel loss; for bernoulli and gaussian one output vector, whose likelihood is summed over its last dimension. M is
their number. K-FAC's true Fisher needs targets drawn from the model's own predictive distribution (Martens & Grosse
2015, sec. 5), so a likelihood can draw them; `loss` is the mean negative log-likelihood per loss term.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Implied(NamedTuple):
    """What the gradient of a loss implies, if it is the negative log-likelihood.

    Attributes:
        loss: Of every loss term at the implied targets.
        possible: Whether those targets exist, of every loss term.
    """

    loss: Tensor
    possible: Tensor


class Likelihood(ABC):
    """Base class. A likelihood of your own implements `log_prob`, `sample` and, unless terms are output vectors,
    `terms_shape`; the built-in ones override the rest with closed forms.
    """

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(targets | outputs) of every loss term, of shape `terms_shape`; differentiable in ``outputs``."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets drawn from the predictive distribution, as `log_prob` takes them."""

    def terms_shape(self, outputs: Tensor) -> torch.Size:
        """Shape of the loss terms. Default: everything but the last dimension."""
        return outputs.shape[:-1]

    def per_term(self, values: Tensor) -> Tensor:
        """Sums a tensor shaped like the outputs over the dimensions inside a loss term."""
        return values.sum(-1)

    def spread(self, per_term: Tensor) -> Tensor:
        """Adds the inner dimensions back to a tensor of shape `terms_shape`, to broadcast against the outputs."""
        return per_term.unsqueeze(-1)

    def check(self, outputs: Tensor) -> None:
        """Refuses outputs that this likelihood can't describe.

        Raises:
            TypeError: The outputs are not floating point.
            ValueError: Their shape does not fit.
        """
        if not outputs.is_floating_point():
            raise TypeError(f"outputs must be floating point for {self!r}, got {outputs.dtype}")
        if outputs.ndim < 2:
            raise ValueError(
                f"outputs must be [N, …] with at least 2 dimensions for {self!r}, got {tuple(outputs.shape)}; give one "
                "example a batch dimension, return one number per example as [N, 1] and squeeze it in the loss"
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood over the loss terms, a scalar."""
        return -self.log_prob(outputs, targets).mean()

    def sample_gradient(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """∂(−log p)/∂outputs at sampled targets, summed over loss terms: shaped like the outputs."""
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            nll = -self.log_prob(z, self.sample(z.detach(), generator)).sum()
            return torch.autograd.grad(nll, z)[0]

    def fisher_root(self, outputs: Tensor) -> Iterator[Tensor]:
        """Tensors v shaped like the outputs with Σ v vᵀ = F_R, the Fisher of the outputs, for every loss term.

        One per output dimension of a loss term; each is zero outside its dimension's reach.

        Raises:
            ValueError: This likelihood has no closed form; use ``fisher="mc"``.
        """
        raise ValueError(f"fisher='exact' needs a closed form that {self!r} does not have; use fisher='mc'")

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """F_R v for every loss term, shaped like the outputs.

        Default: the Hessian of −log p at sampled targets, whose mean is the Fisher. Where outputs are natural
        parameters of an exponential family it does not depend on the targets at all.
        """
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            nll = -self.log_prob(z, self.sample(z.detach())).sum()
            gradient = torch.autograd.grad(nll, z, create_graph=True)[0]
            return torch.autograd.grad(gradient, z, v.detach())[0]

    def counted(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Which loss terms count: `terms_shape`, bool. Default: all.

        Where losses can ignore terms (padding, ``ignore_index``) an exactly zero gradient tells.
        """
        return torch.ones(self.terms_shape(outputs), dtype=torch.bool, device=outputs.device)

    def implied(self, outputs: Tensor, gradient: Tensor) -> Implied | None:
        """What a loss gradient says about the targets, or None (the default) if nothing.

        Args:
            outputs: The outputs.
            gradient: Of the loss with respect to them, times the number of loss terms: as if of the sum of negative
                log-likelihoods.
        """
        return None

    def gradient_fits(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """Whether a loss gradient can come from this likelihood (a bool tensor on the device), None if unknown.

        It is asked once, about the first gradient, and may learn from it what the outputs alone leave open.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Categorical(Likelihood):
    """Softmax over logits: ``F.cross_entropy``. A loss term is one distribution over the classes.

    Args:
        class_dim: Which dimension holds the classes. None: the last of ``[N, C]`` and ``[N, S, C]``, dimension 1 of
            ``[N, C, H, W]`` and ``[N, C, D, H, W]``, as language models and segmentation networks have them, unless the
            first backward pass shows that it is another one: the gradient of a cross entropy sums to zero over the
            classes and over nothing else. `loss` and `log_prob` also see it from the shape of the targets.
        ignore_index: Targets with this value are not loss terms in `loss`, as in ``F.cross_entropy``.
    """

    def __init__(self, class_dim: int | None = None, ignore_index: int = -100) -> None:
        if class_dim is not None and not isinstance(class_dim, int):
            raise TypeError(f"class_dim must be an integer or None, got {class_dim!r}")
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self._learned: dict[int, int] = {}  # the dimension, by number of dimensions

    def dim(self, outputs: Tensor) -> int:
        """Which dimension of these outputs holds the classes."""
        if self.class_dim is not None:
            return self.class_dim % outputs.ndim
        return self._learned.get(outputs.ndim, outputs.ndim - 1 if outputs.ndim <= 3 else 1)

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if self.class_dim is not None and not -outputs.ndim <= self.class_dim < outputs.ndim:
            raise ValueError(f"class_dim={self.class_dim} does not exist in outputs of shape {tuple(outputs.shape)}")
        if outputs.shape[self.dim(outputs)] < 2:
            raise ValueError(
                f"outputs must have at least 2 classes under 'categorical', got shape {tuple(outputs.shape)} with the "
                f"classes in dimension {self.dim(outputs)}; for one logit per example pass likelihood='bernoulli', for "
                "regression likelihood='gaussian', for classes elsewhere likelihood=Categorical(class_dim=…)"
            )

    def _classes_second(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        dim = self.dim(outputs)
        if targets is not None and self.class_dim is None:
            shape = outputs.shape
            fitting = [d for d in range(1, outputs.ndim) if shape[:d] + shape[d + 1 :] == targets.shape]
            dim = fitting[0] if len(fitting) == 1 else dim
        return outputs.movedim(dim, 1)

    def terms_shape(self, outputs: Tensor) -> torch.Size:
        dim = self.dim(outputs)
        return outputs.shape[:dim] + outputs.shape[dim + 1 :]

    def per_term(self, values: Tensor) -> Tensor:
        return values.sum(self.dim(values))

    def spread(self, per_term: Tensor) -> Tensor:
        # Inserting the class dimension makes the tensor one dimension larger, which the rule must see.
        probe = per_term.new_empty((0,) * (per_term.ndim + 1))
        return per_term.unsqueeze(self.dim(probe))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = self._classes_second(outputs, targets)
        return -F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="none")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._classes_second(outputs, targets), targets, ignore_index=self.ignore_index)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # argmax(log p + Gumbel noise): one pass, any shape, no flattening as torch.multinomial would need.
        z = self._classes_second(outputs).float()
        uniform = torch.rand(z.shape, generator=generator, device=z.device)
        return (z - (-uniform.log()).log()).argmax(1)

    def sample_gradient(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dim = self.dim(outputs)
        gradient = (
            outputs.detach().float().softmax(dim) if outputs.dtype.itemsize < 4 else outputs.detach().softmax(dim)
        )
        index = self.sample(outputs.detach(), generator).unsqueeze(dim)
        gradient.scatter_add_(dim, index, gradient.new_full((), -1.0).expand(index.shape))
        return gradient.to(outputs.dtype)

    def fisher_root(self, outputs: Tensor) -> Iterator[Tensor]:
        # Σ_c p_c (e_c − p)(e_c − p)ᵀ = diag(p) − p pᵀ
        dim = self.dim(outputs)
        p = outputs.detach().softmax(dim)
        for c in range(p.shape[dim]):
            v = -p
            v.select(dim, c).add_(1)
            yield v * p.select(dim, c).unsqueeze(dim).sqrt()

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        p = outputs.detach().softmax(self.dim(outputs))
        return p * (v - self.spread(self.per_term(p * v)))

    def counted(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        used = self.per_term((gradient != 0).to(torch.uint8)) != 0
        # Of a term the model is certain of, the gradient may have underflowed.
        certain = outputs.detach().float().softmax(self.dim(outputs)).amax(self.dim(outputs)) > 1 - 1e-6
        return used | certain

    def implied(self, outputs: Tensor, gradient: Tensor) -> Implied:
        """The targets p − g have to be classes: one-hot."""
        dim = self.dim(outputs)
        targets = outputs.softmax(dim) - gradient
        one_hot = F.one_hot(targets.argmax(dim), outputs.shape[dim]).movedim(-1, dim)
        possible = (targets - one_hot).abs().amax(dim) < _tolerance(outputs)
        return Implied(-self.per_term(targets * outputs.log_softmax(dim)), possible)

    def gradient_fits(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        fits = self._fits(outputs, gradient, self.dim(outputs))
        if self.class_dim is None and not fits:
            others = [d for d in range(1, outputs.ndim) if outputs.shape[d] > 1 and self._fits(outputs, gradient, d)]
            if len(others) == 1:
                self._learned[outputs.ndim] = others[0]
                return ~fits
        return fits

    @staticmethod
    def _fits(outputs: Tensor, gradient: Tensor, dim: int) -> Tensor:
        """Whether a gradient may be that of a cross entropy over this dimension."""
        gradient = gradient.float()
        sums_to_zero = gradient.sum(dim).abs().sum() <= 0.05 * gradient.abs().sum()
        log_probabilities = outputs.detach().float().logsumexp(dim).abs().max() < 1e-2
        return sums_to_zero | log_probabilities

    def __repr__(self) -> str:
        return f"Categorical(class_dim={self.class_dim}, ignore_index={self.ignore_index})"


class _Vectors(Likelihood):
    """Loss terms are output vectors. A gradient of exactly zero marks ignored ones only where that is asked for."""

    def __init__(self, masked: bool = False) -> None:
        if not isinstance(masked, bool):
            raise TypeError(f"masked must be a bool, got {masked!r}")
        self.masked = masked

    def loss(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood over the loss terms, a scalar.

        Args:
            outputs: ``[N, …, d]``.
            targets: ``[N, …, d]``; anything, NaN too, where the mask is False.
            mask: ``[N, …]`` bool, which loss terms count; needs ``masked=True``. None: all. At least one has to.

        Raises:
            ValueError: A mask without ``masked=True``, or of another shape.
        """
        if mask is None:
            return super().loss(outputs, targets)
        if not self.masked:
            raise ValueError(f"mask needs {type(self).__name__}(masked=True), so that K-FAC leaves these terms out too")
        shape = tuple(self.terms_shape(outputs))
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}")
        nll = -self.log_prob(outputs, targets.masked_fill(~mask.unsqueeze(-1), 0))
        return nll.masked_fill(~mask, 0).sum() / mask.sum()

    def counted(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        return (gradient != 0).any(-1) if self.masked else super().counted(outputs, gradient)


class Bernoulli(_Vectors):
    """Independent bits from logits: ``F.binary_cross_entropy_with_logits`` summed over the last dimension.

    Args:
        masked: Whether the loss may leave terms out, by `loss` with a mask or by a mask of your own that multiplies
            them. A term with a gradient of exactly zero is then none, unless the model is certain of all its bits.
    """

    def counted(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        counted = super().counted(outputs, gradient)  # where every bit is certain it may have underflowed
        return counted | (outputs.detach().abs() > 15).all(-1) if self.masked else counted

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device)
        return (uniform < outputs.float().sigmoid()).to(outputs.dtype)

    def sample_gradient(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        outputs = outputs.detach()
        return outputs.sigmoid().sub_(self.sample(outputs, generator))

    def fisher_root(self, outputs: Tensor) -> Iterator[Tensor]:
        p = outputs.detach().sigmoid()
        root = (p * (1 - p)).sqrt()
        for c in range(p.shape[-1]):
            v = torch.zeros_like(root)
            v[..., c] = root[..., c]
            yield v

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        p = outputs.detach().sigmoid()
        return p * (1 - p) * v

    def implied(self, outputs: Tensor, gradient: Tensor) -> Implied:
        """The targets p − g have to be in [0, 1]; between them they are allowed, as grey levels of images are."""
        targets = outputs.sigmoid() - gradient
        possible = ((targets - 0.5).abs() < 0.5 + _tolerance(outputs)).all(-1)
        return Implied(-self.log_prob(outputs, targets), possible)


class Gaussian(_Vectors):
    """A normal distribution around the outputs with known standard deviation.

    Its `loss` is ½|outputs − targets|²/σ² summed over the last dimension, mean over the rest; the constant is left out.
    ``nn.MSELoss()`` is 2/d times that for d outputs and σ = 1: the Fisher does not change, the gradient does.

    Args:
        sigma: Standard deviation, > 0, in the units of the outputs.
        masked: Whether the loss may leave terms out, by `loss` with a mask or by a mask of your own that multiplies
            them. A term with a gradient of exactly zero is then none.
    """

    def __init__(self, sigma: float = 1.0, masked: bool = False) -> None:
        super().__init__(masked)
        if not (isinstance(sigma, (int, float)) and math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be > 0, got sigma={sigma}")
        self.sigma = float(sigma)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * ((outputs - targets) / self.sigma).square().sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + self.sigma * noise

    def sample_gradient(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return noise / self.sigma

    def fisher_root(self, outputs: Tensor) -> Iterator[Tensor]:
        for c in range(outputs.shape[-1]):
            v = torch.zeros_like(outputs)
            v[..., c] = 1 / self.sigma
            yield v

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        return v / self.sigma**2

    def implied(self, outputs: Tensor, gradient: Tensor) -> Implied:
        """Targets may be anything; the gradient (outputs − targets)/σ² says how far away they are."""
        loss = 0.5 * (self.sigma * gradient).square().sum(-1)
        return Implied(loss, torch.ones_like(loss, dtype=torch.bool))

    def __repr__(self) -> str:
        return f"Gaussian(sigma={self.sigma:g}{', masked=True' if self.masked else ''})"


def _tolerance(outputs: Tensor) -> float:
    return max(2e-3, 4 * torch.finfo(outputs.dtype).eps)


_BY_NAME: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name or itself.

    Raises:
        ValueError: An unknown name.
        TypeError: Neither a name nor a `Likelihood`.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(f"likelihood must be a name or a Likelihood, got {type(likelihood).__name__}")
    if likelihood not in _BY_NAME:
        raise ValueError(f"likelihood must be one of {sorted(_BY_NAME)} or a Likelihood, got {likelihood!r}")
    return _BY_NAME[likelihood]()
