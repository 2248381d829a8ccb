"""Norms, rope with the store, gated activations and experts equal the plain layers."""

import pytest
import torch
from support.triton_device import DEVICE, assert_near, kernel_test, randn

from ramet.kernels.triton.fp8 import to_fp8
from ramet.kernels.triton.gated_mlp import ACTIVATIONS, gated
from ramet.kernels.triton.moe import experts
from ramet.kernels.triton.norm import add_rms_norm
from ramet.kernels.triton.rope_store import rope_and_store
from ramet.model_runner.kv_pool import KVPool, KVSpec
from ramet.model_runner.layers.linear import _to_fp8
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.layers.moe import MoE, MoESpec
from ramet.model_runner.layers.norm import QKNorm, RMSNorm
from ramet.model_runner.layers.rope import RopeFrequencies, rotate
from ramet.model_runner.parallel import TpGroup

pytestmark = [*kernel_test, pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])]
EPS = 1e-5


def norm(width: int, dtype: torch.dtype, seed: int) -> RMSNorm:
    made = RMSNorm(width, EPS, dtype)
    made.weight.copy_(1 + 0.3 * randn(width, seed=seed))
    return made.to(DEVICE)


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 576), (3, 1000)])
@pytest.mark.parametrize("post", [False, True])
def test_add_rms_norm(tokens, width, post, dtype):
    residual, delta = randn(tokens, width, seed=1).to(DEVICE), randn(tokens, width, dtype=dtype, seed=2).to(DEVICE)
    after, before = norm(width, dtype, 3), norm(width, torch.float32, 4)
    expected = residual + (before(delta) if post else delta)
    out = add_rms_norm(residual, delta, after.weight, EPS, dtype, delta_weight=before.weight if post else None)
    assert out.dtype is dtype
    assert_near(residual, expected)
    assert_near(out, after(expected).float())


def test_plain_norm(dtype):
    hidden, layer = randn(4, 72, dtype=dtype).to(DEVICE), norm(72, dtype, 1)
    kept = hidden.clone()
    assert_near(add_rms_norm(hidden, None, layer.weight, EPS, dtype), layer(hidden).float())
    assert torch.equal(hidden, kept)


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 1000)])
def test_to_fp8(tokens, width, dtype):
    """Rows of all sizes, and one of zeros. A GPU's division may be a bit off, so that few numbers round otherwise."""
    rows = (randn(tokens, width) * torch.logspace(-6, 4, tokens)[:, None]).to(dtype)
    rows[-1] *= tokens == 1
    (found, scale), (expected, expected_scale) = to_fp8(rows.to(DEVICE)), _to_fp8(rows)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-6, atol=0)
    found, expected = found.float().cpu(), expected.float()
    torch.testing.assert_close(found, expected, rtol=0.13, atol=2**-8)  # a step
    assert (found != expected).float().mean() < 0.01


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (3, 1100)])
def test_gated(act, tokens, width, dtype):
    gate_up = (3 * randn(tokens, 2 * width, dtype=dtype)).to(DEVICE)
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert_near(gated(gate_up, act), activation(act)(gate) * up)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(4, 2, 64, 16), (7, 1, 128, 32), (9, 3, 80, 16), (16, 8, 96, 1)]
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_store(heads, kv_heads, dim, page_size, with_norm, dtype):
    """Two requests' tokens and one of padding, which goes to the dummy page."""
    tokens, pages = 4, 8
    pool = KVPool([KVSpec(kv_heads, dim, dim)], pages, page_size, dtype, DEVICE)
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).to(DEVICE)
    table = RopeFrequencies(10000.0 ** -(torch.arange(0, dim, 2) / dim), scale=1.25).table(64, DEVICE)
    positions = torch.tensor([40, 41, 7, 0], device=DEVICE)
    slots = (torch.tensor([2, 3, 5, pages]) * page_size + torch.tensor([1, 0, 3, 2]) % page_size).to(DEVICE)
    layer = QKNorm(heads, kv_heads, dim, EPS, 0.0).to(DEVICE)
    layer.weight.copy_(1 + 0.3 * randn(heads + kv_heads, dim))

    split = qkv.float().unflatten(-1, (-1, dim))
    turned = split[:, : heads + kv_heads]
    rows = table[positions]
    turned = rotate(layer(turned) if with_norm else turned, rows[:, :1], rows[:, 1:])
    weight = layer.weight if with_norm else None
    keys, values = pool.keys[0], pool.values[0]
    query = rope_and_store(qkv, keys, values, table, positions, slots, norm_weight=weight, eps=EPS)

    assert_near(query, turned[:, :heads])
    assert_near(keys.flatten(0, 1)[slots], turned[:, heads:])
    assert torch.equal(values.flatten(0, 1)[slots].float(), split[:, heads + kv_heads :])
    for cache in (keys, values):
        assert cache.flatten(0, 1).index_fill(0, slots, 0.0).eq(0).all()


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width", "size"),
    [(1, 8, 2, 64, 32), (5, 3, 3, 40, 24), (70, 4, 2, 64, 72), (300, 2, 1, 64, 32)],
)
def test_experts(tokens, num_experts, top_k, width, size, dtype):
    """From one token to experts of several tiles; some get no token."""
    layer = MoE(width, MoESpec(num_experts, top_k, size, True), "silu", TpGroup(), torch.float32)
    for seed, parameter in enumerate((layer.router, layer.gate_up, layer.down)):
        parameter.copy_((randn(*parameter.shape, seed=seed) * parameter.shape[-1] ** -0.5).to(dtype))
    hidden = randn(tokens, width, dtype=dtype, seed=9)
    weights, chosen = layer.route(hidden.float())
    args = (hidden, layer.gate_up.to(dtype), layer.down.to(dtype), weights, chosen)
    assert_near(experts(*(tensor.to(DEVICE) for tensor in args), "silu"), layer(hidden.float()))
