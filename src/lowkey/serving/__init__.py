"""What an engine that serves many users needs of us: how layers lie in its pages, and what it must refuse.

Nothing here imports an engine. The distribution `lowkey-vllm` (serving/vllm) connects this to vLLM, and
`lowkey serve` uses it to check and to count before the engine starts.
"""

from __future__ import annotations
