"""The devices that op tests run on: of those that this machine has, the ones that TEST_DEVICES names, or all."""

import os
import sys

SOFTWARE_GPUS = {"mps-g14": "applegpu_g14s", "mps-g17": "applegpu_g17s"}
_HERE = ("cpu", "mps") if sys.platform == "darwin" else ("cpu", *SOFTWARE_GPUS)


def chosen(names: str) -> tuple[str, ...]:
    """names: separated by commas; all where it is empty. Raises ValueError for one that is not here."""
    wanted = names.split(",") if names else _HERE
    for name in wanted:
        if name not in _HERE:
            raise ValueError(f"TEST_DEVICES is {names!r}: {name!r} is not a device of this machine, which are {_HERE}")
    return tuple(name for name in _HERE if name in wanted)


DEVICES = chosen(os.environ.get("TEST_DEVICES", ""))
NATIVE_DEVICES = tuple(name for name in DEVICES if name not in SOFTWARE_GPUS)
