"""CUDA graphs of decode steps, sampling included: one launch in place of hundreds.

A graph is captured for each of a list of batch sizes; a step runs in the smallest that holds it, filled up with rows
that work on the dummy page and the padding slot. All that changes from step to step lies in one buffer, which one copy
fills. The graph chooses tokens by scale and noise alone; whoever wants more chooses anew from its logits. Does not know
requests.
"""

import bisect
import functools
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ramet.ipc.step import StepPlan
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.batch import Arrays, SlotTable, make_batch, pack, step_arrays, unpack
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.sampler import Choices, Chooser

log = logging.getLogger(__name__)

_SMALL_SIZES, _SIZE_STEP = (1, 2, 4), 8
_GRAPH_BYTES = 8 * 2**20  # of the driver, for each graph; a guess on the safe side
_LOGITS_COPIES = 3  # logits and what choosing makes of them, of the largest size


class Decoded(NamedTuple):
    """What a step leaves: logits [R, vocab] float32, how its rows choose, their slots [R], and what they have chosen by
    scale and noise: tokens [R] and what they won with [R]. Overwritten by the next step."""

    logits: Tensor
    choices: Choices
    slots: Tensor
    chosen: tuple[Tensor, Tensor]

    def first(self, rows: int) -> "Decoded":
        tokens, best = self.chosen
        choices = Choices(*(tensor[:rows] for tensor in self.choices))
        return Decoded(self.logits[:rows], choices, self.slots[:rows], (tokens[:rows], best[:rows]))


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and the largest itself."""
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, largest + 1, _SIZE_STEP), largest}
    return sorted(size for size in sizes if size <= largest)


def graph_bytes(config: RunnerConfig, vocab_size: int) -> int:
    """Memory to leave for the graphs."""
    if not config.cuda_graph_max_bs:
        return 0
    logits = config.cuda_graph_max_bs * vocab_size * torch.float32.itemsize
    return _GRAPH_BYTES * len(batch_sizes(config.cuda_graph_max_bs)) + _LOGITS_COPIES * logits


# From a function that runs a step, which is called a few times, to one that runs it again.
Capture = Callable[[Callable[[], Decoded]], Callable[[], Decoded]]


class DecodeGraphs:
    """The device's part of a step reads and writes fixed addresses only: `capture` may record it."""

    def __init__(
        self,
        config: RunnerConfig,
        model: CausalLM,
        slots: SlotTable,
        pool: KVPool,
        backend: AttentionBackend,
        choose: Chooser,
        capture: Capture,
        progress: Callable[[str], None],
    ) -> None:
        self._model, self._slots, self._pool, self._backend, self._choose = model, slots, pool, backend, choose
        self._context_length = config.context_length
        self._sizes = batch_sizes(config.cuda_graph_max_bs)
        nothing = StepPlan(0, [], [])
        largest = pack(self._arrays(nothing, self._sizes[-1]), pinned=False)
        self._buffer = torch.zeros(len(largest), dtype=torch.uint8, device=slots.device)
        self._replays: dict[int, Callable[[], Decoded]] = {}
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: the others use its memory again
            progress(f"capturing CUDA graphs {done}/{len(self._sizes)}")
            self._fill(nothing, size)
            self._replays[size] = capture(functools.partial(self._run, size))

    def cover(self, plan: StepPlan) -> bool:
        """Whether the plan is a step of decodes that there is a graph for."""
        plain = all(row.length == 1 and row.sample and not row.prompt_logprobs for row in plan.rows)
        return plain and len(plan.rows) <= self._sizes[-1]

    def replay(self, plan: StepPlan) -> Decoded:
        """Run a plan that is covered and not empty; the slots have been updated with it."""
        size = self._sizes[bisect.bisect_left(self._sizes, len(plan.rows))]
        self._fill(plan, size)
        return self._replays[size]().first(len(plan.rows))

    def _fill(self, plan: StepPlan, size: int) -> None:
        packed = pack(self._arrays(plan, size), pinned=self._slots.device.type == "cuda")
        self._buffer[: len(packed)].copy_(packed, non_blocking=True)

    def _arrays(self, plan: StepPlan, size: int) -> Arrays:
        return step_arrays(plan, self._slots, self._pool.page_size, padding=size - len(plan.rows))

    def _run(self, size: int) -> Decoded:
        tensors = unpack(self._buffer, self._arrays(StepPlan(0, [], []), size))
        # The host's idea of the contexts is the longest there may be, since the graph is for any.
        contexts = [self._context_length] * size
        batch = make_batch(tensors, [1] * size, contexts, self._slots, self._pool, self._backend, unknown=True)
        logits = self._model.logits(self._model.forward(batch.token_ids, batch.context))
        chosen = self._choose(logits, batch.choices, False)
        self._slots.keep_tokens(batch.sampled_slots, chosen[0])
        return Decoded(logits, batch.choices, batch.sampled_slots, chosen)


@torch.inference_mode()
def capture_graphs(
    config: RunnerConfig,
    model: CausalLM,
    slots: SlotTable,
    pool: KVPool,
    backend: AttentionBackend,
    choose: Chooser,
    progress: Callable[[str], None],
) -> DecodeGraphs | None:
    """None, with a warning, for a model that cannot be captured."""
    free = torch.cuda.mem_get_info(slots.device)[0]
    started_s = time.perf_counter()
    try:
        graphs = DecodeGraphs(config, model, slots, pool, backend, choose, _cuda_capture(), progress)
    except RuntimeError as error:
        log.warning("decoding without CUDA graphs, which is slower: %s", error)
        return None
    taken = free - torch.cuda.mem_get_info(slots.device)[0]
    log.info(
        "CUDA graphs for up to %d requests: %d MiB, %.1f s; --disable-cuda-graph and --cuda-graph-max-bs change it",
        config.cuda_graph_max_bs,
        taken // 2**20,
        time.perf_counter() - started_s,
    )
    return graphs


def _cuda_capture() -> Capture:
    memory = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Decoded]) -> Callable[[], Decoded]:
        # Libraries and kernels set themselves up in the first runs, which a capture does not allow.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL watches its collectives from a thread of its own, whose calls a stricter mode takes for a part of this.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            decoded = run()

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay

    return capture
