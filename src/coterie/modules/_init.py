"""Drawing weights."""

from torch import Tensor, nn


def init_normal(tensor: Tensor, std: float) -> None:
    """Normal weights; none where there is no memory, for torch loads its compiler (a second) to draw nothing there."""
    if tensor.device.type != "meta":
        nn.init.normal_(tensor, std=std)
