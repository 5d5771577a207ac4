"""What comes back so that groups are equal, and what goes with a branch: against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hard_nets import Net, body, tail
from support.nets import X, prepared
from torch import Tensor, nn

import polarfast as pf
from polarfast.planning.selection import is_balanced, spare, to_restore

COUNT = 12  # classes


@st.composite
def rows(draw: st.DrawFn, apart: bool = False) -> list[Tensor]:
    """Up to 3 sets of rows of classes; `apart`: no class is in two of the rows."""
    left, found = draw(st.permutations(range(COUNT))), []
    for _ in range(draw(st.integers(1, 3))):
        number, length = draw(st.sampled_from([(2, 2), (2, 3), (3, 2)]))
        size = number * length
        if apart:
            chosen, left = left[:size], left[size:]
        else:
            chosen = [draw(st.integers(0, COUNT - 1)) for _ in range(size)]
            if any(len(set(chosen[i::number])) < length for i in range(number)):
                continue  # no class is twice in one row
        if len(chosen) == size:
            found.append(torch.tensor(chosen).view(length, number).t().contiguous())
    return found


flags = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(torch.tensor)
strengths = st.lists(st.integers(0, 3), min_size=COUNT, max_size=COUNT).map(
    lambda values: torch.tensor(values).float()
)


def sizes(groups: Tensor, stays: Tensor) -> set[int]:
    return {int(stays[row].sum()) for row in groups}


@pytest.mark.slow
@given(rows(), flags, strengths, st.sets(st.integers(0, COUNT - 1), max_size=3))
@settings(max_examples=100, deadline=None)
def test_as_many_stay_in_each_row(balanced, stays, strength, constant):
    before = stays.clone()
    found = to_restore(balanced, stays, strength, constant)
    assert torch.equal(stays, before)
    there = stays.clone()
    there[list(constant)] = True
    if all(len(sizes(groups, there)) == 1 for groups in balanced):
        assert found == []
    assert not there[found].any()
    there[found] = True
    for groups in balanced:
        assert len(sizes(groups, there)) == 1 and is_balanced(groups, there)


@given(rows(apart=True), flags, strengths)
@settings(max_examples=100, deadline=None)
def test_the_strongest_come_back_and_no_more_than_are_missing(balanced, stays, strength):
    expected = set()
    for groups in balanced:
        most = max(sizes(groups, stays))
        for row in groups.tolist():
            gone = sorted((c for c in row if not stays[c]), key=lambda c: -strength[c])  # stable
            expected |= set(gone[: most - (len(row) - len(gone))])
        assert is_balanced(groups, stays) == (len(sizes(groups, stays)) == 1)
    assert set(to_restore(balanced, stays, strength)) == expected


def test_of_classes_in_several_rows_the_strongest_come_back_first():
    strength = torch.tensor([0.0, 3.0, 2.0, 1.0])
    stays = torch.tensor([True, False, False, False])
    # 1 serves the second row, and makes the first one longer: then 2.
    assert to_restore([torch.tensor([[0, 1], [1, 2]])], stays, strength) == [1, 2]
    assert to_restore([torch.tensor([[0, 1], [2, 3]])], stays, strength) == [2]


@given(rows(), flags, flags)
@settings(max_examples=100, deadline=None)
def test_what_would_have_to_come_back_is_spared(balanced, stays, useless):
    """Classes of one row stay or go together with all that stay beside them, and so on."""
    useless &= stays
    expected, changed = set(useless.nonzero().flatten().tolist()), True
    while changed:
        changed = False
        for groups in balanced:
            beside = {c for c in groups.flatten().tolist() if stays[c]}
            if beside & expected and beside - expected:
                expected, changed = expected - beside, True
    spare(balanced, stays, useless)
    assert set(useless.nonzero().flatten().tolist()) == expected


def shuffled() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        c = x.shape[1]
        x = x.view(x.shape[0], 4, c // 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return net.end(net.b(x))

    return Net(forward, a=body(3, 16), b=body(16, 8), end=nn.Sequential(*tail(8)))


@pytest.mark.parametrize(("least", "kept"), [(1, 4), (4, 4), (5, 8), (9, 12)])
def test_channels_that_go_together_come_back_together(least, kept):
    """The same places in each of 4 groups; the strongest of them count."""
    model, scales = prepared(shuffled, share=0)
    with torch.no_grad():
        scales["a.1.weight"].fill_(1e-3)
        scales["a.1.weight"][[2, 5, 11]] = torch.tensor([8e-3, 7e-3, 6e-3]).double()
    plan = pf.plan(model, X, scales, "fixed", value=0.01, fold="none", min_channels={"a": least})
    places = [place for place, _ in zip([2, 1, 3], range(kept // 4), strict=False)]
    wanted = sorted(place + 4 * group for place in places for group in range(4))
    assert plan.kept["a.1.weight"].tolist() == wanted
    note = plan.layers["a.1.weight"].note
    assert note == f"{kept} added back (min_channels)" if least > 1 else "would lose" in note
