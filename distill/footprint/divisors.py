"""The search for the largest micro-batch that fits in memory and divides a step."""

from collections.abc import Callable


def most_windows(share: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `share`, a step's windows, that fits; 0 if not even one window fits.

    The number is doubled as long as it fits; then a binary search follows.
    """
    divisors = [count for count in range(1, share + 1) if share % count == 0]
    good, bad = -1, len(divisors)
    while good + 1 < bad:
        least = 2 * divisors[good] if good >= 0 else 1
        index = next((i for i in range(good + 1, bad) if divisors[i] >= least), bad - 1)
        if bad < len(divisors):
            index = (good + bad) // 2 if good >= 0 else good + 1
        if fits(divisors[index]):
            good = index
        else:
            bad = index
    return divisors[good] if good >= 0 else 0
