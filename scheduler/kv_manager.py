"""`KVManager`: gives requests their pages, shares them through the radix tree, takes them back.

Knows which pages are *being* computed as well (`_pending`), so that a burst of requests with one cold prefix can wait
for the first of them instead of computing it again. Does not know budgets, order or who runs.

Invariant: free pages + pages in the tree + pages owned by requests == all pages.
"""

from ramet.scheduler.page_allocator import PageAllocator
from ramet.scheduler.radix_cache import Node, RadixCache, shared_pages
from ramet.scheduler.request import TOKEN_BYTES, Request


class KVManager:
    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size * TOKEN_BYTES)
        self._enabled = prefix_cache
        # The end of what a running request has stored of its prompt, and the key of the page that it stores next.
        self._pending: dict[tuple[Node | None, bytes], Request] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be had at once: free ones and those that eviction would give."""
        return self.allocator.num_free + self.cache.evictable_pages

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cached_length(self, request: Request) -> int:
        """Tokens of the request that the tree holds now."""
        return self.page_size * self.cache.find(request.key, self._reuse_limit(request))[1]

    def awaits_prefix(self, request: Request) -> bool:
        """Whether the page after the cached ones is being computed right now, for a request that does not come later
        by its priority: a worse one may have to wait for this one."""
        if request.awaits is not None:  # of many that wait each costs a step no more than this
            owner, until = request.awaits
            if owner.node is not None and owner.num_shared < until:
                return True
            request.awaits = None
        if not self._pending:
            return False
        limit = self._reuse_limit(request)
        node, page = self.cache.find(request.key, limit)
        other = self._pending.get((node, self._page(request, page))) if page < limit else None
        if other is None or other.priority > request.priority:
            return False
        common = shared_pages(other.key, request.key, self.cache.page_bytes)
        request.awaits = other, min(limit, common, other.prompt_len // self.page_size)
        return True

    def open(self, request: Request) -> None:
        """Start a request on its cached prefix: lock it, and announce the prompt page that it will store next."""
        assert request.node is None and not request.pages
        node, pages = self.cache.match(request.key, self._reuse_limit(request))
        self.cache.lock(node)
        request.node, request.pages, request.num_shared = node, pages, len(pages)
        request.num_computed = request.num_stored = len(pages) * self.page_size
        request.num_granted = 0
        self._announce(request)

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
        self._forget(request)
        size, own = self.cache.page_bytes, request.pages[first:whole]
        request.node, adopted = self.cache.extend(request.node, request.key[first * size : whole * size], own)
        # Where another request computed the same page before, use that one from now on.
        if replaced := [i for i, (page, kept) in enumerate(zip(own, adopted, strict=True)) if page != kept]:
            self.allocator.free([own[i] for i in replaced])
            request.num_granted = min(request.num_granted, first + replaced[0])
        request.pages[first:whole] = adopted
        request.num_shared = whole
        self._announce(request)

    def close(self, request: Request, publish: bool) -> None:
        """Take everything back. With `publish`, what is stored stays in the tree for others (and for a resume).

        A step in flight may still write to these pages: whoever gets them is computed after it."""
        if request.node is None:
            return
        if publish:
            self.publish(request)
        self._forget(request)
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
        """How many pages may come from the cache: at least one token must be computed, to have logits, and none whose
        log-probability is still owed may be skipped."""
        limit = request.num_tokens - 1 if self._enabled else 0
        return (min(limit, len(request.prompt_logprobs)) if request.wants_prompt_logprobs else limit) // self.page_size

    def _page(self, request: Request, page: int) -> bytes:
        size = self.cache.page_bytes
        return request.key[page * size : (page + 1) * size]

    def _announce(self, request: Request) -> None:
        """Let others know which page of its prompt a running request stores next, if one is left."""
        if self._enabled and request.num_shared < request.prompt_len // self.page_size:
            place = request.node, self._page(request, request.num_shared)
            if self._pending.setdefault(place, request).priority > request.priority:
                self._pending[place] = request

    def _forget(self, request: Request) -> None:
        place = request.node, self._page(request, request.num_shared)
        if self._pending.get(place) is request:
            del self._pending[place]
