"""How many kernels the shaders are, and how many of them a library that is compiled beforehand holds.

    python benchmarks/metal_library.py

Expands the tables of metal/quantized/formats.h and csrc/gpu/kernels.h with the C++ compiler; runs on any machine.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

SHADERS = Path(__file__).resolve().parents[1] / "metal/quantized"
INSTANCE = re.compile(r"host_name\(([^)]*)\)\]\] \[\[kernel\]\] decltype\(([^()]*)\)")
TYPES = ("float16", "bfloat16", "float32")


@cache
def kernels_in(stem: str, all_kernels: bool = False) -> dict[str, str]:
    """What <stem>.metal instantiates, by host name: the templates with their arguments.

    all_kernels: of every format and type, and not only those of a library that is compiled beforehand.
    """
    path = SHADERS / f"{stem}.metal"
    text = path.read_text().partition("// --- Instances")[2]  # without the templates, and the gate of tensor operations
    defines = ["-DQUANTIZATION_MLX_TENSOR_OPS=1", *(["-DQUANTIZATION_MLX_ALL_KERNELS"] if all_kernels else [])]
    command = ["c++", "-E", "-P", "-x", "c++", *defines, f"-I{path.parent}", "-"]
    expanded = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found = INSTANCE.findall(expanded)
    kernels = {"".join(re.findall(r'"([^"]*)"', literals)): instance for literals, instance in found}
    if len(kernels) != len(found):
        raise ValueError(f"{path} has two kernels of one name")
    return kernels


def main() -> None:
    print(f"{'':16}{'all':>8}{'library':>9}" + "".join(f"{name:>10}" for name in TYPES))
    total: Counter[str] = Counter()
    for stem in sorted(path.stem for path in SHADERS.glob("*.metal")):
        library = kernels_in(stem)
        counts = {"all": len(kernels_in(stem, all_kernels=True)), "library": len(library)}
        counts |= {name: sum(f"_{name}" in kernel for kernel in library) for name in TYPES}
        total.update(counts)
        print(_line(stem, counts))
    print(_line("together", total))


def _line(name: str, counts: dict[str, int]) -> str:
    numbers = "".join(f"{counts[kind]:>10}" for kind in TYPES)
    return f"{name:16}{counts['all']:>8}{counts['library']:>9}{numbers}"


if __name__ == "__main__":
    main()
