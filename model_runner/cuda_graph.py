"""CUDA graphs of small steps, sampling included: one launch in place of hundreds.

A graph is captured for each of a list of sizes, for decodes and for steps with short prompt chunks; a step runs in the
smallest that holds it, filled up with rows that work on the dummy page and the padding slot. All that changes from step
to step lies in one buffer, which one copy fills. The graph chooses tokens by scale and noise alone; whoever wants more
chooses anew from its logits. Does not know requests.
"""

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

logger = logging.getLogger(__name__)

_SMALL_SIZES, _SIZE_STEP = (1, 2, 4), 8
# Of steps with prompt chunks: few rows, since attention is launched for as many chunks of all the tokens.
_CHUNK_ROWS, _CHUNK_TOKENS = 8, (16, 32, 64, 128, 256)
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


class Bucket(NamedTuple):
    """The size of a graph: of decodes if it has as many rows as tokens, else of any lengths, with a row for padding."""

    tokens: int
    rows: int

    @property
    def longest(self) -> int:
        """The most tokens that a row may have."""
        return 1 if self.rows == self.tokens else self.tokens

    def holds(self, rows: int, tokens: int) -> bool:
        if self.longest == 1:
            return rows == tokens <= self.tokens
        return rows < self.rows and rows < tokens <= self.tokens

    def padding(self, plan: StepPlan) -> list[int]:
        """Lengths of the rows that fill it up."""
        rows = self.rows - len(plan.rows)
        return [1] * rows if self.longest == 1 else [self.tokens - len(plan.token_ids)] + [0] * (rows - 1)


def buckets(config: RunnerConfig) -> list[Bucket]:
    """In ascending order. Decodes of 1, 2, 4, then multiples of 8, and the largest itself."""
    largest = config.cuda_graph_max_bs
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, largest + 1, _SIZE_STEP), largest}
    most = min(config.max_step_tokens, config.context_length)
    chunks = [Bucket(tokens, _CHUNK_ROWS) for tokens in _CHUNK_TOKENS if tokens <= most]
    return sorted([Bucket(size, size) for size in sizes if size <= largest] + chunks)


def graph_bytes(config: RunnerConfig, vocab_size: int) -> int:
    """Memory to leave for the graphs."""
    if not config.cuda_graph_max_bs:
        return 0
    sizes = buckets(config)
    logits = max(size.rows for size in sizes) * vocab_size * torch.float32.itemsize
    return _GRAPH_BYTES * len(sizes) + _LOGITS_COPIES * logits


# From a function that runs a step, which is called a few times, to one that runs it again.
Capture = Callable[[Callable[[], Decoded]], Callable[[], Decoded]]


class StepGraphs:
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
        self._buckets = buckets(config)
        nothing = StepPlan(0, [], [])
        num_bytes = max(len(pack(self._arrays(nothing, bucket), pinned=False)) for bucket in self._buckets)
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=slots.device)
        # One for all graphs, whose own memory is free for the next once it is captured.
        rows = max(bucket.rows for bucket in self._buckets)
        self._logits = torch.empty(rows, model.vocab_size, device=slots.device)
        self._replays: dict[Bucket, Callable[[], Decoded]] = {}
        for done, bucket in enumerate(reversed(self._buckets)):  # the largest first: the others use its memory again
            progress(f"capturing CUDA graphs {done}/{len(self._buckets)}")
            self._fill(nothing, bucket)
            self._replays[bucket] = capture(functools.partial(self._run, bucket))

    def find(self, plan: StepPlan) -> Bucket | None:
        """The smallest graph that holds the plan; None if there is none, or if more or less is read of a row than its
        next token."""
        if any(not row.sample or row.prompt_logprobs for row in plan.rows):
            return None
        rows, tokens = len(plan.rows), len(plan.token_ids)
        return next((bucket for bucket in self._buckets if bucket.holds(rows, tokens)), None)

    def replay(self, plan: StepPlan, bucket: Bucket) -> Decoded:
        """Run a plan that `bucket` holds; the slots have been updated with it."""
        self._fill(plan, bucket)
        return self._replays[bucket]().first(len(plan.rows))

    def _fill(self, plan: StepPlan, bucket: Bucket) -> None:
        arrays = self._arrays(plan, bucket)
        self._backend.plan(arrays, self._slots.pages, self._pool.page_size, captured=True)
        packed = pack(arrays, pinned=self._slots.device.type == "cuda")
        self._buffer[: len(packed)].copy_(packed, non_blocking=True)

    def _arrays(self, plan: StepPlan, bucket: Bucket) -> Arrays:
        return step_arrays(plan, self._slots, self._pool.page_size, bucket.padding(plan))

    def _run(self, bucket: Bucket) -> Decoded:
        tensors = unpack(self._buffer, self._arrays(StepPlan(0, [], []), bucket))
        # The host's idea of lengths and contexts is the longest there may be, since the graph is for any.
        lengths, contexts = [bucket.longest] * bucket.rows, [self._context_length] * bucket.rows
        batch = make_batch(tensors, lengths, contexts, self._slots, self._pool, self._backend, unknown=True)
        hidden = self._model.forward(batch.token_ids, batch.context)[batch.sampled_at]
        logits = self._logits[: bucket.rows].copy_(self._model.logits(hidden))
        chosen = self._choose(logits, batch.choices, False)
        self._slots.keep_tokens(batch.sampled_slots, chosen[0])
        return Decoded(logits, batch.choices, batch.sampled_slots, chosen)


@torch.inference_mode()
def capture_graphs(make: Callable[[Capture], StepGraphs], most_requests: int) -> StepGraphs | None:
    """What `make` makes; None, with a warning, for a model that cannot be captured."""
    free = torch.cuda.mem_get_info()[0]
    started_s = time.perf_counter()
    try:
        graphs = make(_cuda_capture())
    except RuntimeError as error:
        logger.warning("decoding without CUDA graphs, which is slower: %s", error)
        return None
    taken = free - torch.cuda.mem_get_info()[0]
    logger.info(
        "CUDA graphs for up to %d requests: %d MiB, %.1f s; --disable-cuda-graph and --cuda-graph-max-bs change it",
        most_requests,
        taken // 2**20,
        time.perf_counter() - started_s,
    )
    return graphs


def _cuda_capture() -> Capture:
    # One stream for all: libraries keep workspace for each that they have seen.
    memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(run: Callable[[], Decoded]) -> Callable[[], Decoded]:
        # Libraries and kernels set themselves up in the first runs, which a capture does not allow.
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # also around the capture: one that fails does not leave its stream
            run()
            run()
            # NCCL watches its collectives from a thread of its own, whose calls a stricter mode takes for part of this.
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                decoded = run()
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay

    return capture
