"""Sparse attention of every kind: masks as expressions, chosen at run time, or by a selector; one kernel under all.

What does not fit into tiles, and what to do:

- Keys that each query picks for itself (Sparsifiner, top-k tokens): every tile is visited in part, so nothing is saved.
  `Bits` computes the right thing and costs what dense attention costs.
- Single columns and diagonals cost whole tiles. `VerticalSlash.attend` gathers the columns and merges.
- Overlapping clusters (Routing Transformer) average several softmaxes: `TokenGroups`, not a mask.
- Summaries of regions (Combiner) are new keys: attend to them beside the tokens, and `merge_states`.
- Heads that need very different numbers of blocks share the width of their lists; call once for each kind of head.
- Choosing has no gradient: distil (`seer_loss`), or train log-gates through `block_bias`.
- Selectors that look at the whole sequence (`group_by_scores`, `snapkv`, `VerticalSlash`, `FlexPrefill`) let later
  tokens influence what earlier ones see: fine for a prompt, not for training a causal model.
"""

from sparsejax.attention.attend import explain_attention, sparse_attention
from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.budgets import Coverage, Forced, Random, Ratio, Threshold, TopK, TopP
from sparsejax.attention.choose import from_dense_blocks, from_lists, from_pages, from_scores
from sparsejax.attention.compile import compile_mask
from sparsejax.attention.data_patterns import (
    Bits,
    BlockDense,
    Lengths,
    Prefix,
    Segment,
    Tokens,
    from_fn,
)
from sparsejax.attention.far_patterns import Dilated, Fixed, GridAxial, LogSparse, Strided
from sparsejax.attention.flex_prefill import FlexPrefill
from sparsejax.attention.last_queries import last_query_weights, slash_sums
from sparsejax.attention.mask import Mask, per_head
from sparsejax.attention.merge import merge_states
from sparsejax.attention.named_patterns import AShape, BigBird, Documents, Longformer, TriShape
from sparsejax.attention.patterns import (
    Causal,
    Chunk,
    Empty,
    Full,
    KeyRange,
    Local,
    QueryRange,
    Sink,
)
from sparsejax.attention.quest import PageBounds, Quest, quest_budget, quest_mask, quest_scores
from sparsejax.attention.seer import SeerGate, causal_blocks, seer_loss, seer_target
from sparsejax.attention.selectors import Context, Reuse, ScoreSelector, Selector, pooled_scores, stats_grid
from sparsejax.attention.snapkv import ada_snapkv, snapkv, snapkv_scores
from sparsejax.attention.token_groups import TokenGroups, group_by_scores
from sparsejax.attention.token_sets import TokenSet, elbow, tokens_where, top_tokens
from sparsejax.attention.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "BigBird",
    "Bits",
    "BlockDense",
    "BlockMask",
    "Causal",
    "Chunk",
    "Context",
    "Coverage",
    "Dilated",
    "Documents",
    "Empty",
    "Fixed",
    "FlexPrefill",
    "Forced",
    "Full",
    "GridAxial",
    "KeyRange",
    "Lengths",
    "Local",
    "LogSparse",
    "Longformer",
    "Mask",
    "PageBounds",
    "Prefix",
    "QueryRange",
    "Quest",
    "Random",
    "Ratio",
    "Reuse",
    "ScoreSelector",
    "SeerGate",
    "Segment",
    "Selector",
    "Sink",
    "Strided",
    "Threshold",
    "TokenGroups",
    "TokenSet",
    "Tokens",
    "TopK",
    "TopP",
    "TriShape",
    "VerticalSlash",
    "ada_snapkv",
    "causal_blocks",
    "compile_mask",
    "elbow",
    "explain_attention",
    "from_dense_blocks",
    "from_fn",
    "from_lists",
    "from_pages",
    "from_scores",
    "group_by_scores",
    "last_query_weights",
    "merge_states",
    "per_head",
    "pooled_scores",
    "quest_budget",
    "quest_mask",
    "quest_scores",
    "seer_loss",
    "seer_target",
    "slash_sums",
    "snapkv",
    "snapkv_scores",
    "sparse_attention",
    "stats_grid",
    "tokens_where",
    "top_tokens",
]
