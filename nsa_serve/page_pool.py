"""Pages of the KV cache: who holds them, which are free, which hold a known prefix.

A page is a number here; its tensors live elsewhere, under the same number. States of a page:

    blank   --allocate-->  held  --release, no hash-->  blank
    cached  --take------>  held  --release, hash----->  cached  --evicted by allocate-->  held

Held pages have references (one per request that uses them); blank and cached pages have none and
are both free. A hash stands for all tokens from the start of the text to the page's end, and for
the salt, so equal hashes mean equal content.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

NULL_PAGE = 0

_DIGEST_BYTES = 32


def root_hash(cache_salt: str | None) -> bytes:
    """Return the parent of a text's first page: texts of different salts never share a hash."""
    # surrogatepass: JSON may carry a lone surrogate, and a salt must not be able to raise here.
    data = b"" if cache_salt is None else b"\x01" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, person=b"nsa-root").digest()


def hash_page(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the chain hash of a full page: BLAKE2b-256 of its parent's hash and its own tokens.

    parent: the previous page's hash, or `root_hash` for the first. token_ids: the page's tokens,
    each in [0, 2**32).
    """
    return hash_pages(parent, token_ids, len(token_ids))[0]


def hash_pages(parent: bytes, token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """Return the chain hashes of full pages that follow each other; see `hash_page`.

    token_ids: a multiple of page_size of them.
    """
    data = struct.pack(f"<{len(token_ids)}I", *token_ids)
    # A prompt has thousands of pages: its tokens are packed once, and a copied state costs less
    # than one that is set up.
    copy = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"nsa-page").copy
    num_bytes = 4 * page_size
    hashes = []
    for start in range(0, len(data), num_bytes):
        state = copy()
        state.update(parent + data[start : start + num_bytes])
        parent = state.digest()
        hashes.append(parent)
    return hashes


class PagePool:
    """Reference counts and the prefix cache of pages 1 to num_pages - 1; page 0 is the null page.

    num_pages counts the null page, which is never allocated. page_size is in tokens. Every
    operation takes constant time per page. Raises ValueError when a size makes no pool.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (the null page and one more), got {num_pages}"
            )
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_references = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._page_by_hash: dict[bytes, int] = {}
        self._blank_pages = list(range(num_pages - 1, NULL_PAGE, -1))
        # Free pages with a hash, in the order of eviction: least recently released first, but for
        # those that were released to go first.
        self._cached_pages: OrderedDict[int, None] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Usable pages: all but the null page."""
        return len(self._num_references) - 1

    @property
    def num_free_pages(self) -> int:
        """Pages that `allocate` can give, those of the prefix cache that nobody holds included."""
        return len(self._blank_pages) + len(self._cached_pages)

    @property
    def num_cached_pages(self) -> int:
        """Pages that `find_prefix` can find, held or not."""
        return len(self._page_by_hash)

    def num_references(self, page: int) -> int:
        """How many requests hold the page."""
        return self._num_references[page]

    def page_hash(self, page: int) -> bytes | None:
        """The hash under which the page is published, if it is."""
        return self._hashes[page]

    def num_unreferenced(self, pages: Sequence[int]) -> int:
        """How many of these pages are free now: what `take` would cost `num_free_pages`."""
        return sum(self._num_references[page] == 0 for page in pages)

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` pages with one reference each, or None, taking none, if too few are free.

        Blank pages go first, then the cached ones least recently released, which lose their hash.
        """
        if count > self.num_free_pages:
            return None
        pages = []
        for _ in range(count):
            page = self._blank_pages.pop() if self._blank_pages else self._evict()
            self._num_references[page] = 1
            pages.append(page)
        return pages

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest cached run at the start of `hashes`; take none."""
        pages = []
        for page_hash in hashes:
            page = self._page_by_hash.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def take(self, pages: Sequence[int]) -> None:
        """Add a reference to each page: cached pages that were found, or pages somebody holds."""
        for page in pages:
            if self._num_references[page] == 0:
                assert page in self._cached_pages, f"page {page} is blank and has nothing to share"
                del self._cached_pages[page]
            self._num_references[page] += 1

    def register(self, page: int, page_hash: bytes) -> None:
        """Publish a held page, full and computed, under its chain hash.

        When another page has that hash already, that one stays the published one. Without prefix
        caching nothing is ever published.
        """
        assert self._num_references[page] > 0, f"page {page} is free and cannot be published"
        assert self._hashes[page] in (None, page_hash), f"page {page} has another hash already"
        if self.enable_prefix_caching and page_hash not in self._page_by_hash:
            self._page_by_hash[page_hash] = page
            self._hashes[page] = page_hash

    def release(self, pages: Sequence[int], *, first_out: bool = False) -> None:
        """Drop one reference of each page, given in the order of the text.

        The tail is freed first: then it is evicted first, and a prefix outlives its continuations.
        first_out: pages that are now free are evicted before all that were free already.
        """
        for page in reversed(pages):
            assert self._num_references[page] > 0, f"page {page} was released but nobody holds it"
            self._num_references[page] -= 1
            if self._num_references[page] == 0:
                if self._hashes[page] is None:
                    self._blank_pages.append(page)
                else:
                    self._cached_pages[page] = None
                    if first_out:
                        self._cached_pages.move_to_end(page, last=False)

    def reset_prefix_cache(self) -> None:
        """Forget every hash. Held pages stay with their holders; cached ones become blank."""
        for page in self._page_by_hash.values():
            self._hashes[page] = None
        self._page_by_hash.clear()
        self._blank_pages.extend(self._cached_pages)
        self._cached_pages.clear()

    def check(self) -> None:
        """Raise AssertionError, saying which, when an invariant of the pool is broken."""
        references = self._num_references
        assert references[NULL_PAGE] == 0, f"the null page has {references[NULL_PAGE]} references"
        assert self._hashes[NULL_PAGE] is None, "the null page has a hash"
        negative = [page for page, count in enumerate(references) if count < 0]
        assert not negative, f"pages {negative} have a negative reference count"
        listed = [*self._blank_pages, *self._cached_pages]
        unheld = [page for page in range(1, len(references)) if references[page] == 0]
        assert sorted(listed) == unheld, f"free pages are {sorted(listed)}, unheld are {unheld}"
        hashed = {page: key for page, key in enumerate(self._hashes) if key is not None}
        by_hash = {page: key for key, page in self._page_by_hash.items()}
        assert len(by_hash) == len(self._page_by_hash), "one page is published under two hashes"
        assert hashed == by_hash, f"hash map has pages {sorted(by_hash)}, not {sorted(hashed)}"
        wrong = [page for page in self._blank_pages if page in hashed]
        wrong += [page for page in self._cached_pages if page not in hashed]
        assert not wrong, f"pages {wrong} are on the wrong free list"

    def _evict(self) -> int:
        page, _ = self._cached_pages.popitem(last=False)
        page_hash = self._hashes[page]
        assert page_hash is not None, f"cached page {page} has no hash"
        del self._page_by_hash[page_hash]
        self._hashes[page] = None
        return page
