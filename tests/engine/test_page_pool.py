"""The page pool: references, the prefix cache, the order of eviction, and `check` itself."""

from collections.abc import Callable

import pytest

from nsa_serve.page_pool import NULL_PAGE, PagePool, hash_page, hash_pages, root_hash

PAGE_SIZE = 3


def make_chain(num_pages: int, *, salt: str | None = None, first_token: int = 0) -> list[bytes]:
    hashes = []
    parent = root_hash(salt)
    for index in range(num_pages):
        parent = hash_page(parent, range(first_token + index, first_token + index + PAGE_SIZE))
        hashes.append(parent)
    return hashes


def allocate_published(pool: PagePool, hashes: list[bytes]) -> list[int]:
    pages = pool.allocate(len(hashes))
    assert pages is not None
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.register(page, page_hash)
    return pages


def test_null_page_is_never_allocated() -> None:
    pool = PagePool(8, PAGE_SIZE)
    assert pool.num_pages == pool.num_free_pages == 7
    pages = pool.allocate(7)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert NULL_PAGE not in pages
    pool.check()


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(6, PAGE_SIZE)
    assert pool.allocate(6) is None
    assert pool.num_free_pages == 5
    assert pool.allocate(0) == []
    assert pool.allocate(5) is not None
    assert pool.allocate(1) is None
    pool.check()


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (0, 4), (4, 0)])
def test_sizes_that_make_no_pool_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        PagePool(num_pages, page_size)


def test_a_shared_page_is_free_after_its_last_release() -> None:
    pool = PagePool(4, PAGE_SIZE)
    pages = allocate_published(pool, make_chain(2))
    pool.take(pages)
    pool.release(pages)
    assert [pool.num_references(page) for page in pages] == [1, 1]
    assert pool.num_free_pages == 1
    pool.release(pages)
    assert pool.num_free_pages == 3
    pool.check()


def test_double_release_is_caught() -> None:
    pool = PagePool(4, PAGE_SIZE)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(pages)


def test_blank_page_cannot_be_taken_or_published() -> None:
    pool = PagePool(4, PAGE_SIZE)
    with pytest.raises(AssertionError, match="nothing to share"):
        pool.take([2])
    with pytest.raises(AssertionError, match="is free"):
        pool.register(2, make_chain(1)[0])


def test_find_prefix_returns_the_longest_run_and_takes_nothing() -> None:
    pool = PagePool(8, PAGE_SIZE)
    hashes = make_chain(5)
    pages = allocate_published(pool, hashes[:3])
    assert pool.find_prefix(hashes) == pages
    assert pool.find_prefix(hashes[:2]) == pages[:2]
    assert pool.find_prefix(hashes[1:]) == pages[1:]
    assert pool.find_prefix([hashes[4], hashes[0]]) == []
    assert [pool.num_references(page) for page in pages] == [1, 1, 1]


def test_released_page_is_found_until_it_is_reallocated() -> None:
    pool = PagePool(4, PAGE_SIZE)
    hashes = make_chain(2)
    pages = allocate_published(pool, hashes)
    pool.release(pages)
    assert pool.find_prefix(hashes) == pages
    assert pool.num_unreferenced(pages) == 2
    pool.take(pages)
    assert pool.num_unreferenced(pages) == 0
    assert pool.num_free_pages == 1
    pool.release(pages)
    assert pool.allocate(3) is not None
    assert pool.find_prefix(hashes) == []
    assert pool.num_cached_pages == 0
    pool.check()


def test_blank_pages_go_before_cached_ones_and_prefix_heads_go_last() -> None:
    pool = PagePool(6, PAGE_SIZE)
    hashes = make_chain(3)
    pages = allocate_published(pool, hashes)
    pool.release(pages)
    blank = pool.allocate(2)
    assert blank is not None
    assert not set(blank) & set(pages)
    for num_left in (2, 1, 0):
        assert pool.allocate(1) == [pages[num_left]]
        assert pool.find_prefix(hashes) == pages[:num_left]
        pool.check()


def test_least_recently_released_is_evicted_first() -> None:
    pool = PagePool(4, PAGE_SIZE)
    chains = [make_chain(1, first_token=100 * i) for i in range(3)]
    pages = [allocate_published(pool, chain)[0] for chain in chains]
    for page in pages:
        pool.release([page])
    pool.take([pages[0]])
    pool.release([pages[0]])
    assert [pool.allocate(1) for _ in range(3)] == [[pages[1]], [pages[2]], [pages[0]]]


def test_the_first_page_of_a_hash_stays_published() -> None:
    pool = PagePool(4, PAGE_SIZE)
    (page_hash,) = make_chain(1)
    (first,) = allocate_published(pool, [page_hash])
    (second,) = allocate_published(pool, [page_hash])
    assert pool.find_prefix([page_hash]) == [first]
    assert pool.page_hash(second) is None
    pool.release([second, first])
    pool.check()
    assert pool.find_prefix([page_hash]) == [first]


def test_a_page_keeps_its_hash() -> None:
    pool = PagePool(4, PAGE_SIZE)
    hashes = make_chain(2)
    (page,) = allocate_published(pool, hashes[:1])
    pool.register(page, hashes[0])
    with pytest.raises(AssertionError, match="another hash"):
        pool.register(page, hashes[1])


def test_without_prefix_caching_nothing_is_published() -> None:
    pool = PagePool(4, PAGE_SIZE, enable_prefix_caching=False)
    hashes = make_chain(2)
    pool.release(allocate_published(pool, hashes))
    assert pool.find_prefix(hashes) == []
    assert pool.num_free_pages == 3
    pool.check()


def test_reset_forgets_hashes_and_keeps_holders() -> None:
    pool = PagePool(6, PAGE_SIZE)
    hashes = make_chain(4)
    held = allocate_published(pool, hashes[:2])
    pool.release(allocate_published(pool, hashes[2:]))
    pool.reset_prefix_cache()
    pool.check()
    assert pool.find_prefix(hashes) == []
    assert pool.num_free_pages == 3
    pool.release(held)
    assert pool.num_free_pages == 5
    pool.check()


def test_hash_depends_on_salt_parent_every_token_and_order() -> None:
    root = root_hash(None)
    hashes = [
        hash_page(root, [1, 2, 3]),
        hash_page(root, [1, 3, 2]),
        hash_page(root, [1, 2, 4]),
        hash_page(root, [257, 2, 3]),
        hash_page(hash_page(root, [9, 9, 9]), [1, 2, 3]),
        hash_page(root_hash(""), [1, 2, 3]),
        hash_page(root_hash("tenant"), [1, 2, 3]),
        hash_page(root_hash("\ud800"), [1, 2, 3]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_page(root, (1, 2, 3)) == hashes[0]
    second = hash_page(hashes[0], [4, 5, 6])
    assert hash_pages(root, [1, 2, 3, 4, 5, 6], 3) == [hashes[0], second]
    assert hash_pages(root, [], 3) == []
    assert {len(value) for value in hashes} == {32}


def test_hash_is_the_same_in_every_process() -> None:
    # Fixed values: hashes name pages across workers and restarts.
    assert root_hash(None).hex().startswith("cafca674991269a6")
    assert hash_page(root_hash("a"), [1, 2, 2**32 - 1]).hex().startswith("0c156904230058ce")


def break_null_page(pool: PagePool) -> None:
    pool._num_references[NULL_PAGE] = 1


def break_count(pool: PagePool) -> None:
    pool._num_references[5] = -1


def break_free_list(pool: PagePool) -> None:
    pool._blank_pages.pop()


def break_free_twice(pool: PagePool) -> None:
    pool._blank_pages.append(pool._blank_pages[0])


def break_hash_map(pool: PagePool) -> None:
    pool._page_by_hash.popitem()


def break_bijection(pool: PagePool) -> None:
    pool._page_by_hash[b"other"] = next(iter(pool._page_by_hash.values()))


def break_free_kind(pool: PagePool) -> None:
    page, _ = pool._cached_pages.popitem()
    pool._blank_pages.append(page)


@pytest.mark.parametrize(
    ("break_pool", "message"),
    [
        (break_null_page, "null page"),
        (break_count, "negative"),
        (break_free_list, "free pages are"),
        (break_free_twice, "free pages are"),
        (break_hash_map, "hash map"),
        (break_bijection, "two hashes"),
        (break_free_kind, "wrong free list"),
    ],
)
def test_check_sees_each_kind_of_damage(
    break_pool: Callable[[PagePool], None], message: str
) -> None:
    pool = PagePool(8, PAGE_SIZE)
    pool.release(allocate_published(pool, make_chain(2)))
    pool.check()
    break_pool(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check()


def test_pages_released_to_go_first_do() -> None:
    """Before all that were free, the last released of them before the others."""
    pool = PagePool(8, PAGE_SIZE)
    kept, passed = make_chain(3), make_chain(4, first_token=100)
    kept_pages = allocate_published(pool, kept)
    passed_pages = allocate_published(pool, passed)
    pool.release(kept_pages)
    pool.release(passed_pages[:2], first_out=True)
    pool.release(passed_pages[2:], first_out=True)
    pool.check()
    order = [pool.allocate(1) for _ in range(7)]
    two, three = passed_pages[2:]
    assert [page for (page,) in filter(None, order)] == [
        two,
        three,
        *passed_pages[:2],
        *reversed(kept_pages),
    ]


def test_a_page_that_is_held_twice_is_not_free_to_go_first() -> None:
    pool = PagePool(4, PAGE_SIZE)
    hashes = make_chain(1)
    pages = allocate_published(pool, hashes)
    pool.take(pages)
    pool.release(pages, first_out=True)
    assert pool.num_references(pages[0]) == 1
    pool.check()
    pool.release(pages)
    assert pool.find_prefix(hashes) == pages
