"""The link emulator: a relay that gives the connections through it a rate, a delay and overhead.

It stands between TCP clients and one server and imitates a slow edge link, so that whatever is
measured over it is measured unmodified. :class:`Link` runs inside an event loop,
:class:`LinkProcess` as a process of its own.
"""

from __future__ import annotations

from dynacomm_async.link.counters import Counters, KindTally, Tally
from dynacomm_async.link.fault import Fault, parse_fault
from dynacomm_async.link.link import Link
from dynacomm_async.link.medium import Medium, Rates
from dynacomm_async.link.options import (
    add_arguments,
    add_setting_arguments,
    addresses_from,
    arguments_of,
    settings_from,
)
from dynacomm_async.link.process import LinkProcess, precise_loop, run_link, serve_link
from dynacomm_async.link.settings import LinkSettings
from dynacomm_async.link.units import (
    format_duration,
    format_rate,
    parse_duration,
    parse_rate,
    parse_schedule,
)
from dynacomm_async.link.walk import MessageWalk, Part

__all__ = [
    "Counters",
    "Fault",
    "KindTally",
    "Link",
    "LinkProcess",
    "LinkSettings",
    "Medium",
    "MessageWalk",
    "Part",
    "Rates",
    "Tally",
    "add_arguments",
    "add_setting_arguments",
    "addresses_from",
    "arguments_of",
    "format_duration",
    "format_rate",
    "parse_duration",
    "parse_fault",
    "parse_rate",
    "parse_schedule",
    "precise_loop",
    "run_link",
    "serve_link",
    "settings_from",
]
