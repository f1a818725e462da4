"""Counts of products that rounding moves, of two libraries, held against each other."""

from __future__ import annotations

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

CHANCE = 1e-4  # how rarely counts from one distribution may fail a test
DRAWS = 9  # the least number of each whose ranks can be so rare


def hold(ours: ArrayLike, theirs: ArrayLike, more: int) -> None:
    """Assert that our counts are not the larger ones, but for `more` products. A solve that fails counts as infinitely many.

    Where their count does not move, the median of ours is held against it. Where it does, the median of a few would lie above
    theirs as often as below, though both are drawn from one distribution; there the ranks of all the counts (Mann & Whitney
    1947) must not show that ours, less the `more`, are the larger ones.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    medians = f"{np.median(ours)} products, theirs {np.median(theirs)}"
    assert np.isfinite(np.median(theirs)), "the case says nothing where they do not converge"
    if (theirs == theirs[0]).all():
        assert np.median(ours) <= theirs[0] + more, medians
    else:
        # exact: the normal approximation of so few is never below a ten-thousandth
        test = scipy.stats.mannwhitneyu(ours - more, theirs, alternative="greater", method="exact")
        assert test.pvalue >= CHANCE, f"{medians}, by chance with a probability of {test.pvalue:.1e}"
