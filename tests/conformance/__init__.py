"""A conformance suite for structured pruning: networks nobody here wrote, oracles that know nothing
of the pruner.

    pytest tests/conformance
        --models all | fast | REGULAR-EXPRESSION      (default: fast)
        --pruner package.module:Class                 (default: polarfast's)

To point it at another library, write a `pruners.Pruner`: two methods, and up to three more for what
the library offers beyond them. `peers.TorchPruning` is an example.

What is asserted of every pruned network is computed by `oracles` (the original with the removed
channels masked, in float64; torch's FlopCounterMode; counting; a training step of the original).
"""
