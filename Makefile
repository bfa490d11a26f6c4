# make help lists what there is
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

DEMO_PROMPTS := "red heart" "panda face" "slice of pizza" "sunflower" "frog face" "grinning face"

PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SSE4   = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AVX2   = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.PHONY: help docs gallery notebooks demo test test-portable lint clean

demo: $(VENV)/.installed  ## six pictures from the embedded pipeline: atlas-demo.png
	$(BIN)/atlas-diffusers generate $(DEMO_PROMPTS) --seed 0 -o atlas-demo.png

test: $(VENV)/.installed-dev  ## the whole test suite
	$(PYTEST)

# OTHERS="-m numeric": on the processors that are not this one, only what compares numbers of networks.
test-portable: test  ## the suite as it runs on three kinds of processors
	$(SSE4) $(PYTEST) $(OTHERS)
	$(AVX2) $(PYTEST) $(OTHERS)

docs: $(VENV)/.installed-dev  ## the documentation site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

gallery: $(VENV)/.installed  ## docs/gallery.png from the embedded pipeline
	$(BIN)/atlas-diffusers generate $(DEMO_PROMPTS) --count 4 --seed 0 -o docs/gallery.png

notebooks: $(VENV)/.installed-dev  ## run notebooks/*.ipynb and keep their outputs
	$(BIN)/python notebooks/execute.py --write

lint: $(VENV)/.installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/pyright

# A torch that $(PYTHON) already has is used, not replaced.
$(BIN)/python:
	$(PYTHON) -m venv $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python setup.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/.installed $@

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build *.egg-info atlas-demo.png
