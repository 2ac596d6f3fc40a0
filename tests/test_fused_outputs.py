"""Results of models of transformers: made faster, and the same."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from dynquant.fused.outputs import maker_of

outputs = pytest.importorskip(
    "transformers.modeling_outputs", reason="transformers is not installed"
)
KIND = outputs.BaseModelOutputWithPoolingAndCrossAttentions
X = torch.ones(2)


@pytest.mark.parametrize("pooled", [X, None])
def test_is_what_the_class_makes(pooled):
    given = {"last_hidden_state": X, "pooler_output": pooled}
    wanted, made = KIND(**given), maker_of(KIND)(**given)
    assert maker_of(KIND) is not KIND
    assert type(made) is KIND
    assert vars(made) == vars(wanted)
    assert list(made.items()) == list(wanted.items())
    assert made.to_tuple() == wanted.to_tuple()
    assert made["last_hidden_state"] is made.last_hidden_state is made[0] is X
    assert made.hidden_states is None
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.keys() == wanted.keys()
    doubled = pytree.tree_map(lambda x: 2 * x, made)
    assert type(doubled) is KIND
    assert torch.equal(doubled.last_hidden_state, 2 * X)


def test_can_be_changed():
    made = maker_of(KIND)(last_hidden_state=X)
    made.pooler_output = X
    made["last_hidden_state"] = 2 * X
    assert list(made) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(made.last_hidden_state, 2 * X)


def test_a_class_that_does_more_makes_it_itself():
    @dataclasses.dataclass
    class Counted(outputs.ModelOutput):
        last_hidden_state: torch.Tensor | None = None
        count: int | None = None

        def __post_init__(self):
            self.count = 1
            super().__post_init__()

    class NoOutput:
        pass

    assert maker_of(Counted) is Counted
    assert maker_of(NoOutput) is NoOutput
