"""Two engines with stores of their own: prompts computed on one, continued on the other: `make prefill-decode`.

run.py           the command line
proxy.py         what users ask; a command of its own
prefill.py       its side to the prefill engine
stored_pages.py  how it knows that a prompt can be fetched from there
pair.py          keys, peers.yaml and flags of the two engines
comparison.py    the same requests to one engine alone, and to the pair
report.py        the table, the exit status
"""
