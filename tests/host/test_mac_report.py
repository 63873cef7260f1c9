"""`make mac-report`: steps that crash or hang, and the whole of it on the software Metal device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import mac_report
from process import printed, python

# --- Steps that may crash ---------------------------------------------------------------------------------------------

STEP = """
import json, os, sys, time
done = set(json.load(sys.stdin))
events = open(int(sys.argv[1]), "w", buffering=1)
def write(event):
    events.write(json.dumps(event) + "\\n")
def crash():
    print("error: the compiler has given up", flush=True)
    os.abort()
for name, act in {ITEMS}.items():
    if name not in done:
        write({"begin": name})
        act()
        write({"end": {"name": name, "outcome": "passed"}, "written": os.lseek(2, 0, os.SEEK_CUR)})
"""
WARN = "lambda: print('x.cpp:1 Warning: [quantization_mlx] family tile (function)', file=sys.stderr)"
PASS, CRASH, HANG, LEAVE = "lambda: None", "crash", "lambda: time.sleep(600)", "lambda: sys.exit(3)"


def guarded(folder: Path, limit: float = 3600.0, **items: str) -> dict[str, mac_report.Item]:
    program = folder / "step.py"
    table = "{" + ", ".join(f"{name!r}: {act}" for name, act in items.items()) + "}"
    program.write_text(STEP.replace("{ITEMS}", table))
    found = mac_report.guarded([sys.executable, str(program)], limit)
    return {item["name"]: item for item in found}


def outcomes(items: dict[str, mac_report.Item]) -> dict[str, str]:
    return {name: item["outcome"] for name, item in items.items()}


def test_what_follows_a_crash_is_run(tmp_path):
    items = guarded(tmp_path, a=PASS, b=CRASH, c=PASS, d=LEAVE, e=PASS)
    expected = {"a": "passed", "b": "crashed", "c": "passed", "d": "crashed", "e": "passed"}
    assert outcomes(items) == expected
    assert (items["b"]["reason"], items["d"]["reason"]) == ("SIGABRT", "exit status 3")
    assert "error: the compiler has given up" in items["b"]["output"]


def test_what_follows_a_hang_is_run(tmp_path):
    items = guarded(tmp_path, limit=20.0, a=HANG, b=PASS)
    assert outcomes(items) == {"a": "hung", "b": "passed"}
    assert items["a"]["reason"] == "nothing for 20 s"


def test_warnings_belong_to_their_items(tmp_path):
    items = guarded(tmp_path, a=PASS, b=WARN, c=PASS)
    warnings = {name: item.get("warnings") for name, item in items.items()}
    assert warnings == {"a": None, "b": ["[quantization_mlx] family tile (function)"], "c": None}


def test_too_many_crashes_end_a_step(tmp_path):
    items = guarded(tmp_path, **{f"item{number}": CRASH for number in range(mac_report.MOST_PROCESSES + 5)})
    assert len(items) == mac_report.MOST_PROCESSES + 1
    assert items["the rest"]["outcome"] == "not run"


def test_a_step_that_does_not_begin(tmp_path):
    (item,) = mac_report.guarded([sys.executable, "-c", "import missing_module"], 3600.0)
    assert (item["name"], item["outcome"]) == ("the step itself", "crashed")
    assert "missing_module" in item["output"][-1]


# --- The machine ------------------------------------------------------------------------------------------------------

REGISTRY = b"""<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><array><dict>
<key>IOClass</key><string>AGXAcceleratorG14X</string>
<key>model</key><string>Apple M2 Max</string>
<key>gpu-core-count</key><integer>38</integer>
</dict></array></plist>"""


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_facts_of_a_mac(tmp_path, monkeypatch):
    """With programs that print what those of macOS print."""
    (tmp_path / "registry").write_bytes(REGISTRY)
    program(tmp_path, "ioreg", f'[ "$*" = "-a -r -d 1 -c AGXAccelerator" ] && cat {tmp_path / "registry"}')
    program(tmp_path, "sysctl", 'case $2 in machdep.cpu.brand_string) echo "Apple M2 Max" ;; kern.hv*) echo 0 ;; esac')
    program(tmp_path, "xcrun", "exit 72")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("QUANTIZATION_MLX_GPU", "applegpu_g14s")
    facts = mac_report.machine()
    assert facts["gpu"] == {"model": "Apple M2 Max", "gpu-core-count": 38}
    assert (facts["chip"], facts["virtual"], facts["Metal compiler"]) == ("Apple M2 Max", "0", None)
    assert facts["environment"]["QUANTIZATION_MLX_GPU"] == "applegpu_g14s"
    program(tmp_path, "ioreg", "echo nonsense")
    assert "InvalidFileException" in mac_report.machine()["gpu"]


@pytest.mark.skipif(sys.platform == "darwin", reason="there, it runs")
def test_elsewhere_it_says_what_it_needs():
    done = python(mac_report.__file__)
    assert (done.returncode, done.stderr) == (1, mac_report.NEEDS + "\n")


# --- All of it, on the software device --------------------------------------------------------------------------------

SOFTWARE_DEVICE = pytest.mark.skipif(sys.platform == "darwin", reason="the software Metal device is for other machines")


def report(folder: Path, *arguments: str) -> tuple[dict, str]:
    output = folder / "report.json"
    options = ("--software-gpu", "applegpu_g14s", "--output", output, "--limit", 3600)  # the machine may be slow
    text = printed(mac_report.__file__, *options, *arguments)
    return json.loads(output.read_text()), text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, str]:
    """Of the checks and the tests a few, whose kernels other tests compile as well."""
    names = ("affine-g64-b4 float16 transposed 1 rows", "affine-g64-b4 quantize", "test_product_defaults", "x [1, 128]")
    return report(tmp_path_factory.mktemp("report"), *(f"--select={name}" for name in names))


@SOFTWARE_DEVICE
def test_whole_report(whole):
    result, printed = whole
    steps = {step: {item["name"]: item for item in items} for step, items in result["steps"].items()}
    assert list(steps) == list(mac_report.STEPS)
    assert outcomes(steps["gpu"]) == {
        **{name: "passed" for name in ("torch", "copies", "an op of torch", "a shader of two lines", "package")},
        "mlx": "failed",  # it has no GPU here
    }
    assert steps["gpu"]["package"]["gpu"] == "applegpu_g14s"
    assert set(outcomes(steps["checks"]).values()) == {"passed"}
    assert set(outcomes(steps["times"]).values()) == {"passed"}
    assert all("mlx" not in item["microseconds"] for item in steps["times"].values())
    assert "tests: 1 passed" in printed.splitlines()
    assert steps["tests"] == {}
    assert {"affine_qmv_float16_gs_64_b_4"} <= set(result["kernels"])
    assert any("software Metal device" in line for line in result["summary"])
    assert "attach" in printed.splitlines()[-1]


@SOFTWARE_DEVICE
def test_wrong_kernels_are_reported(tmp_path):
    """Those of tiles, which the self-check excludes; quantize has no other."""
    select = ("--steps", "gpu", "checks", "--select=affine-g64-b4 float16 transposed 70 rows")
    result, _ = report(tmp_path, *select, "--corrupt", "qmm")
    (item,) = result["steps"]["checks"]
    assert (item["outcome"], item["excluded"]) == ("passed", ["tile"])
    assert "fails its self-check" in item["warnings"][0]
    assert any("fails its self-check" in line for line in result["summary"])
