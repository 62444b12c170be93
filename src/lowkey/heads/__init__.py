"""What single attention heads do, measured per model.

`retrieval` finds the heads that retrieve (HeadKV), on the tasks of `needles`; `induction` finds induction and
echo heads (RazorAttention); `diversity` measures how different the heads of a layer are. Token allocators and
the report read the scores. May import `cache` and the rooms below it.
"""
