# make demo: six pictures from the embedded pipeline.   make test: the whole test suite.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

DEMO_PROMPTS := "red heart" "panda face" "slice of pizza" "sunflower" "frog face" "grinning face"

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/atlas-diffusers generate $(DEMO_PROMPTS) --seed 0 -o atlas-demo.png

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

# A torch that $(PYTHON) already has is used, not replaced.
$(BIN)/python:
	$(PYTHON) -m venv $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python setup.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build *.egg-info atlas-demo.png
