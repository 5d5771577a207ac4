"""Recipes: every setting of a run, as typed dataclasses, and their YAML files."""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..documents import brief, short
from ..errors import ArgumentError, FileFormatError
from ..storage import read_text
from .data.settings import Data
from .ranges import MOST_SEED, check_ranges
from .yamls import MOST_BYTES, parse_yaml, to_yaml_text

PHASES = ("train", "prune", "finetune")
Schedule = Literal["cosine", "step", "constant"]
Method = Literal["valley", "fixed", "percentile", "relative", "taylor", "uniform", "random", "none"]
#: Methods that need a share of the MACs to cut.
BUDGETED = ("relative", "taylor", "uniform", "random")


@dataclass(frozen=True)
class Stage:
    """One stretch of training, with a learning rate of its own.

    Attributes:
        epochs: passes over the training images; 0 skips the stage.
        lr: learning rate at the start ("step"), at its peak ("cosine"), or throughout ("constant").
        schedule: "cosine" falls to 0 over the stage, "step" takes the rates of ``rates``.
        rates: of "step": epoch (from 0) -> rate from there on.
        warmup: epochs over which the rate first rises linearly from 0.
        distill: weight of a second loss in fine-tuning, by which the slim network follows the
            outputs of the network before pruning, and 1 − this of the labels' own (Hinton et al.
            2015); 0: none.
        temperature: outputs are divided by this in that loss.
    """

    epochs: int
    lr: float
    schedule: Schedule = "cosine"
    rates: Mapping[int, float] = field(default_factory=dict)
    warmup: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 0)
        check_ranges(self, epochs=(0, 10**6), lr=(0, 1e6), temperature=(0, 1e6))
        if not 0 <= self.distill <= 1:
            raise ArgumentError(f"distill={self.distill}: a weight in [0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ArgumentError(f"temperature={self.temperature}: must be positive and finite")
        if not 0 < self.lr < math.inf:
            raise ArgumentError(f"lr={self.lr}: must be positive and finite")
        if not self.warmup >= 0 or 0 < self.epochs <= self.warmup:
            raise ArgumentError(f"warmup={self.warmup}: must be at least 0 and below epochs")
        if bool(self.rates) != (self.schedule == "step"):
            raise ArgumentError(
                "rates: give {epoch: rate, ...} for schedule 'step', and only there"
            )
        for epoch, rate in self.rates.items():
            if not 1 <= epoch <= 10**6 or not 0 < rate <= 1e6:
                raise ArgumentError(f"rates[{epoch}]={rate}: epochs from 1, rates above 0")


#: Regularizers for which a recipe need not say how strong.
FINDING_LAM = ("flops-target", "none")


@dataclass(frozen=True)
class Sparsity:
    """What acts on the scaling factors (paper, Eq. 2).

    Attributes:
        regularizer: "polarization"; "flops-target": polarization that steers itself to ``cut``;
            "l1" (network slimming); "deephoyer"; "none".
        lam: λ, strength; "flops-target" finds its own.
        t: balance of polarization's two terms; "flops-target" has its own.
        upper: a, scaling factors are clamped to [0, a]; None: no clamp.
        mean: of γ, "global" (the paper) or of each "layer".
        clamp: "scales" clamps what is regularized; "all" every BatchNorm weight, or every gate.
        init: value of every scaling factor before the first step; None leaves them.
        residual: what happens to channels that are added: "keep", "expand", "expand-all" or
            "couple".
        regularize: regular expression on names; those that match are regularized, all are pruned.
        gates: regular expression on names of norms that get gates, in place of their γ; empty:
            none.
        cut: share of the MACs that "flops-target" aims at.
        shrink: whether "flops-target" takes channels that are at 0 out of the network while it
            trains. Nothing that is computed changes, so networks where it would stay as they are:
            those with gates, under FSDP2, and where a removed channel's constant does not fold.
    """

    lam: float = 0.0
    t: float = 1.2
    regularizer: Literal["polarization", "flops-target", "l1", "deephoyer", "none"] = "polarization"
    upper: float | None = 1.0
    mean: Literal["global", "layer"] = "global"
    clamp: Literal["scales", "all"] = "scales"
    init: float | None = 0.5
    residual: Literal["keep", "expand", "expand-all", "couple"] = "expand"
    regularize: str = ""
    gates: str = ""
    cut: float | None = None
    shrink: bool = True

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ArgumentError(f"sparsity.lam={self.lam}: must not be negative")
        if self.upper is not None and not self.upper > 0:
            raise ArgumentError(f"sparsity.upper={self.upper}: must be above 0")
        check_ranges(
            *(self, "sparsity."),
            **{"lam": (0, 1e6), "t": (-1e3, 1e3), "upper": (0, 1e6), "init": (-1e6, 1e6)},
        )
        if self.regularizer == "flops-target" and self.cut is None:
            raise ArgumentError("sparsity.cut: 'flops-target' needs the share of the MACs to cut")
        _share("sparsity.cut", self.cut)
        if self.regularizer != "flops-target" and self.cut is not None:
            raise ArgumentError(
                f"sparsity.cut={self.cut}: only regularizer 'flops-target' aims at a share, not "
                f"'{self.regularizer}'"
            )
        if self.regularizer == "flops-target" and (self.upper is None or self.mean != "global"):
            raise ArgumentError(
                "sparsity: 'flops-target' needs a number for upper, and mean 'global'"
            )


@dataclass(frozen=True)
class Pruning:
    """How the trained network is cut.

    Attributes:
        method: "valley" (the paper), "fixed", "percentile" (network slimming) on γ; "relative": the
            smallest γ in proportion to the mean of their layer; "taylor": the channels whose
            removal changes the loss least, to first order; "uniform": every layer of an untrained
            network gets the same share of its width; "random": random channels of the trained
            network, the same share of every layer; "none".
        value: threshold of "fixed", share of the channels to remove of "percentile".
        cut: in place of ``value``, the share of the MACs to cut ("percentile", "relative",
            "taylor", "uniform", "random").
        of: what ``cut``, and that of "flops-target", is a share of: "macs", "params" or "latency".
        latency: for "latency", the file that ``polarfast latency RECIPE`` wrote.
        fold: what becomes of removed channels' constants: "exact", "bias" or "none".
        round_to: widths become multiples of this.
        min_channels: no layer is narrower.
    """

    method: Method = "valley"
    value: float | None = None
    cut: float | None = None
    of: Literal["macs", "params", "latency"] = "macs"
    latency: str = ""
    fold: Literal["exact", "bias", "none"] = "exact"
    round_to: int = 1
    min_channels: int = 1

    def __post_init__(self) -> None:
        _share("pruning.cut", self.cut)
        if self.method in BUDGETED and self.cut is None:
            raise ArgumentError(f"pruning.cut: '{self.method}' needs the share of the MACs to cut")
        if self.method == "percentile" and (self.cut is None) == (self.value is None):
            raise ArgumentError("pruning: 'percentile' needs either value= or cut=")
        if self.method in ("valley", "none") and (self.cut or self.value) is not None:
            raise ArgumentError(f"pruning: '{self.method}' takes neither value= nor cut=")
        if self.method == "fixed" and self.cut is not None:
            raise ArgumentError("pruning.cut: 'fixed' takes a threshold as value=, no share to cut")
        if self.method in BUDGETED and self.value is not None:
            raise ArgumentError(f"pruning.value: '{self.method}' takes cut= alone")
        if (self.of == "latency") != bool(self.latency):
            raise ArgumentError(
                f"pruning.of={self.of!r} with pruning.latency={self.latency!r}: give both for a "
                "share of the time (polarfast latency RECIPE writes the file), or neither"
            )
        most = 1.0 if self.method == "percentile" else math.inf
        if self.value is not None and not 0 <= self.value < most:
            raise ArgumentError(
                f"pruning.value={self.value}: for '{self.method}' a number in [0, {most:g})"
            )
        widths = {"round_to": (1, 2**20), "min_channels": (0, 2**20)}
        check_ranges(self, "pruning.", value=(0, 1e9), **widths)


@dataclass(frozen=True)
class Hardware:
    """How the run is computed. A run may go on under other settings of these.

    Attributes:
        device: "auto" takes a GPU where there is one.
        threads: CPU threads of each process.
        parallel: under torchrun, "ddp" or "fsdp" (FSDP2).
        compile: through ``torch.compile``.
        channels_last: memory format of images and weights.
        deterministic: only deterministic kernels, so that equal runs end equal to the bit.
        checkpoint_minutes: between checkpoints within an epoch; each epoch ends with one.
        keep: how many checkpoints stay, the newest and the best apart.
        patience_minutes: a process of a run of several that has given no sign of life for so long
            is given up: the run ends and names it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    checkpoint_minutes: float = 10.0
    keep: int = 2
    patience_minutes: float = 10.0

    def __post_init__(self) -> None:
        _at_least("hardware.threads", self.threads, 1)
        _at_least("hardware.keep", self.keep, 1)
        if not self.checkpoint_minutes >= 0:
            raise ArgumentError(f"hardware.checkpoint_minutes={self.checkpoint_minutes}: negative")
        # OpenMP's threads wait for each other at every operation: many more than there are cores
        # take minutes for it, and where the system has no room for them, end the process.
        most = max(128, 4 * (os.cpu_count() or 1))
        limits = {"threads": (1, most), "keep": (1, 10**6), "checkpoint_minutes": (0, 1e6)}
        check_ranges(self, "hardware.", **limits, patience_minutes=(0.1, 1e6))


@dataclass(frozen=True)
class Recipe:
    """Sparsity training, pruning and fine-tuning of one model on one data set.

    Attributes:
        data: which images, and their augmentation.
        model: "resnet20" and the like for small images, "vgg16", or "torchvision/NAME".
        sparsity: what acts on the scaling factors.
        train: stage with the regularizer.
        finetune: stage of the slim model, without it.
        pruning: how the trained network is cut.
        batch_size: images of one optimizer step, over all processes; what is left of an epoch is
            left out.
        accumulate: backward passes a step in each process.
        momentum: of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: of SGD.
        decay_norms: weight decay also on BatchNorm and on biases.
        clip: largest norm of the task gradient; 0: no clipping.
        label_smoothing: share of the target that is spread over all classes.
        ema: decay per step of averaged weights, which are then what is evaluated, pruned and
            kept; 0: none.
        precision: of the forward pass ("bf16" and "fp16" by autocast; "fp16" scales the loss).
        sync_batchnorm: statistics over all processes; needs GPUs.
        weights: file with a state dict to start from.
        seed: of everything random.
        hardware: how it is computed.
    """

    data: Data
    model: str
    sparsity: Sparsity
    train: Stage
    finetune: Stage
    pruning: Pruning = field(default_factory=Pruning)
    batch_size: int = 64
    accumulate: int = 1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    clip: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batchnorm: bool = False
    weights: str = ""
    seed: int = 0
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        if self.weights and self.pruning.method == "uniform":
            raise ArgumentError("weights: pruning.method 'uniform' trains from scratch, without")
        if self.train.distill:
            raise ArgumentError("train.distill: there is no teacher yet; finetune.distill is meant")
        if self.finetune.distill and self.pruning.method == "uniform":
            raise ArgumentError("finetune.distill: pruning.method 'uniform' has no dense network")
        _at_least("batch_size", self.batch_size, 1)
        _at_least("accumulate", self.accumulate, 1)
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ArgumentError(f"{name}={getattr(self, name)}: must not be negative")
        counts = {"batch_size": (1, 2**24), "accumulate": (1, 2**24), "seed": (0, MOST_SEED)}
        check_ranges(self, **counts, clip=(0, 1e9), weight_decay=(0, 1e6))
        if self.pruning.method == "uniform" and self.sparsity.regularizer != "none":
            raise ArgumentError(
                "pruning.method='uniform': the network is narrow before it is trained, so "
                "sparsity.regularizer must be 'none'"
            )
        if self.sparsity.regularizer == "flops-target" and self.train.epochs == 0:
            raise ArgumentError("train.epochs=0: 'flops-target' has no step in which to steer")
        free = self.sparsity.regularize and self.sparsity.clamp != "all"
        trained = self.sparsity.regularizer != "none"
        if self.pruning.method == "valley" and trained and (free or self.sparsity.upper is None):
            raise ArgumentError(
                "pruning.method='valley' needs every γ clamped, and would fail on negative ones "
                "after training: set sparsity.upper, and sparsity.clamp to 'all' where "
                "sparsity.regularize leaves some out; or choose 'percentile' or 'fixed'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain numbers and strings."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to go on where the other stopped."""
        values = self.to_dict()
        del values["hardware"], values["accumulate"]
        del values["data"]["root"], values["data"]["workers"]
        return values


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ArgumentError(f"{name}={value}: must be at least {least}")


def _share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ArgumentError(f"{name}={value}: a share in (0, 1), e.g. 0.5 for 50 % fewer MACs")


def recipe_names() -> list[str]:
    """Names of the recipes that come with polarfast."""
    folder = resources.files("polarfast") / "recipes"
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or by name from those that come with polarfast ("demo").

    Raises:
        ArgumentError: no such file or recipe, not YAML, or a key or value that does not fit.
    """
    file = Path(path)
    if file.suffix in {".yaml", ".yml"}:
        if not file.is_file():
            raise ArgumentError(f"recipe '{path}': there is no such file")
        try:
            text = read_text(file, "name a recipe", MOST_BYTES)
        except FileFormatError as error:
            raise ArgumentError(f"recipe {error}") from error
    elif str(path) in recipe_names():
        text = (resources.files("polarfast") / "recipes" / f"{path}.yaml").read_text("utf-8")
    else:
        known = ", ".join(recipe_names())
        raise ArgumentError(f"recipe '{path}': give a .yaml file or one of {known}")
    try:
        values, lines = parse_yaml(text)
    except ValueError as error:
        raise ArgumentError(f"recipe '{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"recipe '{path}': must hold 'key: value' lines")
    try:
        return recipe_from_dict(values)
    except ArgumentError as error:
        message = str(error).removeprefix("recipe: ")
        named = (lines[name] for name in re.findall(r"[\w.]+", message) if name in lines)
        line = next((f", line {number}" for number in named), "")
        raise ArgumentError(f"recipe '{path}'{line}: {message}") from error


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting, as :func:`load_recipe` reads it."""
    return to_yaml_text(recipe.to_dict())


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_dict`.

    Raises:
        ArgumentError: a key is unknown or missing, or a value has the wrong type.
    """
    found: Recipe = _build(Recipe, values, "")
    if found.sparsity.regularizer not in FINDING_LAM and "lam" not in values["sparsity"]:
        raise ArgumentError(
            f"recipe: 'sparsity.lam' is missing: '{found.sparsity.regularizer}' needs its strength "
            "λ ('flops-target' finds its own)"
        )
    return found


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings that two recipes' dicts do not share."""
    names = []
    for key in sorted(first.keys() | second.keys(), key=str):
        mine, other = first.get(key), second.get(key)
        if isinstance(mine, dict) and isinstance(other, dict) and key != "rates":
            names += [f"{key}.{name}" for name in differing_settings(mine, other)]
        elif mine != other:
            names.append(str(key))
    return names


def _build(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        name = brief(f"{prefix}{unknown[0]}")
        raise ArgumentError(f"recipe: '{name}' is not a setting; settings: {known}")
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        each = ", ".join(f"'{prefix}{name}'" for name in missing)
        raise ArgumentError(f"recipe: {each} {'is' if len(missing) == 1 else 'are'} missing")
    converted = {k: _convert(hints[k], v, prefix + k) for k, v in values.items()}
    try:
        return kind(**converted)
    except ArgumentError as error:
        if not prefix or str(error).startswith(prefix):
            raise
        raise ArgumentError(f"{prefix.removesuffix('.')}: {error}") from error


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ArgumentError(
                f"recipe: '{name}' must hold settings of its own, not {short(value)}"
            )
        return _build(kind, value, f"{name}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if not isinstance(value, str) or value not in choices:
            shown = ", ".join(map(str, choices))
            raise ArgumentError(f"recipe: {name}={short(value)} must be one of {shown}")
        return value
    if origin is types.UnionType:  # a number or None
        (kind,) = set(typing.get_args(kind)) - {type(None)}
        return None if value is None else _convert(kind, value, name)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(typing.get_args(kind), value, name)
    # An int is a fine float; a bool is neither.
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ArgumentError(f"recipe: {name}={short(value)} must be of type {kind.__name__}")


def _convert_mapping(kinds: tuple[Any, Any], value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ArgumentError(f"recipe: {name}={short(value)} must be a mapping, e.g. {{60: 0.02}}")
    of_keys, of_values = kinds
    return {
        _convert(of_keys, key, f"{name}: {key}"): _convert(of_values, entry, f"{name}[{key}]")
        for key, entry in value.items()
    }
