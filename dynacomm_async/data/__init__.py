"""Images to train on, and who sees which of them when.

:func:`load` reads a data set by name and fits it to a model's input; :class:`Batches` splits it
among workers as a pure function of (seed, epoch, slot, step) and of who takes part;
:class:`Ahead` makes batches while others are computed with. Knows no models and no network.
"""

from dynacomm_async.data.ahead import Ahead
from dynacomm_async.data.augment import Augmentation, parse_augmentation
from dynacomm_async.data.batches import Batches
from dynacomm_async.data.catalogue import DATASETS, load
from dynacomm_async.data.dataset import Dataset

__all__ = ["DATASETS", "Ahead", "Augmentation", "Batches", "Dataset", "load", "parse_augmentation"]
