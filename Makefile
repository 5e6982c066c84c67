# Each target builds .venv first if it is missing or out of date.
#   make train                        second-order MAML with the defaults
#   make train ARGS="task.ways=20"    any key of `python scripts/train.py --help-all`
#   make compare                      first against second order: accuracy, time and memory; a quarter of an hour
#   make test                         lint, types and tests, JOBS of them at a time
#   make faults                       every fault of the table in docs/results.md, as often as it says; a quarter of an hour
#   make docs                         the documentation site, in outputs/site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2

.PHONY: train compare test faults docs lint bench clean-venv
.DELETE_ON_ERROR:

train: $(VENV)/.core
	$(BIN)/python scripts/train.py inner.second_order=true $(ARGS)

compare: $(VENV)/.core
	$(BIN)/python scripts/compare.py $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python scripts/benchmark.py $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

faults: $(VENV)/.dev
	$(BIN)/python -m pytest tests/faults -m fault --faults-report outputs/reference/faults.json $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m docs.blocks
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.core: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'metalearn needs Python 3.10 or later, and this is ' + sys.version)"
	@echo "Building $(VENV): PyTorch and the rest take some minutes and 6 GB, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The peers are compared with, never depended on: where one does not install, its tests skip and say so. One by one, as
# pip installs all of a file or nothing.
$(VENV)/.dev: $(VENV)/.core requirements-peers.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	for peer in learn2learn higher torchopt; do \
	  grep "^$$peer==" requirements-peers.txt > $(VENV)/$$peer.txt; \
	  $(BIN)/python -m pip install --quiet --requirement $(VENV)/$$peer.txt \
	    || echo "WARNING: $$peer could not be installed; the tests that compare with it will be skipped." >&2; \
	done
	touch $@

clean-venv:
	rm -rf $(VENV)
