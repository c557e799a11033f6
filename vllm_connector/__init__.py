"""vLLM's seam: a KV connector over a chain of tiers."""
