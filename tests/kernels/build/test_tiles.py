"""The table of tuned tiles: an entry is used, a damaged table is named."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from d2s.kernels.fused import ALL_SPECS, tiles

TILE = {"rows": 64, "columns": 32, "depth": 16, "warps": 4, "stages": 3}
KEY = "hinge_max_sweep/sm_90/512/half"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table is for now."""
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tiles.tuned_tiles.cache_clear()
    yield tiles.TABLE
    tiles.tuned_tiles.cache_clear()


@pytest.fixture
def x(monkeypatch):
    """Embeddings as far as a tile depends on them, on an H100 that need not be here."""
    monkeypatch.setattr(tiles.torch.cuda, "get_device_capability", lambda device: (9, 0))
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), element_size=lambda: 2, shape=(8, 512))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "line 1: not JSON"),
        ("\udcff", "not UTF-8"),
        ("[]", "no attribute 'items'"),
        ({KEY: None}, "must be a mapping"),
        ({KEY: TILE | {"row": 1}}, "unexpected keyword argument 'row'"),
        ({KEY: {"rows": 64}}, "missing 4 required"),
    ],
)
def test_a_damaged_table_is_named_with_the_remedy(table, x, text, expected):
    text = text if isinstance(text, str) else json.dumps(text)
    table.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="restore it with git, or delete it and run") as caught:
        tiles.tile_for("hinge_max_sweep", x)
    assert str(caught.value).startswith(f"{table}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_table_every_kernel_takes_its_default(table, x):
    assert tiles.tile_for("hinge_max_sweep", x) == tiles.default_tile("hinge_max_sweep", 512, True, (9, 0))


def test_an_entry_is_taken(table, x):
    table.write_text(json.dumps({KEY: TILE}), encoding="utf-8")
    assert tiles.tile_for("hinge_max_sweep", x) == tiles.Tile(**TILE)


def test_every_entry_of_the_committed_table_is_asked_for():
    tiles.tuned_tiles.cache_clear()
    for key in tiles.tuned_tiles():
        kernel, _, width, _ = key.split("/")
        assert kernel in {spec.tile_name for spec in ALL_SPECS}
        assert int(width) in tiles.BUCKETS
