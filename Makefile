# Two commands set everything up: `make demo` and `make test`. PYTHON chooses the interpreter (3.11 or 3.12).
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint claims schemas clean

VENV   ?= .venv
BIN    := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.11,\
            $(shell $(name) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) and print("$(name)")' 2>/dev/null)))
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

help:
	@echo "make demo [DATA=DIR]   set up, then compile, run, eval, profile and gate on rendered people or on DIR"
	@echo "make test              set up, then run the tests (make test-slow runs the slow ones)"
	@echo "make lint              format, lint, types and layers"
	@echo "make claims [CLAIMS=…] measure the figures that the README gives"
	@echo "make clean             remove $(VENV) and what tools left"

# One stamp per set of packages: what is installed again, and only then, when pyproject.toml changes.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3.12 found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing: install it (Debian: python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-all: pyproject.toml $(VENV)/.created
	@echo "installing edgepose[all] into $(VENV): torch, ONNX Runtime, OpenVINO and NNCF take some minutes the first time"
	@$(PIP) install --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-all
	@echo "installing edgepose[dev] into $(VENV)"
	@$(PIP) install --editable '.[all,dev]'
	@touch $@

demo: $(VENV)/.installed-all
	@$(BIN)/edgepose demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

claims: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/claims.py $(CLAIMS)

schemas: $(VENV)/.installed-all
	@$(BIN)/python -m edgepose.schemas --write

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
