"""A stream of random numbers of one's own, that can be put down and taken up again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStream:
    """The states of the global generators of Python, numpy and torch (and of one accelerator), seeded together.

    Within `with stream.current():` the global generators continue this stream; outside they are the caller's again.
    So two trainers can take turns in one process and each draws the numbers it would have drawn alone, which is what
    makes either of them resumable by itself.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        caller = self._states()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self._own = self._states()
        self._set(caller)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let the global generators be this stream."""
        caller = self._states()
        self._set(self._own)
        try:
            yield
        finally:
            self._own = self._states()
            self._set(caller)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able state) of the stream."""
        states = self._own
        version, words, gauss = states["python"]
        name, keys, position, has_gauss, cached = states["numpy"]
        tensors = {"torch": states["torch"], "numpy": torch.from_numpy(keys.astype(np.int64))}
        if "device" in states:
            tensors["device"] = states["device"]
        return tensors, {
            "python": [version, list(words), gauss],
            "numpy": [name, int(position), int(has_gauss), float(cached)],
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue the stream that `state_dict` described; an accelerator's part is left out where it has none."""
        version, words, gauss = state["python"]
        name, position, has_gauss, cached = state["numpy"]
        self._own = {
            "python": (version, tuple(words), gauss),
            "numpy": (name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached),
            "torch": tensors["torch"],
        }
        if "device" in tensors and self.device.type != "cpu":
            self._own["device"] = tensors["device"]

    def _states(self) -> dict[str, Any]:
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if self.device.type != "cpu":
            states["device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        return states

    def _set(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "device" in states:
            torch.get_device_module(self.device).set_rng_state(states["device"], self.device)
