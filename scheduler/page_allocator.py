"""The free list of KV pages: plain integers, no idea what they hold.

Invariant: a page is either free here, or owned by exactly one holder outside (a request or the radix tree).
"""


class PageAllocator:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: pages freed last are reused first, while their memory may still be in a cache.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, at least one. The caller has checked `num_free`."""
        assert 0 < count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def free(self, pages: list[int]) -> None:
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was freed twice"
