"""What single attention heads do, measured per model.

`retrieval` finds the heads that retrieve (HeadKV), on the tasks of `needles`; `induction` finds induction and
echo heads (RazorAttention); `rlkv` and `rivals` find the heads that need all tokens of `chains`, by
`writing_chains`; `diversity` measures how different the heads of a layer are. Token allocators and the report
read the scores. `GATES` has what policies learn of a model, by `Policy.learns`, and `CHAIN_KINDS` the head
scores that are learnt from chains. May import `cache` and the rooms below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowkey.heads.chunk_gate import ChunkGateTraining, train_chunk_gate
from lowkey.heads.fast_kvzip import FastKVzipTraining, train_fast_kvzip
from lowkey.heads.query_centres import estimate_query_centres
from lowkey.heads.rivals import (
    ABLATION,
    DISTILLED,
    Ablation,
    DistilledTraining,
    measure_ablation,
    train_by_distance,
)
from lowkey.heads.rlkv import REWARD, RewardTraining, train_by_reward
from lowkey.heads.scores import HeadScores
from lowkey.policies.chunks import ChunkGate
from lowkey.policies.fast_kvzip import FastKVzip
from lowkey.policies.gates import Gates
from lowkey.policies.triattention import TriAttention

GATES: dict[str, Callable[..., Gates]] = {
    FastKVzip.learns: train_fast_kvzip,
    TriAttention.learns: estimate_query_centres,
    ChunkGate.learns: train_chunk_gate,
}
GATE_TRAININGS: dict[str, Any] = {  # options of those that train
    FastKVzip.learns: FastKVzipTraining,
    ChunkGate.learns: ChunkGateTraining,
}
CHAIN_KINDS: dict[str, Callable[..., HeadScores]] = {  # head scores that are learnt from chains
    REWARD: train_by_reward,
    DISTILLED: train_by_distance,
    ABLATION: measure_ablation,
}
CHAIN_TRAININGS: dict[str, Any] = {
    REWARD: RewardTraining,
    DISTILLED: DistilledTraining,
    ABLATION: Ablation,
}
