"""The table of tuned tiles: what is damaged is named, and what nobody asks for does not pass silently."""

import json
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from d2s.kernels.fused import tiles

TILE = {"rows": 64, "columns": 32, "depth": 16, "warps": 4, "stages": 3}
KEY = "hinge_max_sweep/sm_90/512/half"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table lies for now."""
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
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("\udcff", "can't decode byte 0xff"),
        ("[" * 10**5, "recursion"),
        ("[]", "holds no table of tiles"),
        ("null", "holds no table of tiles"),
        ({KEY: None}, f"{KEY}: must hold rows, columns, depth, warps, stages and nothing else"),
        ({KEY: {}}, f"{KEY}: must hold rows, columns, depth, warps, stages and nothing else"),
        ({KEY: TILE | {"row": 1}}, f"{KEY}: must hold rows, columns, depth, warps, stages and nothing else"),
        ({KEY: TILE | {"rows": "64"}}, f"{KEY}: rows: '64': must be a whole number above 0"),
        ({KEY: TILE | {"rows": 64.0}}, f"{KEY}: rows: 64.0: must be a whole number above 0"),
        ({KEY: TILE | {"warps": True}}, f"{KEY}: warps: True: must be a whole number above 0"),
        ({KEY: TILE | {"stages": 0}}, f"{KEY}: stages: 0: must be a whole number above 0"),
        ({KEY: TILE | {"columns": 48}}, f"{KEY}: columns: 48: must be a power of two"),
    ],
)
def test_a_damaged_table_is_named_with_the_entry_and_the_remedy(table, x, text, expected):
    text = text if isinstance(text, str) else json.dumps(text)
    table.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="restore it with git, or delete it and run") as caught:
        tiles.tile_for("hinge_max_sweep", x)
    assert str(caught.value).startswith(f"{table}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_table_every_kernel_takes_its_default(table, x):
    assert tiles.tile_for("hinge_max_sweep", x) == tiles.default_tile("hinge_max_sweep", 512, True, (9, 0))


@pytest.mark.filterwarnings("error")
def test_an_entry_is_taken_and_no_reason_to_warn(table, x):
    table.write_text(json.dumps({KEY: TILE, "ranks_count/sm_120/1152/float": TILE}), encoding="utf-8")
    assert tiles.tile_for("hinge_max_sweep", x) == tiles.Tile(**TILE)


@pytest.mark.parametrize(
    "key",
    [
        "nonsense/sm_90/512/half",
        "hinge_max_sweep/sm_90/500/half",
        "hinge_max_sweep/90/512/half",
        "hinge_max_sweep/sm_90/512/bf16",
        "hinge_max_sweep",
        "",
    ],
)
def test_an_entry_that_no_kernel_asks_for_is_warned_of(table, key):
    table.write_text(json.dumps({KEY: TILE, key: TILE}), encoding="utf-8")
    with pytest.warns(UserWarning, match=re.escape(f"{table}: no kernel asks for {key!r}") + "$"):
        assert tiles.tuned_tiles()[KEY] == TILE


def test_the_committed_table_is_whole():
    tiles.read_tiles(tiles.TABLE)
