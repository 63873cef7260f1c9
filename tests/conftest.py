"""Shared fixtures: the devices under test, the hypothesis profile, and the count of values compared with mlx.

On a Mac, "mps" is its GPU. Elsewhere it is the software Metal device, once as a GPU without tensor operations and once
as one with them; what that finds wrong, be it an access to memory or a kernel that no plan names, fails the test. The
environment variable TEST_DEVICES leaves some out (support/devices.py).
There every pair of values of a test's parameters, the GPU being one of them, is tested, and with --exhaustive every
combination; the CPU has all of them but with --covering.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Before torch loads OpenMP: threads that spin while they wait make thousands of small calls crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before Transformers reads it: what a test needs is here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Where tests find what they share.
sys.path.extend(str(folder) for folder in Path(__file__).parent.iterdir() if folder.is_dir())

import covering
from devices import DEVICES, SOFTWARE_GPUS
from tally import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The software device, the cross build and GCC's sanitizers are for machines that are no Macs.
if sys.platform == "darwin":
    collect_ignore = [
        *("shaders/test_shaders.py", "shaders/test_tensor_shaders.py", "shaders/test_metal_cost.py"),
        *("host/test_metal_host.py", "host/test_mac_check.py", "cpu/test_sanitized_ops.py"),
    ]

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
        return
    with ExitStack() as stack:
        # Kernels that fail their self-check raise, and no others take their place unnoticed.
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("CI", "true")
        if request.param in SOFTWARE_GPUS:
            from softmetal import mps

            stack.enter_context(mps.gpu(SOFTWARE_GPUS[request.param]))
        yield "mps"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    import tiny

    return tiny.word_tokenizer()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Calls the command line in this process: what it prints, after checking its exit code."""
    from quantization_mlx.cli import main

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == code
        return capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def no_error_of_the_software_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test during which the software Metal device found an error, also where the test expects exceptions."""
    if software_gpu_of(request.node) is None:
        yield
        return
    from softmetal import mps

    mps.clear()
    yield
    errors = mps.errors()
    mps.clear()
    assert not errors, "\n".join(errors)


def device_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("device") if callspec is not None else None


def software_gpu_of(item: pytest.Item) -> str | None:
    return SOFTWARE_GPUS.get(device_of(item))


_tally = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also run what repeats others: tests marked exhaustive")
    parser.addoption("--covering", action="store_true", help="on every device only every pair of parameters")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = Tally()
    config.addinivalue_line("markers", "kernels_ci: fast tests that need the package's ops and nothing else")
    config.addinivalue_line("markers", "exhaustive: repeats what others test, with other values; see --exhaustive")
    config.addinivalue_line("markers", "first: takes minutes, and so starts before the others")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The build of a variant runs kernels_ci alone, without what other files import."""
    is_left_out = config.option.markexpr == "kernels_ci" and collection_path.name.startswith("test_")
    return True if is_left_out and "kernels_ci" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by name or marker: those chosen do not depend on it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The build of a variant, which runs kernels_ci alone, has no compiler for the software Metal device.
    if config.option.markexpr == "kernels_ci":
        items[:] = [item for item in items if software_gpu_of(item) is None]
    for item in repetitions(items, on_all_devices=config.option.covering):
        item.add_marker(pytest.mark.exhaustive)
    if not config.option.exhaustive and "exhaustive" not in config.option.markexpr:
        repeated = {item for item in items if item.get_closest_marker("exhaustive")}
        config.hook.pytest_deselected(items=list(repeated))
        items[:] = [item for item in items if item not in repeated]
    items.sort(key=lambda item: not item.get_closest_marker("first"))


def repetitions(items: list[pytest.Item], on_all_devices: bool) -> list[pytest.Item]:
    """Those on a software device whose parameters have no pair of values that no other has.

    on_all_devices: and those on the CPU, and on a Mac's GPU.
    """
    families: dict[tuple[pytest.Collector | None, str, bool], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if software_gpu_of(item) is not None or (on_all_devices and device_of(item) is not None):
            families[item.parent, item.originalname, device_of(item) == "cpu"].append(item)
    repeated = []
    for family in families.values():
        chosen = set(covering.pairwise([parameters(item) for item in family]))
        repeated += [item for index, item in enumerate(family) if index not in chosen]
    return repeated


def parameters(item: pytest.Item) -> dict[str, str]:
    return {name: repr(value) for name, value in item.callspec.params.items()}


def pytest_collection_finish(session: pytest.Session) -> None:
    """The software device comes before the first backward pass, at which torch counts the devices once for all."""
    if any(software_gpu_of(item) for item in session.items) and not session.config.option.collectonly:
        import software_gpu

        software_gpu.install()


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[_tally]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist, a worker hands its counts over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tally"] = session.config.stash[_tally].counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    node.config.stash[_tally].add(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_tally].lines()
    if lines:
        terminalreporter.section("bit-exact with mlx")
        for line in lines:
            terminalreporter.write_line(line)
