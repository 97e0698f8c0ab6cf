"""A user's own backbone with a keypoint block and an action head that reads the keypoints: one INT8 graph.

The backbone below knows nothing of edgepose. `attach` cuts it at two feature maps and puts a `KPEBlock` on them; a
small head reads the keypoints and says whether an arm is raised. Both are trained together, then compiled by the
recipe ptq-int8 into one network with the keypoints' outputs and the action's, and the engine is compared with torch.

    python examples/attach_action.py --out action.bundle                   # on people rendered for the occasion
    python examples/attach_action.py --out action.bundle --data lspet      # on labelled photographs

Invariant: nothing here is private to edgepose: everything imported is what any program may use.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.attach import attach, describe, feature_shapes
from edgepose.blocks.backbones import initialise
from edgepose.blocks.kpe import KPEBlock
from edgepose.blocks.losses import keypoint_loss
from edgepose.bundle import Bundle
from edgepose.compiler import CompileRequest, Network, compile_bundle
from edgepose.data.augment import AugmentConfig
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.render import write_coco
from edgepose.data.splits import split_train
from edgepose.pose.codec import decode
from edgepose.recipe import load_recipe
from edgepose.runtime import open_session
from edgepose.spec import Keypoints, ModelSpec, Preprocess, SimCC
from edgepose.training.batches import AugmentedPeople, Batch, to_input
from edgepose.training.config import TrainConfig
from edgepose.training.optimizers import make_optimizers
from edgepose.training.predict import cut_crops

ACTIONS = ("arms down", "an arm raised")


class SmallBackbone(nn.Module):
    """An image classifier as anybody might have it: stages, global pooling, classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stage1 = self._stage(3, 16)
        self.stage2 = self._stage(16, 32)
        self.stage3 = self._stage(32, 64)
        self.stage4 = self._stage(64, 96)
        self.classify = nn.Linear(96, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(images))))
        classes: Tensor = self.classify(x.mean((2, 3)))
        return classes


class Coordinates(nn.Module):
    """Where SimCC's logits expect the keypoints: (N, K, bins) twice → (N, 2K), -1..1 across the crop.

    A probability for each of hundreds of bins does not survive 8 bits, so the recipe protects this part by its name.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self._expected(logits) for logits in (x, y)], 1)

    @staticmethod
    def _expected(logits: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, logits.shape[2], dtype=logits.dtype)
        return (logits.softmax(2) * places).sum(2)


class ActionHead(nn.Module):
    """What the keypoints say of the action: (N, actions) logits."""

    def __init__(self, num_keypoints: int, actions: int) -> None:
        super().__init__()
        self.coordinates = Coordinates()
        self.hidden = nn.Linear(2 * num_keypoints, 64)
        self.relu = nn.ReLU()
        self.actions = nn.Linear(64, actions)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = self.actions(self.relu(self.hidden(self.coordinates(x, y))))
        return logits


class PoseWithAction(nn.Module):
    """Images → SimCC logits x and y, and the action's logits."""

    def __init__(self, pose: nn.Module, action: ActionHead) -> None:
        super().__init__()
        self.pose, self.action = pose, action

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.pose(images)
        return x, y, self.action(x, y)


def build(keypoints: Keypoints, input_hw: tuple[int, int], seed: int) -> tuple[PoseWithAction, ModelSpec]:
    """The network, freshly initialised, and its specification."""
    torch.manual_seed(seed)
    backbone = SmallBackbone()
    out = ("stage3", "stage4")
    shapes = [feature_shapes(backbone, input_hw)[name] for name in out]
    decoder = SimCC(split_ratio=2.0)
    block = KPEBlock(
        [channels for channels, _, _ in shapes],
        keypoints.count,
        (shapes[0][1], shapes[0][2]),
        bins_hw=(2 * input_hw[0], 2 * input_hw[1]),
        width=48,
    )
    initialise(backbone)
    initialise(block)
    block.start()
    network = PoseWithAction(
        attach(backbone, block, out=out, input_hw=input_hw), ActionHead(keypoints.count, len(ACTIONS))
    )
    return network, describe(network, "pose-action", keypoints, Preprocess(input_hw), decoder, extra=("action",))


def arm_raised(points: Tensor, labelled: Tensor, keypoints: Keypoints) -> tuple[Tensor, Tensor]:
    """The action, read off the labels: is a wrist further up than its shoulder, as the trunk has it?

    Args:
        points: (N, K, 2) pixels.
        labelled: (N, K), 0 where a joint is not labelled.
        keypoints: Their names.

    Returns:
        (N,) int64, 0 or 1; and (N,) bool, whether all that it takes is labelled.
    """
    at = {name: keypoints.names.index(name) for name in keypoints.names}
    pairs = [(at[f"{side}_shoulder"], at[f"{side}_wrist"], at[f"{side}_hip"]) for side in ("left", "right")]
    shoulders, wrists, hips = (list(part) for part in zip(*pairs, strict=True))
    up = points[:, shoulders].mean(1) - points[:, hips].mean(1)
    lifted = ((points[:, wrists] - points[:, shoulders]) * up[:, None]).sum(2) / up.square().sum(1)[:, None].clamp(1e-6)
    known = (labelled[:, shoulders + wrists + hips] > 0).all(1)
    return (lifted > 0.15).any(1).long(), known


def train(network: PoseWithAction, spec: ModelSpec, people: PoseDataset, steps: int, seed: int) -> Iterator[float]:
    """Train both heads and the backbone together; gives the loss of every step."""
    config = TrainConfig(
        epochs=1, batch_size=16, seed=seed, optimizer="muon", learning_rate=3e-3,
        augment=AugmentConfig(rotation_deg=10, cutout=0.1),
    )  # fmt: skip
    batches = AugmentedPeople(people, spec, config)
    optimizers = make_optimizers(network, nn.Identity(), config)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            each, max_lr=config.learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )
        for each in optimizers
    ]
    network.train()
    for batch in batches.numbers(range(steps), workers=0):
        network.zero_grad()
        loss = _loss(network, spec, batch)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        yield loss.item()
    network.eval()


def _loss(network: PoseWithAction, spec: ModelSpec, batch: Batch) -> Tensor:
    *pose, action = network(to_input(batch.crops, spec))
    loss = keypoint_loss(pose, batch.targets, batch.weights, spec.decoder)
    raised, known = arm_raised(batch.keypoints, batch.weights, spec.keypoints)
    return loss + F.cross_entropy(action[known], raised[known]) if bool(known.any()) else loss


def compiled(network: PoseWithAction, spec: ModelSpec, data: Path, out: Path, targets: tuple[str, ...]) -> Bundle:
    """The whole network as a bundle of INT8 engines; only where the keypoints are expected stays float."""
    recipe = load_recipe("ptq-int8", targets=targets)
    assert recipe.quantise is not None
    quantise = msgspec.structs.replace(recipe.quantise, protected=("action.coordinates",))
    recipe = msgspec.structs.replace(recipe, quantise=quantise)
    return compile_bundle(CompileRequest(recipe, Network(network, spec), data, out, replace=True)).bundle


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine against the float network in torch, on people it was not trained on.

    Attributes:
        outputs: What the engine puts out.
        median_shift_px: How far keypoints move, in pixels of the input.
        same_action: Share of people for whom both say the same action.
        right_torch: Share for whom torch's is right, of those whose labels tell.
        right_engine: The same of the engine.
    """

    outputs: tuple[str, ...]
    median_shift_px: float
    same_action: float
    right_torch: float
    right_engine: float


def compare(bundle: Bundle, network: PoseWithAction, people: PoseDataset) -> Comparison:
    """Run a bundle's first engine in ONNX Runtime, and the network in torch, on the same crops."""
    spec = bundle.manifest.spec
    engine = next(engine for engine in bundle.manifest.engines if engine.backend == "onnxruntime")
    crops = cut_crops(people, spec)
    images = to_input(torch.from_numpy(crops.pixels), spec).contiguous()
    session = open_session(bundle.root / engine.path, engine.backend, threads=1)
    found = session.infer({spec.inputs[0].name: images.numpy()})
    session.close()
    with torch.inference_mode():
        names = [output.name for output in spec.outputs]
        expected = {name: tensor.numpy() for name, tensor in zip(names, network(images), strict=True)}
    shift = np.linalg.norm(decode(found, spec.decoder)[0] - decode(expected, spec.decoder)[0], axis=2)
    said, told = (outputs["action"].argmax(1) for outputs in (found, expected))
    truth = torch.from_numpy(np.stack([person.keypoints for person in people.persons]))
    raised, known = (part.numpy() for part in arm_raised(truth[..., :2], truth[..., 2], spec.keypoints))
    return Comparison(
        outputs=tuple(found),
        median_shift_px=float(np.median(shift)),
        same_action=float((said == told).mean()),
        right_torch=float((told == raised)[known].mean()),
        right_engine=float((said == raised)[known].mean()),
    )


def main(arguments: list[str] | None = None) -> int:
    """Train, compile, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the bundle")
    parser.add_argument("--data", type=Path, help="folder with train.json and images/; default: rendered people")
    parser.add_argument("--people", type=int, default=400, help="people to render without --data")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 16 people")
    parser.add_argument("--input-size", type=int, default=96, help="side of the input, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="this-cpu", help="device to build engines for")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = given.data or Path(folder)
        if given.data is None:
            write_coco(data, "train", given.people, given.seed)
        people, dev = split_train(dataset(data, "train"))
        network, spec = build(people.keypoints, (given.input_size, given.input_size), given.seed)
        for step, loss in enumerate(train(network, spec, people, given.steps, given.seed), 1):
            if step % 20 == 0 or step == given.steps:
                print(f"step {step} of {given.steps}: loss {loss:.3f}")
        bundle = compiled(network, spec, data, given.out, (given.target,))
        result = compare(bundle, network, dev)
    print(f"{bundle.root}: outputs {', '.join(result.outputs)}")
    print(f"engine against torch, {len(dev)} people: keypoints {result.median_shift_px:.2f} px apart (median),")
    print(f"the same action for {result.same_action:.0%}; right: torch {result.right_torch:.0%}, "
          f"engine {result.right_engine:.0%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
