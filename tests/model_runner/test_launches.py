"""How many kernels a captured decode launches, on the simulated device: at batch 1 each costs about as much as reading
4 MB, so none shall come unseen. docs/performance.md#gpu lists them and what they bound."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from support import fake_kernels
from support.engine import runner_config
from support.fake_cuda import fake_cuda
from transformers import AutoConfig

from ramet.launch.bench.step import Case, step_work
from ramet.model_runner.config import LoadFormat
from ramet.model_runner.models import loader
from ramet.model_runner.models.registry import NATIVE, architecture_of
from ramet.model_runner.runner import ModelRunner

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
ROOT = Path(__file__).parents[2]
KERNEL_S, BYTES_PER_S = 1.3e-6, 3.0e12  # in a graph, and of an H100
LAYER = [
    *("_add_rms_norm", "aten.mm.default", "_rope_and_store", "_attend", "_combine", "aten.mm.default"),
    *("_add_rms_norm", "aten.mm.default", "_gated", "aten.mm.default"),
]
FP8_PRODUCT = ("_to_fp8", "aten._scaled_mm.default")
BEFORE = [
    *("aten.index_select.default", "aten.eq.Scalar", "aten.where.self_out"),  # tokens that the host does not know yet
    "aten.index_select.default",  # rows of the page table
    *("aten.embedding.default", "aten._to_copy.default"),
]
AFTER = [
    *("_add_rms_norm", "aten.index.Tensor"),
    *("aten.mm.dtype", "aten.copy_.default"),  # logits in float32, where all graphs leave them
    *("_best_of_block", "aten.max.dim", "aten.gather.default"),
    *("aten.clamp.default", "aten.index_copy_.default"),  # for the next step
]


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict]:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODELS


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("name", ["qwen-0.6b", "llama-8b"])
def test_the_kernels_of_a_captured_decode(shapes, name, quantization, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(shapes[name] | {"num_hidden_layers": 2}))
    monkeypatch.setattr(loader, "fill", lambda *args: None)
    config = runner_config(
        tmp_path,
        load_format=LoadFormat.DUMMY,
        dtype="bfloat16",
        device="cuda",
        cuda_graph_max_bs=1,
        memory_fraction=0.9,
        quantization=quantization,
    )
    with fake_cuda(hollow=True) as device:
        fake_kernels.install(device, monkeypatch)
        ModelRunner(config, lambda text: None)
    assert device.last_graph is not None  # of the smallest batch
    layer = LAYER
    if quantization:  # each product is two launches
        layer = [name for kernel in LAYER for name in (FP8_PRODUCT if kernel == "aten.mm.default" else (kernel,))]
    assert device.last_graph.launched == BEFORE + 2 * layer + AFTER


@pytest.mark.parametrize(("name", "row"), [("qwen-0.6b", "Qwen3 0.6B"), ("llama-8b", "Llama 3.1 8B")])
def test_the_bounds_that_the_documentation_computes(shapes, name, row, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shapes[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    work = step_work(NATIVE[architecture_of(config)](config, 16384), Case(1, 1, 384), weight_bytes=2, kv_bytes=2)
    kernels = len(BEFORE) + shapes[name]["num_hidden_layers"] * len(LAYER) + len(AFTER)
    bytes_s, launches_s = work.num_bytes / BYTES_PER_S, kernels * KERNEL_S
    found = [kernels, 1e6 * bytes_s, 1e6 * launches_s, 1 / bytes_s, 1 / (bytes_s + launches_s)]
    text = (ROOT / "docs/performance.md").read_text()
    cells = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", text, re.MULTILINE)
    assert cells is not None
    assert [float(cell.replace(",", "")) for cell in cells[1].split("|")] == [pytest.approx(v, abs=0.6) for v in found]
