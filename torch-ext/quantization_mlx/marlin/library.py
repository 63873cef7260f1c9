"""The handle that Marlin's dispatch functions take."""

from __future__ import annotations

import threading

import torch


class MetalKernelLibrary:
    """The handle that `dispatch_gemm_fp4` and its like take first, as documented for Marlin.

    The kernels themselves are in this package's extension, which compiles or loads each once, whatever the handle; and
    a product runs where its tensors are.

    Args:
        device: "mps", "cpu" or such a torch.device, where work without tensors of its own (`benchmark_dequant_fp4`)
            runs; None is "mps" where torch has it, else "cpu".

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("mps" if torch.backends.mps.is_available() else "cpu"))
        if self.device.type not in ("cpu", "mps"):
            raise ValueError(f"[MetalKernelLibrary] device is {str(self.device)!r}; supported are 'mps' and 'cpu'")

    def __repr__(self) -> str:
        return f"MetalKernelLibrary(device={str(self.device)!r})"


_lock = threading.Lock()
_default: MetalKernelLibrary | None = None


def get_default_library() -> MetalKernelLibrary:
    """The process's one library for the default device, made by the first call; any thread may call."""
    global _default
    with _lock:
        if _default is None:
            _default = MetalKernelLibrary()
        return _default
