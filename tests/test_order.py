import itertools
from collections import Counter

import numpy as np
import pytest

from dit.data.order import Resampled, Shuffled, permutation, share, uniform

COUNTS = [10, 10, 10, 10, 3, 7, 11, 1]
TOTAL = sum(COUNTS)


def at(order, step, lane):
    return list(zip(*(part.tolist() for part in order.at(step, lane)), strict=True))


def sequence(order, steps):
    """The samples in the order in which an epoch counts them: row by row, lane by lane."""
    batches = [[at(order, step, lane) for lane in range(order.lanes)] for step in range(steps)]
    return [batch[lane][row] for batch in batches for row in range(order.rows) for lane in range(order.lanes)]


@pytest.mark.parametrize(("lanes", "batch_size"), [(1, 1), (1, 4), (2, 8), (4, 4), (8, 8), (8, 64), (8, 128)])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_epoch_has_each_sample_once(lanes, batch_size, window):
    order = Shuffled(COUNTS, seed=0, lanes=lanes, batch_size=batch_size, window=window)
    names = sequence(order, 5 * TOTAL // batch_size + 1)
    everything = {(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)}
    for epoch in range(5):
        assert Counter(names[epoch * TOTAL : (epoch + 1) * TOTAL]) == Counter(everything)
    assert names[:TOTAL] != names[TOTAL : 2 * TOTAL]


@pytest.mark.parametrize("make", [
    lambda **o: Shuffled(COUNTS, **o),
    lambda **o: Resampled(COUNTS, [0] * 4 + [1] * 4, [1, 2], **o),
])  # fmt: skip
def test_a_step_does_not_depend_on_the_steps_before(make):
    walked = make(seed=0, lanes=4, batch_size=12, window=2)
    for step, lane in itertools.product(range(40), range(4)):
        jumped = make(seed=0, lanes=4, batch_size=12, window=2)
        assert at(walked, step, lane) == at(jumped, step, lane)
    far = make(seed=0, lanes=4, batch_size=12).at(10**9, 3)
    assert len(far[0]) == 3
    assert at(make(seed=1, lanes=4, batch_size=12), 0, 0) != at(make(seed=0, lanes=4, batch_size=12), 0, 0)


def test_samples_are_shuffled_within_windows_of_shards():
    order = Shuffled([100] * 12, seed=0, lanes=1, batch_size=100, window=3)
    shards = np.array([shard for shard, _ in sequence(order, 12)]).reshape(4, 300)
    for window in shards:
        assert len(set(window.tolist())) == 3
        assert 0.2 < (np.diff(window) == 0).mean() < 0.5  # a third of neighbours are of one shard
    samples = np.array([sample for _, sample in sequence(order, 3)])
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.2


def test_lanes_read_shards_of_their_own():
    order = Shuffled([50] * 64, seed=0, lanes=8, batch_size=8)
    of_lane = [{shard for step in range(400) for shard, _ in at(order, step, lane)} for lane in range(8)]
    assert all(len(shards) == 8 for shards in of_lane)
    assert len(set.union(*of_lane)) == 64


def test_what_takes_the_place_of_a_sample_follows_it_in_its_window():
    order = Shuffled([10] * 4, seed=0, lanes=1, batch_size=4, window=2)
    names = sequence(order, 10)
    others = list(itertools.islice(order.instead(1, 0, 2), 25))
    assert others[:13] == names[7:20] and others[13:19] == names[:6] and others[19:] == names[20:26]
    assert order.coming(1, 0) == [*sorted({shard for shard, _ in names[:20]}), *sorted({s for s, _ in names[20:40]})]
    assert order.coming(2, 0) == [] and len(order.coming(5, 0)) == 4


def test_a_mixture_has_its_weights():
    order = Resampled([100, 50, 10], [0, 0, 1], [1, 3], seed=0, lanes=2, batch_size=8, window=2)
    drawn = Counter(itertools.chain(*(at(order, step, lane) for step in range(20000) for lane in range(2))))
    total = sum(drawn.values())
    second = sum(number for (shard, _), number in drawn.items() if shard == 2)
    assert second / total == pytest.approx(0.75, abs=0.02)
    first = [number for (shard, _), number in drawn.items() if shard < 2]
    assert len(first) == 150 and min(first) > 0.7 * np.mean(first) and max(first) < 1.4 * np.mean(first)


def test_a_mixture_has_its_weights_in_every_part():
    order = Resampled([1000] * 20, [0] * 10 + [1] * 10, [3, 1], seed=0, lanes=8, batch_size=64)
    for part in range(10):
        drawn = np.concatenate(
            [order.at(step, lane)[0] for step in range(100 * part, 100 * part + 100) for lane in range(8)]
        )
        assert (drawn < 10).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(("options", "message"), [
    ({"counts": []}, "there is no sample"),
    ({"counts": [5] * 3, "lanes": 4}, r"3 shards are fewer than trainer\.lanes=4.*take trainer\.lanes=2"),
    ({"batch_size": 6}, r"trainer\.batch_size=6 must be a multiple of trainer\.lanes=4"),
    ({"window": 0}, r"data\.window=0"),
])  # fmt: skip
def test_what_cannot_be_ordered_is_refused(options, message):
    counts = options.pop("counts", COUNTS)
    with pytest.raises(ValueError, match=message):
        Shuffled(counts, **{"seed": 0, "lanes": 4, "batch_size": 8, **options})


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, 2, 3]])
def test_weights_are_positive_and_one_for_each_source(weights):
    with pytest.raises(ValueError, match=r"data\.weights"):
        Resampled(COUNTS, [0] * 4 + [1] * 4, weights, seed=0, lanes=4, batch_size=8)


def test_devices_share_the_lanes():
    assert [list(share(8, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match=r"lanes=8 cannot be shared out evenly among 3 devices.*\[1, 2, 4, 8\]"):
        share(8, 0, 3)


def test_numbers_are_those_of_the_format():
    """A run that goes on with another version must find the order it had."""
    assert permutation([1, 0, 0, 0, 0], 8).tolist() == [0, 5, 7, 4, 2, 6, 3, 1]
    assert uniform([4, 0, 0, 0], 2).round(6).tolist() == [0.404809, 0.730371]
