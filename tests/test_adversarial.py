"""Adversarial losses by hand: hinge, gradient penalty, adaptive weight, features, and the patch discriminator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.adversarial import (
    Adversarial,
    adaptive_weight,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    r1_penalty,
)
from mmdiff.discriminator import Discriminator, Judgement, Patch


class Linear(Discriminator):
    """D(x) = w . x, one score for an item."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> list[Judgement]:
        return [Judgement(x.flatten(1) @ self.weight, [x * self.weight.view(x.shape[1:])])]


def judged(*scores: list[float]) -> list[Judgement]:
    return [Judgement(torch.tensor(score), []) for score in scores]


def test_hinge_losses_are_the_formula_s() -> None:
    data, fake = judged([2.0, 0.5, -1.0], [0.0]), judged([-3.0, 0.0, 0.5], [-0.25])
    # relu(1 - D(x)): 0, .5, 2 and 1; relu(1 + D(x_hat)): 0, 1, 1.5 and .75
    torch.testing.assert_close(hinge_discriminator(data, fake), torch.tensor((2.5 / 3 + 2.5 / 3 + 1 + 0.75) / 2))
    torch.testing.assert_close(hinge_generator(fake), torch.tensor((2.5 / 3 + 0.25) / 2))


def test_feature_distance_is_the_mean_over_layers_and_moves_the_reconstruction_alone() -> None:
    data = [Judgement(torch.zeros(1), [torch.ones(1, 2, requires_grad=True), torch.zeros(1, 1, 4)])]
    made = [Judgement(torch.zeros(1), [torch.tensor([[2.0, -1.0]], requires_grad=True), torch.full((1, 1, 4), 0.5)])]
    distance = feature_distance(data, made)
    torch.testing.assert_close(distance, torch.tensor((1.5 + 0.5) / 2))
    distance.backward()
    assert data[0].features[0].grad is None
    assert made[0].features[0].grad is not None


def test_r1_of_a_linear_discriminator_is_half_its_squared_norm() -> None:
    discriminator = Linear(torch.randn(12))
    penalty = r1_penalty(discriminator, torch.randn(5, 3, 4))
    torch.testing.assert_close(penalty, 0.5 * discriminator.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(discriminator.weight.grad, discriminator.weight.detach())


def test_r1_is_of_the_mean_patch_and_works_in_autocast() -> None:
    """Patches of a bias-free convolution: the mean score's gradient is the sum of shifted kernels over their count."""
    convolution = nn.Conv1d(1, 1, 3, bias=False)

    def judge(x: Tensor) -> list[Judgement]:
        return [Judgement(convolution(x), [])]

    gradient = torch.zeros(6)
    for start in range(4):
        gradient[start : start + 3] += convolution.weight.detach().flatten() / 4
    x = torch.randn(2, 1, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(judge, x)
    torch.testing.assert_close(penalty.detach(), 0.5 * gradient.square().sum())
    assert not x.requires_grad


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer() -> None:
    last, z, x = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2), torch.randn(5, 3)
    direction = torch.randn(3)
    x_hat = z @ last.T
    others, adversarial = (x_hat - x).square().sum(), (x_hat @ direction).sum()
    of_others = 2 * (x_hat - x).detach().T @ z
    of_adversarial = torch.outer(direction, z.sum(dim=0))
    weight = adaptive_weight(others, adversarial, last)
    torch.testing.assert_close(weight, of_others.norm() / of_adversarial.norm())
    assert not weight.requires_grad
    assert last.grad is None
    assert adaptive_weight(others, 0.0 * adversarial, last) == 1e4  # bounded where the discriminator says nothing
    for wrong in ((others / 0, adversarial), (others, adversarial * torch.inf)):
        assert not adaptive_weight(*wrong, last) > 0


def test_what_is_added_is_the_weighted_sum() -> None:
    last, z, x = nn.Parameter(torch.randn(4, 2)), torch.randn(3, 2), torch.randn(3, 4)
    discriminator = Linear(torch.randn(4))
    x_hat = z @ last.T
    others = (x_hat - x).abs().mean()
    hinge, distance = hinge_generator(discriminator(x_hat)), feature_distance(discriminator(x), discriminator(x_hat))
    ratio = adaptive_weight(others, hinge, last)
    for adaptive, weight in ((True, 0.3 * ratio), (False, torch.tensor(0.3))):
        adversarial = Adversarial([discriminator], weight=0.3, adaptive=adaptive, features=2.0)
        loss, logs = adversarial.generator_loss(x, x_hat, others, last)
        torch.testing.assert_close(loss, weight * hinge + 2 * distance)
        torch.testing.assert_close(logs["adversarial_weight"], weight)
        torch.testing.assert_close(logs["adversarial"], hinge.detach())
        torch.testing.assert_close(logs["features"], distance.detach())


def test_two_discriminators_are_heard_equally() -> None:
    first, second = Linear(torch.randn(4)), Linear(torch.randn(4))
    x, x_hat = torch.randn(3, 4), torch.randn(3, 4)
    both, _ = Adversarial([first, second]).discriminator_loss(x, x_hat, 1)
    apart = [Adversarial([one]).discriminator_loss(x, x_hat, 1)[0] for one in (first, second)]
    torch.testing.assert_close(both, (apart[0] + apart[1]) / 2)


def test_r1_comes_every_so_many_steps_and_counts_as_many_times() -> None:
    discriminator = Linear(torch.randn(4))
    adversarial = Adversarial([discriminator], r1=0.5, r1_every=4)
    x, x_hat = torch.randn(3, 4), torch.randn(3, 4)
    losses = [adversarial.discriminator_loss(x, x_hat, step) for step in range(6)]
    assert ["r1" in logs for _, logs in losses] == [True, False, False, False, True, False]
    penalty = 0.5 * discriminator.weight.detach().square().sum()
    torch.testing.assert_close(losses[4][0] - losses[1][0], 4 * 0.5 * penalty)


def test_the_discriminator_s_loss_does_not_reach_the_reconstruction() -> None:
    x_hat = torch.randn(3, 4, requires_grad=True)
    Adversarial([Linear(torch.randn(4))], r1=1.0).discriminator_loss(torch.randn(3, 4), x_hat, 0)[0].backward()
    assert x_hat.grad is None


@pytest.mark.parametrize(
    ("steps", "sizes", "patches"),
    [
        ([[2], [2]], (17,), (4,)),
        ([[2, 2], [1, 2]], (6, 9), (3, 2)),
        ([[1, 2, 2], [1, 2, 2]], (1, 8, 5), (1, 2, 1)),
        ([[1, 2, 2], [2, 2, 2], [1, 1, 1]], (5, 8, 8), (2, 2, 2)),
    ],
    ids=str,
)
def test_patches_of_one_to_three_axes(steps: Any, sizes: tuple[int, ...], patches: tuple[int, ...]) -> None:
    discriminator = Patch(2, steps, width=8)
    x = torch.randn(3, 2, *sizes)
    (judgement,) = discriminator(x)
    assert judgement.score.shape == (3, 1, *patches)
    assert len(judgement.features) == len(steps)
    judgement.score.square().sum().backward()
    unmoved = [n for n, p in discriminator.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert unmoved == []
    torch.testing.assert_close(discriminator(x[1:2])[0].score, judgement.score[1:2])  # no item depends on others


def test_a_patch_sees_a_part_alone() -> None:
    discriminator = Patch(1, [[2], [2]], width=4).requires_grad_(False)
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):  # whose mean is of the whole
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.randn(1, 1, 64, requires_grad=True)
    discriminator(x)[0].score[0, 0, 8].backward()
    assert x.grad is not None
    seen = x.grad.flatten().nonzero().flatten()
    assert 8 * 4 - 10 < int(seen[0]) < int(seen[-1]) < 8 * 4 + 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(1, []), r"steps=\[\] must be tuples of one length"),
        (lambda: Patch(1, [[2], [2, 2]]), r"steps=\[\[2\], \[2, 2\]\]"),
        (lambda: Patch(1, [[3]]), r"steps=\[\[3\]\] must be of 1 and 2 alone"),
        (lambda: Patch(1, [[2], [2]])(torch.zeros(1, 1, 3)), r"sizes \(3,\) of what is judged are below \(4,\)"),
        (lambda: Adversarial([]), r"discriminators=\[\] leaves nothing to train against"),
        (lambda: Adversarial([Patch(1, [[2]])], weight=-1), "weight=-1 must be 0 or more"),
        (lambda: Adversarial([Patch(1, [[2]])], features=-1), "features=-1"),
        (lambda: Adversarial([Patch(1, [[2]])], r1=-1), "r1=-1"),
        (lambda: Adversarial([Patch(1, [[2]])], start=-1), "start=-1"),
        (lambda: Adversarial([Patch(1, [[2]])], r1_every=0), "r1_every=0 must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
