"""Requests and the pool's prefix cache: what a request finds there and what it leaves there."""

from collections.abc import Iterable

from nsa_serve.page_pool import PagePool, hash_pages, root_hash
from nsa_serve.request import Request
from nsa_serve.window_pages import WindowPages


class PrefixCache:
    """Looks up and publishes the full pages of requests, by their chain of hashes."""

    def __init__(self, pool: PagePool, windows: WindowPages | None = None) -> None:
        self._pool = pool
        self._windows = windows

    def is_used_by(self, request: Request) -> bool:
        """True when the request may take its prefix from the cache."""
        # Prompt logprobs need the hidden state of every prompt token, so every one must run.
        return self._pool.enable_prefix_caching and request.params.prompt_logprobs is None

    def find_hits(self, request: Request) -> list[int]:
        """Return cached pages of the request's prefix; at least one token is left to compute.

        With window pages, those that the next token reads are cached, too.
        """
        if not self.is_used_by(request):
            return []
        self._extend_hashes(request)
        hits = self._pool.find_prefix(request.page_hashes[: self._max_hits(request)])
        if self._windows is not None:
            del hits[self._windows.num_hits(request.page_hashes[: len(hits)]) :]
        return hits

    def is_prefix_coming(
        self, request: Request, num_hits: int, *, running: Iterable[Request]
    ) -> bool:
        """True when a running request is yet to compute the page that the hits end before.

        Waiting for it is cheaper than computing it twice: of n samples of one prompt, or requests
        with one system prompt that arrive together, one computes and the others share.
        """
        if not self.is_used_by(request) or num_hits >= self._max_hits(request):
            return False
        page_hash = request.page_hashes[num_hits]
        for other in running:
            hashes = other.page_hashes
            num_computed_pages = other.num_computed_tokens // self._pool.page_size
            if num_computed_pages <= num_hits < len(hashes) and hashes[num_hits] == page_hash:
                return True
        return False

    def publish(self, request: Request, *, start: int) -> None:
        """Offer the pages that were filled by computing from token `start`."""
        if not self._pool.enable_prefix_caching:
            return
        page_size = self._pool.page_size
        self._extend_hashes(request)
        first, stop = start // page_size, request.num_computed_tokens // page_size
        for index in range(first, stop):
            self._pool.register(request.pages[index], request.page_hashes[index])
        if self._windows is not None:
            self._windows.publish(request, start=first, stop=stop)

    def _max_hits(self, request: Request) -> int:
        return (request.num_tokens - 1) // self._pool.page_size

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full pages of known tokens; tokens are only appended, so hashes stay valid."""
        page_size, hashes = self._pool.page_size, request.page_hashes
        start = len(hashes) * page_size
        stop = request.num_tokens - request.num_tokens % page_size
        if start < stop:
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            hashes += hash_pages(parent, request.token_ids[start:stop], page_size)
