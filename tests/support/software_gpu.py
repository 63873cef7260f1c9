"""This package's kernels for device "mps" on the software Metal device: the files that ship, unmodified."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import kernel_builder
from repository import ROOT
from softmetal import mps

# quantization_mlx::metal::encode: plan_check.cpp comes between its callers and it.
ENCODE = "_ZN16quantization_mlx5metal6encodeERKNS_3gpu4PlanESt5arrayIN2at6TensorELm10EE"
# The installed extension has these: schemas, gradients and the CPU's kernels.
INSTALLED = ("torch-ext/", "csrc/cpu/", "csrc/auto")
FLAGS = (
    *("-DTORCH_EXTENSION_NAME=_C", "-DQUANTIZATION_MLX_NAMESPACE=quantization_mlx"),
    *(f"-I{ROOT / 'csrc'}", f'-DSOFTMETAL_ENCODE="{ENCODE}"'),
)


def install(metallib: bool = False) -> None:
    """Gives torch a device "mps", and the package's ops their kernels for it. Does nothing the second time.

    metallib: as kernel-builder builds, with a library of all shaders compiled beforehand, and not as pip does, with
        their source.
    """
    import quantization_mlx  # noqa: F401  (its ops must be there)

    mps.install(extension(metallib))


def extension(metallib: bool = False) -> mps.Extension:
    files = [path for path in kernel_builder.sources(backend="metal") if path.endswith((".cpp", ".mm"))]
    sources: dict[Path, list[str]] = {ROOT / path: [] for path in files if not path.startswith(INSTALLED)}
    sources[Path(__file__).with_name("plan_check.cpp")] = []
    if metallib:
        sources[ROOT / "csrc/metal/library.mm"] = mps.metallib_flags(sorted((ROOT / "metal").rglob("*.metal")))
    else:
        shaders = ROOT / "build" / "shader_source.cpp"
        embed_shaders(shaders)
        sources[shaders] = []
    return mps.Extension(sources, FLAGS, [f"-Wl,--wrap={ENCODE}"])


def embed_shaders(output: Path) -> None:
    """Writes the C++ source of the embedded shaders, as every build without a Metal compiler does."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("cmake is not installed")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(f".{os.getpid()}.cpp")
    script = ROOT / "cmake" / "embed_shaders.cmake"
    subprocess.run([cmake, "-D", f"OUTPUT={temporary}", "-P", script], check=True)
    os.replace(temporary, output)
