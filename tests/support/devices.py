"""The devices that op tests run on."""

import sys

SOFTWARE_GPUS = {"mps-g14": "applegpu_g14s", "mps-g17": "applegpu_g17s"}
NATIVE_DEVICES = ("cpu", "mps") if sys.platform == "darwin" else ("cpu",)
DEVICES = NATIVE_DEVICES if "mps" in NATIVE_DEVICES else (*NATIVE_DEVICES, *SOFTWARE_GPUS)
