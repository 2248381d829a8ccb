# Run inside an environment made with: pip install -e '.[dev]'
.PHONY: check fmt test bench

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
	pytest

bench:
	@for script in benchmarks/*.py; do echo "== $$script"; python "$$script" || exit 1; done
