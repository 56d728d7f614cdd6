"""Whether a caption of the scenes is true of a scene, by its claims."""

from d2s.shards.scenes.captions import Caption
from d2s.shards.scenes.claims import Both, Claim, Ground, Number, Some, related
from d2s.shards.scenes.world import Content


def is_true(caption: Caption, scene: Content) -> bool:
    return all(_holds(claim, scene) for claim in caption.claims)


def _holds(claim: Claim, scene: Content) -> bool:
    match claim:
        case Some(pattern):
            return any(pattern.fits(thing) for thing in scene.things)
        case Ground(background):
            return scene.background == background
        case Number(pattern, count):
            return sum(pattern.fits(thing) for thing in scene.things) == count
        case Both(first, second, relation):
            pairs = ((a, b) for a in scene.things for b in scene.things if a is not b)
            fitting = ((a, b) for a, b in pairs if first.fits(a) and second.fits(b))
            return any(relation is None or related(a, relation, b) for a, b in fitting)
