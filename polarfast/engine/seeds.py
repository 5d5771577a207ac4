"""Seeds that follow from where a run is, so that no random state has to be kept.

Order, augmentation and dropout of every micro-batch are drawn from a seed made of the run's seed
and the place: a run goes on after an interruption, or on another number of processes, as if
nothing had happened.
"""

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A seed in [0, 2**63) from whole numbers; close numbers give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1
