"""The wire protocol, sans-IO: grid, messages, decoder and session states (see PROTOCOL.md).

It turns bytes into checked messages and back, and says who may send what when. It does no I/O and
reads no clock: a channel hands it bytes and the time at which they came.
"""

from __future__ import annotations

from dynacomm_async.wire.codec import MAX_ITEMS, decode, encode
from dynacomm_async.wire.connection import Connection
from dynacomm_async.wire.decoder import Admit, Arrival, Decoder, Place, Received
from dynacomm_async.wire.frame import (
    BACK_TO_BACK,
    HELLO_LIMIT,
    MAGIC,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    MessageKind,
    Prefix,
)
from dynacomm_async.wire.grid import (
    CELL_FLOATS,
    CELL_NBYTES,
    MAX_FLOATS,
    Grid,
    LayerSpec,
    as_layer_specs,
)
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    DownPolicy,
    End,
    Error,
    Gradients,
    Have,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Leave,
    Membership,
    Message,
    Parameters,
    Report,
    Resume,
    Skip,
    Subscribe,
    Subscription,
    Timing,
    Welcome,
)
from dynacomm_async.wire.states import Role, SessionStates, State

__all__ = [
    "BACK_TO_BACK",
    "CELL_FLOATS",
    "CELL_NBYTES",
    "HELLO_LIMIT",
    "MAGIC",
    "MAX_FLOATS",
    "MAX_HEADER_NBYTES",
    "MAX_ITEMS",
    "PREFIX_NBYTES",
    "PROTOCOL_VERSION",
    "Admit",
    "Arrival",
    "Connection",
    "Decoder",
    "DownPolicy",
    "End",
    "Error",
    "Gradients",
    "Grid",
    "Have",
    "Heartbeat",
    "Hello",
    "Initial",
    "Join",
    "LayerSpec",
    "Leave",
    "Membership",
    "Message",
    "MessageKind",
    "Parameters",
    "Place",
    "Prefix",
    "Received",
    "Report",
    "Resume",
    "Role",
    "SessionStates",
    "Skip",
    "State",
    "Subscribe",
    "Subscription",
    "Timing",
    "Welcome",
    "as_layer_specs",
    "decode",
    "encode",
]
