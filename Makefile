# `make demo` and `make test` set up .venv themselves; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= $(or $(FLWR_LOCAL_SUPERLINK_HTTP_API_PORT),39091)

.PHONY: demo test check docs bench format setup stop clean

demo: setup  ## pre-train across the demo's silos, everything written into this folder
	DEPT_HOME="$(CURDIR)" $(BIN)/dept run conf/demo.yaml

# One thread each in as many processes as there are cores, up to eight; then, two at a time, what
# starts Flower's processes and nginx, which wait for each other more than they work.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not flower" -n auto --maxprocesses 8 \
	--dist loadfile && $(BIN)/python -m pytest -m flower -n 2 --dist loadfile --timeout=1200

test: setup  ## all tests
	$(PYTEST)

check: setup docs  ## format, lint, types, documentation, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

# Its note on MkDocs 2 is of another version than the one that is pinned.
docs: setup  ## the documentation as a site; every link and reference must be whole
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html; for its search: $(BIN)/python -m http.server -d site"

BENCHMARKS := inner_step memory merge prepare round_overhead scale clock

bench: setup  ## the short form of each benchmark; their own pages tell what the long ones take
	@for name in $(BENCHMARKS); do \
	  echo "== python -m benchmarks.$$name --quick"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; \
	done
	@echo "== python -m benchmarks.codec --quick --recipe conf/demo.yaml"
	@DEPT_HOME="$(CURDIR)" $(BIN)/python -m benchmarks.codec --quick --recipe conf/demo.yaml

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $@

stop:  ## end the local SuperLink that a plain `flwr run .` leaves behind
	@$(or $(wildcard $(BIN)/dept),dept) stop --port $(PORT)

clean:  ## remove what the demo wrote here
	rm -rf silos runs flower tokenizers/*/
