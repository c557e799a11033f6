# Two commands: `make demo` and `make test`. Both set up what they need and can be run again.
.DEFAULT_GOAL := help
VENV := .venv-sglang
VLLM := .venv-vllm
BIN := $(VENV)/bin
CPP := $(wildcard kernels/csrc/*.[ch]pp kernels/csrc/*.cu storage/csrc/*.[ch]pp)

.PHONY: help demo demo-vllm prefill-decode test test-quick sanitize lint format venv venv-vllm bench bench-vllm clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: ## a real model behind SGLang, restarted warm (MODEL=path takes another model)
	@examples/demo/demo.sh $(if $(MODEL),--model "$(MODEL)") $(ARGS)

demo-vllm: venv-vllm ## the same behind vLLM, and SGLang first, vLLM second (MODEL=path takes another model)
	@examples/demo/demo.sh --engine vllm $(if $(MODEL),--model "$(MODEL)") $(ARGS)

prefill-decode: venv ## a prefill engine, a decode engine and a proxy that share pages (ARGS=--help)
	@$(BIN)/python -m examples.prefill_decode $(ARGS)

test: venv venv-vllm ## all tests, real engines included
	@.ci/test.sh $(BIN)/python $(VLLM)/bin/python $(ARGS)

test-quick: venv ## all tests that start no engine
	$(BIN)/python -m pytest -m "not engine and not vllm" $(ARGS)

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
	@lmcache_sglang/testing/make_venv.sh sglang $(VENV)

venv-vllm: ## the environment of vLLM for CPU and this checkout, in .venv-vllm
	@lmcache_sglang/testing/make_venv.sh vllm $(VLLM)

bench: venv ## our store beside its peers, tables in docs/benchmarks (ARGS=--quick; ARGS=--help)
	@$(BIN)/python -m benchmarks $(ARGS)

bench-vllm: venv-vllm ## vLLM's connectors beside one another, docs/benchmarks/vllm.md (ARGS=--quick; ARGS=--help)
	@$(VLLM)/bin/python -m benchmarks.vllm $(ARGS)

clean: ## remove what was built and downloaded here
	rm -rf .venv-sglang .venv-vllm .venv-gpu .cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
