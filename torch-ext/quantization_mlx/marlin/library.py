"""The handle that Marlin's dispatch functions take."""

import torch


def _default_device() -> torch.device:
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
        if device is None and not torch.compiler.is_compiling():
            device = _default_device()
        self._device = None if device is None else torch.device(device)
        if self._device is not None and self._device.type not in ("cpu", "mps"):
            raise ValueError(f"[MetalKernelLibrary] device is {str(self._device)!r}; supported are 'mps' and 'cpu'")

    @property
    def device(self) -> torch.device:
        """Where work without tensors of its own runs."""
        # torch.compile cannot trace the query for a GPU, so a library made while tracing asks later.
        return _default_device() if self._device is None else self._device

    def __repr__(self) -> str:
        return f"MetalKernelLibrary(device={str(self.device)!r})"


_default: dict[str, MetalKernelLibrary] = {}


def get_default_library() -> MetalKernelLibrary:
    """The process's one library for the default device, made by the first call; any thread may call, and so may code
    that torch.compile traces."""
    library = _default.get("library")
    # If several threads get here first, setdefault keeps one library. A lock could not be traced.
    return _default.setdefault("library", MetalKernelLibrary()) if library is None else library
