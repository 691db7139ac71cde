# Everything a clean clone needs: make demo, make test.
#
# PYTHON       the interpreter for .venv; by default the first one from 3.10 on that can make a virtual environment
# TORCH_INDEX  where to take torch from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for its CPU build

SHELL := /bin/bash
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
DRAWS := .venv/bin/python -c 'import mujoco; mujoco.GLContext(64, 64)' >/dev/null 2>&1
GL_PACKAGES := libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0

.PHONY: setup demo test test-slow clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "make setup: no Python >= 3.10 with venv found (tried $(CANDIDATES)); install one" \
	       "(apt-get install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; fi
	[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt -e '.[test]'
	$(PIP) install -c constraints.txt -e '.[fast]' || \
	  echo "make setup: could not install OpenVINO (the extra fast); decisions take longer without it" >&2
	@if MUJOCO_GL=egl $(DRAWS) || MUJOCO_GL=osmesa $(DRAWS); then :; \
	 elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	   echo "make setup: no GL library to draw with; installing $(GL_PACKAGES)" >&2; \
	   apt-get update -qq && apt-get install -y -qq $(GL_PACKAGES); fi
	@MUJOCO_GL=egl $(DRAWS) || MUJOCO_GL=osmesa $(DRAWS) || { \
	  echo "make setup: no GL library to draw with; run: apt-get install $(GL_PACKAGES)" >&2; exit 1; }
	touch $@

demo: setup
	rm -rf out/demo
	.venv/bin/worldmodel bench --preset demo

test: setup
	.venv/bin/python -m pytest

test-slow: setup
	.venv/bin/python -m pytest -m slow

clean:
	rm -rf .venv *.egg-info build out
