"""The handwritten digits that come with scikit-learn."""

import torch
import torch.nn.functional as F

from ..decode import ArrayImages

CLASSES = 10
TRAIN = 1000  # of the 1,797 images; the other 797 are the test set
SIDE = 16  # pixels; leaves a ResNet's last stage 4x4 pixels, the stored 8x8 would leave it 2x2


def read(seed: int, side: int = 0) -> tuple[ArrayImages, ArrayImages]:
    """1,000 training images drawn with ``seed`` and the other 797 for the test.

    Args:
        side: side in pixels that the 8x8 images are enlarged to; 0: 16.

    Returns:
        float32 images ``[N, 1, side, side]`` between 0 and 1.
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    size = (side or SIDE,) * 2
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    shuffled = ArrayImages(images[order], torch.from_numpy(bundled.target).long()[order])
    indices = torch.arange(len(images))
    return shuffled.pick(indices[:TRAIN]), shuffled.pick(indices[TRAIN:])
