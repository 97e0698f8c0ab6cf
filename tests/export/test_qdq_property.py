"""Whatever a pose network is made of: what the Q/DQ graph says is what was trained, and engines compute what it says.

Random networks are quantised, exported and taken apart; every layer is compared by itself, fed with torch's own codes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgepose.compress.quantise import QuantiseConfig
from edgepose.export.first_difference import Place, quantised_places
from edgepose.export.openvino import values_openvino
from edgepose.export.ort import values_ort
from edgepose.export.qdq import QuantisedDialect, quantised_onnx
from tests.export.layers import Arrays, feeds_of, take_apart, torch_codes
from tests.export.networks import BLOCKS, export, images

pytestmark = pytest.mark.usefixtures("one_thread")

FLIPPED = 0.03
"""Codes of a layer that may differ by one: sums on the edge between two, of which 32-bit biases move a few over."""

NETWORKS = st.tuples(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3).map(tuple),
    st.sampled_from(["simcc", "heatmap"]),
    st.booleans(),
    st.integers(0, 2**16),
)

EVERY_BLOCK = [
    (("residual", "pools", "attention"), "simcc", False, 0),
    (("inverted", "concat", "smooth"), "heatmap", False, 1),
    (("separable", "gate", "pyramid"), "simcc", True, 2),
]
Random = tuple[tuple[str, ...], str, bool, int]


def check_layers(random: Random) -> None:
    blocks, head, symmetric, seed = random
    feeds = images(3, 7)
    with tempfile.TemporaryDirectory() as folder:
        made = export(Path(folder), blocks, head, QuantiseConfig(symmetric=symmetric), seed)
        dialects: tuple[QuantisedDialect, ...] = ("u8s8", "s8s8") if symmetric else ("u8s8",)
        for dialect in dialects:
            whole, apart = Path(folder, f"{dialect}.onnx"), Path(folder, f"{dialect}-apart.onnx")
            quantised_onnx(made.float_onnx, made.ranges, whole, dialect=dialect)
            places = quantised_places(made.float_onnx, whole, made.ranges)
            codes, outputs = torch_codes(made, places, feeds)
            take_apart(whole, places, codes, apart)
            assert set(codes) == {place.value for place in places}
            names, inputs = [*codes, *outputs], feeds_of(codes, feeds)
            as_written = values_ort(apart, names, inputs, optimise=False)
            check_codes(f"{dialect} as written", places, as_written, codes, FLIPPED)
            check_outputs(as_written, {name: value for name, value in outputs.items() if name not in codes})
            if dialect == "u8s8":  # s8s8 is TensorRT's, which is not here
                check_codes("ONNX Runtime", places, values_ort(apart, names, inputs, optimise=True), codes, 1.0)
                check_codes("OpenVINO", places, values_openvino(apart, names, inputs), codes, 1.0)


def check_codes(form: str, places: tuple[Place, ...], found: Arrays, expected: Arrays, flipped: float) -> None:
    """No code is off by more than one, and no more than the given share at all."""
    for place in places:
        off = np.abs(found[place.value] - expected[place.value]) / place.step
        assert off.max() < 1.01, f"{form}: {place.layer}: {off.max():.2f} codes off"
        assert np.mean(off > 0.5) <= flipped, f"{form}: {place.layer}: {np.mean(off > 0.5):.1%} of the codes differ"


def check_outputs(found: Arrays, expected: Arrays) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-3 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("random", EVERY_BLOCK, ids=lambda random: "-".join(random[0]))
def test_every_kind_of_block_is_computed_as_trained_layer_by_layer(random: Random) -> None:
    check_layers(random)


@pytest.mark.slow
@given(random=NETWORKS)
@settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_any_network_is_computed_as_trained_layer_by_layer(random: Random) -> None:
    check_layers(random)
