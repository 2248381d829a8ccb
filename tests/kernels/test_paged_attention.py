"""The C kernel equals its plain twin, the torch backend, and gives the same bits alone, in a batch and in chunks."""

import pytest
import torch
from support.attention_cases import Case

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.model_runner.attention.cpu_backend import CpuBackend
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.attention.torch_backend import TorchBackend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    try:
        return CpuBackend()
    except KernelUnavailable as error:
        pytest.skip(f"no C compiler: {error}")


MIXED = [(1, 1), (64, 1), (65, 1), (300, 1), (5, 5), (100, 40), (200, 130)]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv_heads": 4},
        {"heads": 8, "kv_heads": 1, "key_dim": 128, "value_dim": 128},
        {"heads": 6, "kv_heads": 3, "key_dim": 24, "value_dim": 40},
        {"page_size": 1},
        {"page_size": 7, "heads": 5, "kv_heads": 1},
        {"key_dim": 256, "value_dim": 256, "heads": 2, "kv_heads": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [{}, {"sliding_window": 24}, {"softcap": 3.0}, {"sliding_window": 1}])
def test_equals_plain_torch(backend, shape, dtype, spec):
    case = Case(MIXED, dtype=dtype, **shape)
    expected = case.run(TorchBackend(), **spec)
    # Both compute in float32: only the order of additions and the exponential differ.
    torch.testing.assert_close(case.run(backend, **spec), expected, rtol=1e-4, atol=2e-5)


def test_long_context(backend):
    case = Case([(3000, 1), (2500, 70)])
    torch.testing.assert_close(case.run(backend), case.run(TorchBackend()), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spec", [{}, {"sliding_window": 50}])
def test_same_bits_alone_in_a_batch_and_in_any_chunks(backend, spec):
    case = Case(MIXED)
    together = case.run(backend, **spec)
    alone = [case.run(backend, [(row, 0, new)], **spec) for row, (_, new) in enumerate(MIXED)]
    assert torch.equal(together, torch.cat(alone))
    one_by_one = [case.run(backend, [(6, i, i + 1)], **spec) for i in range(130)]
    assert torch.equal(alone[6], torch.cat(one_by_one))
    uneven = [case.run(backend, [(6, a, b)], **spec) for a, b in [(0, 17), (17, 81), (81, 82), (82, 130)]]
    assert torch.equal(alone[6], torch.cat(uneven))


@pytest.mark.parametrize("make", [CpuBackend, TorchBackend])
def test_nan_left_in_a_page_by_another_request_does_not_spread(make, request):
    if make is CpuBackend:
        request.getfixturevalue("backend")
    case = Case([(20, 4), (40, 1)])
    expected = case.run(make())
    for row, (context, _) in enumerate(case.rows):
        last_page = case.tables[row][-1]
        case.pool.keys[0][last_page, context % 16 :] = float("nan")
        case.pool.values[0][last_page, context % 16 :] = float("nan")
    assert torch.equal(case.run(make()), expected)


def test_nan_of_its_own_reaches_the_result(backend):
    case = Case([(20, 1)])
    case.pool.keys[0][case.tables[0][0], 3] = float("nan")
    assert case.run(backend).isnan().all()


def test_without_a_compiler_torch_takes_over_and_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(make_backend("auto", CPU, torch.float32), TorchBackend)
    assert "no-such-compiler" in caplog.text
    with pytest.raises(ValueError, match="no-such-compiler"):
        make_backend("cpu", CPU, torch.float32)


def test_half_precision_goes_to_torch(backend):
    assert isinstance(make_backend("auto", CPU, torch.float16), TorchBackend)
