"""Groups over HCCL: what can be told without a card. Tier 2 makes the real process group."""

import pytest

from step3_hetero.backend import Rendezvous
from step3_hetero.backends.ascend import collective, driver
from step3_hetero.backends.torch_common import collective as shared
from step3_hetero.errors import UnsupportedOp

HERE = Rendezvous("127.0.0.1:29500", 0, 1, 5.0)


def test_stand_in_has_no_group(device):
    with pytest.raises(UnsupportedOp, match=r"no HCCL, asked for ranks \[0, 1\]; use backend cpu"):
        device.group([0, 1], HERE)


def test_card_joins_over_hccl(device, monkeypatch):
    monkeypatch.setattr(driver, "stand_in", lambda: None)
    monkeypatch.setattr(shared, "join", lambda *given: given)
    assert device.group([0, 1], HERE) == ([0, 1], HERE, collective.hccl)
