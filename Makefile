# All of `make demo`, `make test` and `make torture` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONCEPT ?= sneaker
SURROGATE ?= dress
METHOD ?= full

.PHONY: demo test torture lint format clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$(nproc) \
		examples/train_sa.py --pretrained_model_name_or_path sa_diffusers/models/embedded/pipeline \
		--concept "$(CONCEPT)" --surrogate "$(SURROGATE)" --train_method $(METHOD) --output_dir outputs/demo \
		--overwrite_output_dir

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

torture: $(INSTALLED)
	$(BIN)/python benchmarks/torture.py --jobs 2

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) outputs
