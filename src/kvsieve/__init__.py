"""kvsieve: make the KV cache of a language model smaller while it runs."""
