"""What a KV connector does to vLLM: a real one on CPU with ours, with vLLM's own tiers and with LMCache.

python -m benchmarks.vllm [--rounds N] [--quick] [--subjects none,ours,...] [--out DIR]
"""
