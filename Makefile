# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for those who work on qpert.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,export,rtx,hf,serve,parquet,ray,daft,test,lint
STAMP := $(VENV)/.installed

.PHONY: demo test soak check format lowest lavis-env modelopt-env triton-env clean

demo: $(STAMP)            ## export, verify and search the demonstration; prints where its page is
	$(BIN)/python examples/demo.py

test: $(STAMP) lavis-env modelopt-env triton-env  ## every test that runs without a GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

soak: $(STAMP)            ## ten thousand hostile inputs; watches for crashes, hangs and leaks
	PYTHONPATH=tests $(BIN)/python -m soak

check: $(STAMP)           ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p qpert

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lowest:                   ## the lower bounds of pyproject.toml, tried in environments of their own (.cache/lowest)
	sh tools/check_lowest.sh

lavis-env:                ## stock LAVIS in an environment of its own (.cache/lavis), for tests and `verify --reference lavis`
	bash tools/lavis_env.sh

modelopt-env:             ## NVIDIA ModelOpt in an environment of its own (.cache/modelopt), for FP8
	sh tools/modelopt_env.sh

triton-env:               ## a real Triton server in an environment of its own (.cache/triton), for tests
	sh tools/triton_env.sh

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo
