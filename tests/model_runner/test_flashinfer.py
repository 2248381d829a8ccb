"""The FlashInfer backend: what it tells the package equals what the torch backend computes. The package itself needs a
GPU; on a CPU, a wrapper of the same form does what its documentation says of the arguments."""

import sys
import types

import numpy as np
import pytest
import torch
from support.attention_cases import Case
from support.engine import InlineEngine

from ramet.model_runner.attention import flashinfer_backend
from ramet.model_runner.attention.flashinfer_backend import FlashInferBackend, paged_rows
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.context import AttentionSpec
from ramet.model_runner.cuda_graph import StepGraphs

CPU = torch.device("cpu")
MIXED = [(65, 1), (16, 1), (7, 7), (70, 33)]


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper, row by row in float32."""

    def __init__(self, workspace, layout, use_cuda_graph=False, backend="auto", **buffers):
        assert layout == "NHD" and backend == ("fa2" if use_cuda_graph else "auto")
        self.buffers, self.fixed = buffers, use_cuda_graph

    def plan(self, cu_q, indptr, indices, last_page_len, *sizes, causal, **options):
        assert causal and cu_q.dtype is indptr.dtype is indices.dtype is last_page_len.dtype is torch.int32
        names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        given = dict(zip(names, (cu_q, indptr, indices, last_page_len), strict=True))
        if self.fixed:
            for name, tensor in given.items():
                assert len(tensor) <= len(self.buffers[name])
                assert name == "paged_kv_indices_buf" or len(tensor) == len(self.buffers[name])
                self.buffers[name][: len(tensor)] = tensor
        else:
            self.buffers = {name: tensor.clone() for name, tensor in given.items()}
        self.sizes, self.options = sizes, options

    def run(self, query, pool):
        cu_q, indptr, indices, last = (
            self.buffers[f"{name}_buf"].tolist()
            for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        )
        heads, kv_heads, dim, page_size = self.sizes
        assert query.shape[1:] == (heads, dim) and pool[0].shape[1:] == (page_size, kv_heads, dim)
        assert self.options["q_data_type"] is self.options["kv_data_type"] is query.dtype
        rows = []
        for row, tail in enumerate(last):
            first, end = cu_q[row : row + 2]
            pages = indices[indptr[row] : indptr[row + 1]]
            length = max(len(pages) - 1, 0) * page_size + tail
            assert length >= end - first and 0 <= tail <= page_size and (tail > 0 or not pages)
            key, value = (part[pages].flatten(0, 1)[:length].float() for part in pool)
            key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
            behind = torch.arange(length - (end - first), length)[:, None] - torch.arange(length)
            left = self.options["window_left"]
            scores = torch.einsum("qhd,khd->hqk", query[first:end].float(), key) * self.options["sm_scale"]
            if (cap := self.options["logits_soft_cap"]) is not None:
                scores = cap * torch.tanh(scores / cap)
            seen = (behind >= 0) & ((behind <= left) | (left < 0))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, value))
        return torch.cat(rows).to(query.dtype)


@pytest.fixture
def backend(monkeypatch) -> FlashInferBackend:
    torch.set_num_threads(1)
    module = types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_backend, "_WORKSPACE_BYTES", 16)
    return FlashInferBackend(CPU)


def step_of(ctx) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """What `plan` hears of a context, whose rows stand for slots."""
    pages = ctx.block_table.cpu().numpy()
    step = {"cu_q": ctx.cu_q.cpu().numpy(), "seq_lens": ctx.seq_lens.cpu().numpy(), "row_slots": np.arange(len(pages))}
    return step, pages, ctx.kv_pool.page_size


def whole(case: Case):
    return case.context([(row, 0, new) for row, (_, new) in enumerate(case.rows)], None)


def test_pages_of_rows():
    pages = np.arange(100, 140, dtype=np.int32).reshape(4, 10)
    step = {
        "cu_q": np.arange(5, dtype=np.int32),
        "seq_lens": np.array([33, 0, 16, 1]),
        "row_slots": np.array([2, 0, 1, 3]),
    }
    rows = paged_rows(step, pages, 16)
    assert rows.indptr.tolist() == [0, 3, 3, 4, 5]
    assert rows.indices.tolist() == [120, 121, 122, 110, 130]
    assert rows.last_page_len.tolist() == [1, 0, 16, 1]
    assert {array.dtype for array in rows} == {np.dtype("int32")}


@pytest.mark.parametrize("spec", [{}, {"sliding_window": 1}, {"sliding_window": 24}, {"softcap": 3.0}], ids=str)
def test_equals_the_torch_backend(backend, spec):
    query, ctx = whole(Case(MIXED, dtype=torch.float32))
    spec = AttentionSpec(0, 0.125, **spec)
    backend.plan(*step_of(ctx), captured=False)
    torch.testing.assert_close(backend.forward(spec, query, ctx), TorchBackend().forward(spec, query, ctx))


def test_layers_of_one_kind_share_a_plan_and_others_do_not(backend, monkeypatch):
    planned = []
    plan = Wrapper.plan
    monkeypatch.setattr(Wrapper, "plan", lambda self, *args, **options: planned.append(plan(self, *args, **options)))
    query, ctx = whole(Case(MIXED, dtype=torch.float32))
    for step in range(2):
        backend.plan(*step_of(ctx), captured=False)
        for window in (None, 24, None, 24):
            backend.forward(AttentionSpec(0, 0.125, window), query, ctx)
        assert len(planned) == 2 * (step + 1)


def test_a_captured_step_is_planned_again_where_its_buffers_are(backend):
    """A replay does not come by `forward`: the wrapper must know of the new rows without it."""
    query, ctx = whole(Case([(300, 1), (20, 1)], dtype=torch.float32))
    backend.plan(*step_of(ctx), captured=True)
    backend.forward(AttentionSpec(0, 0.125), query, ctx)
    (wrapper,) = backend._wrappers.values()
    addresses = {name: tensor.data_ptr() for name, tensor in wrapper.buffers.items()}

    query, ctx = whole(Case([(17, 1), (45, 1)], dtype=torch.float32))
    backend.plan(*step_of(ctx), captured=True)
    pool = (ctx.kv_pool.keys[0], ctx.kv_pool.values[0])
    expected = TorchBackend().forward(AttentionSpec(0, 0.125), query, ctx)
    torch.testing.assert_close(wrapper.run(query, pool), expected)
    assert {name: tensor.data_ptr() for name, tensor in wrapper.buffers.items()} == addresses


def test_an_engine_answers_the_same_with_it(backend, tiny_model, monkeypatch):
    monkeypatch.setattr(flashinfer_backend, "HEAD_DIMS", (16, 64))
    folder = tiny_model("gemma3")
    plain, engine = InlineEngine(folder), InlineEngine(folder)
    runner = engine.runner
    runner._backend = backend
    parts = (runner._model, runner._slots, runner._pool, backend, runner._choose)
    with torch.inference_mode():
        settings = {name: getattr(runner._config, name) for name in runner._config.__struct_fields__}
        config = type(runner._config)(**settings | {"cuda_graph_max_bs": 4})
        runner._graphs = StepGraphs(config, *parts, capture=lambda run: run, progress=lambda text: None)
    for made in (plain, engine):
        for i, length in enumerate((3, 90, 18, 1)):
            made.add(f"r{i}", [7 * i + j for j in range(length)], 5)
            made.run(steps=2)
        made.run()
    assert engine.tokens == plain.tokens
    captured = {key[0] for key in backend._wrappers}
    assert None in captured and {(1, 1), (4, 4)} < captured and any(rows == 8 for rows, _ in captured - {None})


def test_heads_that_the_package_lacks_are_refused(backend):
    query, ctx = whole(Case([(3, 1)], key_dim=80, value_dim=80, dtype=torch.float32))
    with pytest.raises(ValueError, match="takes heads of 64, 128, 256 dimensions, not 80 and 80"):
        backend.forward(AttentionSpec(0, 0.125), query, ctx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
@pytest.mark.parametrize("spec", [{}, {"sliding_window": 24}], ids=str)
def test_the_package_equals_the_torch_backend(name, spec):
    cuda = torch.device("cuda", torch.cuda.current_device())
    try:
        made = make_backend(name, cuda, torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    query, ctx = whole(Case(MIXED, key_dim=128, value_dim=128, device=cuda))
    query, spec = query.bfloat16(), AttentionSpec(0, 0.125, **spec)
    made.plan(*step_of(ctx), captured=False)
    expected = TorchBackend().forward(spec, query, ctx)
    torch.testing.assert_close(made.forward(spec, query, ctx), expected, rtol=2e-2, atol=2e-2)
