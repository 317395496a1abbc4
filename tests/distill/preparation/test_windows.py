"""Windows of text in several shards."""

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.text.windows import Windows
from tests.distill.prepared_folders import write


@pytest.fixture
def three(tmp_path):
    """Three shards of 40, 40 and 30 tokens, each its own place."""
    lengths = [20, 20, 35, 5, 30]
    write(tmp_path / "three", np.arange(110, dtype=np.uint16), np.cumsum([0, *lengths])[:-1], [0] * 5, ["a"], size=40)
    return tmp_path / "three"


@pytest.fixture(autouse=True)
def folder_of_three(tmp_path):
    (tmp_path / "three").mkdir()


def test_windows_of_several_shards(three):
    windows = Windows(three, 8, 5)
    assert windows.count == 4 + 4 + 3  # none goes over the end of a shard
    wanted = [0, 8, 16, 24, 40, 48, 56, 64, 80, 88, 96]
    epochs = [windows.batch(epoch * 11, 11).ids[:, 0].tolist() for epoch in range(4)]
    assert all(sorted(epoch) == wanted for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    for first, last in ((0, 4), (4, 8), (8, 11)):
        assert set(epochs[0][first:last]) == set(wanted[first:last])
    assert len({tuple(np.searchsorted([40, 80], epoch, side="right")) for epoch in epochs}) > 1  # of the shards too
    whole = windows.batch(0, 30)
    parts = [Windows(three, 8, 5).batch(first, 6) for first in range(0, 30, 6)]
    assert whole.trained is None and whole.loss_weights is whole.weights
    for name, value in vars(whole).items():
        assert value is None or torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name
    assert torch.equal(whole.targets, whole.ids + 1)
    assert Windows(three, 8, None).batch(0, 12).ids[:, 0].tolist() == [*wanted, 0]


def test_the_first_windows_need_the_first_shard(three):
    for number in (1, 2):
        (three / f"0000{number}" / "tokens.npy").write_bytes(b"")
    windows = Windows(three, 8, 5)
    assert windows.batch(0, 4).ids.max() < 40
    with pytest.raises(UserError, match=r"00001/tokens\.npy is not what was written"):
        windows.batch(0, 5)


def test_one_shard_has_the_order_of_its_seed(tmp_path):
    """The permutation of all windows, as it was before there were shards."""
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", np.arange(4001, dtype=np.uint16), np.asarray([0]), [0], ["a"])
    for seed, epoch in ((0, 0), (7, 0), (7, 3)):
        right = np.random.default_rng([seed, epoch]).permutation(500) * 8
        assert Windows(tmp_path / "one", 8, seed).batch(500 * epoch, 500).ids[:, 0].tolist() == right.tolist()
