"""`ModelRunner`: executes step plans. Owns the model, the KV pool and the state of each slot.

Does not decide anything: what to compute, in which pages and when to stop is in the plan. Does not know sockets.
Plans are executed in the order in which they are launched; on CUDA, `launch` does not wait for the device, and the next
plan may be launched before the result is read.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, PageGrant, Row, RowResult, StepPlan, StepResult, TokenMasks
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.batch import SlotTable, build
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.cuda_graph import StepGraphs, capture_graphs, graph_bytes
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.logits import send
from ramet.model_runner.memory import PoolTooLarge, size_pool
from ramet.model_runner.models.loader import load_model
from ramet.model_runner.parallel import TpGroup, use_device
from ramet.model_runner.sampler import Ranked, Sampled, is_plain, make_chooser, sample

# Prompt log-probabilities need the whole vocabulary's logits of each position; so many positions at a time.
_SCORED_POSITIONS = 64


class PendingStep:
    """A launched step. `sampled`: None if no row samples, or rank 0 does it alone. `scored`: by row, the
    log-probabilities of prompt tokens."""

    def __init__(self, plan: StepPlan, sampled: Sampled | None, scored: dict[int, list[Ranked]], cuda: bool) -> None:
        self._plan, self._sampled, self._scored = plan, sampled, scored
        self._done = torch.cuda.Event() if cuda else None
        if self._done is not None:
            self._done.record()

    def result(self) -> StepResult:
        """Waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        sampled = iter(self._sampled.results() if self._sampled is not None else itertools.repeat(RowResult()))
        results = [next(sampled) if row.sample else RowResult() for row in self._plan.rows]
        for i, ranked in self._scored.items():
            logprobs = [logprob for some in ranked for logprob in some.logprobs()]
            results[i] = msgspec.structs.replace(results[i], prompt_logprobs=logprobs)
        return StepResult(self._plan.step, results)


class ModelRunner:
    """Raises `WeightsError`, `PoolTooLarge` or ValueError, with words for the user, if it cannot be set up."""

    def __init__(self, config: RunnerConfig, progress: Callable[[str], None], group: TpGroup | None = None) -> None:
        self.device = use_device(config)
        self._config = config
        self._group = group or TpGroup()
        self._dtype = getattr(torch, config.dtype)
        self._backend = make_backend(config.attention_backend, self.device, self._dtype)
        self._graphs: StepGraphs | None = None
        self.warm_up_s = 0.0  # how long a full step takes, on a CPU, where it may be seconds
        try:
            self._set_up(progress)
        except torch.OutOfMemoryError as error:
            raise PoolTooLarge(
                f"the memory of {self.device} does not hold the weights and one full step ({error}): use a smaller "
                "model or --quantization fp8, or lower --chunked-prefill-size and --max-running-requests"
            ) from error

    def _set_up(self, progress: Callable[[str], None]) -> None:
        config = self._config
        self._model = load_model(
            config, self._group, lambda done, total: progress(f"loading weights {done}/{total}")
        ).eval()
        self.vocab_size = self._model.vocab_size
        self._choose = make_chooser(self.device)
        progress("warming up")
        if self.device.type == "cpu":
            self._make_pool(size_pool(config, self._model.kv_specs, self._dtype, self.device))
            started_s = time.perf_counter()
            self._run_prompts([min(config.max_step_tokens, config.context_length, self.num_pages * config.page_size)])
            self.warm_up_s = time.perf_counter() - started_s
            return
        reserve = self._measure_steps() + graph_bytes(config, self.vocab_size)
        self._make_pool(size_pool(config, self._model.kv_specs, self._dtype, self.device, reserve))
        if config.cuda_graph_max_bs and self._backend.capturable and self._model.capturable:
            parts = (self._model, self._slots, self._pool, self._backend, self._choose)
            make = functools.partial(StepGraphs, config, *parts, progress=progress)
            self._graphs = capture_graphs(make, config.cuda_graph_max_bs)
            if self._graphs is None and self._group.size > 1:  # the others may have theirs
                raise ValueError("several ranks must all have CUDA graphs or none: use --disable-cuda-graph")

    def _measure_steps(self) -> int:
        """Bytes that a step takes beside weights and KV cache, at most: one prompt, and as many prompts and then
        decodes as run together, sampled in the way that takes most. Their KV cache is just large enough. Also the
        first request finds kernels compiled, and what CUDA and its libraries keep for themselves is taken."""
        config = self._config
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        self._make_pool(-(-config.max_step_tokens // config.page_size) + config.max_running)
        self._run_prompts([min(config.max_step_tokens, config.context_length)])
        share = min(max(1, config.max_step_tokens // config.max_running), config.context_length)
        self._run_prompts([share] * config.max_running, temperature=1.0, top_p=0.9, logprobs=1)
        before += self._pool.num_bytes
        del self._pool, self._slots
        return torch.cuda.max_memory_reserved(self.device) - before

    def _make_pool(self, num_pages: int) -> None:
        config = self._config
        self.num_pages = num_pages = self._group.minimum(num_pages)
        self._pool = KVPool(self._model.kv_specs, num_pages, config.page_size, self._dtype, self.device)
        max_pages = -(-config.context_length // config.page_size)
        self._slots = SlotTable(config.max_running, max_pages, num_pages, self.vocab_size, self.device)

    def execute(self, plan: StepPlan, masks: Callable[[], TokenMasks] | None = None) -> StepResult:
        """`launch` a step and wait for its result."""
        return self.launch(plan, masks).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: Callable[[], TokenMasks] | None = None) -> PendingStep:
        """Start one step. Rows fail alone where they can; an exception here or from the result means that the whole
        step did not happen, although the slots have taken in the plan. `masks` waits for what the grammars of sampled
        rows allow; only rank 0 has them."""
        cuda = self.device.type == "cuda"
        self._slots.update(plan)
        rows = [self._slots.rows[row.slot] for row in plan.rows if row.sample]
        plain = all(is_plain(row) for row in rows)
        if self._graphs is not None and (bucket := self._graphs.find(plan)) is not None:
            logits, choices, sampled_slots, chosen = self._graphs.replay(plan, bucket)
            if plain:
                return PendingStep(plan, Sampled(*chosen), {}, cuda)
            scored = {}
        else:
            batch = build(plan, self._slots, self._pool, self._backend)
            hidden = self._model.forward(batch.token_ids, batch.context)
            scored = self._score_prompts(hidden, plan)
            if not rows:
                return PendingStep(plan, None, scored, cuda)
            logits = self._model.logits(hidden[batch.sampled_at])
            choices, sampled_slots = batch.choices, batch.sampled_slots
        if plain or not self._group.rank:
            sampled = sample(logits, rows, choices, self._choose, masks() if masks is not None else None)
            tokens = sampled.tokens
        else:
            sampled, tokens = None, torch.empty_like(sampled_slots)
        if not plain:  # else each rank finds the same: scale and noise of the logits that all have gathered
            self._group.broadcast(tokens)
        self._slots.keep_tokens(sampled_slots, tokens)
        return PendingStep(plan, sampled, scored, cuda)

    def _score_prompts(self, hidden: Tensor, plan: StepPlan) -> dict[int, list[Ranked]]:
        """Log-probabilities of the prompt tokens that rows' positions predict: position p predicts token p + 1."""
        scored: dict[int, list[Ranked]] = {}
        first = 0
        for i, row in enumerate(plan.rows):
            if row.prompt_logprobs:
                scored[i] = self._score(hidden[first : first + row.length], row)
            first += row.length
        return scored

    def recover(self) -> None:
        """After a step that raised: give back what its allocations left behind. Raises if the device is lost, as after
        an illegal access; then only a new process can go on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _score(self, hidden: Tensor, row: Row) -> list[Ranked]:
        count = self._slots.rows[row.slot].params.prompt_logprobs or 0
        targets = self._slots.prompts[row.slot][row.start + 1 : row.start + row.length + 1]
        scored: list[Ranked] = []
        for at in range(0, len(targets), _SCORED_POSITIONS):
            some = send(torch.tensor(targets[at : at + _SCORED_POSITIONS]), self.device)
            logprobs = self._model.logits(hidden[at : at + len(some)]).log_softmax(dim=-1)
            scored.append(Ranked(logprobs, some, [count] * len(some)))
        return scored

    def _run_prompts(self, lengths: list[int], **params: Any) -> None:
        """Prompts of these lengths in one step, and a decode of each, so that the first request finds kernels chosen
        and memory mapped; on CUDA also chunks of all powers of two, for which libraries have other kernels and experts
        are compiled anew. Their pages are free again afterwards: nobody has been told of them."""
        sampling = SamplingParams(**{"max_tokens": 2, "temperature": 0.0, "seed": 0, **params})
        size, pages, slots = self._config.page_size, iter(range(self.num_pages)), range(len(lengths))
        plan = StepPlan(
            step=0,
            rows=[Row(slot, 0, length, sample=True) for slot, length in enumerate(lengths)],
            token_ids=[0] * sum(lengths),
            admissions=[Admission(slot, [0] * n, n, sampling, []) for slot, n in enumerate(lengths)],
            grants=[PageGrant(slot, 0, [next(pages) for _ in range(0, n, size)]) for slot, n in enumerate(lengths)],
        )
        self.execute(plan)
        for last in [1 << i for i in range(max(lengths).bit_length() if self.device.type == "cuda" else 1)]:
            chunks = [min(last, length) for length in lengths]
            rows = [Row(slot, lengths[slot] - chunk, chunk, sample=True) for slot, chunk in enumerate(chunks)]
            self.execute(StepPlan(step=0, rows=rows, token_ids=[0] * sum(chunks)))
        self._slots.update(StepPlan(step=0, rows=[], token_ids=[], released=list(slots)))
