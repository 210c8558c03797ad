"""What a peer says is checked where it is read: one error that names it, never a traceback."""

import copy

import numpy as np
import pytest
from afd.played import CONTRACT, RESULT, Stage, batch

from step3_hetero.afd.asked import check_answer
from step3_hetero.afd.driver import Driver, Underway
from step3_hetero.afd.greeting import take_agreed
from step3_hetero.afd.link import Message
from step3_hetero.afd.messages import Kind, result_of
from step3_hetero.afd.wire import Wire
from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import GraphStage
from step3_hetero.runtime.clocks import Durations, StageClock
from step3_hetero.runtime.paces import Paces, table_of
from step3_hetero.runtime.program import Call
from step3_hetero.runtime.timeline import Timeline, spans_of
from step3_hetero.serve.metrics import buckets
from step3_hetero.specs import FfnSpec, TensorSpec

NONSENSE = {
    "text": "x",
    "none": None,
    "true": True,
    "list": [1],
    "dict": {"a": 1},
    "nan": float("nan"),
    "inf": float("inf"),
    "half": 0.5,
    "negative": -1,
    "huge": 10**400,
    "64 bits": 1 << 63,
    "digits": "9" * 5000,
}
EACH = pytest.mark.parametrize("value", NONSENSE.values(), ids=NONSENSE)
NO_NUMBER = {name: value for name, value in NONSENSE.items() if value not in (0.5, -1)}


class Peer:
    """A link on which one message has come."""

    name = "f:0"
    ahead_s = 0.0

    def __init__(self, kind, said, arrays=None, seq=1):
        self.message = Message(kind, 0, seq, said, arrays or {})
        self.posted = []

    def receive(self, deadline_s):
        return self.message

    def post(self, kind, seq=0, said=None, arrays=None):
        self.posted.append((kind, said))


class Cache:
    class spec:
        blocks = 4

    def __init__(self):
        self.copied = []

    def copy_blocks(self, pairs):
        self.copied += pairs


class Remote:
    def __init__(self):
        self.pointed = []

    def point(self, addresses):
        self.pointed.append(addresses)


class Images:
    """A program that only forgets."""

    def __init__(self):
        self.forgotten = []

    def forget_image(self, key):
        self.forgotten.append(key)


@pytest.fixture
def driver():
    remotes = {"f": Remote()}
    return Driver(Images(), [Cache()], {"embed": "a"}, remotes, Wire(), Wire())


ORDERS = {
    "key": (Kind.FORGET, {"key": "?"}),
    "no key": (Kind.FORGET, {}),
    "pairs": (Kind.COPY, {"pairs": "?"}),
    "a pair": (Kind.COPY, {"pairs": [[0, 1], "?"]}),
    "source": (Kind.COPY, {"pairs": [["?", 1]]}),
    "peers": (Kind.PEERS, {"peers": "?"}),
    "of a role": (Kind.PEERS, {"peers": {"f": "?"}}),
    "address": (Kind.PEERS, {"peers": {"f": {"0": [1]}}}),
    "number": (Kind.PEERS, {"peers": {"f": {"x": "a"}}}),
    "role": (Kind.PEERS, {"peers": {"z": {}}}),
    "batch": (Kind.BATCH, {"images": "?", "logprobs": [], "banned": 1}),
    "banned": (Kind.BATCH, {"images": [], "logprobs": [], "banned": "?"}),
}


def put(said, value):
    """Return ``said`` with ``value`` in every place of a question mark."""
    if said == "?":
        return value
    if isinstance(said, dict):
        return {k: put(v, value) for k, v in said.items()}
    return [put(v, value) for v in said] if isinstance(said, list) else said


@EACH
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_front_that_says_nonsense_is_named_and_nothing_of_it_is_done(driver, order, value):
    kind, said = order
    if (kind, value) == (Kind.PEERS, NONSENSE["dict"]) and said["peers"] == "?":
        value = {"a": {}}  # a role that is no peer
    with pytest.raises(EdgeMismatch, match=r"^the front: "):
        driver._from_front(Peer(kind, put(said, value)))
    assert not driver._caches[0].copied and not driver._remotes["f"].pointed
    assert not driver._program.forgotten


def test_what_a_front_may_say_is_done(driver):
    for kind, said in [
        (Kind.FORGET, {"key": 1 << 40}),
        (Kind.COPY, {"pairs": [[0, 3]]}),
        (Kind.PEERS, {"peers": {"f": {"0": "x", "12": "y"}}}),
    ]:
        assert driver._from_front(Peer(kind, said))
    assert driver._program.forgotten == [1 << 40]
    assert driver._caches[0].copied == [(0, 3)]
    assert driver._remotes["f"].pointed == [{0: "x", 12: "y"}]


FFN = GraphStage(
    "ffn[1]",
    1,
    FfnSpec("float32", 4, 8),
    params=(),
    takes=(TensorSpec("u", ("tokens", "hidden"), "float32"),),
    gives=(TensorSpec("y", ("tokens", "hidden"), "float32"),),
)
ANSWERS = {
    "nothing": {},
    "another name": {"u": np.zeros((2, 4), np.float32)},
    "rows": {"y": np.zeros((3, 4), np.float32)},
    "width": {"y": np.zeros((2, 5), np.float32)},
    "axes": {"y": np.zeros((2, 4, 1), np.float32)},
    "dtype": {"y": np.zeros((2, 4), np.int32)},
    "codes without a scale": {"y": np.zeros((2, 4), np.int8)},
    "scale of other rows": {
        "y": np.zeros((2, 4), np.int8),
        "y.scale": np.zeros((3, 1), np.float32),
    },
    "a scale beside no codes": {
        "y": np.zeros((2, 4), np.float32),
        "y.scale": np.zeros((2, 3, 5), np.int32),
    },
}


@pytest.mark.parametrize("arrays", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_of_other_tensors_is_refused(arrays):
    with pytest.raises(EdgeMismatch, match=r"^ffn\[1\]: "):
        check_answer(FFN, 2, arrays, Wire("int8"))


def test_answers_that_fit_are_taken():
    check_answer(FFN, 2, {"y": np.zeros((2, 4), np.float32)}, Wire())
    codes = {"y": np.zeros((2, 4), np.int8), "y.scale": np.zeros((2, 1), np.float32)}
    check_answer(FFN, 2, codes, Wire("int8"))
    check_answer(FFN, 2, codes | {"y.more": np.zeros((), np.float32)}, Wire("int8"))


RESULT_SAID = {
    "times": [["f", "ffn", 0.5, 1, 0, [[-8, 1]]]],
    "members": [["f:0", "ffn", 0.5, 1, 0, [[-8, 1]]]],
    "spans": [["a:0", "ffn", "ffn[1]", 1, 0.0, 1.0, 0, 0]],
    "logprobs": [[0.5, [[1, 0.5]]]],
}


def places(value, path=()):
    """Yield the path of every value within, outermost first."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def changed(value, path, nonsense):
    whole = copy.deepcopy(value)
    *above, last = path
    inner = whole
    for key in above:
        inner = inner[key]
    inner[last] = nonsense
    return whole


@EACH
@pytest.mark.parametrize("path", list(places(RESULT_SAID)), ids=str)
def test_a_result_with_nonsense_is_refused_or_does_no_harm(path, value):
    said = changed(RESULT_SAID, path, value)
    ids = {"ids": np.array([1], np.int32)}
    try:
        result_of(said, ids, 1, with_logits=False)
        clocks = [StageClock.of_wire(said[key]) for key in ("times", "members")]
        spans_of(said["spans"], 0.5)
    except EdgeMismatch:
        return
    for clock in clocks:  # what was taken can be counted, shown and served
        clock.join(clock)
        clock.to_json()
        for durations in clock.entries.values():
            assert all(np.isfinite(float(count)) for _, count in buckets(durations))
        paces = Paces()
        paces.take("a:0", clock)
        table_of(paces.rows())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("times", [["f", "ffn", -1.0, 1, 0, []]]),
        ("times", [["f", "ffn", 1.0, 1, 0, [[10**6, 1]]]]),
        ("members", 5),
        ("spans", [["a:0", "ffn", "s", 1, float("nan"), 1.0, 0, 0]]),
        ("logprobs", []),
        ("logprobs", None),
    ],
)
def test_front_names_the_instance_whose_result_is_none(front, key, value):
    stage = Stage()
    executor = front(stage)
    ticket = executor.submit(batch())
    said, arrays = RESULT
    stage.played[0].link.send(Kind.RESULT, ticket.number, {**said, key: value}, arrays)
    with pytest.raises(EdgeMismatch, match=r"^a:0: "):
        executor.collect(10)
    assert executor.clock.entries == {}


@pytest.mark.parametrize(
    "ids",
    [np.zeros(2, np.int32), np.zeros((1, 1), np.int32), np.zeros(1, np.float32),
     np.array([-1], np.int32)],
    ids=["two", "axes", "float", "negative"],
)  # fmt: skip
def test_front_refuses_ids_that_are_none(front, ids):
    stage = Stage()
    executor = front(stage)
    ticket = executor.submit(batch())
    stage.played[0].link.send(Kind.RESULT, ticket.number, RESULT[0], {"ids": ids})
    with pytest.raises(EdgeMismatch, match=r"^a:0: a result's ids"):
        executor.collect(10)


def test_logits_that_were_asked_for_have_to_come():
    said, arrays = RESULT
    with pytest.raises(EdgeMismatch, match="a result lacks 'logits'"):
        result_of(said, arrays, 1, with_logits=True)
    with pytest.raises(EdgeMismatch, match=r"logits \(2, 5\) refused; allowed: \(1, vocab\)"):
        result_of(said, {**arrays, "logits": np.zeros((2, 5))}, 1, with_logits=True)


@EACH
def test_front_refuses_the_loss_of_an_instance_that_is_none(front, value):
    stage = Stage()
    executor = front(stage)
    executor.submit(batch())
    stage.played[0].link.send(Kind.LOST, said={"role": "f", "instance": value})
    with pytest.raises(EdgeMismatch, match=r"^a:0: instance: "):
        executor.collect(10)


@pytest.mark.parametrize("value", NO_NUMBER.values(), ids=NO_NUMBER)
@pytest.mark.parametrize("key", ["contract", "now"])
def test_an_agreement_that_is_none_names_who_gave_it(key, value):
    answer = Peer(Kind.AGREED, {"contract": CONTRACT, "now": 1.0, key: value})
    with pytest.raises(EdgeMismatch, match="f:0"):
        take_agreed(answer, answer.message, CONTRACT, "a:0", 0.0)


@pytest.mark.parametrize("value", NO_NUMBER.values(), ids=NO_NUMBER)
@pytest.mark.parametrize("key", ["seconds", "taken_s", "sent_s", "waited_s", "call", "spans"])
def test_a_worker_that_says_nonsense_fails_the_request_and_not_the_driver(driver, key, value):
    assert failed(driver, {key: value}, 2).startswith("f:0: ")


def test_a_worker_that_answers_other_rows_fails_the_request_and_not_the_driver(driver):
    assert "f:0: ffn[1]: rows {'y': 3} answered; asked for 2" in failed(driver, {}, 3)


def failed(driver, said, rows):
    """Have a worker answer a call for two rows; return why the front is told that it failed."""
    worker = Peer(Kind.ANSWER, said, {"y": np.zeros((rows, 4), np.float32)})
    driver._underway[1] = Underway(1, None, Call(FFN, {"u": np.zeros((2, 4))}), 0.0)
    driver._program.clock, driver._program.timeline = StageClock(), Timeline("a:0")

    class Asked(Remote):
        role, links = "f", [worker]

        def read(self, link):
            return link.message

        def whole(self, seq):
            return [worker.message]

    driver._remotes["f"] = Asked()
    told = Peer(Kind.BEAT, {})
    driver._from_remote(told, worker)
    ((kind, why),) = told.posted
    assert kind == Kind.FAILED
    return why["why"]


def test_a_step_beyond_every_duration_would_not_be_a_number():
    durations = Durations(calls=1, filed={10**6: 1})
    with pytest.raises(OverflowError):
        durations.quantile_s(0.5)  # which is why a clock that is told so is refused
