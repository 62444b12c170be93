"""What single attention heads do: which retrieve (HeadKV), which induce or echo (RazorAttention), how
different they are.

Policies and the report read the scores. Imports `cache` and the rooms below it.
"""
