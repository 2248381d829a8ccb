"""The radix tree over KV pages: which token prefixes are in the cache, and in which pages.

Each edge holds a run of whole pages and their tokens. Does not know requests: who reads a path locks its end node, and
locks count along the way to the root, so that an unlocked node has only unlocked descendants and can be evicted leaf
by leaf, least recently used first.

Invariants: a node's key has `len(pages) * page_size` tokens; siblings differ in their first page; `evictable_pages`
is the number of pages in unlocked nodes; the tree owns each page in it exactly once.
"""

import heapq
from collections.abc import Iterator, Sequence


class Node:
    """A run of pages below `parent`. `locks` counts the readers at or below this node."""

    __slots__ = ("children", "key", "last_used", "locks", "pages", "parent")

    def __init__(self, key: list[int], pages: list[int], parent: "Node | None") -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.locks = 0
        self.last_used = 0


class RadixCache:
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node([], [], None)
        self.root.locks = 1  # never evicted
        self.num_pages = 0
        self.evictable_pages = 0
        self._clock = 0
        # (last_used, tiebreak, node) of unlocked leaves; an entry is stale when the node has changed since.
        self._leaves: list[tuple[int, int, Node]] = []
        self._pushes = 0

    def match(self, tokens: Sequence[int], limit: int) -> tuple[Node, list[int]]:
        """The longest cached prefix of `tokens[:limit]`, in whole pages: its end node and its pages.

        Splits an edge where the match ends inside it, so that the node stands for exactly the prefix.
        """
        return self._descend(self.root, tokens, limit)

    def match_length(self, tokens: Sequence[int], limit: int) -> int:
        """Tokens of the longest cached prefix of `tokens[:limit]`, leaving the tree as it is."""
        return self.page_size * sum(shared for _, shared in self._walk(self.root, tokens, limit))

    def extend(self, node: Node, tokens: list[int], pages: list[int]) -> tuple[Node, list[int]]:
        """Insert the run `tokens` in `pages` below `node`, which the caller has locked.

        Returns the node at the end of the run, holding the caller's lock in place of `node`, and the pages that now
        stand for the run: where the tree already had a page, its own; the caller frees what was not adopted.
        """
        assert node.locks > 0 and len(tokens) == len(pages) * self.page_size
        end, adopted = self._descend(node, tokens, len(tokens))
        if fresh := pages[len(adopted) :]:
            end = self._append(end, tokens[len(adopted) * self.page_size :], fresh, owned=end is node)
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
                del node.key[keep * self.page_size :]
                self._offer(node)
            else:
                self._remove(node)
        self.num_pages -= len(freed)
        self.evictable_pages -= len(freed)
        return freed

    # ---- inside ------------------------------------------------------------------------------------------------

    def _descend(self, node: Node, tokens: Sequence[int], limit: int) -> tuple[Node, list[int]]:
        """From `node` along the cached pages of `tokens[:limit]`: the end node, after a split if need be, and the
        pages on the way."""
        pages: list[int] = []
        for child, shared in self._walk(node, tokens, limit):
            node = child if shared == len(child.pages) else self._split(child, shared)
            pages += node.pages
        return node, pages

    def _walk(self, node: Node, tokens: Sequence[int], limit: int) -> Iterator[tuple[Node, int]]:
        """Each node below `node` on the way of `tokens[:limit]`, and how many of its pages they share; of the last one
        maybe not all. Who iterates may split it."""
        position, whole = 0, True
        while whole and (child := node.children.get(self._first_page(tokens, position, limit))):
            shared = self._shared_pages(child, tokens, position, limit)
            position, whole, node = position + shared * self.page_size, shared == len(child.pages), child
            yield child, shared

    def _first_page(self, tokens: Sequence[int], position: int, limit: int) -> tuple[int, ...]:
        """The next whole page of tokens as a child's name; an empty tuple (no child's name) if there is none."""
        end = position + self.page_size
        return tuple(tokens[position:end]) if end <= limit else ()

    def _shared_pages(self, child: Node, tokens: Sequence[int], position: int, limit: int) -> int:
        """How many pages of the child's run the tokens share; at least one, its name having matched."""
        size = self.page_size
        most = min(len(child.pages), (limit - position) // size)
        if child.key[: most * size] == list(tokens[position : position + most * size]):
            return most
        shared = 1
        while child.key[shared * size : (shared + 1) * size] == list(
            tokens[position + shared * size : position + (shared + 1) * size]
        ):
            shared += 1
        return shared

    def _split(self, node: Node, at: int) -> Node:
        """Cut a run before page `at`; returns the new upper node. The lower part keeps its identity, and so the
        locks that refer to it."""
        assert node.parent is not None and 0 < at < len(node.pages)
        size = self.page_size
        upper = Node(node.key[: at * size], node.pages[:at], node.parent)
        upper.locks, upper.last_used = node.locks, node.last_used
        node.parent.children[tuple(upper.key[:size])] = upper
        node.key, node.pages, node.parent = node.key[at * size :], node.pages[at:], upper
        upper.children[tuple(node.key[:size])] = node
        return upper

    def _append(self, node: Node, tokens: list[int], pages: list[int], owned: bool) -> Node:
        """Add new pages at the end of `node`. If nobody else refers to it, its own run grows: a prompt computed in
        chunks stays one node."""
        self.num_pages += len(pages)
        if owned and node.parent is not None and node.locks == 1 and not node.children:
            node.key += tokens
            node.pages += pages
            return node
        child = Node(tokens, list(pages), node)
        node.children[tuple(tokens[: self.page_size])] = child
        self.evictable_pages += len(pages)  # until the caller's lock moves here
        return child

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[tuple(node.key[: self.page_size])]
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
