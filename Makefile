# Two commands: `make demo` and `make test`. Both set up what they need and can be run again.
.DEFAULT_GOAL := help
VENV := .venv-sglang
BIN := $(VENV)/bin
CPP := $(wildcard kernels/csrc/*.[ch]pp kernels/csrc/*.cu storage/csrc/*.[ch]pp)

.PHONY: help demo prefill-decode test test-quick sanitize lint format venv bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: ## a real model behind SGLang, restarted warm (MODEL=path takes another model)
	@examples/demo/demo.sh $(if $(MODEL),--model "$(MODEL)") $(ARGS)

prefill-decode: venv ## a prefill engine, a decode engine and a proxy that share pages (ARGS=--help)
	@$(BIN)/python -m examples.prefill_decode $(ARGS)

test: venv ## all tests, real engines included
	@.ci/test.sh $(BIN)/python $(ARGS)

test-quick: venv ## all tests that start no engine
	$(BIN)/python -m pytest -m "not engine" $(ARGS)

sanitize: venv ## the native tests under AddressSanitizer, UBSan and ThreadSanitizer (ARGS=asan or ARGS=tsan)
	@.ci/sanitize.sh $(VENV) $(ARGS)

lint: venv ## ruff, mypy --strict, import-linter, clang-format
	@.ci/tools.sh $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: venv ## put every file into its form
	@.ci/tools.sh $(VENV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

venv: ## the environment of all this: SGLang for CPU and this checkout, in .venv-sglang
	@lmcache_sglang/testing/sglang_cpu/make_venv.sh $(VENV)

bench: venv ## our store beside its peers, tables in docs/benchmarks (ARGS=--quick; ARGS=--help)
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built and downloaded here
	rm -rf .venv-sglang .venv-gpu .cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
