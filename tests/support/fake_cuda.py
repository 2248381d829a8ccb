"""A CUDA device that does not exist: its tensors say `cuda`, its memory is the CPU's, and it computes as late as it
may.

Every operation on it goes into the queue of the current stream, and the queue runs when the host waits for an event, a
stream or a value. So a host that reads results too early, changes memory that is still to be copied, or lets a stream
begin before another one has what it needs, gets wrong numbers. A captured graph is the list of the operations that were
recorded; a replay runs these again in the memory that they had, after spoiling all that the graphs hold. What was never
written is NaN, or a number that is no token and no index. Refused are operations on tensors of two devices, waiting
where `waiting` is False, waiting or copying from or to the host in a capture, and a replay that reads memory given back
since.

With `hollow`, memory has sizes and no content, and nothing is computed: for real models' shapes. Knows no Triton
kernels: see `fake_kernels.py`. What it does not show: speed, races within a kernel, and what CUDA's own code does.
"""

import collections
import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from ramet.model_runner import parallel

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_OURS = ("cuda", "meta")  # C++ that makes a tensor beside a `DeviceTensor` asks for the latter
_ROUNDING = 512  # bytes; of torch's allocator
# What must know content on the host, to know the shape of its result or to give a number.
_READS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.bincount.default),
    *(aten.equal.default, aten.is_nonzero.default, aten._unique2.default, aten.repeat_interleave.Tensor),
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_EMPTY = {aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}


class HostWaits(RuntimeError):
    """The host waits for the device where it should not."""


class _Block:
    """One allocation, which lives as long as tensors that look at it; `captured` in the memory of the graphs."""

    def __init__(self, captured: bool) -> None:
        self.captured = captured


class DeviceTensor(Tensor):
    """`inner` is the memory behind it. C++ takes it for a meta tensor; Python sees a CUDA tensor."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, block: _Block) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor, block: _Block) -> None:
        self.inner, self.block = inner, block

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} of a tensor whose device is not there any more")


class FakeStream:
    _device: "FakeCuda"  # here and below, of the subclass that stands in `torch.cuda`

    def __init__(self) -> None:
        self._device.streams.add(self)
        self._queue: collections.deque[Callable[[], object]] = collections.deque()
        self.issued = self._done = 0

    def put(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        self.issued += 1

    def run(self, until: int | None = None) -> None:
        until = self.issued if until is None else until
        while self._done < until:
            self._done += 1
            self._queue.popleft()()

    def wait_stream(self, other: "FakeStream") -> None:
        reached = other.issued
        self.put(lambda: other.run(reached))


class FakeEvent:
    _device: "FakeCuda"

    def __init__(self) -> None:
        self._stream: FakeStream | None = None

    def record(self) -> None:
        self._stream, self._reached = self._device.stream, self._device.stream.issued

    def synchronize(self) -> None:
        if self._stream is not None:
            self._device.wait("an event", self._stream, self._reached)


class FakeGraph:
    _device: "FakeCuda"

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] = []
        self.read: list[weakref.ref[_Block]] = []  # of what was there before
        self.launched: list[str] = []
        self.broken = False

    def replay(self) -> None:
        if any(block() is None for block in self.read):
            raise RuntimeError("a graph reads memory that has been given back")
        self._device.put(self._run)

    def _run(self) -> None:
        for memory in self._device.graph_memory:
            spoil(memory)
        for work in self.recorded:
            work()


class _Capture:
    """`torch.cuda.graph`. As there, a capture that ends badly leaves its stream the current one."""

    _device: "FakeCuda"

    def __init__(self, graph: FakeGraph, pool: object, stream: FakeStream, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and pool is not None
        self._graph, self._stream = graph, stream

    def __enter__(self) -> None:
        self._device.synchronize()
        self._before, self._device.stream = self._device.stream, self._stream
        self._device.capturing = self._graph

    def __exit__(self, *_: object) -> None:
        self._device.capturing = None
        if self._graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._device.last_graph = self._graph
        self._device.stream = self._before


class _Numbered(TorchFunctionMode):
    """`cuda` becomes `cuda:0`: torch would ask the driver, which one that is. Lists of subclasses are not for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and isinstance(args[0], DeviceTensor):
            return args[0].cpu().tolist()
        if func is Tensor.to:
            args = tuple(map(_numbered, args))
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = kwargs | {"device": _numbered(kwargs["device"])}
        return func(*args, **kwargs)


def _numbered(value: Any) -> Any:
    return CUDA if isinstance(value, torch.device | str) and value in ("cuda", torch.device("cuda")) else value


@contextlib.contextmanager
def fake_cuda(**settings: Any) -> Iterator["FakeCuda"]:
    """A machine with such a device."""
    device, lifting = FakeCuda(**settings), torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, _Numbered(), device:
        for name, value in device.patches().items():
            patch.setattr(torch.cuda, name, value)
        # Else `torch.tensor` would make its tensor on the device behind our back.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(lifting)


def run_collectives_on(device: "FakeCuda", patch: pytest.MonkeyPatch) -> None:
    """Those of tensors of the device, on its queue and by what the processes have for their CPUs."""

    def queued(collective: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **settings: Any) -> object:
            if not (tensors := device_tensors(args, settings)):
                return collective(*args, **settings)
            inner_args, inner_settings = inner((args, settings))
            return device.put(lambda: collective(*inner_args, **inner_settings), tensors)

        return call

    places = (torch.distributed, "all_reduce"), (torch.distributed, "broadcast"), (parallel, "_all_gather")
    for module, name in places:
        patch.setattr(module, name, queued(getattr(module, name)))


class FakeCuda(TorchDispatchMode):
    """`patches` are the attributes of `torch.cuda` that stand for it. `taken_outside` are bytes that CUDA keeps for
    itself. `peak_bytes` of torch's allocator, which is taken to waste nothing."""

    def __init__(self, total_bytes: int = 80 * 2**30, *, hollow: bool = False, taken_outside: int = 0) -> None:
        super().__init__()
        self._hollow, self._total_bytes, self.taken_outside = hollow, total_bytes, taken_outside
        self.streams: weakref.WeakSet[FakeStream] = weakref.WeakSet()
        self._classes = {
            name: type(kind.__name__, (kind,), {"_device": self})
            for name, kind in (
                ("Stream", FakeStream),
                ("Event", FakeEvent),
                ("CUDAGraph", FakeGraph),
                ("graph", _Capture),
            )
        }
        self.stream: FakeStream = self._classes["Stream"]()
        self.capturing: FakeGraph | None = None
        self.last_graph: FakeGraph | None = None
        self.graph_memory: list[Tensor] = []
        self.waiting = True  # whether the host may
        self.waits: list[str] = []
        self._pinned: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        # Bytes in use, and the most of them since the cache was emptied: outside of captures and in them.
        self._used, self._held = [0, 0], [0, 0]
        self.peak_bytes = 0

    def patches(self) -> dict[str, Any]:
        @contextlib.contextmanager
        def on_stream(stream: FakeStream) -> Iterator[None]:
            before, self.stream = self.stream, stream
            try:
                yield
            finally:
                self.stream = before

        properties = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
        return {
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "set_device": lambda index: None,
            "current_device": lambda: 0,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: properties,
            "synchronize": lambda device=None: self.synchronize(),
            "empty_cache": self._empty_cache,
            "memory_reserved": lambda device=None: self.reserved_bytes,
            "max_memory_reserved": lambda device=None: self.peak_bytes,
            "reset_peak_memory_stats": lambda device=None: self._reset_peak(),
            "mem_get_info": lambda device=None: (
                self._total_bytes - self.taken_outside - self.reserved_bytes,
                self._total_bytes,
            ),
            "current_stream": lambda device=None: self.stream,
            "stream": on_stream,
            "graph_pool_handle": lambda: object(),
            **self._classes,
        }

    # ---- the host's side -----------------------------------------------------------------------------------------

    def wait(self, what: str, stream: FakeStream | None = None, until: int | None = None) -> None:
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: the host waits for {what} during a capture")
        self.waits.append(what)
        if not self.waiting:
            raise HostWaits(f"the host waits for {what}")
        with _disable_current_modes(), torch.inference_mode():
            (stream or self.stream).run(until)

    def synchronize(self) -> None:
        for stream in list(self.streams):
            self.wait("the device", stream)

    def put(self, work: Callable[[], object], tensors: list[DeviceTensor] | None = None) -> None:
        """What a kernel does with these tensors, to be done when its turn comes."""
        if self.capturing is not None:
            self.capturing.read += [weakref.ref(t.block) for t in tensors or [] if not t.block.captured]
        if not self._hollow:
            (self.stream.put if self.capturing is None else self.capturing.recorded.append)(work)

    def launch(self, name: str) -> None:
        """Note a kernel of the graph that is recorded. Operations of torch are taken for one each."""
        if self.capturing is not None:
            self.capturing.launched.append(name)

    # ---- memory --------------------------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        return sum(self._held)

    @property
    def graph_bytes(self) -> int:
        return self._held[1]

    def allocate(self, memory: Tensor) -> DeviceTensor:
        if not self._hollow:
            spoil(memory)
        pool, size = self.capturing is not None, -(-memory.nbytes // _ROUNDING) * _ROUNDING
        block = _Block(pool)
        self._count(pool, size)
        if self.reserved_bytes > self._total_bytes - self.taken_outside:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} more bytes")
        weakref.finalize(block, self._count, pool, -size)
        if pool:
            self.graph_memory.append(memory)
        return DeviceTensor(memory, block)

    def _count(self, pool: bool, size: int) -> None:
        self._used[pool] += size
        self._held[pool] = max(self._held[pool], self._used[pool])
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def _empty_cache(self) -> None:
        self._held[0] = self._used[0]

    def _reset_peak(self) -> None:
        self.peak_bytes = self.reserved_bytes

    def _like(self, shape: Any, stride: Any, dtype: torch.dtype) -> DeviceTensor:
        where = "meta" if self._hollow else "cpu"
        return self.allocate(torch.empty_strided(shape, stride, dtype=dtype, device=where))

    # ---- operations ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        mine = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if (mine or func.overloadpacket is aten.to) and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:  # in inference mode torch leaves it to us to take it apart
                return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default and (mine or (device is not None and device.type in _OURS)):
            return self._to_copy(args[0], device, kwargs)
        if func is aten.copy_.default and mine:
            return self._copy(args[0], args[1], len(args) > 2 and args[2])
        if func.overloadpacket in (aten._pin_memory, aten.pin_memory):
            return self._pin(args[0].clone())
        if not mine:
            return self._without_my_tensors(func, args, kwargs, device)
        if others := [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim()]:
            raise RuntimeError(f"{func}: some tensors are on cuda:0, others on {others[0].device}")
        if func in _READS or (func in _INDEXING and any(i is not None and i.dtype is torch.bool for i in args[1])):
            self.wait(str(func))
            if self._hollow:
                return 0
            return tree_map(lambda leaf: self._new(leaf), func(*inner(args), **inner(kwargs)))
        schema = func._schema
        if any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments):
            views = func(*inner(args), **inner(kwargs))
            with torch.inference_mode(mine[0].is_inference()):  # a view is what its base is
                return tree_map(lambda leaf: DeviceTensor(leaf, mine[0].block), views)
        if "device" in kwargs:
            kwargs = kwargs | {"device": "cpu"}
        if schema.is_mutable:
            return self._in_place(func, args, kwargs)
        return self._to_new_memory(func, args, kwargs)

    def _without_my_tensors(self, func: Any, args: Any, kwargs: Any, device: torch.device | None) -> Any:
        if device is not None and device.type in _OURS:
            return self._to_new_memory(func, args, kwargs | {"device": "cpu"})
        if kwargs.get("pin_memory"):
            return self._pin(spoil(func(*args, **kwargs | {"pin_memory": False})))
        return func(*args, **kwargs)

    def _pin(self, host: Tensor) -> Tensor:
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def _new(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        made = self.allocate(torch.empty_like(leaf))
        made.inner.copy_(leaf)
        return made

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        inner_args, inner_kwargs = inner(args), inner(kwargs)
        self.launch(str(func))
        self.put(lambda: func(*inner_args, **inner_kwargs), device_tensors(args, kwargs))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return changed[0] if len(changed) == 1 else tuple(changed)

    def _to_new_memory(self, func: Any, args: Any, kwargs: Any) -> Any:
        compute = _STAND_INS.get(func, func)
        shapes = compute(*_meta(args), **_meta(kwargs) | ({"device": "meta"} if "device" in kwargs else {}))
        outputs = tree_map(lambda leaf: self._like(leaf.shape, leaf.stride(), leaf.dtype), shapes)
        if func in _EMPTY or func.overloadpacket in (aten.empty, aten.empty_strided):
            return outputs
        self.launch(str(func))
        inner_args, inner_kwargs, targets = inner(args), inner(kwargs), tree_flatten(inner(outputs))[0]

        def work() -> None:
            for target, result in zip(targets, tree_flatten(compute(*inner_args, **inner_kwargs))[0], strict=True):
                target.copy_(result)

        self.put(work, device_tensors(args, kwargs))
        return outputs

    def _to_copy(self, source: Tensor, device: torch.device | None, kwargs: Any) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        on_device = device is None or device.type in _OURS
        if isinstance(source, DeviceTensor) and on_device:
            if dtype is source.dtype and kwargs.get("memory_format") is None:
                return source  # which C++ took for another device's
            return self._to_new_memory(aten._to_copy.default, (source,), {**kwargs, "device": "cpu"})
        if on_device:
            target: Tensor = self._like(source.shape, torch.empty_like(source, device="meta").stride(), dtype)
        else:
            target = torch.empty(source.shape, dtype=dtype)
            if kwargs.get("non_blocking"):  # then torch pins it
                self._pin(target)
        return self._copy(target, source, kwargs.get("non_blocking", False))

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            return self._in_place(aten.copy_.default, (target, source), {})
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError("CUDA error: a copy from or to the host during a capture")
        to, came = inner(target), inner(source)
        host = source if isinstance(target, DeviceTensor) else target
        pinned = host.untyped_storage().data_ptr() in self._pinned
        if host is target:
            to.zero_() if self._hollow else spoil(to)
        self.put(lambda: to.copy_(came))
        if not (non_blocking and pinned):
            self.wait("a copy")
        return target


def spoil(memory: Tensor) -> Tensor:
    """Fill with what nobody can have meant."""
    if memory.dtype.itemsize == 1 and memory.dtype is not torch.bool:
        memory.view(torch.uint8).fill_(0x7F)  # in float8 a NaN
    elif memory.is_floating_point():
        memory.fill_(float("nan"))
    else:
        memory.fill_(True if memory.dtype is torch.bool else torch.iinfo(memory.dtype).max // 2)
    return memory


def device_tensors(*tree: Any) -> list[DeviceTensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, DeviceTensor)]


def inner(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, DeviceTensor) else leaf, tree)


def _meta(tree: Any) -> Any:
    return tree_map(
        lambda leaf: (
            torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            if isinstance(leaf, Tensor)
            else leaf
        ),
        tree,
    )


def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any = None, scale_result: Any = None,
    out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """`torch._scaled_mm` with a scale for each row and column, which a CPU may lack, and what it asks for on Hopper."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn and out_dtype is torch.bfloat16
    assert a.stride(1) == 1 and b.stride(0) == 1 and a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype is scale_b.dtype is torch.float32
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


def _mm_to_float32(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`torch.mm` with a type for its result, which a CPU lacks."""
    assert a.dtype is b.dtype is torch.bfloat16 and out_dtype is torch.float32
    return a.float() @ b.float()


_STAND_INS = {aten._scaled_mm.default: _scaled_mm, aten.mm.dtype: _mm_to_float32}
