"""The radix tree over KV pages: which token prefixes are in the cache, and in which pages.

Each edge holds a run of whole pages and their key: their tokens as bytes, the same number for each page, because bytes
are compared at the speed of memory and are nothing to the garbage collector. Does not know requests: who reads a path
locks its end node, and locks count along the way to the root, so that an unlocked node has only unlocked descendants
and can be evicted leaf by leaf, least recently used first.

Invariants: a node's key has `len(pages) * page_bytes` bytes; siblings differ in their first page; `evictable_pages`
is the number of pages in unlocked nodes; the tree owns each page in it exactly once.
"""

import heapq
from collections.abc import Iterator


class Node:
    """A run of pages below `parent`. `locks` counts the readers at or below this node."""

    __slots__ = ("children", "key", "last_used", "locks", "pages", "parent")

    def __init__(self, key: bytes, pages: list[int], parent: "Node | None") -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.last_used = 0


class RadixCache:
    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.root = Node(b"", [], None)
        self.root.locks = 1  # never evicted
        self.num_pages = 0
        self.evictable_pages = 0
        self._clock = 0
        # (last_used, tiebreak, node) of unlocked leaves; an entry is stale when the node has changed since.
        self._leaves: list[tuple[int, int, Node]] = []
        self._pushes = 0

    def match(self, key: bytes, most: int) -> tuple[Node, list[int]]:
        """The longest cached prefix among the first `most` pages of `key`: its end node and its pages.

        Splits an edge where the match ends inside it, so that the node stands for exactly the prefix.
        """
        return self._descend(self.root, key, most)

    def find(self, key: bytes, most: int) -> tuple[Node | None, int]:
        """Where `match` would end, leaving the tree as it is: the end node, None inside an edge; and how many pages."""
        node, count = self.root, 0
        for child, shared in self._walk(self.root, key, most):
            node, count = child, count + shared
            if shared < len(child.pages):
                return None, count
        return node, count

    def extend(self, node: Node, key: bytes, pages: list[int]) -> tuple[Node, list[int]]:
        """Insert the run `key` in `pages` below `node`, which the caller has locked.

        Returns the node at the end of the run, holding the caller's lock in place of `node`, and the pages that now
        stand for the run: where the tree already had a page, its own; the caller frees what was not adopted.
        """
        assert node.locks > 0 and len(key) == len(pages) * self.page_bytes
        end, adopted = self._descend(node, key, len(pages))
        if fresh := pages[len(adopted) :]:
            end = self._append(end, key[len(adopted) * self.page_bytes :], fresh, owned=end is node)
            adopted += fresh
        self.lock(end, above=node)
        return end, adopted

    def lock(self, node: Node, above: Node | None = None) -> None:
        """Protect the path to `node` from eviction: from the root, or of the nodes below `above` alone."""
        step: Node | None = node
        while step is not above:
            assert step is not None
            if step.locks == 0:
                self.evictable_pages -= len(step.pages)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`. The path counts as used now."""
        self._clock += 1
        step: Node | None = node
        while step is not None:
            step.locks -= 1
            step.last_used = self._clock
            if step.locks == 0:
                self.evictable_pages += len(step.pages)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> list[int]:
        """Give back up to `count` pages of unlocked leaves, least recently used first, from the end of each run."""
        freed: list[int] = []
        while len(freed) < count and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.locks or node.children or node.last_used != last_used or not node.pages:
                continue
            keep = max(0, len(node.pages) - (count - len(freed)))
            freed += node.pages[keep:]
            del node.pages[keep:]
            if keep:
                node.key = node.key[: keep * self.page_bytes]
                self._offer(node)
            else:
                self._remove(node)
        self.num_pages -= len(freed)
        self.evictable_pages -= len(freed)
        return freed

    # ---- inside ------------------------------------------------------------------------------------------------

    def _descend(self, node: Node, key: bytes, most: int) -> tuple[Node, list[int]]:
        """From `node` along the cached ones of the first `most` pages of `key`: the end node, after a split if need be,
        and the pages on the way."""
        pages: list[int] = []
        for child, shared in self._walk(node, key, most):
            node = child if shared == len(child.pages) else self._split(child, shared)
            pages += node.pages
        return node, pages

    def _walk(self, node: Node, key: bytes, most: int) -> Iterator[tuple[Node, int]]:
        """Each node below `node` on the way of the first `most` pages of `key`, and how many of its pages they share;
        of the last one maybe not all. Who iterates may split it."""
        done, whole, size = 0, True, self.page_bytes
        while whole and done < most and (child := node.children.get(key[done * size : (done + 1) * size])):
            shared = shared_pages(child.key, key[done * size : min(most, done + len(child.pages)) * size], size)
            done, whole, node = done + shared, shared == len(child.pages), child
            yield child, shared

    def _split(self, node: Node, at: int) -> Node:
        """Cut a run before page `at`; returns the new upper node. The lower part keeps its identity, and so the
        locks that refer to it."""
        assert node.parent is not None and 0 < at < len(node.pages)
        size = self.page_bytes
        upper = Node(node.key[: at * size], node.pages[:at], node.parent)
        upper.locks, upper.last_used = node.locks, node.last_used
        node.parent.children[upper.key[:size]] = upper
        node.key, node.pages, node.parent = node.key[at * size :], node.pages[at:], upper
        upper.children[node.key[:size]] = node
        return upper

    def _append(self, node: Node, key: bytes, pages: list[int], owned: bool) -> Node:
        """Add new pages at the end of `node`. If nobody else refers to it, its own run grows: a prompt computed in
        chunks stays one node."""
        self.num_pages += len(pages)
        if owned and node.parent is not None and node.locks == 1 and not node.children:
            node.key += key
            node.pages += pages
            return node
        child = Node(key, list(pages), node)
        node.children[key[: self.page_bytes]] = child
        self.evictable_pages += len(pages)  # until the caller's lock moves here
        return child

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self.page_bytes]]
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Put an unlocked leaf among the candidates for eviction."""
        if node.locks or node.children:
            return
        if len(self._leaves) > 2 * self.num_pages + 64:  # there are no more nodes than pages
            self._drop_stale_leaves()
        self._pushes += 1
        heapq.heappush(self._leaves, (node.last_used, self._pushes, node))

    def _drop_stale_leaves(self) -> None:
        """Without evictions stale entries would pile up, one for each request that ended."""
        current = {
            id(node): (last_used, order, node)
            for last_used, order, node in self._leaves
            if not node.locks and not node.children and node.pages and node.last_used == last_used
        }
        self._leaves = list(current.values())
        heapq.heapify(self._leaves)


def shared_pages(a: bytes, b: bytes, page_bytes: int) -> int:
    """With how many equal whole pages two keys begin."""
    low, high = 0, min(len(a), len(b)) // page_bytes
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low * page_bytes : middle * page_bytes], low * page_bytes):
            low = middle
        else:
            high = middle - 1
    return low
