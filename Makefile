# On a fresh machine, run `make demo` or `make test`; both set up the environment first and skip steps that are done.
# STACK=classic is torch 2.1 with OpenMMLab's mmcv wheels, STACK=onedl the maintained forks of the MM packages.
STACK := official
ifeq ($(filter official classic onedl,$(STACK)),)
$(error STACK must be official, classic or onedl, got $(STACK))
endif
SUFFIX := $(if $(filter-out official,$(STACK)),-$(STACK))
VENV := .venv$(SUFFIX)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVELOP := $(VENV)/.develop
DEMO := cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py
DEMO_DIR := work_dirs/demo$(SUFFIX)
DEMO_SEG := slide-swin-mini_upernet_mini-ade20k-64x64.py
DEMO_SEG_DIR := work_dirs/demo-seg$(SUFFIX)

.PHONY: help demo demo-seg test test-all docs evidence setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      set up, then train, test, visualize and export Cascade Mask R-CNN with a small Slide-PVT on generated data'
	@echo 'make demo-seg  the same for UperNet with a small Slide-Swin'
	@echo 'make test      set up, then run all checks and tests'
	@echo 'make test-all  the same with the exhaustive tests (about an hour)'
	@echo 'make docs      set up, then build the documentation into site/'
	@echo 'make evidence  train small Slide models and their hosts at equal budgets (hours; resumes if interrupted)'
	@echo 'make setup     only create the environment $(VENV)'
	@echo 'Each accepts STACK=classic (torch 2.1, prebuilt mmcv) or STACK=onedl (the forks), in .venv-classic and .venv-onedl'

setup: $(READY)

# Folders are prerequisites because mim finds new configs and tools of an editable install only after reinstalling.
$(READY): requirements/$(STACK).txt tools/setup_env.sh setup.py pyproject.toml mmslide/ops/native.cpp tools $(wildcard configs/*)
	@bash tools/setup_env.sh $(VENV) $(STACK)
	@touch $(READY)

$(DEVELOP): $(READY) requirements/$(STACK)-develop.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements/$(STACK)-develop.txt \
	    -c requirements/$(STACK).txt
	$(BIN)/pip check
	@touch $(DEVELOP)

test: MARKED := not exhaustive
test test-all: $(DEVELOP)
ifeq ($(STACK),official)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
endif
	$(BIN)/python -m pytest -m '$(MARKED)' -n 2 --durations 10

docs: $(DEVELOP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# With --resume, an interrupted demo continues, and a finished one is only tested again.
data/mini: | $(READY)
	$(BIN)/python tools/make_mini_dataset.py data/mini

demo: data/mini
	$(BIN)/mim train mmslide $(DEMO) --work-dir $(DEMO_DIR) --resume
	$(BIN)/mim test mmslide $(DEMO) --checkpoint "$$(cat $(DEMO_DIR)/last_checkpoint)" \
	    --work-dir $(DEMO_DIR)/test --show-dir $(DEMO_DIR)/pictures
ifeq ($(STACK),classic)
	@echo 'Ground truth and predictions side by side: $(DEMO_DIR)/pictures. Export needs PyTorch 2.9: skipped.'
else
	$(BIN)/python tools/export.py configs/mini/$(DEMO) "$$(cat $(DEMO_DIR)/last_checkpoint)" $(DEMO_DIR)/model.onnx \
	    --shape 128 128 --images data/mini/coco/val2017/00000000000[1-8].jpg
	$(BIN)/python tools/run_exported.py $(DEMO_DIR)/model.onnx data/mini/coco/val2017/000000000001.jpg \
	    $(DEMO_DIR)/onnx.png
	@echo 'Ground truth and predictions side by side: $(DEMO_DIR)/pictures'
	@echo 'The same model in ONNX: $(DEMO_DIR)/model.onnx; its predictions without PyTorch: $(DEMO_DIR)/onnx.png'
endif

demo-seg: data/mini
	$(BIN)/mim train mmslide $(DEMO_SEG) --work-dir $(DEMO_SEG_DIR) --resume
	$(BIN)/mim test mmslide $(DEMO_SEG) --checkpoint "$$(cat $(DEMO_SEG_DIR)/last_checkpoint)" \
	    --work-dir $(DEMO_SEG_DIR)/test --show-dir $(DEMO_SEG_DIR)/pictures
	@echo 'Ground truth and predictions side by side: $(DEMO_SEG_DIR)/pictures'

evidence: data/mini
	$(BIN)/python -m benchmarks.evidence $(if $(BCCD),--bccd $(BCCD))

clean:
	rm -rf .venv .venv-classic .venv-onedl build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
