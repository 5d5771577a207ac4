"""polarfast: polarization pruning of convolutional networks while they train."""
