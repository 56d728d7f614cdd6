"""Scenes: pictures and captions that fit each other, fixed by (number, seed), and as ambiguous as intended."""

from d2s.shards.scenes import plan, scene


def test_every_caption_is_true_of_its_own_scene():
    for entry in plan({"train": 200}, seed=1, size=64):
        drawn = scene(entry.number, 1, 64)
        for caption in (*drawn.sparse_captions, drawn.dense_caption):
            assert caption.holds(drawn.content), caption.text
