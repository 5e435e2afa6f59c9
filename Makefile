# `make demo` and `make test` are all a fresh machine needs; both set the stack up first and do nothing twice.
# STACK=classic is torch 2.1 with OpenMMLab's wheels of mmcv, STACK=onedl the maintained forks of the MM packages.
STACK := official
VENV := .venv$(if $(filter-out official,$(STACK)),-$(STACK))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVELOP := $(VENV)/.develop
DEMO := cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py
DEMO_SEG := slide-swin-mini_upernet_mini-ade20k-64x64.py

.PHONY: help demo demo-seg test test-all docs evidence setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      set up, train Mask R-CNN with a small Slide-PVT on a generated data set, test, draw and export it'
	@echo 'make demo-seg  the same for UperNet with a small Slide-Swin'
	@echo 'make test      set up, then the checks and tests'
	@echo 'make test-all  the same with the exhaustive tests, about an hour'
	@echo 'make docs      set up, then build the documentation into site/'
	@echo 'make evidence  train small Slide models and their hosts under equal budgets, hours; goes on where it was'
	@echo 'make setup     the environment $(VENV) alone'
	@echo 'Each of them takes STACK=classic (torch 2.1, ready-made mmcv) or STACK=onedl (the forks), in .venv-classic, .venv-onedl'

setup: $(READY)

# The folders: mim finds a new config or tool in an editable install only after it was installed again.
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

# With --resume a demo that was interrupted goes on, and a finished one is only tested again.
data/mini: | $(READY)
	$(BIN)/python tools/make_mini_dataset.py data/mini

demo: data/mini
	$(BIN)/mim train mmslide $(DEMO) --work-dir work_dirs/demo --resume
	$(BIN)/mim test mmslide $(DEMO) --checkpoint "$$(cat work_dirs/demo/last_checkpoint)" \
	    --work-dir work_dirs/demo/test --show-dir work_dirs/demo/pictures
ifeq ($(STACK),classic)
	@echo 'Ground truth and predictions side by side: work_dirs/demo/pictures. Export needs PyTorch 2.9: left out.'
else
	$(BIN)/python tools/export.py configs/mini/$(DEMO) "$$(cat work_dirs/demo/last_checkpoint)" work_dirs/demo/model.onnx \
	    --shape 128 128 --images data/mini/coco/val2017/00000000000[1-8].jpg
	$(BIN)/python tools/run_exported.py work_dirs/demo/model.onnx data/mini/coco/val2017/000000000001.jpg \
	    work_dirs/demo/onnx.png
	@echo 'Ground truth and predictions side by side: work_dirs/demo/pictures'
	@echo 'The same model as an ONNX file: work_dirs/demo/model.onnx; what it sees without PyTorch: work_dirs/demo/onnx.png'
endif

demo-seg: data/mini
	$(BIN)/mim train mmslide $(DEMO_SEG) --work-dir work_dirs/demo-seg --resume
	$(BIN)/mim test mmslide $(DEMO_SEG) --checkpoint "$$(cat work_dirs/demo-seg/last_checkpoint)" \
	    --work-dir work_dirs/demo-seg/test --show-dir work_dirs/demo-seg/pictures
	@echo 'Ground truth and predictions side by side: work_dirs/demo-seg/pictures'

evidence: data/mini
	$(BIN)/python -m benchmarks.evidence $(if $(BCCD),--bccd $(BCCD))

clean:
	rm -rf .venv .venv-classic .venv-onedl build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
