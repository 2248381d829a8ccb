# Run inside an environment made with: pip install -e '.[dev]'
.PHONY: check fmt test bench gpu

check:
	ruff check .
	ruff format --check .
	mkdir -p .typecheck && ln -sfn .. .typecheck/ramet
	MYPYPATH=.typecheck mypy -p ramet
	lint-imports

fmt:
	ruff check --fix .
	ruff format .

test:
	pytest -n 2

bench:
	@for script in $(filter-out benchmarks/gpu%.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; python "$$script" || exit 1; done

# On a machine with a GPU, in under 30 minutes; what fails is in its log, and the rest goes on.
OUT ?= gpu-results
gpu:
	mkdir -p $(OUT)
	-pytest -m gpu --continue-on-collection-errors tests/kernels/triton tests/model_runner > $(OUT)/tests.log 2>&1
	-python benchmarks/gpu.py --json $(OUT)/gpu.json > $(OUT)/gpu.log 2>&1
	-python benchmarks/gpu_attention.py --json $(OUT)/attention.json > $(OUT)/attention.log 2>&1
	tail -n 3 $(OUT)/*.log
