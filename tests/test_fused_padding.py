"""Padded batches of fused encoders, whose padding is not computed."""

import pytest
import torch
from compare import assert_same
from fused import fused, randomized, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynquant
from dynquant.fused.padding import groups_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LENGTHS = [1 + 39 * i // 31 for i in range(32)]


def mask_of(lengths, longest=None):
    return torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), threads=st.sampled_from([1, 2])
)
@settings(deadline=None)
def test_groups_are_a_partition(lengths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        groups = groups_of(mask_of(lengths))
    finally:
        torch.set_num_threads(before)
    if groups is None:
        return
    named = [index for indices, _ in groups for index in indices]
    assert sorted(named) == list(range(len(lengths)))
    for indices, longest in groups:
        assert longest == max(lengths[index] for index in indices)
    assert sum(len(one) * longest for one, longest in groups) < len(lengths) * max(lengths)


class TestGroups:
    def test_lengths_that_differ(self):
        groups = groups_of(mask_of([128] * 8 + [8] * 64))
        assert [(len(indices), longest) for indices, longest in groups] == [(64, 8), (8, 128)]

    def test_a_batch_too_small(self):
        assert groups_of(mask_of([12, 5])) is None

    def test_one_text(self):
        assert groups_of(mask_of([3], 40)) == [([0], 3)]

    def test_padding_in_front(self):
        assert groups_of(mask_of(LENGTHS).flip(1)) is None

    def test_a_hole(self):
        mask = mask_of([40] * 40 + [4] * 40)
        assert groups_of(mask) is not None
        mask[3, 7] = False
        assert groups_of(mask) is None

    def test_nothing_seen(self):
        assert groups_of(mask_of([40] * 40 + [4] * 40 + [0])) is None


@pytest.fixture(scope="module")
def model():
    return fused(small("Bert"))[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_every_token_has_the_bits_of_its_text_alone(model, dtype):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(LENGTHS), generator=generator)
    mask = mask_of(LENGTHS)[order]
    ids = torch.randint(3, 99, mask.shape, generator=generator)
    assert groups_of(mask) is not None
    found = model(ids, mask.to(dtype))
    for index, seen in enumerate(mask):
        alone = model(ids[index : index + 1, seen])
        assert_same(found.last_hidden_state[index, seen], alone.last_hidden_state[0])
        assert_same(found.pooler_output[index], alone.pooler_output[0])
    assert not found.last_hidden_state[~mask].any()


@torch.no_grad()
def test_per_tensor_activations_stay_together():
    """Their range is that of the whole batch, padding included."""
    config = {nn.Linear: dynquant.QConfig(activation="per_tensor")}
    floats = randomized(small("Bert", num_hidden_layers=1))
    model = dynquant.quantize_dynamic(floats, config)
    mask = mask_of(LENGTHS)
    ids = torch.randint(3, 99, mask.shape)
    expected = model(ids, mask.long())[0]
    found = dynquant.fuse(model, attention="float")(ids, mask.long())[0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert found[~mask].any()
