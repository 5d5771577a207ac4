"""DeepHoyer's subgradient over all orders of magnitude, against fractions and float64 autograd."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import BACKENDS, device_of, table_of

from polarfast.kernels.table import Kind, Penalty, SgdStep
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import DeepHoyer

every_backend = pytest.mark.parametrize("backend", BACKENDS)

#: A layer's γ: numbers of one size, some tiny beside the others, some 0, some equal.
LAYER = st.lists(
    st.tuples(st.sampled_from([-1, 1]), st.floats(0.25, 4.0), st.sampled_from([0, 0, 0, 4, 12, 40]))
    | st.just((0, 1.0, 0))
    | st.just((1, 1.0, 0)),
    min_size=1,
    max_size=6,
)
#: Where 1/γ is still a number.
EXPONENTS = {torch.float32: (-36, 36), torch.float64: (-300, 300)}


def exact(gammas: list[float]) -> list[Fraction]:
    """2·A/S·(sgn γ − A/S·γ), A = ‖γ‖₁ and S = ‖γ‖₂², in fractions."""
    values = [Fraction(value) for value in gammas]
    norm = sum(abs(value) for value in values)
    squares = sum(value * value for value in values)
    if not squares:
        return [Fraction(0)] * len(values)
    signs = [(value > 0) - (value < 0) for value in values]
    ratio = norm / squares
    return [2 * ratio * (s - ratio * value) for s, value in zip(signs, values, strict=True)]


def computed(layer: torch.Tensor, backend: str) -> torch.Tensor:
    param = torch.nn.Parameter(layer.to(device_of(backend)))
    param.grad = torch.zeros_like(param)
    table_of([param], backend).add_subgradient_(Penalty(Kind.DEEPHOYER, 1.0))
    return param.grad.cpu()


@every_backend
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer=LAYER, share=st.floats(0, 1))
def test_it_is_that_of_fractions(backend, dtype, layer, share):
    """To the precision of the terms of ((1 − x_j) − q), the form that nothing cancels in; and 0
    where it is 0.
    """
    low, high = EXPONENTS[dtype]
    unit = 10.0 ** round(low + share * (high - low))
    gamma = torch.tensor([s * v * unit * 10.0**-e for s, v, e in layer], dtype=torch.float64)
    gamma = gamma.to(dtype)
    want, got = exact(gamma.tolist()), computed(gamma, backend).tolist()
    largest = max(Fraction(abs(value)) for value in gamma.tolist())
    eps = Fraction(torch.finfo(dtype).eps)
    for value, a, b in zip(gamma.tolist(), got, want, strict=True):
        if not largest or not value or not b:
            assert a == 0
            continue
        norm = sum(abs(Fraction(v)) for v in gamma.tolist())
        squares = sum(Fraction(v) ** 2 for v in gamma.tolist())
        middle = squares / norm  # of which |γ| the subgradient is 0
        terms = (largest - abs(Fraction(value))) + (largest - middle)
        bound = 8 * eps * (2 * norm * norm / squares / squares * terms)
        assert abs(Fraction(a) - b) <= bound + Fraction(torch.finfo(dtype).tiny)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", range(-38, 31, 4))
def test_the_only_factor_of_a_layer_stays_where_it_is(backend, dtype, exponent):
    layer = torch.tensor([10.0**exponent, 0.0, 0.0, 0.0], dtype=torch.float64).to(dtype)
    assert computed(layer, backend).tolist() == [0.0] * 4
    param = torch.nn.Parameter(layer.to(device_of(backend)))
    param.grad = torch.zeros_like(param)
    table_of([param], backend).sgd_step_(Penalty(Kind.DEEPHOYER, 1.0), SgdStep(lr=0.1))
    assert torch.equal(param.cpu(), layer)


@every_backend
@pytest.mark.parametrize("power", [-120, -60, -3, 3, 60])
def test_of_a_times_gamma_it_is_one_ath(backend, power):
    """‖γ‖₁²/‖γ‖₂² does not depend on the unit; powers of 2 are exact."""
    layer = torch.tensor([0.5, -0.25, 0.75, 1e-3, 0.0, 0.9])
    got = computed(layer * 2.0**power, backend)
    assert torch.equal(got, computed(layer, backend) * 2.0**-power)


@every_backend
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 1/γ is infinite, in Triton's interpreter
def test_denormal_factors_make_no_nan(backend):
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for layer in ([tiny, 0.0], [tiny, tiny, -tiny], [tiny, 0.0, 3 * tiny]):
            assert not computed(torch.tensor(layer, dtype=dtype), backend).isnan().any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layer=LAYER, power=st.integers(-900, 900))
def test_the_value_does_not_depend_on_the_unit_either(layer, power):
    gamma = torch.tensor([s * v * 10.0**-e for s, v, e in layer], dtype=torch.float64)
    reg = DeepHoyer(lam=1.0)
    found = []
    for unit in (1.0, 2.0**power):
        param = torch.nn.Parameter(gamma * unit)
        value = reg.value(ScalingFactors({"g": param}))
        (grad,) = torch.autograd.grad(value, param)
        found.append((value.item(), grad * unit))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-9)
