"""Flesh and clothes: the sphere-swept cones that make up a person, and what each of them is covered with.

Invariant: every joint of the skeleton is the centre of a sphere of at least one cone (the top of the head lies just
below the scalp), so a keypoint is always inside the silhouette of its limb; loose clothing only ever adds radius.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgepose.data.render import texture
from edgepose.data.render.skeleton import F64, Proportions, Side, Skeleton
from edgepose.data.render.texture import Material

Decal = Literal["none", "face", "bib"]
Zones = tuple[tuple[float, int], ...]
_FLAT = (1.0, 1.0, 0.72)  # trunks are wider than deep
SIDES: tuple[Side, Side] = ("right", "left")


@dataclass(frozen=True, slots=True)
class Flesh:
    """One cone of a person, in camera axes and statures.

    Attributes:
        start: (3,) centre of the first sphere.
        end: (3,) centre of the last sphere.
        radius: Radii there.
        axes: (3, 3), the part's own axes as orthogonal columns; their lengths are the half axes of its "spheres"
            relative to the radius, so 1 is round.
        zones: (upper bound of s, material index) in ascending order; the last bound is 1.
        decal: What is painted on top.
        origin: (3,) where the coordinates of patterns and decals start.
    """

    start: F64
    end: F64
    radius: tuple[float, float]
    axes: F64
    zones: Zones
    decal: Decal
    origin: F64


@dataclass(frozen=True, slots=True)
class Outfit:
    """Clothes and hair.

    Attributes:
        materials: Referred to by index.
        skin, hair, shirt, trousers, shoes, socks: Indices into `materials`.
        sleeve: Share of the arm that is covered: 0 none, 0.5 to the elbow, 1 to the wrist.
        legging: The same of the leg.
        sock: Share of the shank that socks cover.
        loose: Added radius of sleeves and trouser legs, statures.
        hair_style: How the hair is worn.
        bib: Whether a race number is pinned to the chest.
        bib_color: (3,) BGR.
        barefoot: Shoes are skin, and feet smaller.
        midriff: Whether the belly is bare.
    """

    materials: tuple[Material, ...]
    skin: int
    hair: int
    shirt: int
    trousers: int
    shoes: int
    socks: int
    sleeve: float
    legging: float
    sock: float
    loose: float
    hair_style: Literal["bald", "short", "long", "bun", "tail"]
    bib: bool
    bib_color: NDArray[np.float32]
    barefoot: bool
    midriff: bool


def sample_outfit(rng: np.random.Generator, body: Proportions) -> Outfit:
    """Dresses a person: sports kit, leotards, street clothes, bare chests."""
    feminine = rng.random() < body.femininity
    skin = texture.plain(texture.skin_color(rng), gloss=0.12, variation=0.07)
    cap = rng.random() < 0.1
    hair_color = texture.cloth_color(rng) if cap else texture.hair_color(rng)
    hair = texture.plain(hair_color, gloss=0.25, layer=6, variation=0.1 if cap else 0.4)
    loose = float(rng.choice([0.0, 0.004, 0.010, 0.018], p=[0.3, 0.3, 0.25, 0.15]))
    wrinkle = 0.1 + 14.0 * loose
    shirt, trousers = texture.cloth(rng, wrinkle), texture.cloth(rng, wrinkle)
    leotard = rng.random() < (0.35 if feminine else 0.1)
    if leotard:
        shirt = trousers = texture.cloth(rng, 0.04)
        loose = 0.0
    elif rng.random() < 0.2:
        trousers = shirt
    shoe_color = texture.cloth_color(rng) if rng.random() < 0.6 else texture.bgr_from_hsv(0.1, 0.1, 0.1)
    sock_color = texture.cloth_color(rng) if rng.random() < 0.4 else np.full(3, 0.9, np.float32)
    barefoot = bool(rng.random() < (0.75 if leotard else 0.2))
    bare_chest = not feminine and not leotard and rng.random() < 0.16
    styles: tuple[Literal["bald", "short", "long", "bun", "tail"], ...] = ("bald", "short", "long", "bun", "tail")
    shares = [0.0, 0.15, 0.25, 0.3, 0.3] if feminine else [0.12, 0.78, 0.06, 0.02, 0.02]
    legging = _leg_cover(rng, leotard)
    return Outfit(
        materials=(skin, hair, shirt, trousers, texture.plain(shoe_color, gloss=0.2), texture.plain(sock_color)),
        skin=0,
        hair=1,
        shirt=0 if bare_chest else 2,
        trousers=3,
        shoes=0 if barefoot else 4,
        socks=0 if barefoot else 5,
        sleeve=_sleeve(rng, bare_chest),
        legging=legging,
        sock=0.0 if barefoot or legging > 0.6 else float(rng.choice([0.12, 0.35, 0.85], p=[0.6, 0.2, 0.2])),
        loose=loose,
        hair_style=styles[int(rng.choice(len(styles), p=shares))],
        bib=bool(not leotard and not bare_chest and rng.random() < 0.3),
        bib_color=texture.bgr_from_hsv(0.1, 0.05, 0.95) if rng.random() < 0.6 else texture.cloth_color(rng),
        barefoot=barefoot,
        midriff=bool(feminine and not leotard and rng.random() < 0.25),
    )


def _sleeve(rng: np.random.Generator, bare_chest: bool) -> float:
    if bare_chest:
        return 0.0
    kind = rng.random()
    if kind < 0.33:
        return 0.0
    return float(rng.uniform(0.25, 0.48)) if kind < 0.68 else float(rng.uniform(0.93, 1.0))


def _leg_cover(rng: np.random.Generator, leotard: bool) -> float:
    if leotard:
        return float(rng.choice([0.03, 1.0], p=[0.75, 0.25]))
    kind = rng.random()
    if kind < 0.1:
        return 0.08
    return float(rng.uniform(0.2, 0.5)) if kind < 0.5 else float(rng.uniform(0.9, 1.0))


@dataclass(slots=True)
class _Builder:
    """Collects the cones of one person; every method appends to `cones`."""

    body: Proportions
    outfit: Outfit
    skeleton: Skeleton
    cones: list[Flesh] = field(default_factory=list)

    def add(
        self,
        start: F64,
        end: F64,
        radius: tuple[float, float],
        axes: F64,
        zones: Zones,
        *,
        decal: tuple[Decal, F64] | None = None,
    ) -> None:
        kind, origin = decal or ("none", start)
        self.cones.append(Flesh(start, end, radius, axes, zones, kind, origin))

    def trunk(self) -> None:
        """Pelvis, belly, chest, shoulders and neck."""
        joints, frames = self.skeleton.joints, self.skeleton.frames
        body, outfit, girth = self.body, self.outfit, self.body.girth
        pelvis, abdomen, chest = frames["pelvis"], frames["abdomen"], frames["chest"]
        lower, skin, shirt = outfit.trousers, outfit.skin, outfit.shirt
        belly = skin if outfit.midriff else shirt
        hem = outfit.loose * 0.8
        hips = [joints[f"{side}_hip"] for side in SIDES]
        wide = 0.068 * girth
        cloth: tuple[Decal, F64] = ("none", joints["pelvis"])
        # The keypoint of the hip sits on the side of the pelvis; its sphere is what the thigh grows out of.
        self.add(hips[0], hips[1], (wide, wide), pelvis * (0.42, 1.0, 1.05), ((1.0, lower),), decal=cloth)
        seat = -0.03 * pelvis[:, 1] - 0.038 * pelvis[:, 2]
        inward = 0.45
        for hip in hips:
            cheek = inward * hip + seat
            self.add(cheek, cheek, (0.056 * girth, 0.056 * girth), pelvis, ((1.0, lower),), decal=cloth)
        waist, neck = joints["waist"], joints["neck"]
        waist_radius = (0.088 - 0.010 * body.femininity) * girth + hem
        self.add(
            0.012 * pelvis[:, 1], waist, (0.1 * girth, waist_radius), abdomen * _FLAT,
            ((0.22, lower), (1.0, belly)),
        )  # fmt: skip
        breast = neck - 0.088 * chest[:, 1]
        chest_radius = (0.112 - 0.012 * body.femininity) * (0.45 + 0.55 * girth) + hem
        self.add(
            waist, breast, (waist_radius, chest_radius), chest * _FLAT,
            ((0.25 if outfit.midriff else 0.0, belly), (1.0, shirt)), decal=("bib" if outfit.bib else "none", breast),
        )  # fmt: skip
        if body.femininity > 0.55:
            size = 0.034 + 0.012 * body.femininity
            for out in (-1.0, 1.0):
                bust = breast - 0.022 * chest[:, 1] + out * 0.042 * chest[:, 0] + 0.052 * chest[:, 2]
                self.add(bust, bust, (size, size), chest, ((1.0, shirt),), decal=("none", breast))
        base = neck - 0.012 * chest[:, 1] - 0.008 * chest[:, 2]
        cut = 0.55 if outfit.sleeve == 0.0 else 1.0
        for side in SIDES:
            yoke = ((0.12, skin), (cut, shirt), (1.0, skin if cut < 1.0 else shirt))
            self.add(base, joints[f"{side}_shoulder"], (0.046 * girth, 0.046 * girth), chest, yoke)
            pectoral = neck - 0.075 * chest[:, 1] + 0.012 * chest[:, 2]
            self.add(pectoral, joints[f"{side}_shoulder"], (0.06 * girth, 0.042 * girth), chest, ((1.0, shirt),))
        thick = (0.036 - 0.007 * body.femininity) * girth
        skull = 0.42 * neck + 0.58 * joints["head_top"]
        self.add(neck, skull, (thick + 0.004, thick), chest, ((1.0, skin),))

    def head(self) -> None:
        """Skull, jaw, nose, ears and hair."""
        joints, outfit = self.skeleton.joints, self.outfit
        frame = self.skeleton.frames["head"]
        side, up, front = frame.T
        size = self.body.head / 0.160
        top = joints["head_top"]
        radius = 0.052 * size
        crown = top - (radius - 0.006) * up
        skin, hair = outfit.skin, outfit.hair
        self.add(
            crown, crown - 0.012 * size * up, (radius, radius * 0.98), frame * (0.86, 1.0, 1.06),
            ((1.0, skin),), decal=("face", crown),
        )  # fmt: skip
        chin = crown - 0.060 * size * up + 0.016 * size * front
        self.add(
            crown - 0.02 * size * up + 0.008 * front, chin, (radius * 0.92, 0.024 * size), frame * (0.88, 1.0, 1.0),
            ((1.0, skin),), decal=("face", crown),
        )  # fmt: skip
        nose = crown - 0.028 * size * up + 0.055 * size * front
        self.add(nose + 0.016 * size * up, nose, (0.006 * size, 0.0095 * size), frame, ((1.0, skin),))
        for out in (-1.0, 1.0):
            ear = crown + out * 0.045 * size * side - 0.02 * size * up
            self.add(ear, ear, (0.014 * size, 0.014 * size), frame * (0.45, 1.0, 0.7), ((1.0, skin),))
        if outfit.hair_style == "bald":
            return
        cap = crown + 0.006 * size * up - 0.012 * size * front
        nape = crown - 0.02 * size * up - 0.018 * size * front
        self.add(cap, nape, (radius * 1.06, radius * 0.96), frame * (0.9, 1.0, 1.05), ((1.0, hair),))
        self._long_hair(crown, size)

    def _long_hair(self, crown: F64, size: float) -> None:
        """What hangs down or sticks out behind the skull."""
        frame, hair = self.skeleton.frames["head"], self.outfit.hair
        _, up, front = frame.T
        down = np.array([0.0, -1.0, 0.0])  # loose hair follows gravity, which is down in camera axes
        back = crown - 0.03 * size * up - 0.035 * size * front
        match self.outfit.hair_style:
            case "long":
                tip = back + 0.06 * down - 0.06 * up
                self.add(back, tip, (0.045 * size, 0.03 * size), frame * (1.15, 1.0, 0.7), ((1.0, hair),))
            case "bun":
                knot = crown + 0.03 * size * up - 0.05 * size * front
                self.add(knot, knot, (0.026 * size, 0.026 * size), frame, ((1.0, hair),))
            case "tail":
                root = crown + 0.01 * size * up - 0.058 * size * front
                tip = root + 0.09 * down - 0.03 * front
                self.add(root, tip, (0.016 * size, 0.010 * size), frame, ((1.0, hair),))
            case _:
                pass

    def arm(self, side: Side) -> None:
        joints, frames, outfit = self.skeleton.joints, self.skeleton.frames, self.outfit
        girth = 0.35 + 0.65 * self.body.girth - 0.08 * self.body.femininity
        shoulder, elbow, wrist, hand = (joints[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hand"))
        upper, lower, palm = (frames[f"{side}_{name}"] for name in ("upper_arm", "lower_arm", "hand"))
        skin, shirt, sleeve = outfit.skin, outfit.shirt, outfit.sleeve
        covered = min(1.0, 2.0 * sleeve)
        self.add(shoulder, elbow, (0.042 * girth, 0.029 * girth), upper, _covered(covered, shirt, skin))
        biceps = shoulder + 0.5 * (elbow - shoulder) + 0.008 * upper[:, 2]
        self.add(
            shoulder + 0.25 * (elbow - shoulder), biceps, (0.034 * girth, 0.034 * girth), upper,
            _covered(4.0 * covered - 1.0, shirt, skin),
        )  # fmt: skip
        covered_lower = 2.0 * sleeve - 1.0
        belly = elbow + 0.28 * (wrist - elbow)
        forearm = _covered(covered_lower, shirt, skin)
        self.add(elbow, belly, (0.0285 * girth, 0.03 * girth), lower, forearm)
        self.add(belly, wrist, (0.03 * girth, 0.0185 * girth), lower, forearm)
        if outfit.loose > 0.0 and sleeve > 0.0:
            width = 0.040 * girth + outfit.loose
            stop = shoulder + min(1.0, covered) * (elbow - shoulder)
            self.add(shoulder, stop, (width, width - 0.004), upper, ((1.0, shirt),))
            if covered_lower > 0.0:
                cuff = elbow + covered_lower * (wrist - elbow)
                self.add(elbow, cuff, (width - 0.004, 0.022 * girth + outfit.loose), lower, ((1.0, shirt),))
        knuckles = wrist + 0.55 * (hand - wrist)
        flat = palm * (0.55, 1.0, 1.0)  # the palm faces the thigh when the arm hangs
        self.add(wrist, knuckles, (0.021, 0.026), flat, ((1.0, skin),))
        curl = palm[:, 2] * 0.012
        self.add(knuckles, hand + curl, (0.024, 0.013), flat, ((1.0, skin),))
        thumb = wrist + 0.35 * (hand - wrist)
        self.add(thumb, thumb - 0.028 * palm[:, 1] + 0.026 * palm[:, 2], (0.012, 0.009), palm, ((1.0, skin),))

    def leg(self, side: Side) -> None:
        joints, frames, outfit = self.skeleton.joints, self.skeleton.frames, self.outfit
        girth = 0.25 + 0.75 * self.body.girth
        hip, knee, ankle = (joints[f"{side}_{name}"] for name in ("hip", "knee", "ankle"))
        upper, lower = frames[f"{side}_upper_leg"], frames[f"{side}_lower_leg"]
        skin, cloth = outfit.skin, outfit.trousers
        covered = min(1.0, 2.0 * outfit.legging)
        thigh = _covered(covered, cloth, skin)
        root = 0.62 * hip  # the bone starts further inside than where annotators put the hip
        self.add(root, knee, (0.066 * girth, 0.042 * girth), upper * (0.94, 1.0, 1.0), thigh)
        inner = root - 0.02 * upper[:, 1]
        quad = root + 0.45 * (knee - root) + 0.008 * upper[:, 2]
        self.add(inner, quad, (0.066 * girth, 0.058 * girth), upper, _covered(2.2 * covered, cloth, skin))
        calf_cover = 2.0 * outfit.legging - 1.0
        self._shank(knee, ankle, lower, calf_cover)
        if outfit.loose > 0.0 and outfit.legging > 0.0:
            width = 0.060 * girth + outfit.loose
            stop = root + covered * (knee - root)
            knee_width = max(0.044 * girth + outfit.loose, width * (1.0 - 0.3 * covered))
            self.add(root, stop, (width, knee_width), upper, ((1.0, cloth),))
            if calf_cover > 0.0:
                hem = knee + calf_cover * (ankle - knee)
                self.add(knee, hem, (knee_width, 0.032 * girth + outfit.loose), lower, ((1.0, cloth),))
        self.foot(side)

    def _shank(self, knee: F64, ankle: F64, frame: F64, covered: float) -> None:
        """Knee to ankle, bulging at the calf; trousers cover it from above and socks from below."""
        outfit = self.outfit
        girth = 0.25 + 0.75 * self.body.girth
        calf = knee + 0.30 * (ankle - knee) - 0.010 * frame[:, 2]
        sock_from = 1.0 - outfit.sock

        def zones(low: float, high: float) -> Zones:
            """Materials of the stretch `low`..`high` of the shank, in the stretch's own s."""
            span = high - low
            bare = _covered((covered - low) / span, outfit.trousers, outfit.skin)
            socked = (sock_from - low) / span
            if outfit.sock <= 0.0 or socked >= 1.0:
                return bare
            kept = tuple((bound, material) for bound, material in bare if bound < socked)
            following = next(material for bound, material in bare if bound >= max(socked, 0.0))
            return (*kept, (max(socked, 0.0), following), (1.0, outfit.socks))

        self.add(knee, calf, (0.042 * girth, 0.043 * girth), frame, zones(0.0, 0.3))
        self.add(calf, ankle, (0.043 * girth, 0.0245 * girth), frame, zones(0.3, 1.0))

    def foot(self, side: Side) -> None:
        joints, frame, outfit = self.skeleton.joints, self.skeleton.frames[f"{side}_toe"], self.outfit
        ankle, toe = joints[f"{side}_ankle"], joints[f"{side}_toe"]
        thick = 0.0 if outfit.barefoot else 0.005
        shoes: Zones = ((1.0, outfit.shoes),)
        sole = -0.020 * frame[:, 2]  # the frame's front is the back of the foot, so the sole lies opposite
        heel = ankle + 0.030 * frame[:, 1] + sole
        ball = ankle + 0.68 * (toe - ankle) + 1.1 * sole
        self.add(ankle, ball, (0.027 + thick, 0.022 + thick), frame * (1.15, 1.0, 0.9), shoes)
        self.add(heel, ball, (0.025 + thick, 0.024 + thick), frame * (1.1, 1.0, 0.75), shoes)
        self.add(ball, toe + 1.2 * sole, (0.026 + thick, 0.017 + thick), frame * (1.35, 1.0, 0.7), shoes)


def _covered(share: float, cloth: int, skin: int) -> Zones:
    """Zones of a bone whose first `share` is covered."""
    if share >= 1.0:
        return ((1.0, cloth),)
    return ((1.0, skin),) if share <= 0.0 else ((share, cloth), (1.0, skin))


def build_body(body: Proportions, outfit: Outfit, skeleton: Skeleton) -> tuple[Flesh, ...]:
    """Puts flesh, hair and clothes on a skeleton: about 50 cones in camera axes, statures."""
    builder = _Builder(body, outfit, skeleton)
    builder.trunk()
    builder.head()
    for side in SIDES:
        builder.arm(side)
        builder.leg(side)
    return tuple(builder.cones)


def joint_radii(body: Proportions, outfit: Outfit) -> Mapping[str, float]:
    """How deep below the surface of its own limb each keypoint lies at most, statures."""
    arm, leg = 0.35 + 0.65 * body.girth, 0.25 + 0.75 * body.girth
    sleeve = outfit.loose if outfit.sleeve > 0.0 else 0.0
    trouser = outfit.loose if outfit.legging > 0.0 else 0.0
    return {
        "ankle": 0.034 * leg + trouser,
        "knee": 0.046 * leg + trouser,
        "hip": 0.074 * leg + trouser,
        "wrist": 0.028 * arm + sleeve,
        "elbow": 0.032 * arm + sleeve,
        "shoulder": 0.05 * arm + sleeve,
        "neck": 0.055 * body.girth,
        "head_top": 0.02,
    }
