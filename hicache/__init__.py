"""SGLang's side: the HiCache storage backend, and what makes two pages the same.

Only backend.py imports SGLang, and only when SGLang asks for the backend; events.py takes its event types
when there is something to tell.
"""
