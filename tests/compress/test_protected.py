"""The tables of what stays float and what does not: complete, named, and each rule can be broken by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgepose.blocks.config import KPEConfig, ORNConfig
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.protected import CONSIDERED, OUTPUTS, OUTPUTS_REASON, PROTECTED, protected_parts, rules
from edgepose.compress.quantise import QuantiseConfig, convert, prepare
from edgepose.errors import RecipeError
from edgepose.spec import Keypoints
from tests.export.networks import images, network

ROBUST = KPEConfig("robust", (32, 32), 8, (8, 16, 16, 32), (1, 1, 1, 1), 16, orn=ORNConfig(16, 1))


def members(name: str, model: nn.Module) -> tuple[str, ...]:
    (entry,) = [entry for entry in CONSIDERED if entry.name == name]
    return entry.members(model)


def keys(model: nn.Module, **settings: tuple[str, ...]) -> set[str]:
    wrapped = prepare(fold_batch_norms(model), [images(4, 1)], QuantiseConfig(**settings))  # type: ignore[arg-type]
    return {entry.key for entry in convert(wrapped)[1].ranges}


def test_every_entry_has_a_name_and_a_reason() -> None:
    names = [entry.name for entry in (*PROTECTED, *CONSIDERED)]
    assert len(set(names)) == len(names)
    assert all(len(entry.reason) > 40 for entry in (*PROTECTED, *CONSIDERED))
    assert len(OUTPUTS_REASON) > 40
    assert rules() == (*(entry.name for entry in PROTECTED), OUTPUTS)


def test_layers_that_others_keep_float_are_found() -> None:
    simcc = build(ROBUST, Keypoints(tuple("abc")))
    assert members("first convolution", simcc) == ("backbone.stem.0.0",)
    assert members("output layers", simcc) == ("block.head.x", "block.head.y")
    assert members("sigmoid", simcc) == ()
    maps = build(KPEConfig("maps", (32, 32), 8, (8, 8, 8, 8), (1, 1, 1, 1), 8, head="heatmap"), Keypoints(("a",)))
    assert members("output layers", maps) == ("block.head.maps",)
    assert members("sigmoid", nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())) == ("1",)
    assert members("first convolution", nn.Linear(1, 1)) == ()


def test_a_rule_that_is_broken_leaves_the_others_standing() -> None:
    model = build(ROBUST, Keypoints(tuple("abc")))
    whole, without = set(protected_parts(model)), set(protected_parts(model, without=("Mix",)))
    assert {type(model.get_submodule(name)).__name__ for name in whole - without} == {"Mix"}
    assert "Mix" not in {type(model.get_submodule(name)).__name__ for name in without}
    assert without < whole


def test_a_broken_rule_quantises_what_it_protected() -> None:
    model = build(ROBUST, Keypoints(tuple("abc"))).eval()
    added = keys(model, unprotected=("Mix",)) - keys(model)
    assert any("mix" in key for key in added)
    assert not any("norm" in key or "pool" in key for key in added)


def test_outputs_are_rounded_only_where_that_rule_is_broken() -> None:
    model = network(("residual",))
    added = keys(model, unprotected=(OUTPUTS,)) - keys(model)
    assert added == {"post_hooks.x/linear/0__0", "post_hooks.y/linear/0__0"}
    wrapped = prepare(fold_batch_norms(model), [images(4, 1)], QuantiseConfig(unprotected=(OUTPUTS,)))
    with torch.no_grad():
        outputs = wrapped(torch.from_numpy(images(2, 3)))
    assert all(len(np.unique(output.numpy())) <= 256 for output in outputs)


def test_a_rule_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unprotected: found 'Softmax', expected one of Sum, .*outputs"):
        prepare(nn.Conv2d(3, 3, 1), [images(2, 1)], QuantiseConfig(unprotected=("Softmax",)))
