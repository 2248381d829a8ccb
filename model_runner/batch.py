"""From a `StepPlan` to the tensors of one forward pass.

`SlotTable` keeps what the plans have told so far (page tables, sampling state); `build` turns one plan's rows into a
`Batch`. Host arrays are numpy and go to the device in one copy each.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, PageGrant, StepPlan
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import ForwardContext
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.logits import LogitsProcessor, needs_processing
from ramet.model_runner.sampler import SampledRow


@dataclasses.dataclass(frozen=True)
class Batch:
    """token_ids: [N] int64. sampled_at: [S] int64, the tokens whose hidden state gives a next token, in row order."""

    token_ids: Tensor
    context: ForwardContext
    sampled_at: Tensor
    sampled_rows: list[SampledRow]


class SlotTable:
    """State per slot. A slot's page table is a row of `pages` [slots, max_pages]; unused entries are stale."""

    def __init__(self, num_slots: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        self.pages = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.params: list[SamplingParams | None] = [None] * num_slots
        self.prompts: list[list[int]] = [[] for _ in range(num_slots)]
        self.processors: list[LogitsProcessor | None] = [None] * num_slots
        self._vocab_size = vocab_size
        self._device = device

    def update(self, plan: StepPlan) -> None:
        """Take in what changed: released slots first, for one may be given again in the same plan."""
        for slot in plan.released:
            self.params[slot] = self.processors[slot] = None
            self.prompts[slot] = []
        for admission in plan.admissions:
            self._admit(admission)
        for grant in plan.grants:
            self._grant(grant)

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        assert self.params[slot] is None, f"slot {slot} is taken"
        self.params[slot] = admission.params
        if admission.params.prompt_logprobs is not None:
            self.prompts[slot] = admission.token_ids[: admission.prompt_len]
        if needs_processing(admission):
            self.processors[slot] = LogitsProcessor(admission, self._vocab_size, self._device)

    def _grant(self, grant: PageGrant) -> None:
        self.pages[grant.slot, grant.first : grant.first + len(grant.pages)] = grant.pages


def build(plan: StepPlan, slots: SlotTable, pool: KVPool, backend: AttentionBackend, device: torch.device) -> Batch:
    """The tensors of one step; `slots` has been updated with the plan."""
    lengths = np.array([row.length for row in plan.rows])
    starts = np.array([row.start for row in plan.rows])
    rows = np.array([row.slot for row in plan.rows])
    ends = lengths.cumsum()
    # Token i of the step stands at starts[row] + its index within the row.
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    token_rows = np.repeat(rows, lengths)
    page, offset = np.divmod(positions, pool.page_size)
    slot_mapping = slots.pages[token_rows, page].astype(np.int64) * pool.page_size + offset
    contexts = starts + lengths
    max_pages = -(-int(contexts.max()) // pool.page_size)

    def to_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype).to(device, non_blocking=True)

    context = ForwardContext(
        positions=to_device(positions, torch.int64),
        slot_mapping=to_device(slot_mapping, torch.int64),
        cu_q=to_device(np.concatenate(([0], ends)), torch.int32),
        seq_lens=to_device(contexts, torch.int32),
        block_table=to_device(slots.pages[rows, :max_pages], torch.int32),
        query_lens=lengths.tolist(),
        context_lens=contexts.tolist(),
        num_decodes=int((lengths == 1).sum()),
        kv_pool=pool,
        backend=backend,
    )
    sampled = [i for i, row in enumerate(plan.rows) if row.sample]
    return Batch(
        token_ids=torch.tensor(plan.token_ids, dtype=torch.int64).to(device, non_blocking=True),
        context=context,
        sampled_at=to_device(ends[sampled] - 1, torch.int64),
        sampled_rows=[_sampled_row(slots, plan.rows[i].slot, int(contexts[i])) for i in sampled],
    )


def _sampled_row(slots: SlotTable, slot: int, position: int) -> SampledRow:
    params = slots.params[slot]
    assert params is not None, f"slot {slot} holds no request"
    return SampledRow(params, position, slots.processors[slot])
