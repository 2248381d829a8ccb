"""From a `StepPlan` to the tensors of one forward pass.

`SlotTable` keeps what the plans have told so far (page tables, sampling state, the last token chosen in each slot);
`step_arrays` says in numpy what the device must know of one step, `to_device` takes it there in one copy, and
`make_batch` finishes it there: all of that happens at fixed addresses, so that it can be captured in a CUDA graph.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramet.ipc.step import UNKNOWN_TOKEN, Admission, PageGrant, StepPlan
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import ForwardContext
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.logits import LogitsProcessor
from ramet.model_runner.sampler import CHOOSING, Choices, SampledRow, choice_arrays, choosing

Arrays = Mapping[str, np.ndarray]

_ALIGNMENT = 16  # bytes; of each array in a packed step


@dataclasses.dataclass(frozen=True)
class Batch:
    """token_ids: [N] int64. sampled_at: [S] int64, the tokens whose hidden state gives a next token, in row order.
    sampled_slots: [S] int64."""

    token_ids: Tensor
    context: ForwardContext
    sampled_at: Tensor
    sampled_slots: Tensor
    choices: Choices


class SlotTable:
    """State per slot. A slot's page table is a row of `pages` [slots + 1, max_pages]; unused entries are stale. The
    last slot is that of padding rows: all of its pages are the pool's dummy, `dummy_page`. `rows`: how those who
    have a slot are sampled."""

    def __init__(self, num_slots: int, max_pages: int, dummy_page: int, vocab_size: int, device: torch.device) -> None:
        self.padding = num_slots
        self.pages = np.zeros((num_slots + 1, max_pages), dtype=np.int32)
        self.pages[num_slots] = dummy_page
        # On a CPU the same memory.
        self.device_pages = torch.from_numpy(self.pages).to(device)
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.choosing = np.zeros(num_slots + 1, dtype=CHOOSING)
        self.rows: dict[int, SampledRow] = {}
        self.prompts: dict[int, list[int]] = {}  # of those whose log-probabilities are wanted
        self.device = device
        self._vocab_size = vocab_size

    def update(self, plan: StepPlan) -> None:
        """Take in what changed: released slots first, for one may be given again in the same plan."""
        for slot in plan.released:
            self.rows.pop(slot, None)
            self.prompts.pop(slot, None)
        for admission in plan.admissions:
            self._admit(admission)
        for grant in plan.grants:
            self.pages[grant.slot, grant.first : grant.first + len(grant.pages)] = grant.pages
        if plan.grants and self.device.type != "cpu":
            self._grant_on_device(plan.grants)

    def keep_tokens(self, slots: Tensor, tokens: Tensor) -> None:
        """The tokens [S] just chosen in `slots` [S], for a next step that is planned before the host knows them. A row
        that failed may have chosen what is no token: an index beyond the embedding would end the process."""
        self.last_tokens.index_copy_(0, slots, tokens.clamp(0, self._vocab_size - 1))

    def _admit(self, admission: Admission) -> None:
        slot, params = admission.slot, admission.params
        assert slot not in self.rows, f"slot {slot} is taken"
        processor = LogitsProcessor(admission, self._vocab_size, self.device) if params.processed else None
        self.rows[slot] = SampledRow(params, processor)
        self.choosing[slot] = choosing(params)
        if params.prompt_logprobs is not None:
            self.prompts[slot] = admission.token_ids[: admission.prompt_len]

    def _grant_on_device(self, grants: list[PageGrant]) -> None:
        width = self.pages.shape[1]
        places = [g.slot * width + i for g in grants for i in range(g.first, g.first + len(g.pages))]
        pages = np.array([page for grant in grants for page in grant.pages], dtype=np.int32)
        tensors = to_device({"places": np.array(places), "pages": pages}, self.device)
        self.device_pages.view(-1).index_copy_(0, tensors["places"], tensors["pages"])


def step_arrays(plan: StepPlan, slots: SlotTable, page_size: int, padding: Sequence[int] = ()) -> Arrays:
    """By name, what `make_batch` takes. `slots` has been updated with the plan. `padding` rows of these lengths, which
    may be 0, are added; they sample."""
    table = [(row.slot, row.start, row.length) for row in plan.rows]
    table += [(slots.padding, 0, length) for length in padding]
    row_slots, starts, lengths = np.array(table).T
    ends = lengths.cumsum()
    # Token i of the step stands at starts[row] + its index within the row.
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    page, offset = np.divmod(positions, page_size)
    contexts = starts + lengths
    sampled = [i for i, row in enumerate(plan.rows) if row.sample] + list(range(len(plan.rows), len(table)))
    return {
        "token_ids": np.array(plan.token_ids + [0] * sum(padding)),
        "positions": positions,
        "slot_mapping": slots.pages[np.repeat(row_slots, lengths), page].astype(np.int64) * page_size + offset,
        "cu_q": np.concatenate(([0], ends)).astype(np.int32),
        "seq_lens": contexts.astype(np.int32),
        "row_slots": np.ascontiguousarray(row_slots),
        "sampled_at": ends[sampled] - 1,
        "sampled_slots": row_slots[sampled],
        **choice_arrays(slots.choosing[row_slots[sampled]], contexts[sampled]),
    }


def build(plan: StepPlan, slots: SlotTable, pool: KVPool, backend: AttentionBackend) -> Batch:
    """The tensors of one step; `slots` has been updated with the plan."""
    arrays = step_arrays(plan, slots, pool.page_size)
    backend.plan(arrays, slots.pages, pool.page_size, captured=False)
    lengths = [row.length for row in plan.rows]
    contexts: list[int] = arrays["seq_lens"].tolist()
    tensors = to_device(arrays, slots.device)
    unknown, scored = UNKNOWN_TOKEN in plan.token_ids, any(row.prompt_logprobs for row in plan.rows)
    return make_batch(tensors, lengths, contexts, slots, pool, backend, unknown=unknown, scored=scored)


def make_batch(
    tensors: Mapping[str, Tensor],
    lengths: list[int],
    contexts: list[int],
    slots: SlotTable,
    pool: KVPool,
    backend: AttentionBackend,
    *,
    unknown: bool,
    scored: bool = False,
) -> Batch:
    """`lengths` and `contexts` of the rows, as the host may know them. `unknown`: input tokens may be missing.
    `scored`: more is read of the result than what is sampled from."""
    token_ids, num_decodes = tensors["token_ids"], sum(length == 1 for length in lengths)
    if unknown:
        # Decodes come first and are one token each: of those, whose tokens alone may be missing, token i is row i's.
        first, last = token_ids[: len(lengths)], slots.last_tokens.index_select(0, tensors["row_slots"])
        torch.where(first == UNKNOWN_TOKEN, last, first, out=first)
    max_pages = -(-max(contexts) // pool.page_size)
    context = ForwardContext(
        positions=tensors["positions"],
        slot_mapping=tensors["slot_mapping"],
        cu_q=tensors["cu_q"],
        seq_lens=tensors["seq_lens"],
        block_table=slots.device_pages[:, :max_pages].index_select(0, tensors["row_slots"]),
        query_lens=lengths,
        context_lens=contexts,
        num_decodes=num_decodes,
        kv_pool=pool,
        backend=backend,
        wanted=None if scored else tensors["sampled_at"],
    )
    choices = Choices(**{name: tensors[name] for name in Choices._fields})
    return Batch(token_ids, context, tensors["sampled_at"], tensors["sampled_slots"], choices)


def to_device(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on the device, after one copy; on a CPU they are the arrays' own memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return unpack(pack(arrays, pinned=True).to(device, non_blocking=True), arrays)


def pack(arrays: Arrays, *, pinned: bool) -> Tensor:
    """All arrays in one piece of host memory [bytes]. Pinned memory is torch's to reuse once it has been copied."""
    end = sum(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values())
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    memory = packed.numpy()
    for _, start, array in _places(arrays):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    """Views of what `pack` made of arrays of these shapes; `packed` may be longer."""
    return {
        name: packed[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for name, start, array in _places(arrays)
    }


def _places(arrays: Arrays) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, first byte and content of each array."""
    start = 0
    for name, array in arrays.items():
        yield name, start, array
        start += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
