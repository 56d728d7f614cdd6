"""Proof that a refactoring changes no number: the same bits from two commits.

    python tests/same_bits.py --against HEAD~1        # records that commit, then this tree, and compares
    python tests/same_bits.py --record FILE           # this tree alone

What is compared: the bytes of a shard build; the losses of 30 steps of every small recipe, on one and on two workers;
the embeddings of a saved model; every loss's value and gradients, by the CPU implementation and by the Triton kernels
in their interpreter. Against another commit, this tree also has to read what that one wrote: it embeds with its
models and resumes its runs to the same losses. Everything runs on one thread, which makes it repeatable.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [
    f"{data}_small_{part}" for data in ("scenes", "flickr8k") for part in ("pretrain", "finetune", "align")
]
STEPS, SAVED_AT = 30, 20
SHARDS = (
    "-m d2s.shard build --source scenes --count train=256,val=48,test=48 --size 64 --workers 2 --out".split()
)
EMBEDDINGS = """
import hashlib, json, sys, numpy as np
from d2s import D2SModel
model = D2SModel.from_pretrained(sys.argv[1])
texts = ["a red ball", "two dogs run on the beach", "and a long caption. " * 12]
rng = np.random.default_rng(0)
from PIL import Image
images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(3)]
out = {"text": model.encode_text(texts), "image": model.encode_image(images)}
print(json.dumps({k: hashlib.sha256(np.asarray(v).tobytes()).hexdigest() for k, v in out.items()}))
"""
LOSSES = """
import hashlib, json, os, torch
torch.set_num_threads(1)
from d2s import kernels as K
n, d = 40, 24
def made(*shape, dtype, grad=True, unit=True):
    x = torch.randn(*shape, dtype=torch.float64)
    x = torch.nn.functional.normalize(x, dim=-1) if unit else x
    return x.to(dtype).requires_grad_(grad)
out = {}
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    a, b, t, f = (made(n, d, dtype=dtype) for _ in range(4))
    ids = torch.arange(n) // 2
    scale = torch.tensor([10.0], dtype=dtype, requires_grad=True)
    bias = torch.tensor([-5.0], dtype=dtype, requires_grad=True)
    tokens, weights = made(6, 9, d, dtype=dtype, unit=False), made(6, 9, dtype=dtype, unit=False)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 9, 2, 7])[:, None]
    half = a.detach()[:20].clone().requires_grad_()
    cases = {
        "hinge max": (lambda: K.hinge_loss(a, b, ids), (a, b)),
        "hinge max rows": (lambda: K.hinge_loss(half, b, ids[:20], ids, offset=0, both=False), (half, b)),
        "hinge sum": (lambda: K.hinge_loss(a, b, ids, hardest=False), (a, b)),
        "hinge sum rows": (lambda: K.hinge_loss(half, b, ids[:20], ids, hardest=False, both=False), (half, b)),
        "info_nce": (lambda: K.info_nce_loss(a, b, ids, scale=scale), (a, b, scale)),
        "info_nce rows": (lambda: K.info_nce_loss(half, b, ids[:20], ids, scale=scale, both=False), (half, b, scale)),
        "sigmoid": (lambda: K.sigmoid_loss(a, b, ids, scale=scale, bias=bias), (a, b, scale, bias)),
        "relational": (lambda: K.relational_distillation(a, t.detach(), temperature=0.1), (a,)),
        "gpo": (lambda: K.gpo_pool(tokens, weights, mask).square().sum(), (tokens, weights)),
    }
    for kind in ("cosine", "l1", "l2"):
        cases[f"pointwise {kind}"] = (lambda kind=kind: K.pointwise_distillation(a, t.detach(), kind=kind), (a,))
    for name, (loss, sides) in cases.items():
        value = loss()
        grads = torch.autograd.grad(value, sides)
        digest = hashlib.sha256(b"".join(g.contiguous().numpy().tobytes() for g in grads)).hexdigest()
        out[f"{name} {dtype}"] = [value.item().hex(), digest]
    ranks = K.retrieval_ranks(a.detach(), b.detach(), query_ids=ids, candidate_ids=ids)
    out[f"ranks {dtype}"] = ranks.tolist()
print(json.dumps(out))
"""


def python(tree: Path, arguments: list[str], env: dict[str, str] | None = None) -> subprocess.Popen:
    """A Python process that imports d2s from `tree`, on one thread, with its output kept."""
    base = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    base |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "D2S_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    base |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tree,
        env=base,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(*processes: subprocess.Popen) -> str:
    """The first one's output, once all have ended; SystemExit with what a failed one said."""
    results = [process.communicate(timeout=1200) for process in processes]
    for process, (out, error) in zip(processes, results, strict=True):
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, process.args))} failed:\n{out[-3000:]}\n{error[-6000:]}")
    return results[0][0]


def train(tree: Path, workers: int, arguments: list[str]) -> None:
    """The training command on so many processes, as a launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
        }
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(workers)
    ]
    finish(*(python(tree, ["d2s/train.py", *arguments], rank) for rank in ranks))


def losses(run: Path) -> list:
    """Every step's numbers that do not depend on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fields = ("step", "loss", "align", "distill", "lr", "grad_norm", "rsum")
    return [[row["kind"], *(row.get(name) for name in fields)] for row in rows]


def options(tree: Path) -> list[str]:
    """Overrides of every run; a tree of before the rooms has the older names of two fields."""
    new = (tree / "d2s/training").is_dir()
    save = "--checkpoint.every_steps" if new else "--log.save_steps"
    return f"--max_steps {STEPS} --log.every 1 --batch_size 64 --seed 3 {save} {SAVED_AT}".split()


def record(tree: Path, work: Path, recipes: list[str]) -> dict:
    """Everything that `tree` computes, with its data and runs left in `work`."""
    found: dict = {}
    data = work / "scenes"
    finish(python(tree, [*SHARDS, str(data)]))
    files = sorted(path for path in data.rglob("*") if path.is_file())
    found["shards"] = {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    for name, env in (("chunked", {}), ("triton", {"D2S_KERNELS": "triton", "TRITON_INTERPRET": "1"})):
        found[f"losses, {name}"] = json.loads(finish(python(tree, ["-c", LOSSES], env)))
    for workers in (1, 2):
        for recipe in recipes:
            run = work / f"{recipe}-{workers}"
            start = ["--init", str(work / f"{recipe.replace('finetune', 'pretrain')}-{workers}")]
            source = start if recipe.endswith("finetune") else ["--data", str(data)]
            print(f"{tree.name}: {recipe} on {workers}", file=sys.stderr, flush=True)
            train(tree, workers, [recipe, "--run", str(run), *source, *options(tree)])
            found[run.name] = losses(run)
            if workers == 1:
                found[f"{run.name} embeddings"] = embed(tree, run / "best")
    return found


def embed(tree: Path, model: Path) -> dict:
    return json.loads(finish(python(tree, ["-c", EMBEDDINGS, str(model)])))


def read_by_another(tree: Path, work: Path, copies: Path, recipes: list[str]) -> dict:
    """What `tree` makes of the runs that another commit left: embeddings, and the losses of a resumed copy."""
    found = {}
    for recipe in recipes:
        found[f"{recipe}-1 embeddings"] = embed(tree, work / f"{recipe}-1" / "best")
        old, run = work / f"{recipe}-2", copies / f"{recipe}-2"
        shutil.copytree(old, run)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
        shutil.rmtree(run / "last")
        start = ["--init", str(work / f"{recipe.replace('finetune', 'pretrain')}-2")]
        source = start if recipe.endswith("finetune") else ["--data", str(work / "scenes")]
        train(tree, 2, [recipe, "--run", str(run), "--resume", *source, *options(tree)])
        found[old.name] = losses(run)
    return found


def differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """The dotted names at which two records differ."""
    found = []
    for name in sorted({*before, *after}, key=str):
        a, b = before.get(name), after.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}: ")
        elif a != b:
            found.append(f"{prefix}{name}: {str(a)[:160]} -> {str(b)[:160]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write this tree's record to FILE and leave"
    )
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="folder for the other commit's record, to be used again"
    )
    parser.add_argument(
        "--recipes", nargs="+", default=RECIPES, help="only these (a finetune needs its pretrain)"
    )
    options_ = parser.parse_args()
    if bool(options_.record) == bool(options_.against):
        parser.error("give either --record FILE or --against COMMIT")
    with tempfile.TemporaryDirectory() as temporary:
        if options_.record:
            found = record(ROOT, Path(temporary), options_.recipes)
            options_.record.write_text(json.dumps(found, indent=1))
            return 0
        keep = options_.keep or Path(temporary) / "before"
        before_file = keep / "record.json"
        if not before_file.is_file():
            keep.mkdir(parents=True)
            tree = Path(temporary) / "tree"
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), options_.against],
                check=True,
            )
            try:
                before_file.write_text(json.dumps(record(tree, keep, options_.recipes), indent=1))
            finally:
                subprocess.run(
                    ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True
                )
        before = json.loads(before_file.read_text())
        after = record(ROOT, Path(temporary) / "after", options_.recipes)
        wrong = differences({name: before.get(name) for name in after}, after)
        read = read_by_another(ROOT, keep, Path(temporary) / "copies", options_.recipes)
        wrong += [f"read by this tree: {line}" for line in differences({n: before[n] for n in read}, read)]
    for line in wrong:
        print(line)
    print(f"{len(after)} records compared, {len(read)} read again, {len(wrong)} differences")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
