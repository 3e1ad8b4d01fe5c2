# make demo       from nothing: a tiny TiTok trained, evaluated, exported; its tokens; a tiny GPT; pictures; says where all is
# make test       tests of a few minutes           make test-all   the slow ones, too
# make lint       ruff                             make types      mypy
# make check      lint, types, test: what CI runs  make bench      benchmarks
# make clean      caches and build products (not .venv, not runs)
#
# The first target makes .venv with `python3 -m venv` and pip; nothing else is needed. PYTHON=… picks another Python.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DEMO := runs/demo
# Two test processes with one thread each; ARGS="-k name" picks tests.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint types links check bench clean

help:
	@sed -n 's/^# \{0,1\}//; 1,8p' Makefile

venv: $(READY)

# Made anew only when pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version 2>&1) found, Smalti needs Python 3.11 or newer; make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "error: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "setting up .venv (once; some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python train.py experiment=titok scale=tiny run=$(DEMO)/titok
	$(BIN)/python evaluate.py model_path=$(DEMO)/titok/export
	@rm -rf $(DEMO)/tokenizer
	$(BIN)/python export.py run=$(DEMO)/titok output=$(DEMO)/tokenizer
	$(BIN)/python encode.py data=shapes model_path=$(DEMO)/tokenizer output=$(DEMO)/tokens views=flip batch_size=64
	$(BIN)/python train.py experiment=gpt scale=tiny data.path=$(DEMO)/tokens tokenizer_path=$(DEMO)/tokenizer run=$(DEMO)/gpt
	$(BIN)/python generate.py model_path=$(DEMO)/gpt/export num=32 output=$(DEMO)/samples.png
	@echo
	@echo "reconstructions: $(DEMO)/titok/export/evaluation/shapes/reconstructions.png"
	@echo "new images:      $(DEMO)/samples.png"
	@echo "tokenizer:       $(DEMO)/tokenizer    in Python: smalti.load('$(DEMO)/tokenizer')"
	@echo "generator:       $(DEMO)/gpt/export   its tokens: $(DEMO)/tokens"

test: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not see that smalti/ spans several folders: typings/smalti/ links them together (for tools only).
links:
	@mkdir -p typings/smalti
	@find typings/smalti -type l ! -exec test -e {} \; -delete
	@for path in tokenizers generators data configs smalti/*.py $$(dirname smalti/*/__init__.py); do \
	  link=typings/smalti/$${path##*/}; test -L $$link || ln -s ../../$$path $$link; done

types: $(READY) links
	MYPYPATH=typings $(BIN)/mypy -p smalti

check: lint types test

bench: $(READY)
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
