SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first of these that is a Python 3.11 or 3.12, else python3, so that setup can say what is wrong with it.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && exit; \
	done; echo python3)
VENV := .venv/bin

# This environment has a ROS of its own. What a sourced distribution adds would be mixed into it.
ifdef ROS_DISTRO
unexport AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH LD_LIBRARY_PATH PYTHONPATH
endif
# Stay on this machine: neither the demo nor a test has business on the network.
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST

# Keep the checkout itself off sys.path: its nope_ros has no messages, the installed one has.
export PYTHONSAFEPATH := 1

# colcon's script reads variables that may be unset.
ACTIVATE := set +u; source install/setup.bash; set -u;

.PHONY: help setup demo test docs checksums clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install everything into .venv, build the messages (PYTHON=python3.12 chooses the Python)
	@$(PYTHON) tools/setup_ros.py

demo: setup ## Estimate poses on the bundled sequence (rendered), draw them into out/demo (DATA=folder PRIOR=free|upright|standing)
	@$(ACTIVATE) $(VENV)/python -m nope_ros.cli demo $(if $(DATA),--data "$(DATA)") $(if $(PRIOR),--prior "$(PRIOR)")

test: setup ## Lint, check types, run the tests (ARGS="-k crop" goes to pytest)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(ACTIVATE) $(VENV)/pytest $(ARGS)

docs: setup ## Build the documentation into out/docs
	@$(VENV)/python -m pip install --quiet --disable-pip-version-check -c requirements-lock.txt -r requirements-docs.txt
	@$(ACTIVATE) $(VENV)/python -m nope_ros.node.reference
	@$(VENV)/mkdocs build --strict --quiet && echo "out/docs/index.html"

checksums: ## Note the packaged weights as those to ship, after replacing them: `nope-ros doctor` compares
	@for folder in nope_ros/weights/*/; do (cd "$$folder" && sha256sum model.safetensors > SHA256SUMS); done

clean: ## Remove what setup and the demo made
	rm -rf .venv build install log out/demo nope_ros.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
