"""The slim form in which a network trains on, as the steering of the whole network sees it."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import ArgumentError
from ..inputs import misplaced, unwrap
from ..sharding import present_parameters, whole
from ..slimming.slim import SlimInfo


class SlimForm:
    """What `shrink` made of a network, at once or step by step.

    Args:
        slim: that network.
        watched: name -> γ and β of the network that it was made from.

    Raises:
        ArgumentError: `slim` was not made from that network.
    """

    def __init__(self, slim: nn.Module, watched: Mapping[str, Tensor]) -> None:
        slim = unwrap(slim)
        info, params = getattr(slim, "polarfast_info", None), present_parameters(slim)
        origin = info.origin if isinstance(info, SlimInfo) else None
        for name, tensor in watched.items():
            kept = {} if origin is None else origin.index.get(name, {})
            last = int(kept[0].max()) if 0 in kept and kept[0].numel() else -1
            size = kept[0].numel() if 0 in kept else tensor.numel()
            if origin is None or name not in params or params[name].numel() != size:
                last = tensor.numel()
            if last >= tensor.numel():
                raise ArgumentError(
                    f"{name}: this network is no slim form of the one that FlopsTarget was made "
                    f"with; give it what pf.shrink returns{misplaced(watched, slim)}"
                )
        assert origin is not None  # something is watched
        self.model, self._origin = slim, origin

    def parameters(self) -> dict[str, nn.Parameter]:
        return present_parameters(self.model)

    def write_to(self, watched: Mapping[str, Tensor]) -> None:
        """Give γ and β of the whole network the values that they have here; 0 where they are gone.
        Sharded ones are gathered, in one collective.
        """
        present = self.parameters()
        now = whole({name: present[name].detach() for name in watched})
        self._origin.write_vectors(now, watched)

    def spread(self, parts: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the channels here at their places in the whole network, 0 elsewhere: of each γ,
        shaped like `full`.
        """
        return {name: self._origin.spread(name, part, full[name]) for name, part in parts.items()}

    def part(self, name: str, full: Tensor) -> Tensor:
        """Of a γ, the values [C] of the channels that are here."""
        index = self._origin.index.get(name, {})
        return full[index[0].to(full.device)] if 0 in index else full
