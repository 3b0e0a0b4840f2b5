"""vLLM: the same recipe inside its engine and server, with blocks that are really freed.

``register`` is the entry point of the group ``vllm.general_plugins``: vLLM calls it in every
process. Without ``additional_config["kvsieve"]`` everything stays as it is. Nothing here imports
vllm before that; ``effective`` and ``settings`` work without it.
"""

from __future__ import annotations


def register() -> None:
    """Put kvsieve's attention backend in vLLM's place; may be called more than once.

    Raises:
        EngineError: a release of vLLM that this version of kvsieve doesn't know.
    """
    from kvsieve.engines.vllm.compat import install

    install()
