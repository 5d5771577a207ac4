"""Networks to plan, and what torch itself counts in the slim models of their plans."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf

from .nets import prepared


def make(build, residual="keep", seed=0):
    """γ anywhere in (0, 1), all of them different; β on both sides of 0."""
    model, scales = prepared(build, residual, share=0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.copy_(torch.rand(gamma.numel(), generator=generator, dtype=torch.float64))
    return model, scales


def width(plan, name):
    return plan.kept[name].numel() + len(plan.layers[name].constant)


def check_sizes(model, plan, x):
    """Predicted sizes against torch's own count of the model that is built."""
    slim = pf.slim(model, plan, verify=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slim(x)
    assert plan.macs == counter.get_total_flops() // 2
    assert plan.params == sum(param.numel() for param in slim.parameters())
    return slim
