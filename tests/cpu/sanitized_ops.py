"""The op tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

    python tests/cpu/sanitized_ops.py                                 # the tests of all ops, on device "cpu"
    python tests/cpu/sanitized_ops.py ops/test_gather.py --maxfail 9  # pytest's arguments, and these tests alone

The build and an environment that has it stand in build/sanitize; what is installed stays as it is. Torch and Python
know nothing of sanitizers, but AddressSanitizer makes their allocations too, so that the bounds of tensors are known:
tests/cpu/test_sanitized_ops.py proves it. The compiler has to be GCC, whose runtime a plain interpreter can load.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/sanitize"
FLAGS = (
    *("-O1", "-g1"),
    # Beyond "undefined": conversions of floating-point values that the integer type does not have.
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    # Indices of standard containers. Not _GLIBCXX_SANITIZE_VECTOR: torch's vectors do not tell how long they are.
    "-D_GLIBCXX_ASSERTIONS",
)
OPTIONS = {
    # The interpreter frees little when it ends.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# The longest first: it runs those of the ops once more for each other instruction set.
FILES = (
    *("cpu/test_instruction_sets.py", "ops/test_matmul.py", "ops/test_gather.py", "ops/test_quantize.py"),
    *("models/test_generation.py", "layers/test_modules.py", "ops/test_properties.py", "ops/test_torch_citizen.py"),
    "ops/test_validation.py",
)
# The shaders have a device of their own that checks them; what torch compiles and real models take long and add no op.
SELECTION = "not mps and not compile and not real_model"

# Any other build of the package would pass as well.
IS_IMPORTED = "import quantization_mlx, sys; assert quantization_mlx.__file__.startswith(sys.prefix)"


def compile_extension() -> Path:
    """Builds what has changed, and returns the interpreter of an environment with it and all packages of this one."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        sys.exit("no cmake: `make setup` brings it")

    def run(*arguments: str | Path) -> None:
        subprocess.run([cmake, *arguments], check=True, env={**os.environ, "PATH": path})

    flags = " ".join(FLAGS)
    options = ("-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}")
    run("-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja", *options)
    run("--build", BUILD / "cmake")

    folder = BUILD / "venv"
    venv.create(folder, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    shutil.copytree(ROOT / "torch-ext/quantization_mlx", packages / "quantization_mlx", dirs_exist_ok=True)
    run("--install", BUILD / "cmake", "--prefix", packages)
    # An editable install, which would come before the package here, is found through a .pth file, and those in folders
    # that a .pth file names are not read.
    others = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))
    return folder / "bin/python"


def environment(library: Path) -> dict[str, str]:
    """The environment in which a program without sanitizers can load a library that was built with FLAGS."""
    linked = subprocess.check_output(["ldd", library], text=True)
    # AddressSanitizer has to come first, and looks for the function that throws exceptions as soon as it is there.
    runtimes = [re.search(rf"=> (\S*/{name}\.so\S*)", linked) for name in ("libasan", r"libstdc\+\+")]
    if not all(runtimes):
        sys.exit(f"{library} does not load libasan and libstdc++: CXX has to be GCC")
    return {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(found[1] for found in runtimes)}


def main(arguments: Sequence[str]) -> int:
    python = compile_extension()
    chosen = any((ROOT / "tests" / argument.split("::")[0]).is_file() for argument in arguments)
    files = () if chosen else FILES
    # Reports go to the process's standard error, which pytest would keep in a process that ends at once.
    options = ("-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-k", SELECTION)
    workers = ("--numprocesses", os.environ.get("WORKERS", "2"), "--dist", "worksteal")
    sanitized = environment(next((BUILD / "cmake").glob("_C.*so")))
    for command in (("-c", IS_IMPORTED), ("-m", "pytest", *options, *workers, *files, *arguments)):
        done = subprocess.run([python, *command], cwd=ROOT / "tests", env=sanitized, check=False)
        if done.returncode != 0:
            break
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
