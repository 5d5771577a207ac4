"""Runs of the network, as it is or without its weights: what is drawn in their place, and what of
the inputs is drawn with it, shows what a removed channel depends on.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import PlanError
from ..inputs import device_of, map_numbers, map_tensors, tensors_in
from ..running import call_model, plain_eager, seeded
from ..tracing.graph import ProjectionCall
from ..tracing.projections import convolution_fits, convolution_shape
from .replay import COPIES, PROJECTIONS, Field, Reads, not_in_double, run_double

#: Operators that look values up by whole numbers.
LOOKUPS = frozenset("embedding index index_select gather".split())
#: Operators whose result may be the same for all inputs near an example, and not for others.
LEVELS = frozenset(
    "sign sgn heaviside ceil floor round trunc fix frac floor_divide remainder fmod clamp "
    "clamp_min clamp_max maximum minimum fmax fmin threshold hardtanh hardsigmoid hardswish "
    "hardshrink softshrink relu relu6 sigmoid tanh erf".split()
)
#: Operators whose result goes by the shape and the type of a tensor, not by what is in it.
NEW = frozenset(
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like rand_like "
    "randn_like".split()
)
#: What stands for a number that is larger than any other.
FAR = 1000
#: Other views of a weight, or copies of one.
VIEWS = frozenset("t transpose permute view _unsafe_view unsqueeze expand detach alias".split())


class Varied(Enum):
    """How a run without weights may differ from what the inputs ask for, past all projections:
    masks from lengths, look-ups and the like are drawn; single decisions (`if x.mean() > 5`) are
    KEPT, FLIPPED or TOSSED; LESS: kept, and whole numbers among the inputs are smaller. Numbers
    that Python reads (`x.mean().item()`) or that an operator of `LEVELS` is given become large
    where FLIPPED, far below zero with LESS. TOSSED, for networks that do not run so: those that
    Python reads become large, and of what an operator of `LEVELS` returns a share is drawn.
    """

    KEPT, FLIPPED, TOSSED, LESS = range(4)


class Unfit(Exception):
    """A network that does not run without its weights.

    Attributes:
        names: of the weights that it asked for; none where it lacks something else.
    """

    def __init__(self, why: str, names: frozenset[str] = frozenset()) -> None:
        super().__init__(why)
        self.names = names


class _Hollow(Reads):
    """Instead of computing projections with weights that are not there, draws their outputs.

    What a removed channel leaves behind does not depend on any of these; so a field that
    is the same whatever they are is what the real network shows. For a fraction of the time.

    Args:
        tensors, calls, wanted: as in `Reads`; of a model with zeros for the projections' weights.
        hollow: names of the weights that are not there.
        seed: of the numbers drawn.
        varied: how what follows from the inputs past all projections is drawn, too.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        calls: list[ProjectionCall],
        wanted: dict[int, Tensor],
        hollow: set[str],
        seed: int,
        varied: Varied | None = None,
    ) -> None:
        super().__init__(tensors, calls, wanted)
        self.varied, self.raw = varied, WeakIdKeyDictionary()
        self.drawn = WeakIdKeyDictionary()
        self.decided = False  # whether the network decided something by one number
        self.read_numbers = False  # whether its code read one
        self.hollow = {address for address, name in self.names.items() if name in hollow}
        self.draws = _Draws(seed)

    def start(self, inputs: Any) -> Any:
        """The inputs to run on: truth values are drawn."""

        def raw(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.bool:
                tensor = self.draws.coins(tensor)
            elif self.varied == Varied.LESS and not tensor.is_floating_point():
                tensor = self.draws.up_to(tensor)
            self.raw[tensor] = True
            return tensor

        if self.varied is None:
            return inputs
        if self.varied == Varied.LESS:
            inputs = map_numbers(inputs, self.draws.below)
        return map_tensors(inputs, raw)

    def _vary(self, name: str, args: Any, out: Any) -> Any:
        """The result of an operator on the inputs, drawn where it decides something or is looked
        up.
        """
        if name in NEW:
            return out
        numbers = [tensor for tensor in tensors_in(args) if tensor in self.raw]
        if numbers and type(out) is float:
            return self._read_by_python(out)
        if not numbers or not isinstance(out, Tensor):
            return out
        if out.dtype == torch.bool and any(number.dtype != torch.bool for number in numbers):
            out = self._decided(out)
        elif out.is_floating_point() and name.rstrip("_") in LEVELS:
            if self.varied == Varied.TOSSED:
                shares = self.draws.shares(out)
                out = out.mul_(shares) if name.endswith("_") else out * shares
        elif out.is_floating_point() and any(not n.is_floating_point() for n in numbers):
            if name in LOOKUPS:
                out = self.draws.take(list(out.shape), out.device)
            elif name == "_to_copy":
                out = out * (0.5 + 0.5 * self.draws.share())
        self.raw[out] = True
        return out

    def _levelled(self, name: str, args: Any) -> Any:
        """The arguments of an operator that may give the same for all inputs near an example. What
        is 0 whatever the input stays 0.
        """
        if name.rstrip("_") not in LEVELS:
            return args
        for place, arg in enumerate(args[:2]):
            if isinstance(arg, Tensor) and arg in self.raw and arg.is_floating_point():
                self.decided = self.read_numbers = True
                if self.varied in (Varied.KEPT, Varied.TOSSED):
                    return args
                far = FAR * (1 + arg.abs()) * (arg != 0)
                far = -far if self.varied == Varied.LESS else far
                given = arg.copy_(far) if name.endswith("_") and place == 0 else far
                return (*args[:place], given, *args[place + 1 :])
        return args

    def _read_by_python(self, number: float) -> float:
        """What the network's code gets in place of a number: it may be held against anything."""
        self.decided = self.read_numbers = True
        far = FAR * (1 + abs(number))
        return {Varied.KEPT: number, Varied.LESS: -far}.get(self.varied, far)  # type: ignore[arg-type]

    def _decided(self, out: Tensor) -> Tensor:
        """A comparison's result, drawn; one number alone is a decision."""
        if out.numel() != 1:
            return self.draws.coins(out)
        self.decided = True
        if self.varied == Varied.TOSSED:
            return self.draws.coins(out)
        return ~out if self.varied == Varied.FLIPPED else out

    def other(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hollow = self.hollow & _addresses(args, kwargs)
        if "batch_norm" in name and args[0] in self.drawn and args[3] is not None:
            # As if its statistics were those of what was drawn: then its outputs are spread like
            # real ones, and a gate behind it opens and closes.
            args = (*args[:3], torch.zeros_like(args[3]), torch.ones_like(args[4]), *args[5:])
        if self.varied is not None and name.startswith("grid_sampler") and args[1] in self.raw:
            outside_too = self.draws.take(list(args[1].shape), args[1].device)
            args = (args[0], outside_too, *args[2:])
        if not hollow:
            if self.varied is None:
                return super().other(name, func, args, kwargs)
            args = self._levelled(name, args)
            return self._vary(name, args, super().other(name, func, args, kwargs))
        if name in VIEWS:
            return func(*args, **kwargs)
        if name in COPIES:
            return args[0].detach()
        raise Unfit(f"{func} reads a weight", frozenset(self.names[each] for each in hollow))

    def project(self, index: int, func: Any, args: Any) -> Tensor:
        x, weight = (args[i] for i in PROJECTIONS[func.overloadpacket.__name__])
        if not _fits(func.overloadpacket.__name__, x, weight, args):
            raise Unfit("a layer reads another number of channels")
        if weight.data_ptr() not in self.hollow:
            return super().project(index, func, args)
        shape = convolution_shape(args) if func.overloadpacket.__name__ == "convolution" else None
        drawn = self.draws.take(shape or [x.shape[0], weight.shape[1]], x.device)
        self.drawn[drawn] = True
        return drawn


class _Draws:
    """Random float64 tensors, all cut out of one: drawing takes longer than using them."""

    SLACK = 8192

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.count = 0
        self.pool = torch.empty(0)

    def share(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.generator))

    def shares(self, like: Tensor) -> Tensor:
        """Numbers in [0.5, 1)."""
        return (0.5 + 0.5 * torch.rand(like.shape, generator=self.generator)).to(like)

    def up_to(self, most: Tensor) -> Tensor:
        """Whole numbers from 1 to each of these, or from 0 if none is above 1, as in a mask."""
        if not bool((most > 1).any()):
            return most * self.coins(most)
        drawn = torch.rand(most.shape, generator=self.generator, dtype=torch.float64).to(
            most.device
        )
        return torch.where(most > 0, 1 + (drawn * most).to(most.dtype).clamp(max=most - 1), most)

    def below(self, most: int) -> int:
        """A whole number from 1 to below this, if there is one."""
        return min(most, 1 + int(self.share() * (most - 1)))

    def coins(self, like: Tensor) -> Tensor:
        """Random truth values."""
        return (torch.rand(like.shape, generator=self.generator) < 0.5).to(like.device)

    def take(self, shape: list[int], device: torch.device) -> Tensor:
        """A tensor like no other that was taken."""
        wanted = math.prod(shape)
        if self.pool.numel() < wanted + self.SLACK:
            drawn = torch.empty(wanted + self.SLACK, dtype=torch.float32, device="cpu")
            self.pool = drawn.normal_(generator=self.generator).to(device, torch.float64)
        self.count = (self.count + 1) % self.SLACK
        # A copy, since networks work in place.
        return self.pool[self.count : self.count + wanted].clone().view(shape)


def _fits(name: str, x: Tensor, weight: Tensor, args: Any) -> bool:
    """Whether a projection's input has the channels that its weight reads."""
    return convolution_fits(args) if name == "convolution" else x.shape[1] == weight.shape[0]


def _addresses(args: Any, kwargs: dict[str, Any]) -> set[int]:
    found: set[int] = set()
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            found.add(arg.data_ptr())
        elif isinstance(arg, (list, tuple)):
            found.update(part.data_ptr() for part in arg if isinstance(part, Tensor))
    return found


#: What may go wrong in a network's code on numbers that are unlike any real ones.
_ANY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class Runs:
    """Runs of one float64 copy of a model.

    Attributes:
        model, tensors: the copy, and its parameters and buffers by name.
        calls: `graph.projections`.
        weights: those that are not there, but zeros of their shapes; where something else than a
            convolution or a linear layer reads one, it is put in its place.
        decided: whether the last varied run has decided something by the inputs.
        read_numbers: whether the network's code has read a number of the inputs then.
        filled: whether a weight was put in its place.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    calls: list[ProjectionCall]
    weights: dict[str, Tensor] = field(default_factory=dict)
    decided: bool = False
    read_numbers: bool = False
    filled: bool = False

    def fields(
        self, inputs: Any, wanted: dict[int, Tensor], seed: int, varied: Varied | None = None
    ) -> dict[int, Field] | None:
        """For each call index in `wanted`, what the call reads in those input channels; None where
        a model does not run without its weights.

        Args:
            seed: of all that is drawn, by the network itself, too.
            varied: as in `_Hollow`.

        Raises:
            PlanError: what a whole model reads is not finite.
        """
        while self.weights:
            try:
                with seeded(seed, device_of(self.model)):
                    return self._drawn(inputs, wanted, seed, varied)
            except Unfit as unfit:
                if not unfit.names:
                    return None
                self._fill(unfit.names)
        with seeded(seed, device_of(self.model)), Reads(self.tensors, self.calls, wanted) as reads:
            try:
                run_double(self.model, inputs)
            except PlanError:
                raise
            except (AssertionError, LookupError, TypeError, ValueError) as error:
                raise PlanError(not_in_double(self.model, error)) from error
        for index, seen in reads.fields.items():
            if not math.isfinite(seen.largest):
                raise PlanError(
                    f"{self.calls[index].weight} reads NaN or inf in a removed channel, on random "
                    "inputs between the example inputs' smallest and largest value: use example "
                    "inputs like the real ones, and check that training has not diverged"
                )
        return reads.fields

    def _drawn(
        self, inputs: Any, wanted: dict[int, Tensor], seed: int, varied: Varied | None
    ) -> dict[int, Field] | None:
        reads = _Hollow(self.tensors, self.calls, wanted, set(self.weights), seed, varied)
        inputs = reads.start(inputs)
        try:
            with reads, plain_eager():
                call_model(self.model, inputs)
        except Unfit:
            raise
        except _ANY:
            # Its code may well want other numbers than random ones (an index, a box): then the
            # whole network runs, and any error that is one shows.
            return None
        finally:
            self.decided, self.read_numbers = reads.decided, reads.read_numbers
        return reads.fields

    def _fill(self, names: Iterable[str]) -> None:
        for name in names:
            self.tensors[name].data = self.weights.pop(name).detach().double()
        self.filled = True
