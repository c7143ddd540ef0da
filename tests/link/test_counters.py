from __future__ import annotations

from dynacomm_async.link import Counters
from dynacomm_async.link.counters import KEPT_STEPS
from dynacomm_async.wire.frame import PREFIX_NBYTES, MessageKind, Prefix


def test_counters_say_messages_and_bytes_by_direction_kind_and_step() -> None:
    counters = Counters()
    for step in (10, 9, 10):
        counters.up.add(Prefix(MessageKind.GRADIENTS, 0, 4, 100, step))
    counters.down.add(Prefix(MessageKind.HEARTBEAT, 0, 0, 0, 0))
    nbytes = 3 * (PREFIX_NBYTES + 104)
    assert counters.to_json() == {
        "up": {
            "messages": 3,
            "bytes": nbytes,
            "kinds": {"GRADIENTS": {"messages": 3, "bytes": nbytes, "steps": {"9": 1, "10": 2}}},
        },
        "down": {
            "messages": 1,
            "bytes": PREFIX_NBYTES,
            "kinds": {"HEARTBEAT": {"messages": 1, "bytes": PREFIX_NBYTES, "steps": {"0": 1}}},
        },
    }


def test_of_a_kinds_steps_the_newest_ten_thousand_are_counted_apart() -> None:
    counters = Counters()
    for step in range(KEPT_STEPS + 7):
        for _ in range(2):
            counters.up.add(Prefix(MessageKind.GRADIENTS, 0, 0, 0, step))
    tally = counters.up.kinds[MessageKind.GRADIENTS]
    assert tally.steps == dict.fromkeys(range(7, KEPT_STEPS + 7), 2)
    assert tally.messages == counters.up.messages == 2 * (KEPT_STEPS + 7)
    assert tally.nbytes == tally.messages * PREFIX_NBYTES
