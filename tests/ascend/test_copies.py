"""Copies between host and device: pinned, in pieces, with deadlines."""

import ml_dtypes
import numpy as np
import pytest
import torch

from step3_hetero.afd.landing import Landing
from step3_hetero.afd.leaving import PIECE_BYTES, Leaving
from step3_hetero.afd.parcel import parcel
from step3_hetero.backends.ascend import copies, driver
from step3_hetero.errors import TransportTimeout


class Pending:
    """An event that never comes."""

    def record(self, stream):
        """Stay pending."""

    def query(self):
        return False


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 128, 129, 1000])
def test_arrays_of_any_size_pass_through_the_buffers_whole(nbytes):
    staging = copies.Staging(piece_bytes=64)
    host = torch.from_numpy(np.random.default_rng(nbytes).integers(0, 255, nbytes, np.uint8))
    x, back = torch.zeros(nbytes, dtype=torch.uint8).to("npu"), torch.zeros_like(host)
    staging.copy_in(host, x)
    assert torch.equal(x.cpu(), host)
    staging.copy_out(x, back)
    assert torch.equal(back, host)


def test_a_buffer_is_not_written_before_its_last_piece_has_left(monkeypatch):
    """Copies that end only when they are waited for: what a buffer held then is what arrives."""
    queue = []

    class Late:
        def record(self, stream):
            self.mine = len(queue)

        def query(self):
            while queue and self.mine:
                queue.pop(0)()
                self.mine -= 1
            return True

        synchronize = query

    plain = torch.Tensor.copy_

    def later(self, source, non_blocking=False):
        if non_blocking:
            queue.append(lambda: plain(self, source))
            return self
        return plain(self, source)

    staging = copies.Staging(piece_bytes=64)
    host, x = torch.arange(250, dtype=torch.uint8), torch.zeros(250, dtype=torch.uint8).to("npu")
    back = torch.zeros_like(host)
    monkeypatch.setattr(driver.module(), "Event", Late)
    monkeypatch.setattr(torch.Tensor, "copy_", later)
    staging.copy_in(host, x)
    staging.copy_out(x, back)
    monkeypatch.undo()
    assert torch.equal(x.cpu(), host) and torch.equal(back, host)


def test_large_arrays_go_through_pinned_pieces_and_small_ones_do_not(backend, monkeypatch):
    device = backend.open(0)
    device.to_host(device.from_host(np.ones(100, np.float32)))
    assert device._staging is None
    large = np.arange(1 << 20, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(1024, -1)
    x = device.from_host(large)
    assert device._staging is not None
    assert np.array_equal(device.to_host(x), large)
    wide = device.from_host(np.arange(1 << 20, dtype=np.float32).reshape(1024, -1))
    assert np.array_equal(device.to_host(wide.t()), wide.cpu().numpy().T)


def test_copy_into_memory_with_gaps_arrives(device):
    x = device.from_host(np.arange(6, dtype=np.float32))
    back = np.zeros((6, 2), np.float32)
    device.copy_out(x, back[:, 0]).wait(1.0)
    assert back[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and not back[:, 1].any()


def test_copy_that_does_not_end_is_told(device, monkeypatch):
    monkeypatch.setattr(driver.module(), "Event", Pending)
    with pytest.raises(TransportTimeout, match=r"the end of a copy in 0\.01 s"):
        device.copy_in(np.ones(4, np.float32), device.empty((4,), "float32")).wait(0.01)
    monkeypatch.setattr(copies, "COPY_S", 0.01)
    staging, x = copies.Staging(64), torch.zeros(64, dtype=torch.uint8).to("npu")
    for call in (staging.copy_in, lambda host, x: staging.copy_out(x, host)):
        with pytest.raises(TransportTimeout, match=r"a copy in 0\.01 s"):
            call(torch.zeros(64, dtype=torch.uint8), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])  # 5, 2.5 and 1.25 pieces
def test_an_edge_takes_a_large_array_out_and_in_by_pieces(device, dtype):
    x = np.arange(5 * PIECE_BYTES // 4).reshape(5, -1).astype(np.dtype(dtype))
    sent = Leaving(device)
    sent.add("u", device.from_host(x), dtype)
    assert sent.is_pending
    sent.wait()
    np.testing.assert_array_equal(sent["u"], x)
    landing = Landing(device, (1,))
    landing.begin(parcel(1, 0, 0, {}, {"u": x}))
    landing.came(x.nbytes)
    (landed,) = landing.taken({"u": x}).values()
    np.testing.assert_array_equal(device.to_host(landed.there()), x)


def test_a_copy_is_waited_for_on_the_device_that_holds_the_array(device, monkeypatch):
    """The thread that starts it may have another device as its current one."""
    asked, npu = [], driver.module()
    monkeypatch.setattr(npu, "current_stream", lambda place=None: asked.append(place))
    x = device.empty((4,), "float32")
    device.copy_in(np.ones(4, np.float32), x)
    device.copy_out(x, np.ones(4, np.float32))
    staging, host = copies.Staging(64), torch.zeros(4)
    staging.copy_in(host, x)
    staging.copy_out(x, host)
    assert asked == [device.device] * 4


def test_a_copy_to_the_host_keeps_both_ends_until_it_is_waited_for(device):
    x, host = device.empty((4,), "float32"), np.zeros(4, np.float32)
    event = device.copy_out(x, host)
    source, target = event.keep
    assert source is x
    assert target.data_ptr() == host.ctypes.data
    event.wait(1.0)
    assert event.keep is None
