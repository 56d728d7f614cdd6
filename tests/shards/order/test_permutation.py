from dataclasses import dataclass
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2s.shards.order.permutation import BlockPermutation, Permutation, batch_positions, steps_per_epoch


def everything(order) -> np.ndarray:
    return order(np.arange(len(order)))


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_permutation_is_a_bijection(n, seed, epoch):
    assert (np.sort(everything(Permutation(n, seed, epoch))) == np.arange(n)).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(0, 99), st.integers(1, 12))
def test_block_permutation_is_a_bijection_block_by_block(sizes, seed, block):
    if sum(sizes) == 0:
        with pytest.raises(ValueError, match="no item"):
            BlockPermutation(sizes, seed, 0, block)
        return
    order = BlockPermutation(sizes, seed, 0, block)
    items = everything(order)
    assert (np.sort(items) == np.arange(sum(sizes))).all()
    # Walking through the epoch, a shard once left never comes back after its block.
    shard = np.searchsorted(np.cumsum(sizes), items, side="right")
    seen = [set(shard[np.flatnonzero(shard == s)[[0, -1]]]) for s in np.unique(shard)]
    assert all(len(s) == 1 for s in seen)
    spans = [np.ptp(np.flatnonzero(shard == s)) + 1 for s in np.unique(shard)]
    biggest = sum(sorted(sizes)[-block:])
    assert max(spans) <= biggest


@dataclass(frozen=True)
class Case:
    """A run of two epochs over `items`, stopped after `stop` steps and gone on with by other workers."""

    items: int
    global_batch: int
    worlds: tuple[int, int]
    processes: tuple[int, int]
    stop: int
    seed: int
    blocks: tuple[int, ...] = ()
    """Sizes of the shards, where they are read block by block."""

    def order(self, epoch: int) -> Permutation | BlockPermutation:
        if self.blocks:
            return BlockPermutation(self.blocks, self.seed, epoch, 2)
        return Permutation(self.items, self.seed, epoch)


def check_case(case: Case) -> None:
    """Promise 1: stop on W workers, go on with W'; the union is the permutation's head, batch by batch."""
    steps = steps_per_epoch(case.items, case.global_batch)
    stop = min(case.stop, 2 * steps)
    parts = (
        (case.worlds[0], case.processes[0], 0, stop),
        (case.worlds[1], case.processes[1], stop, 2 * steps),
    )
    seen: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for world, processes, first, last in parts:
        batches = {}
        for rank in range(world):
            for process in range(processes):  # each builds the order for itself, and takes every k-th step
                orders = [case.order(0), case.order(1)]
                for number in range(first + process, last, processes):
                    epoch, step = divmod(number, steps)
                    positions = batch_positions(step, case.global_batch, rank, world)
                    assert len(positions) == case.global_batch // world
                    batches[number, rank] = orders[epoch](np.arange(positions.start, positions.stop))
        assert len(batches) == (last - first) * world  # equal steps on every worker
        for number in range(first, last):
            seen[number // steps] += [batches[number, rank] for rank in range(world)]
    for epoch, rows in seen.items():
        items = np.concatenate(rows)
        whole = everything(case.order(epoch))[: steps * case.global_batch]
        assert (items == whole).all()  # the union is exact
        assert len(np.unique(items)) == len(items)  # nothing twice
        assert items.min() >= 0
        assert items.max() < case.items
        assert case.items - len(items) < case.global_batch  # nothing missing but what fills no whole batch


WORLDS = (1, 2, 3, 4)


@given(
    n=st.integers(1, 600),
    local=st.integers(1, 8),
    worlds=st.tuples(st.sampled_from(WORLDS), st.sampled_from(WORLDS)),
    processes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stop=st.integers(0, 160),
    seed=st.integers(0, 2**32),
    blocks=st.booleans(),
)
@settings(max_examples=50)
def test_every_item_once_whatever_the_workers_and_the_stop(n, local, worlds, processes, stop, seed, blocks):
    global_batch = local * lcm(*worlds)
    if n < global_batch:
        with pytest.raises(ValueError, match=f"{global_batch} but the split has {n}"):
            steps_per_epoch(n, global_batch)
        return
    check_case(Case(n, global_batch, worlds, processes, stop, seed, (n // 3, n - n // 3) if blocks else ()))


@pytest.mark.slow
@pytest.mark.dist  # no process is started, but it belongs to what many workers rest upon
def test_every_item_once_in_two_thousand_random_cases():
    rng = np.random.default_rng(4)
    for number in range(2_000):
        worlds = tuple(int(world) for world in rng.choice(WORLDS, 2))
        global_batch = int(rng.integers(1, 5)) * lcm(*worlds)
        steps = int(rng.integers(1, 5))
        items = steps * global_batch + int(rng.integers(0, global_batch))
        cuts = np.sort(rng.integers(0, items + 1, 3)) if number % 8 == 0 else ()  # empty shards among them
        case = Case(
            items=items,
            global_batch=global_batch,
            worlds=worlds,
            processes=tuple(int(count) for count in rng.integers(1, 4, 2)),
            stop=int(rng.integers(0, 2 * steps + 1)),
            seed=int(rng.integers(0, 2**63)),
            blocks=tuple(np.diff([0, *cuts, items]).tolist()) if number % 8 == 0 else (),
        )
        try:
            check_case(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_any_position_alone_and_far_out():
    order = Permutation(10**12 + 7, 1, 2)
    positions = np.array([0, 5, 10**12, 10**12 + 6])
    items = order(positions)
    assert (items >= 0).all()
    assert (items < len(order)).all()
    assert [int(order(np.array([p]))[0]) for p in positions] == items.tolist()


def test_the_order_is_random():
    n, trials = 30, 4000
    where = np.stack([everything(Permutation(n, seed, 0)) for seed in range(trials)])
    expected = trials / n
    for position in (0, 1, n // 2, n - 1):
        counts = np.bincount(where[:, position], minlength=n)
        assert ((counts - expected) ** 2 / expected).sum() < 85  # chi-square, 29 degrees: once in 5e6
    # Neighbours in the order are not neighbours among the items more often than by chance.
    close = (np.abs(np.diff(where, axis=1)) == 1).mean()
    assert abs(close - 2 / n) < 0.005
    # For few items every order occurs.
    assert len({tuple(everything(Permutation(4, seed, 0))) for seed in range(600)}) == 24


def test_epochs_and_seeds_give_other_orders():
    orders = [everything(Permutation(1000, *pair)) for pair in ((0, 0), (0, 1), (1, 0))]
    for i in range(3):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.02


def test_the_order_never_changes():
    # A change here breaks the resuming of every run that was started before it.
    assert everything(Permutation(10, 0, 0)).tolist() == [9, 8, 2, 6, 5, 7, 0, 1, 4, 3]


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="batch_size is 10, which 4 workers"):
        batch_positions(0, 10, 0, 4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(ValueError, match="block_shards is 0"):
        BlockPermutation([3], 0, 0, 0)
    with pytest.raises(ValueError, match="n is 0"):
        Permutation(0, 0, 0)
