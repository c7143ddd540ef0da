"""Every error that the package raises on purpose, in one tree.

The branches say what the caller can do::

    DynaCommError
    ├── ConfigError (also ValueError)    a setting, name or file is wrong: change it
    │   ├── PlanError                    a plan or a cost table that cannot be
    │   └── ShapeError                   an array or layer whose shape or dtype does not fit
    ├── ProtocolError                    bytes or calls out of turn; the connection is over
    │   ├── LocalProtocolError           this side's fault: fix the calling code
    │   └── RemoteProtocolError          the other side's fault: do not trust the connection
    ├── ChannelError                     the connection carries nothing any more
    │   ├── ChannelClosed                one side ended it in order
    │   └── ChannelBroken                it was lost in the middle: reconnecting may help
    ├── CheckpointError                  a disk failed; training may go on: look at the disk
    └── PeerError                        the other side refused, and says why (``code``)

Deadlines raise the built-in :class:`TimeoutError`.
"""

from __future__ import annotations

__all__ = [
    "ChannelBroken",
    "ChannelClosed",
    "ChannelError",
    "CheckpointError",
    "ConfigError",
    "DynaCommError",
    "LocalProtocolError",
    "PeerError",
    "PlanError",
    "ProtocolError",
    "RemoteProtocolError",
    "ShapeError",
]


class DynaCommError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DynaCommError, ValueError):
    """A setting, a name or a file is wrong; the message says what was expected."""


class PlanError(ConfigError):
    """A plan or a cost table that cannot be: negative times, missing layers, overlaps."""


class ShapeError(ConfigError):
    """An array or a layer does not fit: names the layer, what came and what was expected."""


class ProtocolError(DynaCommError):
    """The rules of the protocol were broken; the connection cannot go on."""


class LocalProtocolError(ProtocolError):
    """This side tried something that the protocol forbids now. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol forbids. Nothing of it was applied."""


class ChannelError(DynaCommError):
    """The connection carries nothing any more."""


class ChannelClosed(ChannelError):
    """The connection was ended in order, by either side."""


class ChannelBroken(ChannelError):
    """The connection was lost; a message under way may or may not have arrived whole."""


class CheckpointError(DynaCommError):
    """A checkpoint could not be written or read; checkpoints on disk are as they were before."""


class PeerError(DynaCommError):
    """The other side refused or failed, and said why.

    Attributes:
        code: a stable word for programs, such as ``"run-mismatch"``; the codes are listed in
            ``wire/PROTOCOL.md``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[PeerError], tuple[str, str]]:
        """Pickle with the code, since errors cross processes in other people's frameworks."""
        return type(self), (self.code, str(self))
