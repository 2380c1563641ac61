"""Sparse attention as a Flax NNX module, in the place of `nnx.MultiHeadAttention`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.attend import sparse_attention
from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Causal
from sparsejax.attention.selectors import Context
from sparsejax.nn.attention_fn import by_index


class SparseAttention(nnx.MultiHeadAttention):
    """Multi-head attention under a pattern, or over what a selector chooses.

    Takes the arguments of `nnx.MultiHeadAttention` and has its parameters, by the same names (`query`, `key`, `value`,
    `out`), so that weights and checkpoints of one fit the other. Cost follows the visited tiles.

    Args:
        num_heads: number of query heads.
        in_features: number of input features.
        pattern: what may be seen; a `Mask`, or a `BlockMask` compiled for the length of the inputs. None: everything.
        selector: chooses blocks among those that the pattern leaves, see `sparsejax.attention.Selector`; a module
            (such as `SeerGate`) is a submodule and has its parameters here.
        bq: queries in a tile; a selector brings its own.
        bk: keys in a tile; likewise.
        implementation: see `sparse_attention`.
        **options: further arguments of `nnx.MultiHeadAttention`, `rngs` among them; all but `attention_fn`. Dropout is
            drawn for every example on its own, whatever `broadcast_dropout` says.

    Example:
        >>> from sparsejax.attention import Local
        >>> layer = SparseAttention(4, 32, pattern=Causal() & Local(15), bq=16, bk=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64, 32))).shape
        (2, 64, 32)
        >>> sorted(nnx.to_flat_state(nnx.state(layer, nnx.Param)).paths)[:2]
        [('key', 'bias'), ('key', 'kernel')]
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args,
        pattern: Mask | BlockMask | None = None,
        selector: Any = None,
        bq: int = 128,
        bk: int = 128,
        implementation: str | None = None,
        **options,
    ):
        if "attention_fn" in options:
            raise ValueError(
                "SparseAttention has its own attention; give attention_fn to nnx.MultiHeadAttention instead"
            )
        if pattern is not None and not isinstance(pattern, (Mask, BlockMask)):
            raise TypeError(f"pattern must be a Mask, a BlockMask or None, not {type(pattern).__name__}")
        if selector is not None and isinstance(pattern, BlockMask):
            raise ValueError("a selector chooses among the tiles of a Mask: give the pattern as an expression")
        super().__init__(num_heads, in_features, *args, **options)
        self.pattern = nnx.data(jax.tree.map(jnp.asarray, pattern))
        if isinstance(selector, nnx.Module) or selector is None:
            self.selector = nnx.data(selector)
        else:
            self.selector = nnx.data(jax.tree.map(jnp.asarray, selector))
        self.bq, self.bk, self.implementation = bq, bk, implementation
        self.selector_state = nnx.data(None)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: Mask | jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        q_positions=None,
        kv_positions=None,
        out_sharding=None,
        qkv_sharding=None,
    ) -> jax.Array:
        """Attends.

        Args:
            inputs_q: [..., Sq, features]; in decoding with one leading axis, B.
            inputs_k: [..., Sk, features]; None: `inputs_q`.
            inputs_v: [..., Sk, features]; None: `inputs_k`.
            mask: further restriction: a `Mask`, or bool [... or 1, H or 1, Sq, Sk] by index (a bit for each pair is
                then stored). In decoding Sk is the length of the cache.
            deterministic: no dropout; as in `nnx.MultiHeadAttention`.
            rngs: for dropout; likewise.
            sow_weights: not supported: weights are never formed.
            decode: use the cache of `init_cache`: the inputs are the next tokens, one or several (a whole prompt, or a
                chunk of it). Past the end of the cache nothing is defined, as in `nnx.MultiHeadAttention`. A selector
                chooses for all tokens of a call together; to fill the cache densely, call a copy of the module that
                has none, and copy its `nnx.Cache` variables.
            is_causal: restrict to `Causal()`; decoding always does.
            q_positions: int [Sq] or [B, Sq], for the pattern; None counts from 0. In decoding the cache gives both.
            kv_positions: int [Sk] or [B, Sk]; None counts from 0.
            out_sharding: for the output projection.
            qkv_sharding: for the input projections.

        Returns:
            [..., Sq, out_features].

        Raises:
            ValueError: what is asked for is not supported, or something does not fit.
        """
        if sow_weights:
            raise ValueError(
                "sow_weights=True: attention weights are never formed here; `block_stats` has tile statistics"
            )
        if inputs_k is None and inputs_v is not None:
            raise ValueError("inputs_v without inputs_k: give the one array as inputs_k")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        for name, inputs, features in (
            ("inputs_q", inputs_q, self.in_features),
            ("inputs_k", inputs_k, self.in_kv_features),
        ):
            if inputs.ndim < 2 or inputs.shape[-1] != features:
                raise ValueError(f"{name} has shape {inputs.shape}; it must be [batch, length, {features}]")
        lead = inputs_q.shape[:-2]
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)

        context = Context(q_positions=q_positions, kv_positions=kv_positions)
        if self.decode if decode is None else decode:
            if q_positions is not None or kv_positions is not None:
                raise ValueError("in decoding, positions are given by the cache: leave them out")
            key, value, context = self._append(key, value)
            is_causal = True
        restriction = Causal() if is_causal else None
        if mask is not None:
            given = mask if isinstance(mask, Mask) else by_index(mask, lead, query.shape[-3], key.shape[-3])
            restriction = given if restriction is None else restriction & given
        dropout = self._dropout(deterministic, rngs)
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        x = self._attend(query, key, value, restriction, context, dropout)
        return self.out(x.reshape(*lead, *x.shape[1:]), out_sharding=out_sharding)

    def init_cache(self, input_shape, dtype=jnp.float32):
        """Makes the cache for decoding: as in `nnx.MultiHeadAttention`, and the selector's state, if it has one.

        Args:
            input_shape: [B, longest length, features].
            dtype: of the cache.
        """
        super().init_cache(input_shape, dtype)
        make = getattr(self.selector, "init_state", None)
        if make is not None:
            state = make(*input_shape[:2], self.num_kv_heads, self.head_dim, dtype)
            self.selector_state = nnx.data(jax.tree.map(nnx.Cache, state))

    def _append(self, key, value):
        """Puts the next tokens into the cache: all keys and values, and what masks and selectors may know."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ValueError("the cache for decoding is not there: call init_cache first")
        if self.cached_key.ndim != 4 or key.ndim != 4:
            raise ValueError(f"in decoding, inputs are [batch, length, features]; the cache is {self.cached_key.shape}")
        batch, room = self.cached_key[...].shape[:2]
        if key.shape[0] != batch or key.shape[1] > room:
            raise ValueError(f"the cache holds {batch} examples of {room} tokens: {key.shape[:2]} do not fit into it")
        at, tokens, new_keys = self.cache_index[...], key.shape[1], key
        key = jax.lax.dynamic_update_slice(self.cached_key[...], key.astype(self.cached_key[...].dtype), (0, at, 0, 0))
        value = jax.lax.dynamic_update_slice(
            self.cached_value[...], value.astype(self.cached_value[...].dtype), (0, at, 0, 0)
        )
        self.cached_key[...], self.cached_value[...], self.cache_index[...] = key, value, at + tokens
        lengths = jnp.full(batch, at + tokens, jnp.int32)
        positions = at + jnp.arange(tokens, dtype=jnp.int32)
        return key, value, Context(q_positions=positions, kv_lengths=lengths, new_keys=new_keys)

    def _dropout(self, deterministic, rngs):
        if self.dropout_rate == 0:
            return None
        off = self.deterministic if deterministic is None else deterministic
        if off is None:
            raise ValueError("with dropout, give deterministic=True or False to the module or to the call")
        if off:
            return None
        rngs = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        if rngs is None:
            raise ValueError("dropout needs rngs: the module was made with keep_rngs=False, so give them to the call")
        return self.dropout_rate, rngs()

    def _attend(self, query, key, value, restriction, context: Context, dropout):
        query, key, value = (x.astype(jnp.promote_types(query.dtype, key.dtype)) for x in (query, key, value))
        options = {"dropout": dropout, "implementation": self.implementation}
        pattern = self.pattern
        if isinstance(pattern, BlockMask):
            if restriction is not None or context.q_positions is not None or context.kv_positions is not None:
                raise ValueError(
                    "a compiled pattern cannot be restricted or moved in the call: give the pattern as an expression"
                )
            return sparse_attention(query, key, value, pattern, **options)
        allowed = [mask for mask in (pattern, restriction) if mask is not None]
        base = allowed[0] & allowed[1] if len(allowed) == 2 else allowed[0] if allowed else None
        if self.selector is None:
            positions = {"q_positions": context.q_positions, "kv_positions": context.kv_positions}
            bq = min(self.bq, query.shape[1])
            return sparse_attention(query, key, value, base, **positions, bq=bq, bk=self.bk, **options)
        state = self.selector_state
        if state is not None:
            state = jax.tree.map(lambda v: v[...], state, is_leaf=_is_variable)
        chosen, new, _ = self.selector(query, key, base=base, state=state, context=context)
        if state is not None:
            jax.tree.map(_assign, self.selector_state, new, is_leaf=_is_variable)
        return sparse_attention(query, key, value, chosen, **options)


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _assign(variable, value):
    variable[...] = value
