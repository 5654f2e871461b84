"""What autocast asks for; some devices (meta) have none."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast has a device of this type compute now; None: it is off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def no_autocast(device: str) -> AbstractContextManager:
    """Inside, a device of this type computes in the dtypes that it is given."""
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext()
