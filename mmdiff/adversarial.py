"""Adversarial training of an autoencoder: what its discriminators minimise, and what they add to its own loss.

B batch, C channels, `*axes` T and what follows it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .discriminator import Discriminator, Judgement


class Adversarial(nn.Module):
    """Discriminators, with the weights of what they add.

    Args:
        discriminators: each judges whole reconstructions.
        weight: of the generator's hinge loss. adaptive: multiply it by the ratio of the gradients that the other losses
            and it have at the decoder's last layer (`adaptive_weight`), so that 1 makes them equally strong there.
        features: weight of the distance between the features of data and reconstruction (Larsen et al. 2016;
            Salimans et al. 2016, sec. 3.1), L1 as in MelGAN (Kumar et al. 2019, sec. 2.3).
        r1: gamma of the gradient penalty on data (`r1_penalty`); 0 is none. r1_every: steps between penalties, each of
            which counts as many times (Karras et al. 2020, appendix B).
        start: steps without any of this, for the autoencoder to find its form.
    """

    def __init__(
        self,
        discriminators: Sequence[Discriminator],
        weight: float = 0.5,
        adaptive: bool = True,
        features: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        start: int = 0,
    ) -> None:
        super().__init__()
        if not discriminators:
            raise ValueError("discriminators=[] leaves nothing to train against; leave `adversarial` out instead")
        for name, value in {"weight": weight, "features": features, "r1": r1, "start": start}.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must be 0 or more")
        if r1_every < 1:
            raise ValueError(f"r1_every={r1_every} must be 1 or more")
        self.discriminators = nn.ModuleList(discriminators)
        self.weight, self.adaptive, self.features = weight, adaptive, features
        self.r1, self.r1_every, self.start = r1, r1_every, start

    def judge(self, x: Tensor) -> list[Judgement]:
        """All judgements on x (B, C, *axes)."""
        return [judgement for discriminator in self.discriminators for judgement in discriminator(x)]

    def generator_loss(
        self, x: Tensor, x_hat: Tensor, others: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the reconstruction x_hat of x adds to the autoencoder's loss (), and what to log.

        others: () the loss that the adaptive weight compares with. last_weight: of the decoder's last layer.
        """
        judged = self.judge(x_hat)
        hinge = hinge_generator(judged)
        weight = adaptive_weight(others, hinge, last_weight) if self.adaptive else torch.ones_like(hinge)
        loss = self.weight * weight * hinge
        logs = {"adversarial": hinge.detach(), "adversarial_weight": self.weight * weight}
        if self.features:
            with torch.no_grad():
                data = self.judge(x)
            distance = feature_distance(data, judged)
            loss = loss + self.features * distance
            logs["features"] = distance.detach()
        return loss, logs

    def discriminator_loss(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminators minimise (), for reconstructions x_hat of x at `step`, and what to log."""
        hinge = hinge_discriminator(self.judge(x), self.judge(x_hat.detach()))
        logs = {"discriminator": hinge.detach()}
        if not self.r1 or step % self.r1_every:
            return hinge, logs
        penalty = r1_penalty(self.judge, x)
        logs["r1"] = penalty.detach()
        return hinge + self.r1_every * self.r1 * penalty, logs


def hinge_discriminator(data: Sequence[Judgement], reconstructed: Sequence[Judgement]) -> Tensor:
    """Mean of max(0, 1 - D(x)) + max(0, 1 + D(x_hat)) over patches and judgements (Lim & Ye 2017)."""
    losses = [F.relu(1 - a.score).mean() + F.relu(1 + b.score).mean() for a, b in zip(data, reconstructed, strict=True)]
    return torch.stack(losses).mean()


def hinge_generator(reconstructed: Sequence[Judgement]) -> Tensor:
    """Mean of -D(x_hat) over patches and judgements (Lim & Ye 2017)."""
    return torch.stack([-judgement.score.mean() for judgement in reconstructed]).mean()


def feature_distance(data: Sequence[Judgement], reconstructed: Sequence[Judgement]) -> Tensor:
    """Mean absolute difference of the features of every layer, mean over the layers of all judgements."""
    pairs = [
        (a.detach(), b)
        for d, r in zip(data, reconstructed, strict=True)
        for a, b in zip(d.features, r.features, strict=True)
    ]
    return torch.stack([F.l1_loss(b, a) for a, b in pairs]).mean()


def r1_penalty(judge: Callable[[Tensor], list[Judgement]], x: Tensor) -> Tensor:
    """Half the mean squared norm of the gradient of D on data, D the mean of an item's patches, judgements summed.

    Source: Mescheder et al. 2018, eq. 9, without gamma. In float32 where weights are, as half precision may lose it.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        score = torch.stack([j.score.reshape(len(x), -1).mean(dim=1).sum() for j in judge(x)]).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return 0.5 * gradient.float().flatten(1).square().sum(dim=1).mean()


def adaptive_weight(others: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """Ratio () of two losses' gradient norms at the last layer, at most 1e4 (Esser et al. 2021, eq. 7).

    NaN where a gradient is not finite.
    """
    scale = 64.0  # keeps gradients of means over many values above what float16 can hold
    gradients = [torch.autograd.grad(scale * loss, last_weight, retain_graph=True)[0] for loss in (others, adversarial)]
    strengths = [gradient.float().norm() for gradient in gradients]
    ratio = (strengths[0] / (strengths[1] + scale * 1e-6)).clamp(max=1e4)
    return torch.where(strengths[0].isfinite(), ratio, torch.nan).detach()
