# make setup   create .venv and install (the others do it when needed)
# make run     run every notebook headless: make run PROFILE=laptop ARGS="--from 05"
# make test    lint, unit tests, all notebooks at smoke: what CI runs
# make check   lint and notebook pairs only: seconds
# make bench   kernel benchmarks on this machine: make bench DEVICE=cuda
# make clean   remove .venv, runs and caches

PROFILE ?= smoke
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: setup run test check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "kexa needs Python 3.11 or newer: install it or set PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev,lab,gym]" || { \
	echo "trying without reasoning-gym, whose pycosat takes a C compiler (no synthetic problems)"; \
	$(BIN)/python -m pip install --quiet --editable ".[dev,lab]"; }
	@touch $(STAMP)

run: $(STAMP)
	@$(BIN)/kexa run --profile $(PROFILE) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/kexa notebooks --check

test: check
	$(BIN)/python -m pytest -m "not notebooks" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m notebooks

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(if $(DEVICE),--device $(DEVICE))

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
