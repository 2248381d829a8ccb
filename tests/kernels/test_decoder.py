"""Operations of the decoder kernel alone, against float64."""

import pytest
import torch

from ramet.kernels.cpu import decoder as kernel
from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel, Grid, Op, Packed, interleave, op, pack


@pytest.fixture(scope="module")
def run():
    try:
        decoder = DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    return lambda made, n: decoder.run((Op * 1)(made), n)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 5, 11, 12, 13, 25, 96, 97, 230])
@pytest.mark.parametrize(("width", "inner"), [(32, 64), (40, 34), (7, 2), (960, 576)])
def test_product(run, n, width, inner):
    x, weight = random(n, inner), random(width, inner)
    bias = torch.zeros(-(-width // 32) * 32)
    bias[:width] = random(width, dtype=torch.float32)
    expected = x.double() @ weight.double().T + bias[:width]
    packed = pack(weight)
    for effect, start in ((kernel.STORE, 7.0), (kernel.ADD, 3.0)):
        out = torch.full((n, width), start)
        run(op(kernel.MATMUL, x, out, weight=packed, bias=bias, width=width, inner=inner, effect=effect, bits=16), n)
        wanted = expected + (start if effect == kernel.ADD else 0)
        torch.testing.assert_close(out.double(), wanted, atol=1e-5 * inner, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 14, 100])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # large arguments, too
def test_gated_product(run, n, scale):
    x, gate, up = random(n, 48), random(80, 48) * scale, random(80, 48)
    packed, bias = pack(interleave(gate, up)), interleave(*random(2, 80, dtype=torch.float32))
    g, u = (
        (x.double() @ w.double().T) + b
        for w, b in ((gate, bias.view(-1, 2, 16)[:, 0].flatten()), (up, bias.view(-1, 2, 16)[:, 1].flatten()))
    )
    expected = {
        kernel.GATED_SILU: torch.nn.functional.silu(g) * u,
        kernel.GATED_GELU_TANH: torch.nn.functional.gelu(g, approximate="tanh") * u,
    }
    for effect, wanted in expected.items():
        out = torch.empty(n, 80, dtype=torch.bfloat16)
        run(op(kernel.MATMUL, x, out, weight=packed, bias=bias, width=80, inner=48, effect=effect, bits=16), n)
        torch.testing.assert_close(out.double(), wanted, atol=1e-3, rtol=2**-8)


@pytest.mark.parametrize("width", [16, 50, 576])
def test_norm(run, width):
    x, weight = random(9, width, dtype=torch.float32) * 5, random(width, dtype=torch.float32)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    out = torch.empty(9, width, dtype=torch.bfloat16)
    run(op(kernel.NORM, x, out, weight=weight, width=width, effect=kernel.STORE, eps=1e-5), 9)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=2**-8)
    total = torch.full((9, width), 2.0)
    run(op(kernel.NORM, x, total, weight=weight, width=width, effect=kernel.ADD, eps=1e-5), 9)
    torch.testing.assert_close(total.double(), expected + 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 13, 100])
@pytest.mark.parametrize(("width", "inner"), [(32, 32), (40, 96), (960, 576)])
@pytest.mark.parametrize("bits", [8, 4])
def test_product_of_rounded_numbers(run, n, width, inner, bits):
    x, weight = random(n, inner), random(width, inner)
    x[0] = 0  # a row without any magnitude
    group = 64 if bits == 8 and inner % 64 == 0 else 32
    rounded, row_scales = torch.empty(n, inner, dtype=torch.int8), torch.empty(n, inner // group)
    sums = torch.empty(n, inner // group, dtype=torch.int32)
    inputs = {"row_scales": row_scales, "group_sums": sums}
    run(op(kernel.QUANTIZE, x, rounded, width=inner, bits=bits, **inputs), n)
    exact = rounded.unflatten(1, (-1, group)).sum(2, dtype=torch.int32)
    if bits == 8:
        assert torch.equal(sums, -128 * exact)
    else:
        assert torch.equal(sums.view(torch.float32), row_scales * exact)
    values = (rounded.double().unflatten(1, (-1, group)) * row_scales[..., None].double()).flatten(1)
    assert (values - x.double()).abs().max() <= 0.51 * row_scales.max()

    if bits == 8:
        scales = weight.float().abs().amax(1, keepdim=True) / 127
        grid = (weight.float() / scales).round().double() * scales
    else:
        groups = weight.float().unflatten(1, (-1, 32))
        least, most = groups.aminmax(dim=2, keepdim=True)
        scales, least = ((most - least) / 15).half().double(), least.half().double()
        grid = (((groups - least) / scales).round().clamp(0, 15) * scales + least).flatten(1)
    assert (grid - weight.double()).abs().max() <= 0.52 * scales.max()
    packed = Packed.of(weight, bits) if bits == 8 else Packed.of_grid(Grid.of(weight))
    out = torch.empty(n, width)
    fields = {"weight": packed.weight, "scales": packed.scales, "bits": bits, **inputs}
    run(op(kernel.MATMUL, rounded, out, width=width, inner=inner, effect=kernel.STORE, **fields), n)
    torch.testing.assert_close(out.double(), values @ grid.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [32, 40, 7])
def test_product_keeps_the_values_of_a_grid(run, width):
    """Scales of both signs, and numbers that do not reach from 0 to 15: rounding would choose others."""
    n, inner = 5, 96
    x, numbers = random(n, inner), torch.arange(width * inner, dtype=torch.uint8).view(width, inner) % 13 + 1
    scales, minima = random(width, 3, dtype=torch.float16), random(3, width, dtype=torch.float16).T
    values = numbers.double().unflatten(1, (-1, 32)) * scales.double()[..., None] + minima.double()[..., None]
    rounded, row_scales = torch.empty(n, inner, dtype=torch.int8), torch.empty(n, 3)
    inputs = {"row_scales": row_scales, "group_sums": torch.empty(n, 3, dtype=torch.int32)}
    run(op(kernel.QUANTIZE, x, rounded, width=inner, bits=4, **inputs), n)
    packed, out = Packed.of_grid(Grid(numbers, scales, minima)), torch.empty(n, width)
    fields = {"weight": packed.weight, "scales": packed.scales, "bits": 4, **inputs}
    run(op(kernel.MATMUL, rounded, out, width=width, inner=inner, effect=kernel.STORE, **fields), n)
    expected = (rounded.double().unflatten(1, (-1, 32)) * row_scales.double()[..., None]).flatten(1) @ values.flatten(
        1
    ).T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_rounding_keeps_a_nan_in_its_group(run):
    x = random(3, 64)
    x[1, 7] = float("nan")
    rounded, row_scales = torch.empty(3, 64, dtype=torch.int8), torch.empty(3, 2)
    sums = torch.empty(3, 2, dtype=torch.int32)
    run(op(kernel.QUANTIZE, x, rounded, width=64, row_scales=row_scales, group_sums=sums), 3)
    assert row_scales.isnan().tolist() == [[False, False], [True, False], [False, False]]
