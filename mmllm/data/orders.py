"""Orders that are the same on every machine and in every release: functions of a seed and of what they are for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bits(seed: int, *use: int) -> np.random.PCG64:
    """The random bits of one use of a run's seed."""
    return np.random.PCG64(np.random.SeedSequence(seed % 2**64, spawn_key=use))


def permutation(seed: int, size: int, *use: int) -> NDArray[np.int64]:
    """The numbers ``0 .. size - 1`` in random order."""
    # Not Generator.permutation: numpy promises the same raw stream in every version, but not the same shuffle.
    return np.argsort(bits(seed, *use).random_raw(size), kind="stable").astype(np.int64)
