"""This package's kernels for device "mps" on the software Metal device: the files that ship, unmodified."""

from __future__ import annotations

from pathlib import Path

import built
import kernel_builder
from repository import ROOT
from softmetal import mps
from softmetal.cache import digest

# quantization_mlx::metal::encode: plan_check.cpp comes between its callers and it.
ENCODE = "_ZN16quantization_mlx5metal6encodeERKNS0_12PreparedPlanENS0_8OperandsE"
# The installed extension has these: schemas, gradients and the CPU's kernels.
INSTALLED = ("torch-ext/", "csrc/cpu/", "csrc/auto", "csrc/decoder", "csrc/custom_kernels", "csrc/linear_experts")
# It keeps these to itself; what was compiled for it serves here as well.
SHARED = ("csrc/problem/", "csrc/gpu/")
SHADER_HEADERS = (
    *("format.h", "formats.h", "functions.h", "resampling.h", "sampling.h"),
    *("gpu/kernels.h", "gpu/launch.h"),
)
FLAGS = (
    *("-DTORCH_EXTENSION_NAME=_C", "-DQUANTIZATION_MLX_NAMESPACE=quantization_mlx"),
    *(f"-I{ROOT}", f"-I{ROOT / 'csrc'}", f'-DSOFTMETAL_ENCODE="{ENCODE}"'),
)


def install(metallib: bool = False, check_plans: bool = True) -> None:
    """Gives torch a device "mps", and the package's ops their kernels for it. Does nothing the second time.

    metallib: as kernel-builder builds, with a library of all shaders compiled beforehand, and not as pip does, with
        their source.
    check_plans: compares every plan that is encoded with what the device was told to launch.
    """
    import quantization_mlx  # noqa: F401  (its ops must be there)

    mps.install(extension(metallib, check_plans))


def extension(metallib: bool = False, check_plans: bool = True) -> mps.Extension:
    files = [path for path in kernel_builder.sources(backend="metal") if path.endswith((".cpp", ".mm"))]
    known = {path: built.object_of(path) for path in files if path.startswith(SHARED)}
    objects = [path for path in known.values() if path is not None]
    missing = [path for path in files if not path.startswith(INSTALLED) and known.get(path) is None]
    sources: dict[Path, list[str]] = {ROOT / path: [] for path in missing}
    if check_plans:
        sources[Path(__file__).with_name("plan_check.cpp")] = []
    # Compiled again where the shaders that it embeds have changed.
    embedded = [*(ROOT / "metal").rglob("*"), *(ROOT / "csrc" / name for name in SHADER_HEADERS)]
    texts = [path.read_bytes() for path in sorted(embedded) if path.is_file()]
    sources[ROOT / "csrc/metal/shader_source.cpp"] = [f"-DSOFTMETAL_EMBEDDED={digest(*texts)}"]
    if metallib:
        sources[ROOT / "csrc/metal/library.mm"] = mps.metallib_flags(sorted((ROOT / "metal").rglob("*.metal")))
    return mps.Extension(sources, FLAGS, [f"-Wl,--wrap={ENCODE}"] if check_plans else [], objects)
