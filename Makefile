# Every command sets up .venv by itself, once, from requirements.lock.
PYTHON   ?= $(shell command -v python3.11 || command -v python3)
BIN      := .venv/bin
READY    := .venv/.ready

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "kdlib needs Python 3.11, found $$($(PYTHON) --version 2>&1). Name yours with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	@touch $(READY)
