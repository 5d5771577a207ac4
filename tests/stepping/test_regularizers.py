"""The penalties' values: Eq. 2 written out, Theorem 3.2 by enumeration, and properties of R_s."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stepping import make_scales
from torch import Tensor, nn

import polarfast as pf
from polarfast.errors import ArgumentError, ScalingFactorError
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import L1, DeepHoyer, Polarization, Regularizer

FACTORS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)
BALANCES = st.floats(-2.0, 2.0)


def _scales(*layers: list[float], dtype: torch.dtype = torch.float64) -> ScalingFactors:
    return ScalingFactors(
        {f"g{i}": nn.Parameter(torch.tensor(v, dtype=dtype)) for i, v in enumerate(layers)}
    )


def _eq2(layers: list[list[float]], lam: float, t: float, weights: list[float]) -> float:
    """Σ_i w·(t|γ_i| − |γ_i − γ̄|) in Python floats."""
    every = [value for layer in layers for value in layer]
    mean = math.fsum(every) / len(every)
    terms = [
        weight * (t * abs(value) - abs(value - mean))
        for layer, weight in zip(layers, weights, strict=True)
        for value in layer
    ]
    return lam * math.fsum(terms)


@given(st.lists(FACTORS, min_size=1, max_size=4), BALANCES, st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_polarization_is_eq_2(layers: list[list[float]], t: float, lam: float) -> None:
    scales = _scales(*layers)
    weights = [1.0 + 0.5 * i for i in range(len(layers))]
    plain = _eq2(layers, lam, t, [1.0] * len(layers))
    assert Polarization(lam, t).value(scales).item() == pytest.approx(plain, abs=1e-12)
    weighted = Polarization(lam, t, weights=dict(zip(scales, weights, strict=True)))
    expected = _eq2(layers, lam, t, weights)
    assert weighted.value(scales).item() == pytest.approx(expected, abs=1e-12)
    by_layer = math.fsum(_eq2([layer], lam, t, [1.0]) for layer in layers)
    assert Polarization(lam, t, mean="layer").value(scales).item() == pytest.approx(
        by_layer, abs=1e-12
    )


@pytest.mark.parametrize("t", [-2.0, -0.7, 0.0, 1.0, 1.2, 1.5, 2.0])
@pytest.mark.parametrize("upper", [0.5, 1.0])
def test_theorem_3_2(t: float, upper: float) -> None:
    """The minimum over [0, a]^n has ⌊nρ⌋ or ⌊nρ⌋ + 1 factors at a and the others at 0."""
    rho = min(max(0.5 - t / 4, 0.0), 1.0)
    reg = Polarization(1.0, t, upper=upper)
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 13):
        ones = [value(reg, [upper] * k + [0.0] * (n - k)) for k in range(n + 1)]
        if n <= 5:  # every vertex, once: it matters only how many are at a
            for vertex in itertools.product((0.0, upper), repeat=n):
                assert value(reg, list(vertex)) == pytest.approx(ones[vertex.count(upper)])
        allowed = [ones[k] for k in (math.floor(n * rho), math.floor(n * rho) + 1) if k <= n]
        assert min(allowed) == pytest.approx(min(ones))
        for _ in range(10):
            inside = upper * torch.rand(n, generator=generator, dtype=torch.float64)
            assert value(reg, inside.tolist()) >= min(ones) - 1e-12


def value(reg: Regularizer, gammas: list[float]) -> float:
    return reg.value(_scales(gammas)).item()


@given(st.data(), st.integers(1, 12), BALANCES, st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_polarization_is_concave_and_permutation_invariant(
    data: Any, n: int, t: float, share: float
) -> None:
    side = st.lists(st.floats(0.0, 1.0), min_size=n, max_size=n)
    a, b = data.draw(side), data.draw(side)
    reg = Polarization(1.0, t)
    between = [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]
    assert value(reg, between) >= share * value(reg, a) + (1 - share) * value(reg, b) - 1e-12
    shuffled = data.draw(st.permutations(a))
    assert value(reg, list(shuffled)) == pytest.approx(value(reg, a), abs=1e-12)
    half = reg.value(_scales(a[: n // 2 + 1], a[n // 2 + 1 :] or [0.0])).item()
    if n // 2 + 1 < n:  # how the factors are split over layers does not matter
        assert half == pytest.approx(value(reg, a), abs=1e-12)


def test_the_mean_is_differentiated_through() -> None:
    scales = make_scales(torch.float64)
    lam, t = 0.3, 1.2
    Polarization(lam, t).value(scales).backward()
    flat = torch.cat([gamma.detach() for gamma in scales.values()])
    side = (flat - flat.mean()).sign()
    expected = lam * (t * flat.sign() - side + side.mean())
    torch.testing.assert_close(torch.cat([_grad(gamma) for gamma in scales.values()]), expected)
    assert abs(side.mean().item()) > 0.01, "a case in which forgetting the last term shows"


def _grad(gamma: Tensor) -> Tensor:
    assert gamma.grad is not None
    return gamma.grad


def test_rivals() -> None:
    layers = [[0.5, -0.25, 0.0], [2.0]]
    scales = _scales(*layers)
    weights = {"g1": 3.0}  # a layer without a weight weighs 1
    assert L1(0.1).value(scales).item() == pytest.approx(0.1 * 2.75)
    assert L1(0.1, weights=weights).value(scales).item() == pytest.approx(0.1 * (0.75 + 6))
    hoyer = 0.75**2 / (0.25 + 0.0625)
    assert DeepHoyer(0.1).value(scales).item() == pytest.approx(0.1 * (hoyer + 1))
    weighted = DeepHoyer(0.1, weights=weights).value(scales)
    assert weighted.item() == pytest.approx(0.1 * (hoyer + 3))
    for reg in (L1(0.1), DeepHoyer(0.1)):
        assert reg.upper is None


def test_deephoyer_of_a_dead_layer_is_zero_and_so_is_its_gradient() -> None:
    scales = _scales([0.0, 0.0], [0.5, 0.5])
    value = DeepHoyer(1.0).value(scales)
    value.backward()
    assert value.item() == pytest.approx(2.0)
    assert torch.equal(_grad(scales["g0"]), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("reg", [Polarization(0.1, 1.2), L1(0.1), DeepHoyer(0.1)], ids=repr)
def test_precision_of_the_value(reg: Regularizer) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        scales = make_scales(dtype, sizes=(3000, 20000))
        value = reg.value(scales)
        assert value.shape == () and value.dtype == expected
        exact = reg.value({name: gamma.detach().double() for name, gamma in scales.items()})
        torch.testing.assert_close(value.double(), exact, rtol=1e-7, atol=0)
        value.backward()
        assert _grad(scales["bn0.weight"]).dtype == dtype


def test_a_negative_penalty_is_normal() -> None:
    assert Polarization(1.0, 1.0).value(_scales([0.0, 1.0])).item() == pytest.approx(0.0)
    assert Polarization(1.0, 0.5).value(_scales([0.0, 1.0])).item() < 0


def test_nothing_to_penalize() -> None:
    with pytest.raises(ScalingFactorError, match="no scaling factors"):
        Polarization(1.0, 1.0).value({})


def test_wrong_arguments_name_the_argument() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("lam", {"lam": -1.0}),
        ("lam", {"lam": float("nan")}),
        ("lam", {"lam": "1e-4"}),
        ("t", {"t": float("inf")}),
        ("upper", {"upper": 0.0}),
        ("upper", {"upper": math.inf}),
        ("mean", {"mean": "channel"}),
        ("clamp", {"clamp": "none"}),
        (r"weights\['a'\]", {"weights": {"a": -1.0}}),
    ]
    for name, changed in cases:
        with pytest.raises(ArgumentError, match=f"^{name}="):
            Polarization(**({"lam": 1.0, "t": 1.0} | changed))
    reg = Polarization(0.02, 1.2, weights={"a": 1.0})
    with pytest.raises(ArgumentError, match="^lam="):
        reg.lam = -1.0
    assert reg.lam == 0.02
    assert reg.weights is not None
    with pytest.raises(TypeError):
        reg.weights["a"] = 2.0  # type: ignore[index]  # assign a new mapping, so that it is noticed
    assert repr(reg) == "Polarization(lam=0.02, t=1.2, upper=1.0)"
    assert repr(L1(1e-4)) == "L1(lam=0.0001, upper=None)"


VARIANTS: list[dict[str, Any]] = [
    {"squared": True},
    {"squared": True, "mean": "layer"},
    {"mean": "weighted", "weights": {"b": 2.0}},
    {"through_mean": False},
    {"through_mean": False, "squared": True, "mean": "weighted", "weights": {"b": 0.5}},
    {"groups": {"^a": {"lam": 0.06, "t": -0.5}, "c": {"t": 1.5}}},
    {"groups": {"^b": {"lam": 0.0}}, "mean": "layer", "weights": {"c": 3.0}},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_adds_the_gradient_of_the_value(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gammas = {n: nn.Parameter(torch.rand(k)) for n, k in (("a", 5), ("b", 3), ("c", 8))}
    scales = ScalingFactors(gammas)
    reg = Polarization(0.02, 1.2, upper=None, **options)
    wanted = torch.autograd.grad(reg.value(scales), list(gammas.values()))
    for gamma in gammas.values():
        gamma.grad = torch.zeros_like(gamma)
    optimizer = torch.optim.Adam(gammas.values(), lr=0.0)
    pf.step(optimizer, scales, reg)
    for gamma, want in zip(gammas.values(), wanted, strict=True):
        torch.testing.assert_close(gamma.grad, want)


def test_groups_by_hand() -> None:
    """As three penalties about one mean."""
    gammas = {n: torch.rand(4, dtype=torch.float64) for n in "abc"}
    mean = torch.cat(list(gammas.values())).mean()
    own = {"a": (0.06, -0.5), "b": (0.02, 1.2), "c": (0.02, 1.5)}
    want = sum(
        lam * (t * gamma.abs() - (gamma - mean).abs()).sum()
        for gamma, (lam, t) in zip(gammas.values(), own.values(), strict=True)
    )
    reg = Polarization(0.02, 1.2, groups={"a": {"lam": 0.06, "t": -0.5}, "c": {"t": 1.5}})
    torch.testing.assert_close(reg.value(gammas), want)


def test_one_set_of_factors_may_be_stepped_with_several() -> None:
    gammas = {n: nn.Parameter(torch.rand(4)) for n in "ab"}
    scales, optimizer = ScalingFactors(gammas), torch.optim.Adam(gammas.values(), lr=0.0)
    regs = [Polarization(0.02, 1.2), Polarization(0.02, 1.2, groups={"a": {"t": 0.0}})]
    for reg in (*regs, *regs):
        for gamma in gammas.values():
            gamma.grad = torch.zeros_like(gamma)
        wanted = torch.autograd.grad(reg.value(scales), list(gammas.values()))
        pf.step(optimizer, scales, reg)
        for gamma, want in zip(gammas.values(), wanted, strict=True):
            torch.testing.assert_close(gamma.grad, want)


def test_lam_may_start_late_and_goes_on_after_a_checkpoint() -> None:
    gammas = {n: nn.Parameter(torch.rand(4)) for n in "ab"}
    scales, optimizer = ScalingFactors(gammas), torch.optim.Adam(gammas.values(), lr=0.0)
    reg, acted = Polarization(0.02, 1.2, start=3), []
    for _ in range(5):
        for gamma in gammas.values():
            gamma.grad = torch.zeros_like(gamma)
        again = Polarization(0.02, 1.2, start=3)
        again.load_state_dict(reg.state_dict())
        reg = again
        pf.step(optimizer, scales, reg)
        acted.append(any(bool(gamma.grad.any()) for gamma in gammas.values()))
        assert (reg.value(scales) != 0) == acted[-1]
    assert acted == [False] * 3 + [True] * 2


def test_options_are_checked() -> None:
    for options, message in [
        ({"groups": {"(": {"t": 1.0}}}, r"groups\['\('\]: not a regular expression"),
        ({"groups": {"a": {}}}, "give 'lam', 't' or both"),
        ({"groups": {"a": {"tt": 1.0}}}, "give 'lam', 't' or both"),
        ({"groups": {"a": {"t": 2.5}}}, r"t lies in \[-2, 2\]"),
        ({"groups": {"a": {"lam": -1.0}}}, "λ cannot be negative"),
        ({"groups": {"a": {"lam": 1.0}}, "mean": "weighted"}, "would count in a weighted mean"),
        ({"start": -1}, "start=-1"),
        ({"start": 1.5}, "start=1.5"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            Polarization(0.02, 1.2, **options)
    reg = Polarization(0.02, 1.2, groups={"x": {"t": 1.0}})
    with pytest.raises(ArgumentError, match="matches no scaling factor here"):
        reg.value({"a": torch.rand(3)})
