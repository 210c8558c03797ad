"""A rank that follows, and one that leads, told step by step: whom they obey, and when."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from step3_hetero.afd.driver import Driver
from step3_hetero.afd.follower import Follower
from step3_hetero.afd.link import Message
from step3_hetero.afd.messages import META as META_NAMES
from step3_hetero.afd.messages import Kind, batch_parcel, meta_arrays
from step3_hetero.afd.ranks import Ranks, Reduction
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import BatchMeta
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.graph import build_graph
from step3_hetero.model.config import step3
from step3_hetero.registry import get_backend
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.microbatch import Choice, MicroBatch
from step3_hetero.specs import Limits
from step3_hetero.transport.base import CorruptFrame

GRAPH = build_graph(step3(), dtype="float32")
HIDDEN = GRAPH.by_name["head"].spec.hidden
META = BatchMeta(np.zeros(2, np.int32), np.arange(2, dtype=np.int32), np.array([0, 2], np.int32),
                 np.array([2], np.int32), np.zeros((1, 1), np.int32))  # fmt: skip
STAGES = ("attention[0]", "attention[1]")
MEET = {"address": "127.0.0.1:9", "epoch": 1}


class Group(Reduction):
    """Notes when it is joined and left."""

    def __init__(self):
        super().__init__(1, 2)
        self.heard = []

    def join(self, device, address, epoch, links):
        self.heard.append((address, epoch))

    def leave(self):
        self.heard.append("left")


class Noting:
    """A stage that notes what it gets, and adds one to the residual, in the same array each run."""

    def __init__(self):
        self.given = []
        self.held = {}

    def plan(self, meta):
        self.meta = meta

    def run(self, inputs, out=None):
        self.given.append(inputs)
        held = self.held.setdefault(inputs["x"].shape, inputs["x"].copy())
        held[...] = inputs["x"] + 1
        return {"x": held}


class Rank0:
    """A link whose messages the test gives."""

    def __init__(self, name="a:0"):
        self.name = name
        self.messages = []
        self.refused = []

    def send(self, kind, seq=0, said=None, arrays=None):
        assert kind == Kind.REFUSED
        self.refused.append(said["why"])

    def receive(self, deadline_s):
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message


def rows(value=0.0, count=2, dtype=np.float32):
    return np.full((count, HIDDEN), value, dtype)


@pytest.fixture
def follower():
    device = get_backend("reference").open(0)
    stages = {n: LoadedStage(GRAPH.by_name[n], Noting(), device, "a") for n in STAGES}
    copied = SimpleNamespace(pairs=[], spec=SimpleNamespace(blocks=8))
    copied.copy_blocks = copied.pairs.extend
    made = Follower(stages, [copied], Group(), "a:0", Limits(4, 2, 3), "a:1")
    made.copied, made.stages, made.group = copied.pairs, stages, made._reduction
    return made


def tell(follower, link, kind, seq=0, said=None, arrays=None):
    """Give a message; say whether the link stays."""
    link.messages.append(Message(kind, 0, seq, said or {}, arrays or {}))
    return follower._from_caller(link)


def met(follower):
    link = Rank0()
    assert tell(follower, link, Kind.MEET, 0, MEET)
    return link


def test_two_micro_batches_side_by_side_each_keep_their_residual(follower):
    link = met(follower)
    for seq in (1, 2):
        assert tell(follower, link, Kind.BATCH, seq, arrays=meta_arrays(META))
        assert tell(follower, link, Kind.CALL, seq, {"stage": STAGES[0]}, {"x": rows(10 * seq)})
    assert follower.is_busy
    for seq in (2, 1):
        assert tell(follower, link, Kind.CALL, seq, {"stage": STAGES[1]}, {"y": rows(0.5)})
    assert [g["x"][0, 0] for g in follower.stages[STAGES[1]].stage.given] == [21, 11]
    assert all((g["y"] == 0.5).all() for g in follower.stages[STAGES[1]].stage.given)
    assert not follower.is_busy
    assert tell(follower, link, Kind.COPY, 0, {"pairs": [[0, 1], [1, 2]]})
    assert follower.copied == [(0, 1), (1, 2)]


def test_what_a_lost_leader_had_under_way_is_forgotten_and_the_group_left(follower):
    link = met(follower)
    assert tell(follower, link, Kind.BATCH, 1, arrays=meta_arrays(META))
    link.messages.append(RoleLost("gone"))
    assert not follower._from_caller(link)
    assert not follower.is_busy
    assert follower.group.heard == ["left", ("127.0.0.1:9", 1), "left"]
    again = met(follower)
    assert not tell(follower, again, Kind.CALL, 1, {"stage": STAGES[0]}, {"x": rows()})


@pytest.mark.parametrize(
    ("kind", "said", "arrays"),
    [
        (Kind.CALL, {"stage": "attention[9]"}, {"x": rows()}),
        (Kind.CALL, {"stage": STAGES[0]}, {"x": rows(count=3)}),
        (Kind.CALL, {"stage": STAGES[0]}, {"x": rows(dtype=np.float64)}),
        (Kind.CALL, {"stage": STAGES[0]}, {"y": rows()}),
        (Kind.CALL, {"stage": STAGES[1]}, {"y": rows()}),
        (Kind.CALL, {}, {"x": rows()}),
        (Kind.BATCH, {}, {"positions": META.positions}),
        (Kind.BATCH, {}, {**meta_arrays(META), "slots": META.slots + 8 * 128}),
        (Kind.COPY, {"pairs": [[1]]}, {}),
        (Kind.COPY, {}, {}),
        (Kind.MEET, {"address": "127.0.0.1:9"}, {}),
        (Kind.MEET, {"address": "127.0.0.1:9", "epoch": float("inf")}, {}),
        (Kind.MEET, {"address": "nowhere", "epoch": 2}, {}),
        (Kind.FORGET, {}, {}),
    ],
)
def test_a_leader_that_says_what_cannot_be_is_let_go(follower, kind, said, arrays):
    link = met(follower)
    assert tell(follower, link, Kind.BATCH, 1, arrays=meta_arrays(META))
    assert not tell(follower, link, kind, 1, said, arrays)
    assert not any(s.stage.given for s in follower.stages.values())
    assert follower.group.heard[-1] == "left"
    (why,) = link.refused
    assert why.startswith("a:1 refuses what a:0 says: ")


INT = np.int32
ONE, LONG = np.zeros((1, 1), INT), np.zeros((1, 4), INT)


@pytest.mark.parametrize(
    ("name", "array", "why"),
    [
        ("positions", META.positions.astype(np.float32), r"positions float32 .2,. refused"),
        ("positions", META.positions[None], r"positions int32 .1, 2. refused; .* int32 .any."),
        ("positions", META.positions - 1, "positions from -1 to -1 refused"),
        ("positions", META.positions + 3 * 128, "positions from 384 .* from 0 to 383"),
        ("slots", META.slots[:1], r"slots int32 .1,. refused; allowed: int32 .2."),
        ("slots", META.slots - 2, "slots from -2 to -1 refused; allowed: from -1 to 1023"),
        ("slots", META.slots + 1023, "slots from 1023 to 1024 refused"),
        ("query_starts", np.array([0, 3], INT), "query_starts from 0 to 3 .* from 0 to 2"),
        ("query_starts", np.array([0], INT), r"query_starts int32 .1,. refused; .*int32 .2."),
        ("query_starts", np.array([1, 2], INT), "query_starts .1 2. refused"),
        ("query_starts", np.array([0, -1], INT), "query_starts from -1"),
        ("context_lens", np.array([129], INT), "context_lens from 129 to 129 .* from 0 to 128"),
        ("context_lens", np.zeros((), INT), "context_lens int32 .. refused"),
        ("block_tables", ONE + 8, "block_tables from 8 to 8 refused; allowed: from 0 to 7"),
        ("block_tables", ONE - 1, "block_tables from -1 to -1"),
        ("block_tables", np.zeros(1, INT), r"block_tables int32 .1,. refused; .*int32 .1, any."),
        ("block_tables", LONG, "2 tokens of 1 sequences of 4 blocks refused; allowed: to 4, 2 and"),
    ],
)
def test_where_tokens_are_said_to_stand_is_held_against_the_cache(follower, name, array, why):
    link = met(follower)
    good = meta_arrays(META)
    assert tell(follower, link, Kind.BATCH, 1, arrays=good)
    assert not tell(follower, link, Kind.BATCH, 2, arrays={**good, name: array})
    (refused,) = link.refused
    assert re.match(f"a:1 refuses what a:0 says: {why}", refused), refused


def test_a_batch_that_falls_back_or_has_too_many_rows_or_sequences_is_refused(follower):
    for lens, tokens, starts in (
        ((1, 1), 2, (0, 2, 1)),
        ((1,), 5, (0, 5)),
        ((1,) * 3, 2, (0,) * 4),
    ):
        said = np.zeros(tokens, INT), np.zeros(tokens, INT), np.array(starts, INT)
        tables = np.zeros((len(lens), 1), INT)
        arrays = meta_arrays(BatchMeta(*said, np.array(lens, INT), tables))
        assert not tell(follower, met(follower), Kind.BATCH, 1, arrays=arrays)
    padded = BatchMeta(META.positions, META.slots - 1, np.zeros(1, INT), ONE[0, :0], ONE[:0])
    assert tell(follower, met(follower), Kind.BATCH, 1, arrays=meta_arrays(padded))


def test_nobody_but_its_rank_0_is_obeyed(follower):
    link, other = met(follower), Rank0("a:2")
    assert not tell(follower, other, Kind.MEET, 0, MEET | {"epoch": 5})
    assert not tell(follower, Rank0(), Kind.BATCH, 1, arrays=meta_arrays(META))
    assert tell(follower, link, Kind.BEAT) and tell(follower, other, Kind.BEAT)
    assert follower.group.heard == ["left", ("127.0.0.1:9", 1)]
    assert tell(follower, link, Kind.BATCH, 1, arrays=meta_arrays(META))


class Others:
    """The other ranks as a driver sees them, whole once the test says so."""

    def __init__(self):
        self.is_whole = False
        self.links, self.copied = [], []

    def point(self, addresses):
        self.is_whole = 1 in addresses

    def copy(self, pairs):
        self.copied += pairs

    def lost(self):
        return []


def test_a_leader_begins_nothing_before_its_ranks_are_there_and_then_in_order():
    heard, spec = [], SimpleNamespace(blocks=8)
    cache = SimpleNamespace(copy_blocks=lambda pairs: heard.append("copy"), spec=spec)

    def passing():
        heard.append("batch")
        yield SimpleNamespace(node=GRAPH.by_name["ffn[4]"], inputs={})

    program = SimpleNamespace(
        run=lambda batch: passing(), timeline=None, home=get_backend("reference").open(0),
        clock=SimpleNamespace(add=lambda *a: None),
        forget_image=lambda key: heard.append("forget"),
    )  # fmt: skip
    asked = SimpleNamespace(links=[], lost=list, call=lambda *a: [])
    ranks, front = Others(), Rank0("front")
    driver = Driver(program, [cache], {"embed": "a", "ffn[4]": "f"}, {"f": asked}, Wire(), Wire(),
                    0, ranks)  # fmt: skip
    asked.point = lambda addresses: None
    one = np.zeros(1, np.float32)
    batch = MicroBatch(META.positions, META, META.positions[:1], Choice(one, one, one, one, -1),
                       [None])  # fmt: skip
    said, arrays = batch_parcel(batch)
    peers = [{"f": {"0": "x"}}, {"f": {"0": "x"}, "a": {"1": "y"}}]
    front.messages = [
        Message(Kind.PEERS, 0, 0, {"peers": peers[0]}, {}),
        Message(Kind.COPY, 0, 0, {"pairs": [[0, 1]]}, {}),
        Message(Kind.BATCH, 0, 1, said, arrays),
        Message(Kind.FORGET, 0, 0, {"key": 3}, {}),
    ]
    for _ in range(4):
        assert driver._from_front(front)
    assert heard == []
    front.messages = [Message(Kind.PEERS, 0, 0, {"peers": peers[1]}, {})]
    assert driver._from_front(front)
    assert heard == ["copy", "batch", "forget"] and ranks.copied == [(0, 1)]


class Told(Rank0):
    """A link that keeps what is posted."""

    def __init__(self, name):
        super().__init__(name)
        self.posted = []

    def post(self, kind, seq=0, said=None, arrays=None):
        self.posted.append((kind, seq, dict(said or {}), sorted(arrays or ())))

    def close(self):
        self.posted.append("closed")


@pytest.fixture
def ranks(follower):
    """Return a rank 0 of three, the group that it forms, and what becomes of its links."""
    group, links = Group(), {}
    group.rank, group.size = 0, 3

    def connect(name, address):
        if address == "nobody":
            raise TransportTimeout("nobody there")
        links[name] = Told(name)
        return links[name]

    return Ranks("a", 3, group, connect, list(follower.stages.values())), group, links


def test_rank_0_meets_the_others_once_all_are_there_and_tells_them_what_they_lack(ranks):
    leads, group, links = ranks
    leads.point({1: "x", 4: "x", 5: "nobody"})  # 1 is of another instance
    assert list(links) == ["a:4"] and leads.lost() == [5] and leads.lost() == []
    assert not leads.is_whole and group.heard == []
    leads.point({4: "x", 5: "y"})
    ((address, epoch),) = group.heard
    assert leads.is_whole and address.startswith("127.0.0.1:") and epoch == 1
    other = BatchMeta(META.positions, META.slots, META.query_starts, META.context_lens,
                      META.block_tables)  # fmt: skip
    leads.run(STAGES[0], META, {"x": rows()})
    leads.run(STAGES[0], other, {"x": rows()})
    leads.run(STAGES[1], META, {"x": rows(), "y": rows()})
    leads.copy([(0, 1)])
    meet = (Kind.MEET, 0, {"address": address, "epoch": 1}, [])
    for name in ("a:4", "a:5"):
        assert links[name].posted == [
            meet,
            (Kind.BATCH, 1, {}, sorted(META_NAMES)),
            (Kind.CALL, 1, {"stage": STAGES[0]}, ["x"]),
            (Kind.BATCH, 2, {}, sorted(META_NAMES)),
            (Kind.CALL, 2, {"stage": STAGES[0]}, ["x"]),
            (Kind.CALL, 1, {"stage": STAGES[1]}, ["y"]),
            (Kind.COPY, 0, {"pairs": [(0, 1)]}, []),
        ]
    assert leads._told == {other: 2}  # what is at its end is not kept
    leads.close()
    assert group.heard[-1] == "left" and all(x.posted[-1] == "closed" for x in links.values())


@pytest.mark.parametrize("how", [RoleLost("gone"), TransportTimeout("late"), CorruptFrame("bad")])
def test_rank_0_ends_when_another_rank_is_gone(ranks, how):
    leads, _, links = ranks
    leads.point({4: "x", 5: "y"})
    links["a:5"].messages = [Message(Kind.BEAT, 0, 0, {}, {}), how]
    leads.read(links["a:5"])
    with pytest.raises(RoleLost, match="a:5 is gone, its instance begins anew"):
        leads.read(links["a:5"])


def test_what_another_rank_refuses_is_told_in_its_words(ranks):
    leads, _, links = ranks
    leads.point({4: "x", 5: "y"})
    links["a:5"].messages = [Message(Kind.REFUSED, 0, 0, {"why": "a:5 refuses what a:3 says"}, {})]
    with pytest.raises(EdgeMismatch, match=r"^a:5 refuses what a:3 says$"):
        leads.read(links["a:5"])


def test_what_rank_0_measures_is_told_of_its_process_and_not_of_its_instance():
    clock = StageClock()
    clock.add("a", "attention", 1.0)
    program = SimpleNamespace(clock=clock)
    driver = Driver(program, [], {"embed": "a"}, {}, Wire(), Wire(), 1, Others(), "a:2")
    assert [entry[:2] for entry in driver._paces()] == [["a:2", "attention"]]


def test_what_another_role_refuses_is_not_said_to_come_from_the_front():
    def point(addresses):
        raise EdgeMismatch("f:0 and a:0 do not agree")

    front = Rank0("front")
    front.messages = [Message(Kind.PEERS, 0, 0, {"peers": {"f": {"0": "x"}}}, {})]
    remotes = {"f": SimpleNamespace(links=[], lost=list, point=point)}
    driver = Driver(SimpleNamespace(), [], {"embed": "a"}, remotes, Wire(), Wire())
    with pytest.raises(EdgeMismatch, match=r"^f:0 and a:0"):
        driver._from_front(front)
