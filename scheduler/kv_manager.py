"""`KVManager`: gives requests their pages, shares them through the radix tree, takes them back.

Knows which prefixes are *being* computed as well (`_pending`), so that a burst of requests with one cold prefix can
wait for the first of them instead of computing it again. Does not know budgets, order or who runs.

Invariant: free pages + pages in the tree + pages owned by requests == all pages.
"""

from ramet.scheduler.page_allocator import PageAllocator
from ramet.scheduler.radix_cache import RadixCache
from ramet.scheduler.request import Request


class KVManager:
    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size)
        self._enabled = prefix_cache
        # Hash of a page with all before it -> the running request that is about to compute it.
        self._pending: dict[int, Request] = {}

    @property
    def num_pages(self) -> int:
        return self.allocator.num_pages

    @property
    def num_available(self) -> int:
        """Pages that can be had at once: free ones and those that eviction would give."""
        return self.allocator.num_free + self.cache.evictable_pages

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cached_length(self, request: Request) -> int:
        """Tokens of the request that the tree holds now."""
        return self.cache.match_length(request.tokens, self._reuse_limit(request)) if self._enabled else 0

    def awaits_prefix(self, request: Request) -> bool:
        """Whether the page after the cached ones is being computed right now, for a request that does not come later
        by its priority: a worse one may have to wait for this one."""
        if not self._pending:
            return False
        page, hashes = self.cached_length(request) // self.page_size, self._hashes(request)
        if (page + 1) * self.page_size > self._reuse_limit(request) or page >= len(hashes):
            return False  # past the prompt nothing is announced
        computing = self._pending.get(hashes[page])
        return computing is not None and computing.priority <= request.priority

    def open(self, request: Request) -> None:
        """Start a request on its cached prefix: lock it, and announce the prompt pages that it will compute."""
        assert request.node is None and not request.pages
        node, pages = self.cache.match(request.tokens, self._reuse_limit(request) if self._enabled else 0)
        self.cache.lock(node)
        request.node, request.pages, request.num_shared = node, pages, len(pages)
        request.num_computed = request.num_stored = len(pages) * self.page_size
        request.num_granted = 0
        if self._enabled:
            for page_hash in self._hashes(request)[len(pages) :]:
                if self._pending.setdefault(page_hash, request).priority > request.priority:
                    self._pending[page_hash] = request

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make the request's pages cover its first `num_tokens`, evicting if need be; False if there are too few."""
        missing = self.pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        if missing > self.allocator.num_free:
            self.allocator.free(self.cache.evict(missing - self.allocator.num_free))
        request.pages += self.allocator.allocate(missing)
        return True

    def publish(self, request: Request) -> None:
        """Hand the whole pages stored so far to the tree, where others can find them."""
        whole = request.num_stored // self.page_size
        first = request.num_shared
        if not self._enabled or whole <= first:
            return
        assert request.node is not None
        size, own = self.page_size, request.pages[first:whole]
        request.node, adopted = self.cache.extend(request.node, request.tokens[first * size : whole * size], own)
        # Where another request computed the same page before, use that one from now on.
        self.allocator.free([page for page, kept in zip(own, adopted, strict=True) if page != kept])
        request.num_granted = min(request.num_granted, _first_difference(own, adopted) + first)
        request.pages[first:whole] = adopted
        request.num_shared = whole
        self._forget_pending(request, first, whole)

    def close(self, request: Request, publish: bool) -> None:
        """Take everything back. With `publish`, what is stored stays in the tree for others (and for a resume).

        A step in flight may still write to these pages: whoever gets them is computed after it."""
        if request.node is None:
            return
        if publish:
            self.publish(request)
        self._forget_pending(request, request.num_shared, len(request.page_hashes))
        self.allocator.free(request.pages[request.num_shared :])
        self.cache.unlock(request.node)
        request.node, request.pages, request.num_shared = None, [], 0
        request.num_computed = request.num_stored = request.num_in_flight = 0

    def flush(self) -> int:
        """Drop every cached page that nobody reads; returns how many."""
        pages = self.cache.evict(self.cache.evictable_pages)
        self.allocator.free(pages)
        return len(pages)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _reuse_limit(self, request: Request) -> int:
        """How many tokens may come from the cache: at least one must be computed, to have logits, and none whose
        log-probability is still owed may be skipped."""
        limit = len(request.tokens) - 1
        return min(limit, len(request.prompt_logprobs)) if request.wants_prompt_logprobs else limit

    def _hashes(self, request: Request) -> list[int]:
        """Chained hashes of the prompt's whole pages. A collision costs a needless wait, never a wrong page."""
        if not request.page_hashes:
            previous, size = 0, self.page_size
            for start in range(0, request.prompt_len - size + 1, size):
                previous = hash((previous, *request.tokens[start : start + size]))
                request.page_hashes.append(previous)
        return request.page_hashes

    def _forget_pending(self, request: Request, first: int, last: int) -> None:
        for page_hash in request.page_hashes[first:last]:
            if self._pending.get(page_hash) is request:
                del self._pending[page_hash]


def _first_difference(own: list[int], adopted: list[int]) -> int:
    """Index of the first page that changed; the length if none did."""
    return next((i for i, (a, b) in enumerate(zip(own, adopted, strict=True)) if a != b), len(own))
