"""What tests, demos and measurements need beside the product: a model, a server, SGLang on CPU.

Nothing in the product imports this package.
"""
