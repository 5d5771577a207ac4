"""Which factors go, by enumeration."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from polarfast.steering.borders import APART, apart, between, center_of, places

SIZES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5001, 1.0]), min_size=1, max_size=12)


@given(SIZES, st.data())
def test_places_are_those_of_python_s_sort(sizes, data):
    then = data.draw(
        st.lists(st.sampled_from([0.0, 0.3, 0.7]), min_size=len(sizes), max_size=len(sizes))
    )
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], then[i], i))
    found = places(torch.tensor(sizes), torch.tensor(then))
    assert [order.index(i) + 1 for i in range(len(sizes))] == found.tolist()


@given(SIZES, st.data())
def test_a_border_has_so_many_under_it_and_all_their_equals(sizes, data):
    order = torch.tensor(sizes).sort().values
    count = data.draw(st.integers(0, len(sizes)))
    border = between(order, count)
    under = int((order <= border).sum())
    assert under >= count and (under == count or order[under - 1] == order[count - 1])


@given(SIZES, st.data())
def test_what_goes_is_clearly_below_what_stays(sizes, data):
    """Whatever number of a layer's smallest factors are to go."""
    gamma = torch.tensor(sizes)
    place = places(gamma, torch.zeros_like(gamma))
    count = data.draw(st.integers(0, len(sizes)))
    going = place <= count
    border = between(gamma.sort().values, count)
    center = center_of(gamma, going, border)
    moved = gamma.clone()
    for near, size in apart({"a": gamma}, {"a": going}, (center,)).values():
        moved = torch.where(near, size, gamma)
    assert (moved[going] <= center).all() and (moved[~going] >= center).all()
    assert (moved[~going] == gamma[~going]).all()  # what stays is left alone
    assert (moved[going] >= (1 - APART) * gamma[going] - 1e-6).all()  # and nothing moves far
    if (~going).any() and float(gamma[~going].min()) > 0:
        assert (gamma[~going] >= center / (1 - APART / 2) - 1e-6).all()
