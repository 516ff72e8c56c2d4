# slmops: every target sets up .venv by itself; two commands are enough for a newcomer: make demo, make test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEER   := .venv-llamafactory
DEMO   := demo
REPORT ?= $(DEMO)/outputs/$(notdir $(DEMO))/report.html


.PHONY: demo test check bench bench-peer docs lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train, distil, quantise, judge and bundle a support-desk model (minutes, no network after set-up)"
	@echo "make test    everything that CI runs (compiles llama.cpp the first time)"
	@echo "make check   the fast loop: lint, types, contracts, quick tests"
	@echo "make bench   training speed and memory against TRL; make bench-peer also against LLaMA-Factory"
	@echo "make docs    regenerate the reference and the pictures"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,train,convert,runtime,evaluate]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# llama.cpp is compiled here, for any processor of this kind and without its parts for images: minutes, once for a machine,
# since pip keeps what it built. Only slow tests need it.
$(VENV)/.llamacpp: pyproject.toml constraints.txt $(VENV)/.dev
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF" \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llamacpp]'
	@touch $@

# MLX, OpenVINO, LiteRT and ExecuTorch, and Azure's SDK, which only slow tests need: 140 MB to fetch, 580 MB on the disk.
$(VENV)/.formats: pyproject.toml constraints.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlx,openvino,litert,executorch,azure]'
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.run
	@test -f $(DEMO)/slmops.yaml || $(BIN)/slmops init $(DEMO)
	@$(BIN)/slmops run -f $(DEMO); code=$$?; if [ $$code -ne 0 ] && [ $$code -ne 4 ]; then exit $$code; fi
	@echo
	@$(BIN)/slmops chat -f $(DEMO) \
	    "hi, my blendr never arrived, order 4821. where is it??" \
	    "please move my delivery to friday, no need to cancel" \
	    "what's the capital of france?"
	@echo
	@echo "the report: $(DEMO)/outputs/$(notdir $(DEMO))/report.html"

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2

test: lint $(VENV)/.llamacpp $(VENV)/.formats
	$(BIN)/python -m pytest -q -m "not slow" -n 2
	$(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --durations=12

# The package index has torchvision and torchaudio for CUDA: beside a torch for the CPU they cannot be imported, and
# training on text needs neither.
$(PEER)/.run: benchmarks/llamafactory.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/llamafactory.txt
	$(PEER)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/training.py

bench-peer: $(VENV)/.bench $(PEER)/.run
	$(BIN)/python benchmarks/training.py --llamafactory $(PEER)/bin/python

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/report_schema.py
	@if [ -f "$(REPORT)" ]; then $(BIN)/python docs/screenshot.py "$(REPORT)" docs/images; \
	else echo "no $(REPORT): pictures are left as they are (make demo writes one, or give REPORT=…)"; fi

clean:
	rm -rf $(DEMO) build dist
