"""Seeds that follow from where a run is, so that no random state has to be kept.

Order, augmentation and dropout of every micro-batch are drawn from a seed made of the run's seed
and the place: a run goes on after an interruption, or on another number of processes, as if
nothing had happened.
"""

from .data.plan import WORD, splitmix


def seed_at(*place: int) -> int:
    """A seed in [0, 2**63) from whole numbers; close numbers give unrelated seeds.

    Not ``data.plan.mix``: numbers are joined by exclusive or here and added there. Either one for
    both would change what every recipe draws, and what unfinished runs go on with.
    """
    state = 0
    for number in place:
        state = splitmix(state ^ (number & WORD))
    return state >> 1
