# Everything here sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt
TOY = runs/demo/seed-$(SEED)

.PHONY: install install-test demo compare lint test test-slurm test-faults test-launchers test-transformers bench-model bench-data bench-train clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing torch and what dssk needs into .venv, once: 1 to 6 GB by the build of torch, and as"
	@echo "long as your connection takes; every later command starts at once."
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

install-test: .venv/.installed-test

.venv/.installed-test: .venv/.installed
	@echo "Installing what the tests need, once."
	$(PIP) -e ".[test]"
	touch $@

# The main job on the embedded default: base model, encoded contexts, trained blocks, scores. It asks no network.
demo compare: export HF_HUB_OFFLINE = 1
demo: install
	$(BIN)/dssk base --dataset toy --seed $(SEED) --output $(TOY)/base
	$(BIN)/dssk preproc --dataset toy --seed $(SEED) --embedding_model $(TOY)/base \
		--maximum_input_length 256 --batch_size 64 --data_cache_path $(TOY)
	$(BIN)/dssk train -e crossattn_tiny --set model_path=$(TOY)/base --set seed=$(SEED) \
		--data_path $(TOY)/processed_data/base -sb $(TOY)/runs -r 1 --steps 800 --log_every 200
	$(BIN)/dssk evaluate --checkpoint $(TOY)/runs --data_path $(TOY)/processed_data/base
	@printf '%s\n' "" "Next:" "  source .venv/bin/activate" \
		"  dssk report $(TOY)/runs                 # the run as one page, with sample answers" \
		"  dssk answer --checkpoint $(TOY)/runs --library $(TOY)/processed_data/base   # ask; /quit ends" \
		"  make compare                                       # beside prompting and fine-tuning, in minutes"

# Cached contexts beside prompting, prefix caching and fine-tuned prompting on the demo's base, and a report of it all.
compare: install
	$(PIP) --quiet -e ".[compare]"
	@ls $(TOY)/runs/*/final/dssk_manifest.json > /dev/null 2>&1 || $(MAKE) demo
	$(BIN)/dssk compare --checkpoint $(TOY)/runs --data_path $(TOY)/processed_data/base \
		--seed $(SEED) --output runs/compare
	$(BIN)/dssk report $(TOY)/runs --compare runs/compare --output runs/compare/report.html

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist worksteal --durations=15

# A real Slurm of two nodes on this machine; tests/cluster/install_slurm.sh installs it.
test-slurm: install-test
	$(BIN)/pytest -m slurm --durations=0

# What breaks commands: mutated inputs, flipped bytes, kills, two at once, and faults in the package itself. Each figure
# is the last line of its command; all in all up to an hour.
test-faults: install-test
	$(BIN)/python -m tests.faults.mutants
	$(BIN)/python -m tests.faults.fuzz --count 2500 --minutes 15
	$(BIN)/python -m tests.faults.flip --count 500 --minutes 5
	$(BIN)/python -m tests.faults.kill --count 20 --minutes 10
	$(BIN)/python -m tests.faults.race --count 6 --minutes 5
	$(BIN)/python -m tests.faults.train_faults term --count 10

# Every launcher on two CPU ranks. It installs DeepSpeed, which compiles for about a minute on its first run.
test-launchers: install-test
	$(PIP) -e ".[test,deepspeed]" ninja
	$(BIN)/python -m tests.faults.launchers
	$(BIN)/python -m tests.faults.launchers zero3 fsdp2 --family llama

# transformers' own common model tests on our classes. Its source comes through pip, into the user's cache folder.
test-transformers: install-test
	$(BIN)/pip install --quiet -c constraints.txt parameterized
	$(BIN)/python -m tests.suites.transformers_common

# At most ten minutes each; results go to benchmarks/results/.
bench-model bench-data bench-train: bench-%: install-test
	$(BIN)/python benchmarks/bench_$*.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
