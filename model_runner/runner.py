"""`ModelRunner`: executes step plans. Owns the model, the KV pool and the state of each slot.

Does not decide anything: what to compute, in which pages and when to stop is in the plan. Does not know sockets.
"""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ramet.ipc.messages import Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, PageGrant, Row, RowResult, StepPlan, StepResult, TokenMasks
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.batch import Batch, SlotTable, build
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.memory import size_pool
from ramet.model_runner.models.loader import load_model
from ramet.model_runner.parallel import TpGroup, use_device
from ramet.model_runner.sampler import make_chooser, rank_tokens, sample

log = logging.getLogger(__name__)

# Prompt log-probabilities need the whole vocabulary's logits of each position; so many positions at a time.
_SCORED_POSITIONS = 64


class ModelRunner:
    """Raises `WeightsError`, `PoolTooLarge` or ValueError, with words for the user, if it cannot be set up."""

    def __init__(self, config: RunnerConfig, progress: Callable[[str], None], group: TpGroup | None = None) -> None:
        self.device = use_device(config)
        dtype = getattr(torch, config.dtype)
        self._backend = make_backend(config.attention_backend, self.device, dtype)
        self._group = group or TpGroup()
        self._model = load_model(
            config, self._group, lambda done, total: progress(f"loading weights {done}/{total}")
        ).eval()
        size = size_pool(config, self._model.kv_specs, dtype, self.device)
        self.num_pages = self._group.minimum(size.num_pages)
        self.vocab_size = self._model.vocab_size
        self._pool = KVPool(self._model.kv_specs, self.num_pages, config.page_size, dtype, self.device)
        self._choose = make_chooser(self.device)
        max_pages = -(-config.context_length // config.page_size)
        self._slots = SlotTable(config.max_running, max_pages, self.vocab_size, self.device)
        progress("warming up")
        started_s = time.perf_counter()
        self._warm_up(min(config.max_step_tokens, config.context_length, self.num_pages * config.page_size))
        self.warm_up_s = time.perf_counter() - started_s

    @torch.inference_mode()
    def execute(self, plan: StepPlan, masks: Callable[[], TokenMasks] | None = None) -> StepResult:
        """Compute one step. Rows fail alone where they can; an exception means that the whole step did not happen,
        although the slots have taken in the plan. `masks` waits for what the grammars of sampled rows allow. Only rank
        0 chooses tokens."""
        self._slots.update(plan)
        batch = build(plan, self._slots, self._pool, self._backend, self.device)
        hidden = self._model.forward(batch.token_ids, batch.context)
        sampled = iter(self._sample(hidden, batch, masks))
        results = [next(sampled) if row.sample else RowResult() for row in plan.rows]
        first = 0
        for i, row in enumerate(plan.rows):
            if row.prompt_logprobs:
                scored = self._score_prompt(hidden[first : first + row.length], row)
                results[i] = RowResult(results[i].token_id, results[i].logprob, scored, results[i].error)
            first += row.length
        return StepResult(plan.step, results)

    def recover(self) -> None:
        """After a step that raised: give back what its allocations left behind. Raises if the device is lost, as after
        an illegal access; then only a new process can go on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _sample(self, hidden: Tensor, batch: Batch, masks: Callable[[], TokenMasks] | None) -> list[RowResult]:
        if not batch.sampled_rows:
            return []
        logits = self._model.logits(hidden[batch.sampled_at])
        if self._group.rank:
            return [RowResult()] * len(batch.sampled_rows)  # rank 0 chooses
        return sample(logits, batch.sampled_rows, self._choose, masks() if masks is not None else None)

    def _score_prompt(self, hidden: Tensor, row: Row) -> list[Logprob]:
        """Log-probabilities of the prompt tokens that a row's positions predict: position p predicts token p + 1."""
        prompt, params = self._slots.prompts[row.slot], self._slots.params[row.slot]
        assert params is not None
        targets = prompt[row.start + 1 : row.start + row.length + 1]
        scored: list[Logprob] = []
        for at in range(0, len(targets), _SCORED_POSITIONS):
            some = targets[at : at + _SCORED_POSITIONS]
            logprobs = self._model.logits(hidden[at : at + len(some)]).log_softmax(dim=-1)
            scored += rank_tokens(logprobs, some, [params.prompt_logprobs or 0] * len(some))
        return scored

    def _warm_up(self, num_tokens: int) -> None:
        """A prompt and a decode step, so that the first request finds kernels chosen and memory mapped. Its pages
        are free again afterwards: nobody has been told of them."""
        params = SamplingParams(max_tokens=2, temperature=0.0, seed=0)
        prompt = [0] * num_tokens
        num_pages = -(-num_tokens // self._pool.page_size)
        self.execute(
            StepPlan(
                step=0,
                rows=[Row(0, 0, num_tokens, sample=True)],
                token_ids=prompt,
                admissions=[Admission(0, prompt, num_tokens, params, [])],
                grants=[PageGrant(0, 0, list(range(num_pages)))],
            )
        )
        self.execute(StepPlan(step=0, rows=[Row(0, num_tokens - 1, 1, sample=True)], token_ids=[0]))
        self._slots.update(StepPlan(step=0, rows=[], token_ids=[], released=[0]))
