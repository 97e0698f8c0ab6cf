"""Who the rendered person is and how they stand: proportions, sampled joint angles, forward kinematics.

Invariant: everything is right-handed, in units of the person's stature, with x to the person's left, y up and z to the
front; a frame is a (3, 3) float64 matrix whose columns are those axes. With the identity as root the person faces a
viewer on the +z axis, so their left side appears on the viewer's right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgepose.spec import Keypoints

F64 = NDArray[np.float64]
Side = Literal["right", "left"]
Limits = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]

LSP14 = Keypoints(
    names=(
        "right_ankle",
        "right_knee",
        "right_hip",
        "left_hip",
        "left_knee",
        "left_ankle",
        "right_wrist",
        "right_elbow",
        "right_shoulder",
        "left_shoulder",
        "left_elbow",
        "left_wrist",
        "neck",
        "head_top",
    ),
    skeleton=(
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
        (6, 7),
        (7, 8),
        (8, 9),
        (9, 10),
        (10, 11),
        (8, 12),
        (9, 12),
        (12, 13),
        (2, 8),
        (3, 9),
    ),
    flip_pairs=((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9)),
    sigmas=(0.089, 0.087, 0.107, 0.107, 0.087, 0.089, 0.062, 0.072, 0.079, 0.079, 0.072, 0.062, 0.079, 0.079),
)


@dataclass(frozen=True, slots=True)
class Proportions:
    """Lengths in statures and two shape parameters.

    Attributes:
        thigh: Hip to knee.
        shank: Knee to ankle.
        upper_arm: Shoulder to elbow.
        forearm: Elbow to wrist.
        torso: Middle of the hips to the base of the neck, standing straight.
        head: Base of the neck to the top of the skull.
        shoulder: Half the distance between the shoulder joints.
        hip: Half the distance between the hip joints as annotators place them.
        girth: Multiplies every radius: 0.85 slender, 1.3 heavy.
        femininity: 0..1, shifts width from shoulders to hips.
    """

    thigh: float
    shank: float
    upper_arm: float
    forearm: float
    torso: float
    head: float
    shoulder: float
    hip: float
    girth: float
    femininity: float


@dataclass(frozen=True, slots=True)
class LimbAngles:
    """Pose of one arm or leg, degrees.

    Attributes:
        swing: Between the limb's first bone and straight down the trunk.
        azimuth: Where it swings to: 0 outwards, 90 to the front, -90 to the back.
        twist: About the bone; turns the plane in which elbow or knee bends.
        flex: Bend of elbow or knee.
        end: Bend of the hand towards the palm, or of the foot away from the shin (0 stands flat, 70 pointed toes).
    """

    swing: float
    azimuth: float
    twist: float
    flex: float
    end: float


@dataclass(frozen=True, slots=True)
class Pose:
    """All joint angles, degrees; spine and neck are (forward bend, turn to the left, bend to the left)."""

    spine: tuple[float, float, float]
    neck: tuple[float, float, float]
    arms: Mapping[Side, LimbAngles]
    legs: Mapping[Side, LimbAngles]
    root: F64


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Joint positions (3,) and bone frames (3, 3) of a posed person.

    Attributes:
        joints: The 14 keypoints by LSP name, and "pelvis", "waist", "right_hand", "right_toe", "left_hand", "left_toe".
        frames: "pelvis", "abdomen", "chest", "head" and "<side>_<bone>"; a limb frame's -y runs along its bone.
    """

    joints: Mapping[str, F64]
    frames: Mapping[str, F64]

    def keypoints(self) -> F64:
        """Returns (14, 3), in the order of `LSP14`."""
        return np.stack([self.joints[name] for name in LSP14.names])


# (mean, standard deviation) of swing, azimuth, twist, flex: what arms and legs do in the families below.
_ARM: Mapping[str, Limits] = {
    "hang": ((14, 8), (25, 45), (0, 25), (18, 15)),
    "bent": ((28, 14), (55, 35), (-25, 35), (85, 30)),
    "run_front": ((40, 15), (70, 20), (-20, 20), (95, 18)),
    "run_back": ((45, 15), (-65, 18), (0, 20), (85, 22)),
    "overhead": ((160, 15), (50, 50), (0, 40), (15, 16)),
    "out": ((92, 18), (8, 22), (0, 45), (15, 18)),
    "reach": ((82, 25), (78, 25), (0, 35), (25, 25)),
    "hips": ((42, 8), (-12, 12), (-70, 15), (95, 12)),
}
_LEG: Mapping[str, Limits] = {
    "straight": ((6, 6), (20, 60), (0, 12), (7, 7)),
    "stride_front": ((45, 20), (85, 12), (0, 10), (50, 28)),
    "stride_back": ((22, 12), (-85, 15), (0, 10), (50, 32)),
    "split_side": ((78, 18), (12, 18), (15, 20), (7, 8)),
    "split_front": ((85, 20), (80, 14), (0, 10), (9, 10)),
    "split_back": ((48, 15), (-75, 18), (0, 15), (14, 14)),
    "tuck": ((112, 15), (80, 12), (0, 10), (122, 14)),
    "squat": ((88, 20), (66, 18), (8, 15), (95, 22)),
    "lunge_side": ((40, 15), (15, 20), (10, 15), (35, 30)),
    "kneel": ((20, 15), (70, 30), (0, 12), (112, 18)),
}
_ARM_RANGE: Limits = ((2, 176), (-70, 125), (-95, 80), (0, 148))
_LEG_RANGE: Limits = ((0, 132), (-100, 115), (-45, 50), (0, 146))


@dataclass(frozen=True, slots=True)
class _Family:
    """A kind of pose: its share, how much the spine bends, how upright it is, and what the limbs may do."""

    weight: float
    spine: tuple[float, float]
    tilt: Literal["upright", "loose", "inverted", "free"]
    arms: tuple[tuple[str, str], ...]
    legs: tuple[tuple[str, str], ...]
    toes: float


_STEP = ("stride_front", "stride_back")
_FAMILIES: tuple[_Family, ...] = (
    _Family(
        0.14,
        (5, 8),
        "upright",
        (("hang", "hang"), ("hang", "bent"), ("bent", "bent"), ("hips", "hips"), ("hang", "reach"), ("bent", "out")),
        (("straight", "straight"), ("straight", "stride_front"), ("lunge_side", "straight")),
        5,
    ),
    _Family(0.17, (12, 10), "upright", (("run_front", "run_back"), ("bent", "run_back")), (_STEP,), 15),
    _Family(
        0.10,
        (25, 18),
        "loose",
        (("reach", "reach"), ("reach", "bent"), ("bent", "bent"), ("out", "out")),
        (("squat", "squat"), ("squat", "kneel"), ("squat", "lunge_side"), ("kneel", "kneel")),
        10,
    ),
    _Family(
        0.13,
        (-2, 14),
        "loose",
        (("overhead", "overhead"), ("overhead", "out"), ("overhead", "reach"), ("overhead", "hang")),
        (("straight", "straight"), _STEP, ("squat", "straight"), ("tuck", "straight"), ("lunge_side", "lunge_side")),
        25,
    ),
    _Family(
        0.14,
        (2, 22),
        "free",
        (("out", "out"), ("overhead", "overhead"), ("out", "overhead"), ("reach", "out")),
        (
            ("split_side", "split_side"),
            ("split_front", "split_back"),
            ("split_front", "straight"),
            ("tuck", "straight"),
        ),
        50,
    ),
    _Family(
        0.12,
        (-5, 14),
        "inverted",
        (("overhead", "overhead"), ("overhead", "overhead"), ("overhead", "out")),
        (
            ("straight", "straight"),
            ("split_front", "split_back"),
            ("split_side", "split_side"),
            ("squat", "straight"),
            _STEP,
        ),
        50,
    ),
    _Family(0.06, (50, 18), "free", (("reach", "reach"), ("bent", "bent"), ("out", "reach")), (("tuck", "tuck"),), 35),
    _Family(
        0.04,
        (-38, 12),
        "free",
        (("overhead", "overhead"),),
        (("stride_back", "stride_back"), ("split_back", "straight")),
        30,
    ),
    _Family(0.10, (10, 25), "free", (("any", "any"),), (("any", "any"),), 30),
)
_FAMILY_WEIGHTS = np.array([family.weight for family in _FAMILIES]) / sum(family.weight for family in _FAMILIES)


def _clamp(value: float, low: float, high: float) -> float:
    """np.clip for one number costs ten times as much, and a pose has fifty of them."""
    return min(max(value, low), high)


def rotation(axis: Literal[0, 1, 2], degrees: float) -> F64:
    """Right-handed rotation about a coordinate axis, (3, 3)."""
    angle = np.deg2rad(degrees)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def sample_proportions(rng: np.random.Generator) -> Proportions:
    """Draws an adult or child of random build."""
    femininity = float(rng.beta(0.7, 0.7))
    child = float(rng.random() < 0.12) * float(rng.uniform(0.3, 1.0))
    jitter = rng.normal(1.0, 0.04, 8)
    return Proportions(
        thigh=0.243 * jitter[0] * (1 - 0.06 * child),
        shank=0.240 * jitter[1] * (1 - 0.06 * child),
        upper_arm=0.176 * jitter[2] * (1 - 0.05 * child),
        forearm=0.152 * jitter[3] * (1 - 0.05 * child),
        torso=0.305 * jitter[4],
        head=0.160 * jitter[5] * (1 + 0.22 * child),
        shoulder=(0.106 - 0.012 * femininity) * jitter[6],
        hip=(0.075 + 0.006 * femininity) * jitter[7],
        girth=_clamp(rng.lognormal(0.0, 0.13) * (1 - 0.08 * femininity), 0.78, 1.4),
        femininity=femininity,
    )


def sample_pose(rng: np.random.Generator) -> Pose:
    """Draws joint angles from a random family of poses, and the root's orientation towards the camera."""
    family = _FAMILIES[int(rng.choice(len(_FAMILIES), p=_FAMILY_WEIGHTS))]
    arm_states = family.arms[int(rng.integers(len(family.arms)))]
    leg_states = family.legs[int(rng.integers(len(family.legs)))]
    # Arms swing against the legs, and either side may lead.
    swap = bool(rng.random() < 0.5)
    arm_sides: tuple[Side, Side] = ("left", "right") if swap else ("right", "left")
    leg_sides: tuple[Side, Side] = ("right", "left") if swap else ("left", "right")
    spread = float(rng.choice([0.7, 1.0, 1.5], p=[0.35, 0.45, 0.2]))
    arms = {
        side: _sample_limb(rng, _ARM.get(state), _ARM_RANGE, spread, float(rng.normal(10, 25)))
        for side, state in zip(arm_sides, arm_states, strict=True)
    }
    legs = {
        side: _sample_limb(rng, _LEG.get(state), _LEG_RANGE, spread, _clamp(rng.normal(family.toes, 18), -20, 75))
        for side, state in zip(leg_sides, leg_states, strict=True)
    }
    mean, deviation = family.spine
    spine = (
        _clamp(rng.normal(mean, deviation), -65, 85),
        _clamp(rng.normal(0, 14 * spread), -45, 45),
        _clamp(rng.normal(0, 9 * spread), -30, 30),
    )
    neck = (
        _clamp(rng.normal(8, 18), -45, 50),
        _clamp(rng.normal(0, 24), -70, 70),
        _clamp(rng.normal(0, 10), -30, 30),
    )
    return Pose(spine=spine, neck=neck, arms=arms, legs=legs, root=_sample_root(rng, family))


def _sample_limb(
    rng: np.random.Generator, state: Limits | None, limits: Limits, spread: float, end: float
) -> LimbAngles:
    """Draws one limb around `state` (None: anywhere within the limits)."""
    if state is None:
        swing, azimuth, twist, flex = (float(rng.uniform(low, high)) for low, high in limits)
    else:
        drawn = (rng.normal(mean, deviation * spread) for mean, deviation in state)
        swing, azimuth, twist, flex = (
            _clamp(value, low, high) for value, (low, high) in zip(drawn, limits, strict=True)
        )
    if limits is _ARM_RANGE and 60 < swing < 130:
        azimuth = max(azimuth, -30.0)  # a raised arm cannot reach far behind the back
    if limits is _LEG_RANGE and azimuth < 0:
        swing = min(swing, 95.0 + 50.0 * azimuth / 100.0)  # legs go up in front, sideways less, backwards little
    return LimbAngles(swing=swing, azimuth=azimuth, twist=twist, flex=flex, end=end)


def _sample_root(rng: np.random.Generator, family: _Family) -> F64:
    """Orientation of the pelvis in camera axes (x right, y up, z towards the viewer)."""
    yaw = float(rng.normal(0, 48)) if rng.random() < 0.55 else float(rng.uniform(-180, 180))
    pitch = float(rng.normal(6, 12 if rng.random() < 0.72 else 42))
    match family.tilt:
        case "upright":
            roll = float(rng.normal(0, 11))
        case "loose":
            roll = float(rng.normal(0, 20)) if rng.random() < 0.55 else float(rng.uniform(-180, 180))
        case "inverted":
            roll = 180.0 + float(rng.normal(0, 18))
        case "free":
            roll = float(rng.uniform(-180, 180)) if rng.random() < 0.85 else float(rng.normal(0, 20))
    return rotation(2, roll) @ rotation(0, pitch) @ rotation(1, yaw)


def _first_bone(parent: F64, side: Side, limb: LimbAngles) -> F64:
    """Frame of the upper arm or thigh: the shortest rotation from the rest pose to the direction, then twist."""
    out = 1.0 if side == "left" else -1.0
    swing, azimuth = np.deg2rad(limb.swing), np.deg2rad(limb.azimuth)
    # The axis is horizontal and perpendicular to (out·cos, front·sin); rotating -y about it by `swing` goes that way.
    heading = np.array([out * np.cos(azimuth), 0.0, np.sin(azimuth)])
    axis = np.cross([0.0, -1.0, 0.0], heading)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    swung = np.eye(3) + np.sin(swing) * cross + (1 - np.cos(swing)) * (cross @ cross)
    return np.asarray(parent @ swung @ rotation(1, out * limb.twist))


def pose_skeleton(body: Proportions, pose: Pose) -> Skeleton:
    """Forward kinematics.

    Args:
        body: Lengths.
        pose: Joint angles; `pose.root` turns the whole person.

    Returns:
        Joints and frames in camera axes, the middle of the hips at the origin, units of stature.
    """
    pelvis = pose.root
    bend, turn, side_bend = pose.spine
    half = rotation(1, turn / 2) @ rotation(2, -side_bend / 2) @ rotation(0, bend / 2)
    abdomen, chest = pelvis @ half, pelvis @ half @ half
    nod, look, lean = pose.neck
    head = chest @ rotation(1, look) @ rotation(2, -lean) @ rotation(0, nod)
    frames: dict[str, F64] = {"pelvis": pelvis, "abdomen": abdomen, "chest": chest, "head": head}
    joints: dict[str, F64] = {"pelvis": np.zeros(3)}
    joints["waist"] = 0.12 * body.torso * pelvis[:, 1] + 0.28 * body.torso * abdomen[:, 1]
    joints["neck"] = joints["waist"] + 0.6 * body.torso * chest[:, 1]
    neck_frame = chest @ rotation(1, look / 2) @ rotation(0, nod / 2)
    joints["head_top"] = joints["neck"] + body.head * (0.3 * neck_frame[:, 1] + 0.7 * head[:, 1]) + 0.012 * head[:, 2]
    sides: tuple[Side, Side] = ("right", "left")
    for side in sides:
        out = 1.0 if side == "left" else -1.0
        arm, leg = pose.arms[side], pose.legs[side]
        raised = max(0.0, (arm.swing - 70.0) / 110.0)  # the shoulder blade lifts the joint with a raised arm
        offset = np.array([out * (body.shoulder - 0.022 * raised), -0.024 + 0.032 * raised, 0.004])
        joints[f"{side}_shoulder"] = joints["neck"] + chest @ offset
        joints[f"{side}_hip"] = pelvis @ np.array([out * body.hip, 0.0, 0.0])
        _add_limb(joints, frames, side, arm, (body.upper_arm, body.forearm, 0.095), limb="arm")
        _add_limb(joints, frames, side, leg, (body.thigh, body.shank, 0.115), limb="leg")
    return Skeleton(joints=joints, frames=frames)


def _add_limb(
    joints: dict[str, F64],
    frames: dict[str, F64],
    side: Side,
    angles: LimbAngles,
    lengths: tuple[float, float, float],
    *,
    limb: Literal["arm", "leg"],
) -> None:
    """Adds the three bones of an arm or leg to `joints` and `frames`."""
    arm = limb == "arm"
    root, middle, end, tip = ("shoulder", "elbow", "wrist", "hand") if arm else ("hip", "knee", "ankle", "toe")
    first = _first_bone(frames["chest" if arm else "pelvis"], side, angles)
    # About the left axis, a positive angle takes -y to the back: knees bend backwards, elbows to the front.
    second = first @ rotation(0, -angles.flex if arm else angles.flex)
    third = second @ rotation(0, -angles.end if arm else angles.end - 90.0)
    frames[f"{side}_upper_{limb}"], frames[f"{side}_lower_{limb}"], frames[f"{side}_{tip}"] = first, second, third
    joints[f"{side}_{middle}"] = joints[f"{side}_{root}"] - lengths[0] * first[:, 1]
    joints[f"{side}_{end}"] = joints[f"{side}_{middle}"] - lengths[1] * second[:, 1]
    joints[f"{side}_{tip}"] = joints[f"{side}_{end}"] - lengths[2] * third[:, 1]
