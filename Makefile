# Everything here sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
SEED ?= 0
MINUTES ?= 30
GROUP ?= merged_smollm2-135m
LAYERS ?= $(if $(findstring replay_two,$(GROUP)),9+18,18)
SPACE := $(subst ,, )
# What is trained, and on what, names its folder: another one does not meet it. More MINUTES go on in the same.
REAL ?= runs/$(subst $(SPACE),-,$(strip real $(filter-out merged_smollm2-135m,$(GROUP)) $(LONGEST) \
	$(if $(ALL),all) $(patsubst %,seed-%,$(filter-out 0,$(SEED)))))
BIN := .venv/bin
# Python compiles what it imports and keeps it; pip would compile every file of every library, which takes longer than
# to unpack them. Where Python may not keep it, as in many containers, each command would compile them again, in 25 s.
PIP := $(BIN)/pip install --disable-pip-version-check --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
TOY = runs/demo/seed-$(SEED)

.PHONY: install install-test demo compare real lint test test-slurm test-faults test-launchers test-transformers bench-model bench-data bench-train clean

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

# The merged reader on a real pretrained base and real questions: MINUTES of one core train it, whatever is left off goes
# on, and MINUTES=120 goes on longer. DATA=FOLDER names local files; without it they come from the Hub.
# GROUP=merged_replay_smollm2-135m answers better and reads slower, GROUP=merged_replay_two_smollm2-135m better still, at
# twice the bytes; LONGEST=2400 trains on longer paragraphs, too, ALL=1 on half as many questions more.
real: export OMP_NUM_THREADS = 1
real: install
	$(PIP) --quiet -e ".[gguf,compare]"
	$(BIN)/dssk base smollm2 --output $(REAL)/base
	$(BIN)/dssk real --output $(REAL)/sets $(if $(DATA),--data $(DATA)) $(if $(LONGEST),--longest $(LONGEST)) $(if $(ALL),--all_questions)
	$(BIN)/dssk preproc --embedding_model $(REAL)/base --dataset $(REAL)/sets/train.jsonl \
		--val_dataset $(REAL)/sets/val.jsonl --text_only --data_cache_path $(REAL)/train
	$(BIN)/dssk preproc --embedding_model $(REAL)/base --dataset $(REAL)/sets/xquad.jsonl --val_fraction 0 \
		--encode_layer $(LAYERS) --data_cache_path $(REAL)/xquad
	$(BIN)/dssk preproc --embedding_model $(REAL)/base --dataset $(REAL)/sets/nq_swap.jsonl --val_fraction 0 \
		--encode_layer $(LAYERS) --data_cache_path $(REAL)/nq_swap
	$(BIN)/dssk train -e $(GROUP) --set model_path=$(REAL)/base --set seed=$(SEED) \
		--data_path $(REAL)/train/processed_data/base -sb $(REAL)/runs --steps 1_000_000 --minutes $(MINUTES) \
		--log_every 50 --generation_eval_samples 16
	$(BIN)/dssk compare --checkpoint $(REAL)/runs --data_path $(REAL)/train/processed_data/base \
		--systems merged,prompted_examples --controls with_context,no_context,wrong_context \
		--eval xquad=$(REAL)/xquad/processed_data/base --eval nq_swap=$(REAL)/nq_swap/processed_data/base \
		--medium_cost false --output $(REAL)/compare
	$(BIN)/dssk report $(REAL)/runs --compare $(REAL)/compare --data xquad --output $(REAL)/report.html

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
