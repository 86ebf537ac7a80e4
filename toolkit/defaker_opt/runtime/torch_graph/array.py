"""Arrays of stages that stay on the device until somebody reads them.

They are what `numpy.concatenate` and indexing take, by numpy's own protocols, so a session hands outputs of one stage
to the next as it does with arrays of numpy. Reading one (`numpy.asarray`, arithmetic) waits for the device; nothing
else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class DeviceArray:
    """tensor: on the device. ready: when it is computed, if that is on a stream of its own."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, as numpy says them."""
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.tensor.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type, as numpy says it."""
        return np.dtype(str(self.tensor.dtype).removeprefix("torch."))

    def __len__(self) -> int:
        return len(self.tensor)

    def here(self) -> Tensor:
        """The tensor for work on the current stream, which waits for the stream it comes from."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            self.tensor.record_stream(stream)
        return self.tensor

    def reshape(self, *sizes: int) -> DeviceArray:
        """The same numbers in other sizes."""
        return DeviceArray(self.here().reshape(*sizes))

    def __getitem__(self, place: Any) -> DeviceArray:
        # Rows in their own order are the array itself; a list of others has to go to the device first.
        if isinstance(place, list) and place == list(range(len(self))):
            return self
        return DeviceArray(self.here()[place])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        read = self.here().cpu().numpy()
        return read if dtype is None else read.astype(dtype)

    def __array_function__(
        self, function: Callable[..., Any], types: Sequence[type], arguments: Any, options: Any
    ) -> Any:
        if function is not np.concatenate:
            return NotImplemented
        return _concatenate(*arguments, **options)


def _concatenate(parts: Sequence[Any], axis: int = 0) -> DeviceArray:
    device = next(part.tensor.device for part in parts if isinstance(part, DeviceArray))
    return DeviceArray(torch.cat([to_tensor(part, device) for part in parts], axis))


def to_tensor(array: Any, device: torch.device) -> Tensor:
    """A tensor on the device, of an array of numpy or of one that lies there."""
    if isinstance(array, DeviceArray):
        return array.here()
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor
    # From pinned memory the copy waits for nothing.
    return tensor.pin_memory().to(device, non_blocking=True)
