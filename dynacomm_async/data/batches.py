"""Which images each worker sees at each step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError
from dynacomm_async.split import Split

__all__ = ["Batches"]


class Batches:
    """Deals a data set out to workers, anew in every epoch.

    A step's global batch is the next ``workers * batch`` entries of the epoch's permutation; slot r
    takes the r-th block of ``batch``. So the workers together see exactly what one process with a
    ``workers`` times larger batch would see. What is left at an epoch's end is dropped; epochs
    shuffle differently, so nothing is left out for good. Where workers come and go, a
    :class:`~dynacomm_async.split.Split` says among whom the permutation is dealt out.

    Attributes:
        split: the one among slots 0 to ``workers - 1`` from step 0 on.
        steps_per_epoch: whole global batches in the data set.

    Raises:
        ConfigError: a number below 1, a negative seed, or fewer images than one global batch.
    """

    def __init__(self, dataset_size: int, *, workers: int, batch: int, seed: int) -> None:
        for name, number in (("workers", workers), ("batch", batch)):
            if number < 1:
                raise ConfigError(f"{name} is {number}, expected at least 1")
        if seed < 0:
            raise ConfigError(f"seed is {seed}, expected at least 0")
        if dataset_size < workers * batch:
            raise ConfigError(
                f"{dataset_size} images are too few for one step of {workers} workers with a "
                f"batch of {batch}: expected at least {workers * batch}"
            )
        self.split = Split(dataset_size // batch, tuple(range(workers)))
        self.steps_per_epoch = self.split.steps_per_epoch
        self._size = dataset_size
        self._batch = batch
        self._seed = seed
        self._current = (-1, np.empty(0, np.int64))

    def indices(self, slot: int, step: int, split: Split | None = None) -> NDArray[np.int64]:
        """Return the (batch,) indices that ``slot`` trains on at the global, 0-based ``step``.

        A pure function of (seed, epoch, slot, step, split): steps may repeat or go back. O(1), but
        O(n log n) whenever the epoch is another than at the call before. The array is a read-only
        view. Threads may call it at the same time.

        Args:
            slot: the rank.
            step: from 0.
            split: the one that the step is divided by, of as many blocks as :attr:`split`; that
                one by default.

        Raises:
            ConfigError: no such slot or step.
        """
        epoch, block = (split or self.split).block(slot, step)
        return self._permutation(epoch)[block * self._batch : (block + 1) * self._batch]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        known, permutation = self._current
        if known != epoch:
            permutation = _shuffle(self._size, self._seed, epoch)
            self._current = (epoch, permutation)
        return permutation


def _shuffle(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorting raw bits instead of Generator.permutation: NumPy promises that SeedSequence and the
    # bit generators never change, but not Generator's methods, and workers may run other versions.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    permutation = np.argsort(raw, kind="stable").astype(np.int64, copy=False)
    permutation.flags.writeable = False
    return permutation
