"""Large CPU buffers that live across steps."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastmoe
from fastmoe.kernels import memory

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not memory._CAN_MAP, reason="this system hands out no such memory")


@pytest.fixture(autouse=True)
def _empty():
    gc.collect()
    memory.empty_cache()


def kept():
    memory._pool._sort_in()
    return [size for size, *_ in memory._pool.kept]


def test_a_buffer_is_handed_out_again():
    like = torch.empty(0)
    first = memory.new_buffer(like, 1024, 1024)
    assert first.shape == (1024, 1024)
    assert first.dtype == torch.float32
    address = first.data_ptr()
    view = first[3:]
    del first
    assert kept() == []  # a view of it is still in use
    del view
    assert kept() == [4 * MIB]
    assert memory.new_buffer(like, 1 * MIB).data_ptr() == address


def test_buffers_in_use_are_apart():
    buffers = [memory.new_buffer(torch.empty(0), MIB).fill_(i) for i in range(3)]
    assert len({b.data_ptr() for b in buffers}) == 3
    assert [b.mean().item() for b in buffers] == [0, 1, 2]


def test_small_ones_are_ordinary_and_empty_ones_too():
    assert memory.new_buffer(torch.empty(0), 0, 7).shape == (0, 7)
    memory.new_buffer(torch.empty(0), 100)
    assert kept() == []


def test_a_much_larger_buffer_is_left_for_who_needs_it():
    del_me = memory.new_buffer(torch.empty(0), 16 * MIB)
    del del_me
    small = memory.new_buffer(torch.empty(0), 2 * MIB)
    assert small.untyped_storage().nbytes() == 8 * MIB


def test_what_does_not_serve_is_given_back():
    small = [memory.new_buffer(torch.empty(0), MIB) for _ in range(4)]
    del small
    assert kept() == [4 * MIB] * 4
    large = memory.new_buffer(torch.empty(0), 2 * MIB)  # 8 MiB: two of the small ones go for it
    assert kept() == [4 * MIB] * 2
    del large
    fastmoe.empty_cache()
    assert kept() == []


def test_a_buffer_may_come_back_at_any_moment(monkeypatch):
    """The garbage collector runs between any two lines, and other threads do."""
    like = torch.empty(0)
    del_me, small = memory.new_buffer(like, 4 * MIB), [memory.new_buffer(like, MIB)]
    del del_me

    def bisect_left(*args):
        index = memory_bisect_left(*args)
        small.clear()
        return index

    memory_bisect_left = memory.bisect_left
    monkeypatch.setattr(memory, "bisect_left", bisect_left)
    buffer = memory.new_buffer(like, 4 * MIB)
    assert not small
    assert len(buffer) == 4 * MIB


def test_threads_never_share_a_buffer():
    def work(number):
        wrong = 0
        for i in range(200):
            buffer = memory.new_buffer(torch.empty(0), MIB * (1 + (i + number) % 3))
            mark = number * 1000 + i
            buffer[::4096] = mark
            wrong += int((buffer[::4096] != mark).sum())
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0] * 4


def test_gradients_of_an_earlier_step_stay_as_they_were():
    layer = fastmoe.MoE(64, 32, 2, d_hidden=256)
    x = torch.randn(32, 64)
    layer(x).square().sum().backward()
    held = {name: p.grad for name, p in layer.named_parameters()}
    copies = {name: grad.clone() for name, grad in held.items()}
    layer.zero_grad()
    layer(2 * x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.equal(held[name], copies[name])
        if p.grad is not None and p.numel() > MIB:
            assert p.grad.data_ptr() != held[name].data_ptr()


def test_a_second_step_needs_no_fresh_memory(monkeypatch):
    layer = fastmoe.MoE(64, 32, 2, d_hidden=256)
    x = torch.randn(64, 64)

    def step():
        layer.zero_grad()
        layer(x).square().sum().backward()

    step()
    step()
    monkeypatch.setattr(memory.mmap, "mmap", lambda *a, **k: pytest.fail("fresh memory"))
    for _ in range(3):
        step()
