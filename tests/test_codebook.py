"""The codebook against van den Oord et al. 2017, appendix A.1, by hand, and its rule of revival."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdiff.codebook import VQ


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_book(book: list[list[float]], uses: list[float], **settings: float) -> VQ:
    """A book as if it had been learned: `uses` are the moving averages."""
    vq = VQ(len(book), len(book[0]), **settings)  # type: ignore[arg-type]
    vq.book.copy_(torch.tensor(book))
    vq.uses.copy_(torch.tensor(uses))
    vq.sums.copy_(vq.book * vq.uses[:, None])
    vq.begun.fill_(True)
    return vq


def test_the_code_is_the_nearest() -> None:
    vq = VQ(16, 3)
    vq.book.normal_()
    h = torch.randn(2, 3, 4, 5)
    flat = h.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(vq.indices(h).flatten(), torch.cdist(flat, vq.book).argmin(dim=1))
    assert torch.equal(vq.encode(h), vq.book[vq.indices(h)].permute(0, 3, 1, 2))
    every = torch.arange(16).reshape(4, 4)
    assert torch.equal(vq.indices(vq.codes(every)), every)


def test_one_update_is_the_paper_s() -> None:
    vq = with_book([[0.0, 0.0], [4.0, 4.0], [9.0, 0.0]], [0.5, 0.25, 0.25], decay=0.9)
    vectors = torch.tensor([[0.5, 0.1], [0.1, 0.3], [3.0, 5.0], [0.0, -1.0]])
    z, _, logs = vq(vectors.T[None], seeded())
    assert torch.equal(z[0].T, torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 4.0], [0.0, 0.0]]))  # of the book before
    uses = torch.tensor([0.9 * 2 + 0.1 * 3, 0.9 * 1 + 0.1 * 1, 0.9])  # of four vectors, from 2, 1 and 1
    sums = torch.tensor([[0.1 * 0.6, 0.1 * -0.6], [0.9 * 4 + 0.1 * 3, 0.9 * 4 + 0.1 * 5], [0.9 * 9, 0.0]])
    torch.testing.assert_close(vq.uses, uses / 4)
    torch.testing.assert_close(vq.sums, sums / 4)
    torch.testing.assert_close(vq.book, sums / uses[:, None])
    torch.testing.assert_close(logs["usage"], torch.tensor(2 / 3))
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    torch.testing.assert_close(logs["perplexity"], entropy.exp())


def test_the_gradient_passes_straight_through_and_the_commitment_pulls_to_the_code() -> None:
    vq = with_book([[0.0], [2.0]], [1.0, 1.0], commitment=0.5)
    h = torch.tensor([[[0.3, 1.6, 2.5]]], requires_grad=True)
    z, loss, logs = vq(h)
    (torch.tensor([1.0, 10.0, 100.0]) * z).sum().backward(retain_graph=True)
    assert h.grad is not None
    assert h.grad.flatten().tolist() == [1.0, 10.0, 100.0]
    errors = torch.tensor([0.3, -0.4, 0.5])
    torch.testing.assert_close(loss, 0.5 * errors.square().mean())
    torch.testing.assert_close(logs["commitment"], errors.square().mean())
    h.grad = None
    loss.backward()
    torch.testing.assert_close(h.grad, (0.5 * 2 * errors / 3).reshape(1, 1, 3))


def test_codes_come_to_rest_at_the_means_of_their_vectors() -> None:
    vq = with_book([[-1.0], [1.0]], [0.9, 0.1], decay=0.5)
    h = torch.tensor([-3.0, -2.0, 4.0, 7.0]).reshape(1, 1, 4)
    for _ in range(60):
        vq(h, seeded())
    torch.testing.assert_close(vq.book, torch.tensor([[-2.5], [5.5]]))
    torch.testing.assert_close(vq.uses, torch.tensor([0.5, 0.5]))


def test_a_dead_code_takes_a_vector_of_the_batch_and_an_even_share() -> None:
    uses = [0.98, 0.009, 0.011]  # dead is what is below 0.03 / 3
    vq = with_book([[0.0, 0.0], [50.0, 50.0], [60.0, 60.0]], uses)
    vectors = torch.randn(10, 2)
    vq.revive_dead(vectors, seeded())
    assert torch.equal(vq.book[[0, 2]], torch.tensor([[0.0, 0.0], [60.0, 60.0]]))
    assert (vq.book[1] == vectors).all(dim=1).any()
    torch.testing.assert_close(vq.uses, torch.tensor([0.98, 1 / 3, 0.011]))
    torch.testing.assert_close(vq.sums[1], vq.book[1] / 3)


@pytest.mark.parametrize(("vectors", "codes"), [(32, 32), (8, 32)], ids=["enough", "too-few"])
def test_the_first_batch_makes_the_book_without_replacement(vectors: int, codes: int) -> None:
    batch = torch.randn(vectors, 2)
    vq = VQ(codes, 2)
    vq.revive_dead(batch, seeded())
    assert torch.equal(vq.book.unique(dim=0), batch.unique(dim=0))  # each vector, and nothing else
    torch.testing.assert_close(vq.uses, torch.full((codes,), 1 / codes))


def test_revival_keeps_the_book_in_use_where_without_it_codes_die() -> None:
    def last_usage(revive: float) -> float:
        generator = seeded()
        vq = with_book([[100.0 + i, 100.0] for i in range(15)] + [[0.0, 0.0]], [1 / 16] * 16, revive=revive, decay=0.9)
        for _ in range(60):
            logs = vq(torch.randn(4, 2, 64, generator=generator), generator)[2]
        return float(logs["usage"])

    assert last_usage(0.0) == 1 / 16
    assert last_usage(0.03) > 0.9


def test_nothing_is_learned_without_a_generator() -> None:
    vq = with_book([[0.0], [1.0]], [1.0, 0.0])
    state = {name: value.clone() for name, value in vq.state_dict().items()}
    vq.train()(torch.randn(1, 1, 9))
    assert all(torch.equal(value, state[name]) for name, value in vq.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("begun", [True, False])
def test_a_batch_that_is_not_finite_moves_nothing(value: float, begun: bool) -> None:
    vq = with_book([[0.0], [1.0]], [1.0, 0.0]) if begun else VQ(2, 1)
    state = {name: value.clone() for name, value in vq.state_dict().items()}
    _, loss, _ = vq(torch.tensor([0.1, 0.9, value]).reshape(1, 1, 3), seeded())
    assert not loss.isfinite()
    assert all(torch.equal(value, state[name]) for name, value in vq.state_dict().items())


def test_the_whole_state_is_in_buffers() -> None:
    generator, vq, other = seeded(), VQ(8, 3), VQ(8, 3)
    batches = torch.randn(6, 2, 3, 16)
    for batch in batches[:3]:
        vq(batch, generator)
    other.load_state_dict(vq.state_dict())
    apart = torch.Generator()
    apart.set_state(generator.get_state())
    for batch in batches[3:]:
        assert torch.equal(vq(batch, generator)[0], other(batch, apart)[0])
    assert torch.equal(vq.book, other.book)


def updated(batches: list[Tensor]) -> VQ:
    """A book of known start after `batches`, without chance."""
    vq = with_book([[-1.0, 0.0], [1.0, 0.0], [30.0, 30.0]], [0.5, 0.5, 0.0], revive=0.0)
    for batch in batches:
        vq(batch, seeded())
    return vq


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from test_codebook import VQ, seeded, updated
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
batches = torch.randn(5, 4, 2, 6, generator=seeded(9))[:, 2 * rank : 2 * rank + 2]
vq, first = updated(list(batches)), VQ(6, 2)
first(batches[0], seeded(rank))
torch.save({"book": vq.book, "uses": vq.uses, "first": first.book}, f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_learn_the_book_of_one_with_both_batches(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", TWO_PROCESSES]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    running = [subprocess.Popen([*command, str(rank), tmp_path, here], env=environment) for rank in range(2)]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = updated(list(torch.randn(5, 4, 2, 6, generator=seeded(9))))
    for name, value in {"book": alone.book, "uses": alone.uses}.items():
        assert torch.equal(zero[name], one[name])
        torch.testing.assert_close(zero[name], value)
    assert torch.equal(zero["first"], one["first"]), "the processes began with different books"
