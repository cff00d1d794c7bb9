"""A thread beside the main one: order, bounds, errors, and that nothing half-made is left."""

import threading

import pytest

from pso.background import Ahead, Behind

SOON = 20  # seconds after which a test gives up


class Seen:
    """A make that tells what was begun and can be held back."""

    def __init__(self):
        self.begun, self.threads, self.held = [], [], threading.Event()
        self.held.set()

    def __call__(self, item: int) -> int:
        self.begun.append(item)
        self.threads.append(threading.current_thread())
        assert self.held.wait(SOON)
        return 10 * item


def test_what_is_announced_is_made_while_the_caller_works():
    make = Seen()
    with Ahead(make) as ahead:
        assert ahead.take(1, 2) == 10
        ahead.pool.submit(lambda: None).result(SOON)  # all that was begun is done
        assert make.begun == [1, 2]  # before it is asked for, and no further than one
        assert ahead.take(2, 3) == 20 and ahead.take(3) == 30
    assert make.begun == [1, 2, 3]
    main = threading.current_thread()
    assert [thread is main for thread in make.threads] == [True, False, False]


def test_another_item_than_the_announced_one_is_made_all_the_same_and_never_two_at_a_time():
    make = Seen()
    with Ahead(make) as ahead:
        assert ahead.take(1, 2) == 10
        assert ahead.take(5, 6) == 50 and ahead.take(6) == 60
    assert make.begun == [1, 2, 5, 6]


def test_an_error_comes_out_where_its_item_is_taken_and_can_be_tried_again():
    calls = []

    def make(item: int) -> int:
        calls.append(item)
        if item == 2 and calls.count(2) == 1:
            raise MemoryError("too little")
        return item

    with Ahead(make) as ahead:
        assert ahead.take(1, 2) == 1
        with pytest.raises(MemoryError, match="too little"):
            ahead.take(2, 3)
        assert ahead.take(2, 3) == 2 and ahead.take(3) == 3
    assert calls == [1, 2, 2, 3]


def test_calls_behind_are_made_in_order_and_all_are_made_at_the_end():
    done = []
    with Behind() as behind:
        for number in range(20):
            behind(done.append, number)
    assert done == list(range(20))


@pytest.mark.parametrize("bound", [1, 2, 5])
def test_no_more_than_the_bound_wait(bound):
    free = threading.Event()
    with Behind(bound) as behind:
        for _ in range(bound):
            behind(free.wait, SOON)
        other = threading.Thread(target=lambda: behind(free.wait, SOON))
        other.start()
        other.join(0.2)
        assert other.is_alive() and len(behind.waiting) == bound - 1  # it waits for the first
        free.set()
        other.join(SOON)
        assert not other.is_alive()


def test_after_an_error_nothing_more_is_made_and_the_error_comes_out():
    done, held = [], threading.Event()

    def fail() -> None:
        assert held.wait(SOON)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Behind(bound=10) as behind:
        behind(done.append, 1)
        behind(fail)
        behind(done.append, "what must not be written")
        held.set()
    assert done == [1]


def test_an_error_of_the_caller_is_the_one_that_comes_out_and_what_waits_is_dropped():
    done, held = [], threading.Event()
    with pytest.raises(KeyError), Behind(bound=10) as behind:
        behind(held.wait, SOON)
        behind(done.append, 1)
        threading.Timer(0.1, held.set).start()
        raise KeyError
    assert done == []
