"""Among whom an epoch's data are divided, also while workers come and go. Pure.

An epoch is a run of *blocks*, numbered from 0, each the batch of one worker in one step. A step
takes as many neighbouring blocks as it has members, one each in the order of their slots; when the
rest of an epoch is not enough for a step, the next epoch begins. When the members change, the next
step goes on where the one before ended. So nothing is seen twice in an epoch, whoever comes and
goes, and the work is divided anew at the very next step: over slow links an epoch may take hours,
and a newcomer that idles to its end, or a share that nobody works on until then, would cost more
than the few bytes that it takes to tell everybody. What a member had not pushed when it left is
not seen in that epoch.

A split says all there is to know from its step on, so nobody needs the history: not a newcomer, not
a checkpoint. Training without a common step is divided among all slots throughout: there is no
boundary at which to divide anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynacomm_async.errors import ConfigError

__all__ = ["Split"]


@dataclass(frozen=True, slots=True)
class Split:
    """How the data are divided from a step on.

    Attributes:
        blocks: in an epoch.
        members: the slots among which each step is divided, ascending.
        step: the first one that is divided like this.
        epoch: the one that ``step`` lies in.
        position: blocks of ``epoch`` before ``step``.

    Raises:
        ConfigError: nobody, somebody twice, fewer blocks than members, or negative numbers.
    """

    blocks: int
    members: tuple[int, ...]
    step: int = 0
    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if min(self.step, self.epoch, self.position, *self.members) < 0:
            raise ConfigError(f"{self} has a negative number")
        if not self.members or list(self.members) != sorted(set(self.members)):
            raise ConfigError(f"data split among {self.members}, expected ascending slots")
        if self.blocks < len(self.members):
            raise ConfigError(
                f"an epoch of {self.blocks} batches is too short for a step of "
                f"{len(self.members)} workers"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a whole epoch, for as long as the members stay the same."""
        return self.blocks // len(self.members)

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its first block.

        Raises:
            ConfigError: the step is before this split's.
        """
        if step < self.step:
            raise ConfigError(f"step is {step}, expected at least {self.step}")
        n_members, ahead = len(self.members), step - self.step
        left = (self.blocks - self.position) // n_members
        if ahead < left:
            return self.epoch, self.position + ahead * n_members
        epochs, ahead = divmod(ahead - left, self.steps_per_epoch)
        return self.epoch + 1 + epochs, ahead * n_members

    def block(self, slot: int, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the block in it that a member works on.

        Raises:
            ConfigError: no member is in the slot, or the step is before this split's.
        """
        if slot not in self.members:
            expected = ", ".join(str(member) for member in self.members)
            raise ConfigError(f"slot is {slot}, expected one of {expected}")
        epoch, first = self.locate(step)
        return epoch, first + self.members.index(slot)

    def anew(self, step: int, members: Iterable[int]) -> Split:
        """Return the split among other members from a step on."""
        if step < self.step:
            raise ConfigError(f"step is {step}, expected at least {self.step}")
        epoch, position = self.epoch, self.position
        if step > self.step:  # where the step before ended: what is left may do for fewer members
            epoch, position = self.locate(step - 1)
            position += len(self.members)
        return Split(self.blocks, tuple(sorted(members)), step, epoch, position)
