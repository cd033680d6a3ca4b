# Everything here sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
DEMO := runs/demo
TOY = $(DEMO)/seed-$(SEED)

.PHONY: install demo compare lint test test-slurm test-launchers bench-model bench-data bench-train clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# The main job on the embedded default: base model, encoded contexts, trained blocks, scores.
demo: install
	$(BIN)/python -m dssk.models.make_base --dataset toy --seed $(SEED) --output $(DEMO)/seed-$(SEED)/base
	$(BIN)/python dssk/data/preproc_nq.py --dataset toy --seed $(SEED) --embedding_model $(DEMO)/seed-$(SEED)/base \
		--maximum_input_length 256 --batch_size 64 --data_cache_path $(DEMO)/seed-$(SEED)
	$(BIN)/python trainval.py -e crossattn_tiny --set model_path=$(DEMO)/seed-$(SEED)/base --set seed=$(SEED) \
		--data_path $(DEMO)/seed-$(SEED)/processed_data/base -sb $(DEMO)/seed-$(SEED)/runs -r 1 \
		--steps 800 --log_every 200
	$(BIN)/python -m dssk.evaluation.evaluate --checkpoint $(DEMO)/seed-$(SEED)/runs \
		--data_path $(DEMO)/seed-$(SEED)/processed_data/base --output $(DEMO)/scores.json

# Cached contexts beside prompting, prefix caching and fine-tuned prompting on the demo's base, and a report of it all.
compare: install
	@ls $(TOY)/runs/*/final/dssk_manifest.json > /dev/null 2>&1 || $(MAKE) demo
	$(BIN)/python -m dssk.evaluation.compare --checkpoint $(TOY)/runs --data_path $(TOY)/processed_data/base \
		--seed $(SEED) --output runs/compare
	$(BIN)/python -m dssk.report $(TOY)/runs --compare runs/compare --output runs/compare/report.html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --durations=15

# A real Slurm of two nodes on this machine; tests/cluster/install_slurm.sh installs it.
test-slurm: install
	$(BIN)/pytest -m slurm --durations=0

# Every launcher on two CPU ranks. It installs DeepSpeed, which compiles for about a minute on its first run.
test-launchers: install
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,deepspeed]" ninja
	$(BIN)/python -m tests.faults.launchers

# At most ten minutes each; results go to benchmarks/results/.
bench-model bench-data bench-train: bench-%: install
	$(BIN)/python benchmarks/bench_$*.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
