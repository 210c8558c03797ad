"""The first words of whoever connects: the contract, and what the peer's clock shows."""

from __future__ import annotations

import time

from step3_hetero.afd.contract import Contract, agree
from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import Kind, number_of, said_by
from step3_hetero.errors import EdgeMismatch


def say_hello(link: Link, contract: Contract, me: str, *, traced: bool = False) -> float:
    """Give our reading of the contract and our name; return when. ``traced``: spans are wanted.

    Raises:
        RoleLost, TransportTimeout: the peer is gone.
    """
    asked_s = time.monotonic()
    link.send(Kind.HELLO, said={"contract": dict(contract), "from": me, "traced": traced})
    return asked_s


def take_agreed(link: Link, answer: Message, contract: Contract, me: str, asked_s: float) -> None:
    """Hold the peer's contract against ours, and its clock.

    Raises:
        EdgeMismatch: they differ, for all that the peer agreed.
    """
    theirs = answer.said.get("contract")
    if not isinstance(theirs, dict):
        raise EdgeMismatch(f"{link.name} agrees to {theirs!r:.80}, which is no contract")
    agree(contract, theirs, me, link.name)
    with said_by(link.name):
        theirs_s = number_of({"now": asked_s, **answer.said}, "now")
    link.compare_clocks(asked_s, theirs_s)
