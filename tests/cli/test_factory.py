"""Networks of the user's own on the command line: found, checked, and taken by every verb like the project's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepose.blocks.card import read_card
from edgepose.blocks.zoo import zoo_names
from edgepose.bundle import read_bundle
from edgepose.cli.factory import find_source, names_code, network_of
from edgepose.errors import CheckpointError, EdgeposeError, SpecError, UsageError
from edgepose.stages.networks import load_network
from edgepose.stages.source import Source
from tests.cli.conftest import Cli

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import msgspec
import torch
from torch import nn

from edgepose.blocks.attach import describe
from edgepose.spec import Heatmap, Keypoints, Preprocess, TensorSpec
from edgepose.stages.source import Network


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        )
        self.maps = nn.Conv2d(width, 2, 1)

    def forward(self, images):
        return (self.maps(self.body(images)),)


class Alone(Net):
    def forward(self, images):
        return super().forward(images)[0]


class Whole(Net):
    def forward(self, images):
        return (super().forward(images)[0].double(),)


class Picky(Net):
    def forward(self, images):
        raise RuntimeError("only batches of one\\nand more")


SPOTS = Keypoints(("blue", "red"), skeleton=((0, 1),), sigmas=(0.1, 0.1))
SPEC = describe(Net(), "mine", SPOTS, Preprocess((32, 32)), Heatmap(stride=4.0))


def pair():
    return Net(), SPEC


def carries_its_spec():
    net = Net()
    net.spec = SPEC
    return net


def network():
    return Network(Net(), SPEC)


def wider():
    return Net(32), SPEC


def other_keypoints():
    return Net(), msgspec.structs.replace(SPEC, keypoints=Keypoints(("left", "right")))


class Zoo:
    @staticmethod
    def small():
        return pair()


ready = Net()
number = 3


def bare():
    return Net()


def listed():
    return {"net": Net()}


def crossed():
    return SPEC, Net()


def leaves():
    raise SystemExit(0)


def fails():
    raise ValueError("no weights\\nat all")


def wants(path):
    return pair()


def alone():
    return Alone(), SPEC


def double():
    return Whole(), SPEC


def picky():
    return Picky(), SPEC


def shape():
    return Net(), msgspec.structs.replace(SPEC, outputs=(TensorSpec("heatmap", ("batch", 2, 9, 8)),))


def more():
    return Net(), msgspec.structs.replace(SPEC, outputs=(*SPEC.outputs, TensorSpec("mood", ("batch", 1))))


def unread():
    return Net(), msgspec.structs.replace(SPEC, outputs=(TensorSpec("mood", ("batch", 2, 8, 8)),))


def unseen():
    return Net(), msgspec.structs.replace(SPEC, visibility="sight")


def inputs():
    return Net(), msgspec.structs.replace(SPEC, inputs=(TensorSpec("image", ("batch", 3, 64, 64)),))


def fixed():
    return Net(), msgspec.structs.replace(SPEC, outputs=(TensorSpec("heatmap", (1, 2, 8, 8)),))
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the working directory, which is nowhere on Python's path."""
    folder = tmp_path / "project"
    (folder / "owned").mkdir(parents=True)
    (folder / "owned" / "__init__.py").write_text("")
    (folder / "owned" / "nets.py").write_text(MODULE)
    (folder / "owned" / "broken.py").write_text("import a_package_that_is_not_there\n")
    (folder / "owned" / "odd.py").write_text("def f(:\n")
    (folder / "owned" / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(folder)
    yield folder
    assert str(folder) not in sys.path
    for name in [name for name in sys.modules if name.partition(".")[0] == "owned"]:
        del sys.modules[name]


@pytest.mark.parametrize("text", ["owned.nets:pair", "nets:pair", "owned.nets:Zoo.small", "a:b@runs/pruned", "a-b:c"])
def test_a_colon_names_code(text: str) -> None:
    assert names_code(text)


@pytest.mark.parametrize("text", ["kpe-s", "runs/a:b", "./a:b", "a:b.safetensors", "runs/pruned.safetensors", "x@y"])
def test_names_and_paths_do_not(text: str) -> None:
    assert not names_code(text)


@pytest.mark.parametrize("factory", ["pair", "carries_its_spec", "network", "Zoo.small"])
def test_every_kind_of_factory_gives_the_same_network_each_time(factory: str) -> None:
    source = find_source(f"owned.nets:{factory}")
    again = find_source("owned.nets:pair")
    assert source.path == again.path  # found by its content, random weights and all
    network, checkpoint = load_network(source)
    assert checkpoint.card.spec == network_of("owned.nets:pair").spec
    assert not network.training


def test_the_random_numbers_of_the_process_stay_where_they_were() -> None:
    import torch

    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    network_of("owned.nets:pair")
    assert torch.equal(torch.rand(1), first)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("owned.net:pair", "no module 'owned.net', expected one that Python finds"),
        ("absent.nets:pair", "no module 'absent'"),
        ("owned.broken:pair", "a module whose import fails with ModuleNotFoundError: No module named 'a_package_that"),
        ("owned.odd:pair", "a module whose import fails with SyntaxError"),
        ("owned.leaves:pair", "a module whose import fails with SystemExit"),
        ("owned.nets:missing", "no 'missing' in owned.nets, expected a function without arguments"),
        ("owned.nets:Zoo.large", "no 'large' in owned.nets"),
        ("owned.nets:number", "an object of type int, expected a function"),
        ("owned.nets:ready", "an object of type Net, expected a function"),
        ("owned.nets:", "no name of code, expected package.module:factory"),
        ("my-nets:pair", "no name of code"),
        ("owned.nets:pair()", "no name of code"),
        ("owned.nets:bare", "Net without a spec, expected a function"),
        ("owned.nets:listed", "dict, expected a function"),
        ("owned.nets:crossed", "(ModelSpec, Net), expected a function"),
        ("owned.nets:leaves", "SystemExit: 0"),
        ("owned.nets:fails", "ValueError: no weights, expected"),
        ("owned.nets:wants", "TypeError: wants() missing 1 required positional argument"),
        ("owned.nets:pair@", "nothing behind @"),
    ],
)
def test_what_is_no_factory_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_source(text)
    assert str(caught.value).startswith(text.partition("@")[0])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("alone", "forward: found a Tensor, expected a tuple of tensors; return (output,)"),
        ("double", "output 'heatmap': found float64 (2, 2, 8, 8) for 2 images, expected float32 (batch, 2, 8, 8)"),
        ("picky", "forward: found RuntimeError: only batches of one, expected a network for images of (2, 3, 32, 32)"),
        ("shape", "output 'heatmap': found float32 (2, 2, 8, 8) for 2 images, expected float32 (batch, 2, 9, 8)"),
        ("more", "outputs: found 1 ((2, 2, 8, 8)), expected 2: heatmap, mood"),
        ("unread", "spec.outputs: found mood, expected heatmap first"),
        ("unseen", "spec.visibility: found 'sight', expected one of heatmap"),
        ("inputs", "spec.inputs: found image (batch, 3, 64, 64), expected one, (batch, 3, 32, 32)"),
        ("fixed", "output 'heatmap': found float32 (2, 2, 8, 8) for 2 images, expected float32 (1, 2, 8, 8)"),
    ],
)
def test_a_network_that_is_not_what_its_spec_says_is_refused(factory: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        find_source(f"owned.nets:{factory}")
    assert words in str(caught.value)


def test_a_file_here_stands_in_for_no_installed_package(package: Path) -> None:
    (package / "msgspec.py").write_text("raise RuntimeError('not this one')\n")
    (package / "tomllib.py").write_text("raise RuntimeError('not this one')\n")
    (package / "owned" / "reads.py").write_text("import tomllib\nfrom owned.nets import pair\n")
    loaded = sys.modules.pop("tomllib", None)
    try:
        assert network_of("owned.reads:pair").spec.name == "mine"
        assert "project" not in str(sys.modules["tomllib"].__file__)
    finally:
        if loaded is not None:
            sys.modules["tomllib"] = loaded


def test_checkpoints_of_other_networks_are_refused(cli: Cli, package: Path) -> None:
    wide = find_source("owned.nets:wider")
    with pytest.raises(CheckpointError, match="computes something else"):
        load_network(find_source(f"owned.nets:pair@{wide.path}"))
    with pytest.raises(CheckpointError, match="whose specification is another than the factory's"):
        find_source(f"owned.nets:other_keypoints@{wide.path}")
    with pytest.raises(CheckpointError, match="a network that edgepose builds by itself"):
        find_source(f"owned.nets:pair@{zoo_names()[0]}")
    with pytest.raises(EdgeposeError, match="no such file"):
        find_source("owned.nets:pair@runs/absent")
    # A checkpoint alone imports nothing, wherever its code may lie.
    for name in [name for name in sys.modules if name.partition(".")[0] == "owned"]:
        del sys.modules[name]
    outcome = cli("prune", "plan", wide.path, "--ratio", "0.3", "--importance", "l2", "--out", package / "plan.json")
    assert outcome.code == 2
    assert "name it package.module:factory@CHECKPOINT" in outcome.line
    assert "owned.nets" not in sys.modules


# The verbs


def test_it_is_pruned_and_measured(cli: Cli, people: Path, package: Path) -> None:
    plan, pruned = package / "plan.json", package / "pruned"
    flags = ("--ratio", "0.3", "--target", "this-cpu", "--data", people)
    outcome = cli("prune", "plan", "owned.nets:wider", *flags, "--out", plan)
    assert outcome.code == 0, outcome.err
    assert 16 in {len(row["kept"]) for row in json.loads(plan.read_bytes())["layers"]}  # of 32
    outcome = cli("prune", "apply", "owned.nets:wider", plan, "--data", people, "--out", "pruned")
    assert outcome.code == 0, outcome.err
    assert "name it owned.nets:wider@./pruned" in outcome.err
    assert read_card(pruned).own is not None

    outcome = cli("eval", f"owned.nets:wider@{pruned}", "--data", people)
    assert outcome.code == 0, outcome.err
    outcome = cli("eval", "./pruned", "--data", people)
    assert outcome.code == 2
    assert "name it package.module:factory@CHECKPOINT" in outcome.line

    outcome = cli("compile", "qat-int8", "--model", f"owned.nets:wider@{pruned}", "--out", "a.bundle", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "qat" in outcome.out


def test_it_is_compiled(cli: Cli, people: Path, package: Path) -> None:
    recipe = package / "mine.yaml"
    recipe.write_text("name: mine\ndescription: short\nprune: {ratio: 0.3, epochs: 1}\n")
    outcome = cli("compile", "./mine.yaml", "--model", "owned.nets:wider", "--data", people, "--out", "a.bundle")
    assert outcome.code == 0, outcome.err
    manifest = read_bundle(package / "a.bundle").manifest
    assert {"prune", "recover", "export"} <= set(manifest.reports)
    assert manifest.chain["checkpoint"] == read_card(find_source("owned.nets:wider").path).weights_sha256

    asked = ("report", "a.bundle", "--data", people, "--people", "4", "--no-latency", "--pictures", "0", "--json", "-")
    for with_code in ((), ("--baseline", "owned.nets:wider")):
        outcome = cli(*asked, *with_code, "--out", "a.html")
        assert outcome.code == 0, outcome.err
        steps = {step["name"]: step for step in json.loads(outcome.out)["waterfall"]["steps"]}
        assert list(steps) == ["fp32", "prune", "recover", "onnx", "onnxruntime fp32", "openvino fp32"]
        for name in ("fp32", "prune", "recover"):
            assert steps[name]["measured"] is bool(with_code)
            assert steps[name]["recorded"]  # on dev, when it was made
            assert with_code or "name it package.module:factory@CHECKPOINT" in steps[name]["why"]
        assert steps["openvino fp32"]["measured"]


def test_it_is_trained_as_it_is(cli: Cli, people: Path, package: Path) -> None:
    flags = ("--data", people, "--epochs", "1", "--batch-size", "8", "--workers", "0", "--threads", "1")
    outcome = cli("train", "--from", "owned.nets:pair", *flags, "--out", "trained")
    assert outcome.code == 0, outcome.err
    card, start = read_card(package / "trained"), find_source("owned.nets:pair")
    assert card.own == read_card(start.path).own
    assert [entry.stage for entry in card.lineage] == ["train"]
    assert card.lineage[0].inputs["checkpoint"] == read_card(start.path).weights_sha256 != card.weights_sha256
    outcome = cli(
        "train", "--from", "owned.nets:pair@./trained", "--distill-from", "owned.nets:pair", *flags, "--out", "again"
    )
    assert outcome.code == 0, outcome.err
    assert [entry.stage for entry in read_card(package / "again").lineage] == ["train", "train"]
    load_network(Source(package / "again", network_of("owned.nets:pair").module))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--from", "owned.nets:pair", "--model", "kpe-t"), "--model: found given beside a network of your own"),
        (("--from", "owned.nets:pair", "--input-size", "64"), "--input-size: found given beside a network of your own"),
        (
            ("--from", "owned.nets:other_keypoints"),
            "a network for the keypoints left, right, expected those of the data",
        ),
        (("--from", "owned.nets:missing"), "no 'missing' in owned.nets"),
        (("--from", "owned.nets:pair", "--distill-from", "kpe-s"), "a teacher whose outputs are"),
    ],
)
def test_training_that_does_not_fit_is_refused(cli: Cli, people: Path, words: tuple[str, ...], told: str) -> None:
    outcome = cli("train", *words, "--data", people, "--epochs", "1", "--workers", "0", "--out", "trained")
    assert outcome.code == 2
    assert told in outcome.line


def test_its_control_arm_is_trained(cli: Cli, people: Path, package: Path) -> None:
    recipe = package / "mine.yaml"
    recipe.write_text("name: mine\ndescription: short\nprune: {ratio: 0.3, epochs: 1}\n")
    flags = ("--data", people, "--workers", "0", "--threads", "1", "--control-of", "./mine.yaml")
    outcome = cli("train", "--from", "owned.nets:wider", *flags, "--out", "control")
    assert outcome.code == 0, outcome.err
    assert read_card(package / "control").plan is None
    assert read_card(package / "control").own is not None


def test_it_is_scanned(cli: Cli, people: Path, package: Path) -> None:
    outcome = cli(
        "prune", "scan", "owned.nets:pair", "--data", people, "--share", "0.5", "--importance", "l2", "--out", "s.json"
    )
    assert outcome.code == 0, outcome.err
    assert {row["layer"] for row in json.loads((package / "s.json").read_bytes())["rows"]} == {"body.0", "body.3"}
