"""A restarted SGLang server that is warm: what `make demo` runs.

run.py       the command line
model.py     which model: a local one, Gemma 3 270M (gemma.py, convert.py), or random weights
workload.py  what is asked: one document, one chat (texts/)
server.py    how SGLang is started on this machine, and when its store is complete; vllm_server.py: vLLM
store.py     the folder that outlives the server
client.py    one streamed request over HTTP, and what it measured
rounds.py    the same requests to a cold server and to a warm one
report.py    the table, the summary, the exit status
progress.py  what is shown while one waits
"""
