"""SyncBatchNorm for models with gates, put-back normalizations or normalizations of no channels."""

from typing import Any

from torch import nn

from .errors import ArgumentError
from .gates import GATED
from .modules import PUT_BACK, SILENT

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {n: n for n in (*_NORMS, nn.SyncBatchNorm)}


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Make every BatchNorm of a model a SyncBatchNorm, in place.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes new, plain ones: without the gates of
    `add_gates`, and without the places where a slim model's norms put their channels back.

    Args:
        model: any model, slim or not.
        process_group: over whose processes statistics are taken; all, by default.

    Returns:
        `model`; its normalizations are the objects they were, of another class.

    Raises:
        ArgumentError: a normalization of a class derived from torch's; nothing was changed.
    """
    synchronized = {
        table[norm]: table[nn.SyncBatchNorm]
        for table in (_PLAIN, GATED, PUT_BACK, SILENT)
        for norm in _NORMS
    }
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
    }
    for name, module in found.items():
        if type(module) not in synchronized:
            raise ArgumentError(
                f"{name} is a {type(module).__name__}, which has no synchronized form here: "
                "replace it by one of torch's BatchNorms or convert it yourself"
            )
    for module in found.values():
        module.process_group = process_group
        module.__class__ = synchronized[type(module)]
    return model
