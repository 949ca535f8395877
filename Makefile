# Every target works on a fresh machine with Python 3.11+ and make: the first one that runs makes the environment.
PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?=
ARGS   ?=
JSON   ?=
CALIB  ?=
TEXT   ?=
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test check format bench-cpu bench-memory bench-step bench-loader-memory bench-quality bench-gpu parity tune-gpu kernels-check kernels-check-all kernels-check-oldest docker-check clean environment environment-dev

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

environment:
	@$(PYTHON) scripts/create_environment.py

environment-dev:
	@$(PYTHON) scripts/create_environment.py --dev

serve: environment ## serve the demo model, or MODEL=directory-or-hub-name, on HOST and PORT
	@$(BIN)/awq-serve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: check ## lint, types, import rules and the whole test suite
	@$(BIN)/pytest $(ARGS)

check: environment-dev ## lint, format, types and import rules, without the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: environment-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: environment-dev ## decode and prefill speed beside llama.cpp on this machine; JSON=path keeps the figures
	$(BIN)/python -m benchmarks.cpu $(if $(JSON),--json $(JSON))

bench-memory: environment-dev ## what quantizing takes in memory, beside its bound, on a random model; ARGS=options
	$(BIN)/python -m benchmarks.quantizer_memory $(if $(JSON),--json $(JSON)) $(ARGS)

bench-step: environment-dev ## what a step costs the CPU around the model, for 1 to 256 sequences; JSON=path keeps the figures
	$(BIN)/python -m benchmarks.step_overhead $(if $(JSON),--json $(JSON)) $(ARGS)

bench-loader-memory: environment-dev ## what loading takes of the host's memory, beside its bound, on a random model; ARGS=options
	$(BIN)/python -m benchmarks.loader_memory $(if $(JSON),--json $(JSON)) $(ARGS)

bench-quality: environment-dev ## quality beside llm-compressor and AutoRound, calibrated on CALIB=file, measured on TEXT=files
	$(BIN)/python -m benchmarks.quality $(if $(CALIB),--calib $(CALIB)) $(TEXT:%=--text %) $(if $(JSON),--json $(JSON)) $(ARGS)

parity: environment-dev ## how far the decoder is from transformers, on tiny models of every family; ARGS="NAME ..."
	$(BIN)/python -m benchmarks.parity $(ARGS)

bench-gpu: environment-dev ## check and time every kernel on a GPU in nine minutes; without one, a rehearsal. ARGS="--out DIR"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

tune-gpu: environment-dev ## time other tiles on the shapes that miss their goal; the better ones go into kernels/tuned_tiles.json
	$(BIN)/python benchmarks/gpu.py --phases machine,linear,tune --minutes 20 --tiles kernels/tuned_tiles.json $(ARGS)

kernels-check: environment-dev ## compile every Triton kernel and tile for every GPU architecture, without a GPU
	$(BIN)/python -m kernels.compile --sample $(ARGS)

kernels-check-all: environment-dev ## the same for every combination of tile, dtype, bits and group size
	$(BIN)/python -m kernels.compile $(ARGS)

kernels-check-oldest: environment-dev ## the same with the oldest Triton that is supported, in a directory of its own
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .triton-3.6 'triton==3.6.*'
	PYTHONPATH=.triton-3.6 $(BIN)/python -m kernels.compile $(ARGS)

docker-check: environment-dev ## run the Dockerfile's steps as far as a machine without a Docker daemon allows
	bash docker/check.sh

clean: ## remove the environments and the caches; models and jobs stay
	rm -rf .venv .venv-bench .triton-3.6 .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
