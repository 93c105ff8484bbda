# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for those who work on qpert.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
DEMO_EXTRAS := cpu,export,hf
EXTRAS := $(DEMO_EXTRAS),openvino,rtx,serve,qdrant,postgres,parquet,ray,daft,test,lint,docs
DEMO_STAMP := $(VENV)/.demo
STAMP := $(VENV)/.installed
# What tests need beside the virtual environment. Each is made once; where one cannot be had, it says so or its tests skip.
ENVIRONMENTS := lavis-env modelopt-env open-clip-env trt-bindings triton-env postgres-env cpp-env web-env

# Another interpreter, with what docs/guides/gpu-acceptance.md lists, is used as it is.
GPU_PYTHON := .cache/gpu/bin/python

.PHONY: demo test test-all test-cpp test-node test-web web soak gpu-acceptance gpu-acceptance-dry-run check docs linkcheck format lowest clean $(ENVIRONMENTS)

demo: $(DEMO_STAMP)       ## export, verify and search the demonstration; prints where its page is
	$(BIN)/python examples/demo.py

test: $(STAMP)            ## the tests for everyday work: no GPU and nothing but the virtual environment; under ten minutes
	$(PYTEST) -m "not slow"

test-all: test $(ENVIRONMENTS)  ## those, then what is slow or needs another environment, a database, a browser, a compiler
	$(PYTEST) -m slow

test-cpp: $(STAMP) cpp-env  ## examples/cpp: built, also with sanitizers, and held against Python
	$(BIN)/python -m pytest tests/examples/test_cpp.py tests/examples/test_cpp_inputs.py

test-node: $(STAMP)       ## the Node example, with its npm packages
	sh tools/web_env.sh --without-browser
	$(BIN)/python -m pytest tests/examples/test_node.py

test-web: $(STAMP)        ## the web page in headless Chromium, with its npm packages
	sh tools/web_env.sh
	$(BIN)/python -m pytest tests/examples/test_web.py

web: $(STAMP)             ## the web page with the demonstration, in build/web: any static server serves it
	sh tools/web_env.sh --without-browser
	$(BIN)/python examples/web/build.py

soak: $(STAMP)            ## ten thousand hostile inputs; watches for crashes, hangs and leaks
	PYTHONPATH=tests $(BIN)/python -m soak

gpu-acceptance:           ## everything that only an NVIDIA GPU shows, each line with its goal; resumes; JSON and page to commit
	test "$(GPU_PYTHON)" != .cache/gpu/bin/python || sh tools/gpu_env.sh
	PYTHONPATH=benchmarks $(GPU_PYTHON) -m gpu_acceptance $(ARGS)

gpu-acceptance-dry-run: $(STAMP)  ## the same lines on the CPU with a small model: tests the script, accepts nothing
	PYTHONPATH=benchmarks $(BIN)/python -m gpu_acceptance --dry-run $(ARGS)

check: $(STAMP)           ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p qpert

docs: $(STAMP)            ## the documentation site in build/docs, strictly: a warning is an error; opens without a network
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html"

linkcheck: $(STAMP)       ## every external link of the documentation, over the network; the list is build/linkcheck/output.txt
	$(BIN)/python -m sphinx -E -q -b linkcheck docs build/linkcheck

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lowest:                   ## the lower bounds of pyproject.toml, tried in environments of their own (.cache/lowest)
	sh tools/check_lowest.sh

lavis-env:                ## stock LAVIS in an environment of its own (.cache/lavis), for tests and `verify --reference lavis`
	bash tools/lavis_env.sh

modelopt-env:             ## NVIDIA ModelOpt in an environment of its own (.cache/modelopt), for FP8
	sh tools/modelopt_env.sh

open-clip-env:            ## stock open_clip in an environment of its own (.cache/open_clip), for tests and `verify --reference open_clip`
	sh tools/open_clip_env.sh

trt-bindings: $(STAMP)    ## NVIDIA's Python bindings of TensorRT 10.3 to 11 (.cache/trt-bindings), for tests of what is called
	PYTHON=$(BIN)/python sh tools/trt_bindings_env.sh

triton-env:               ## a real Triton server in an environment of its own (.cache/triton), for tests
	sh tools/triton_env.sh

postgres-env:             ## a PostgreSQL with pgvector in an environment of its own (.cache/postgres), which tests start
	sh tools/postgres_env.sh

cpp-env:                  ## what examples/cpp is built with, from apt and in .cache/onnxruntime-headers; says what is missing
	sh tools/cpp_env.sh

web-env:                  ## npm packages of examples/node and examples/web, and Chromium; says what is missing
	sh tools/web_env.sh --if-possible

$(DEMO_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(DEMO_EXTRAS)]'
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo
