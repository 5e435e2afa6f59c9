# `make demo` and `make test` are all a fresh machine needs; both set the stack up first and do nothing twice.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-seg test setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      set up, train Mask R-CNN with a small Slide-PVT on a generated data set, test it, draw it'
	@echo 'make demo-seg  the same for UperNet with a small Slide-Swin'
	@echo 'make test      set up, then every check and test'
	@echo 'make setup     the environment $(VENV) alone'

setup: $(READY)

$(READY): requirements.txt tools/setup_env.sh setup.py pyproject.toml
	@bash tools/setup_env.sh $(VENV)
	@touch $(READY)

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m '' -n 2 --durations 10

demo: $(READY)
	$(BIN)/python tools/demo.py detection

demo-seg: $(READY)
	$(BIN)/python tools/demo.py segmentation

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
