# Every command sets everything up by itself: `make demo`, `make test`, `make test-long`, `make lint`, `make torture`,
# `make bench`, `make test-lowest`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
# Coloured icons, or `embedded` for garments.
BASE ?= coloured
CONCEPT ?= $(if $(filter embedded,$(BASE)),sneaker,fox)
SURROGATE ?= $(if $(filter embedded,$(BASE)),dress,dog)
METHOD ?= full

.PHONY: bench demo lint test test-long torture test-lowest format clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$(nproc) \
		examples/train_sa.py --pretrained_model_name_or_path sa_diffusers/models/$(BASE)/pipeline \
		--concept "$(CONCEPT)" --surrogate "$(SURROGATE)" --output_dir outputs/demo \
		--train_method $(if $(filter lora,$(METHOD)),full --adapter lora,$(METHOD)) \
		--overwrite_output_dir

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/pytest -n 2 --dist loadscope -m "not long"

# Whole erasures, pages, benchmarks and attacks, and trainings of hundreds of steps.
test-long: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadscope -m long

# The lowest versions that setup.py declares, as uv finds them there: first without eval-unlearn and torchao, which
# need newer libraries than the rest, then with them. They take as long and as much disk as two installations.
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[test]"
	$(LOWEST)/bin/pytest -n 2 --dist loadscope -m "not quantized" --ignore tests/test_eval_unlearn.py
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct \
		-e ".[test,eval-unlearn,quantization]"
	$(LOWEST)/bin/pytest tests/test_eval_unlearn.py
	$(LOWEST)/bin/pytest -n 2 --dist loadscope -m quantized

# What an erasure costs, as curves: a table, and benchmarks/results/curves.png.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/curves.py --output benchmarks/results/curves.json

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
	rm -rf $(VENV) $(LOWEST) outputs
