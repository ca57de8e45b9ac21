# Both commands of the README install what they need into .venv first:
#   make demo    evaluate, fine-tune, evaluate again and predict on examples/*.csv
#   make test    lint, types, import contract, tests
# PYTHON names the interpreter to build .venv with (3.11 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint slow cluster bench audit install clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Two processes: one has the session's Ray and the head of the jobs' tests, the other runs what needs neither.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Several hosts as namespaces of this machine: needs root, and Debian's openssh-server, rsync and iproute2.
cluster: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/cluster

# Known holes in the tested set; asks PyPI, from an environment of its own.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

bench: $(STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

install: $(STAMP)

# One install serves every target; it is repeated when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ray_qa needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo-output dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
